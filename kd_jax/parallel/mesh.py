"""Device meshes, and which mesh axis each named axis of an array is split over.

Inside a jitted function, `constrain` and `gather` fix the layout of arrays: rows stay where the batch put them, and a
weight that is split to save memory (fsdp) is gathered before use. Otherwise the compiler may follow the weights, and
all-reduce activations or whole logits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes. Other axes are not split.
# Devices along fsdp have rows of their own, as along data, and a part of each weight; devices along tensor share rows
# and split each product.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}


def one_axis(name: str, devices=None) -> Mesh:
    """A mesh of all `devices` (default: all of JAX's) along one axis called `name`."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (name,))


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None, *, slices: int = 0) -> Mesh:
    """A mesh of axes data x fsdp x tensor over `devices` (default: all). One size may be -1: the rest of the devices.

    Between slices (of TPUs) and nodes (of GPUs) the network is slow. Only data spans it: devices along fsdp and tensor,
    which communicate in every layer, are of one slice.

    Args:
        slices: equal parts of the devices, in their order, that are taken for slices. 0 takes the slices that the
            devices themselves name; 1 lets every axis span all devices.
    Raises: ValueError where the product of the sizes is not the number of devices, or where fsdp or tensor would span
        slices.
    """
    # Sorting keeps the order within a slice. It is the same for meshes of all sizes, as arrays of two meshes (student
    # and teacher) can meet in one program only if both have their devices in one order.
    devices = sorted(jax.devices() if devices is None else devices, key=_slice)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and fixed > 0:
        sizes[free[0]] = len(devices) // fixed
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != len(devices):
        raise ValueError(f"mesh {asked} does not fit {len(devices)} devices (one size may be -1: the devices left)")
    in_slice = np.arange(len(devices)) * slices // len(devices) if slices else np.array([_slice(d) for d in devices])
    groups = in_slice.reshape(sizes["data"], -1)
    if (groups != groups[:, :1]).any():
        raise ValueError(
            f"mesh {asked}: fsdp x tensor = {groups.shape[1]} devices do not fit into a slice (or node); the "
            f"{len(devices)} devices are in {len(set(in_slice.tolist()))} of them, and only data may span the network "
            "between them (slices=1 lets every axis span it)"
        )
    # Neighbours form a tensor group: it communicates in every layer, and neighbours have the fastest links.
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def _slice(device: jax.Device) -> int:
    # TPUs have this number, and GPUs of several processes, where it is the node's; CPUs do not.
    return getattr(device, "slice_index", 0)


def spec(axes: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array with these logical axes. Mesh axes of size 1 are left out.

    Args:
        axes: logical axis of each axis of the array; None for one that is not split.
        mesh: of data x fsdp x tensor.
    """
    parts = []
    for axis in axes:
        names = tuple(name for name in RULES.get(axis, ()) if mesh.shape.get(name, 1) > 1)
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def sharding(axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """`spec` on its mesh."""
    return NamedSharding(mesh, spec(axes, mesh))


def constrain(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Lays out an array inside a jitted function by its logical axes; does nothing on one device.

    Args:
        axes: logical axes, as of `spec`.
        mesh: None for no mesh.
    """
    return x if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(x, sharding(axes, mesh))


# With a rule for its gradient, which would otherwise be laid out like the gathered weight: all-reduced, where a
# reduce-scatter to the owners of the parts is enough.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Gathers a weight along "embed" for use in a product; its gradient is split again like the weight.

    Args:
        weight: any array.
        axes: logical axes, as of `spec`.
        mesh: None for no mesh.
    """
    return constrain(weight, tuple(None if axis == "embed" else axis for axis in axes), mesh)


def _gather_forward(weight, axes, mesh):
    return gather(weight, axes, mesh), None


def _gather_backward(axes, mesh, _, gradient):
    return (constrain(gradient, axes, mesh),)


gather.defvjp(_gather_forward, _gather_backward)


def top_k(x: jax.Array, k: int, axes: tuple[str | None, ...], mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k over the last axis of an array laid out by its logical axes.

    The compiler would gather the whole array. Here each device searches its own part, and where the last axis is split,
    only k values of each part are gathered.

    Args:
        x: [..., size].
        k: how many of the last axis.
        axes: logical axes, as of `spec`.
        mesh: None for no mesh.
    Returns: values and indices [..., k], not split along the last axis.
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
        # parts in order, so that among equal values the lowest index still comes first
        values, ids = (jax.lax.all_gather(a, split, axis=a.ndim - 1, tiled=True) for a in (values, ids))
        values, places = jax.lax.top_k(values, k)
        return values, jax.numpy.take_along_axis(ids, places, axis=-1)

    out = PartitionSpec(*partition[:-1], None)
    # the gathered result is replicated, which shard_map's check cannot infer
    return jax.shard_map(part, mesh=mesh, in_specs=(partition,), out_specs=(out, out), check_vma=False)(x)


def _top_k(x, k):
    # Without barriers XLA fuses what follows into the selection, and then sorts all of x. One barrier for both arrays
    # would be a barrier on the selection itself, which crashes XLA's CPU compiler where x is split.
    values, ids = jax.lax.top_k(x, k)
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(ids)


def of(tree: Any) -> Mesh | None:
    """The mesh of a tree of arrays (or of shapes with shardings); None on one device."""
    found = {getattr(leaf.sharding, "mesh", None) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")}
    return found.pop() if len(found) == 1 else None


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays.

    Args:
        axes: a tree of tuples of logical axes.
        shapes: a tree of arrays or shapes.
    Raises: ValueError, naming the array, for a size that is not a multiple of the devices it is split over.
    """

    def one(path, leaf, names):
        partition = spec(names, mesh)
        for size, part, name in zip(leaf.shape, partition, names, strict=True):
            parts = (part,) if isinstance(part, str) else part or ()
            devices = int(np.prod([mesh.shape[p] for p in parts]))
            if size % devices:
                where = f"{jax.tree_util.keystr(path)}: axis {name!r} of size {size}"
                raise ValueError(f"{where} cannot be split over {' x '.join(parts)} = {devices} devices")
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def batch_devices(mesh: Mesh | None) -> int:
    """The number of devices that rows are split over; the number of rows must be a multiple of it."""
    return 1 if mesh is None else int(np.prod([mesh.shape.get(axis, 1) for axis in RULES["batch"]]))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of shapes with shardings, on one device."""

    def one(leaf):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))
