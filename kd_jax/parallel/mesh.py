"""Device meshes, and which mesh axis each named axis of an array is split over.

Inside a jitted function `constrain` and `gather` say where arrays lie: rows stay where the batch put them, and a weight
that is split to save memory (fsdp) is gathered to be used. Left to itself, the compiler may follow the weights instead
and add up activations, or whole logits, over the devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes. Axes that are not here are not split.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}


def one_axis(name: str, devices=None) -> Mesh:
    """All `devices` (default: every device there is) along one axis called `name`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (name,))


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of axes data x fsdp x tensor over `devices` (default: all); one of the sizes may be -1, for the rest.

    Raises ValueError where the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {asked}: sizes are from 1, and at most one is -1 (the rest)")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def spec(axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array with these logical axes; mesh axes of size 1 are left out."""
    parts = []
    for axis in axes:
        names = tuple(name for name in RULES.get(axis, ()) if mesh.shape.get(name, 1) > 1)
        parts.append(names[0] if len(names) == 1 else names or None)
    used = [name for part in parts if part for name in (part if isinstance(part, tuple) else (part,))]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} would use a mesh axis twice: {used}")
    return PartitionSpec(*parts)


def sharding(axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """`spec` on its mesh."""
    return NamedSharding(mesh, spec(axes, mesh))


def constrain(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """An array inside a jitted function, laid out by its logical axes; as it is on one device."""
    return x if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(x, sharding(axes, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """A weight as it is computed with: whole along "embed". Its gradient is split again, as the weight itself is."""
    return constrain(weight, tuple(None if axis == "embed" else axis for axis in axes), mesh)


def _gather_forward(weight, axes, mesh):
    return gather(weight, axes, mesh), None


def _gather_backward(axes, mesh, _, gradient):
    return (constrain(gradient, axes, mesh),)


gather.defvjp(_gather_forward, _gather_backward)


def top_k(x: jax.Array, k: int, axes: tuple[str | None, ...], mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k of an array laid out by its logical axes: values and indices [..., k], whole along the last axis.

    The compiler would gather all of the array for it. Here each device looks through its own part, and where the last
    axis is split only k of each part are gathered.
    """
    if mesh is None or mesh.size == 1:
        return _top_k(x, k)
    partition = spec(axes, mesh)
    split = partition[-1]

    def part(x):
        values, ids = _top_k(x, min(k, x.shape[-1]))
        if split is None:
            return values, ids
        ids = ids + jax.lax.axis_index(split) * x.shape[-1]
        # part after part: among equals the lowest index still comes first
        values, ids = (jax.lax.all_gather(a, split, axis=a.ndim - 1, tiled=True) for a in (values, ids))
        values, places = jax.lax.top_k(values, k)
        return values, jax.numpy.take_along_axis(ids, places, axis=-1)

    out = PartitionSpec(*partition[:-1], None)
    # what is gathered is the same on all; the check cannot see it
    return jax.shard_map(part, mesh=mesh, in_specs=(partition,), out_specs=(out, out), check_vma=False)(x)


def _top_k(x, k):
    # Without barriers XLA merges what follows into the selection, and then sorts all of x for it. One for both would be
    # a barrier of the selection itself, of which its compiler for CPUs dies where x is split.
    values, ids = jax.lax.top_k(x, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(ids)


def of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays (or their shapes, with shardings) lies on; None where it is on one device."""
    found = {getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")}
    return found.pop() if len(found) == 1 else None


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays, from a tree of tuples of logical axes and a tree of shapes (or arrays).

    Raises ValueError, naming the array, where a size is not a multiple of the devices it is to be split over.
    """

    def one(path, leaf, names):
        partition = spec(names, mesh)
        for size, part, name in zip(leaf.shape, partition, names, strict=True):
            parts = (part,) if isinstance(part, str) else part or ()
            devices = int(np.prod([mesh.shape[p] for p in parts]))
            if size % devices:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size} cannot be split over "
                    f"{' x '.join(parts)} = {devices} devices"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def batch_devices(mesh: Mesh | None) -> int:
    """Over how many devices rows are split; their number has to be a multiple of it."""
    return 1 if mesh is None else int(np.prod([mesh.shape.get(axis, 1) for axis in RULES["batch"]]))
