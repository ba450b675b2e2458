"""Positions cut into chunks, their hidden states projected to logits, and products in float32.

Logits of a chunk are float32. Hidden states are [..., position, width]; positions are cut into chunks, and whatever
leads them (rows, split over devices perhaps) stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.parallel import mesh as mesh_lib

# Few on a CPU, where their logits should stay in its caches.
CPU_TOKENS, TOKENS = 256, 4096


def chunk_tokens(mesh: Mesh | None = None, each: int | None = None) -> int:
    """How many tokens' logits are held at a time.

    Over a mesh, as many (or `each`) for each part of the rows: the number of chunks does not grow with that of devices.
    """
    return (each or (CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS)) * mesh_lib.batch_devices(mesh)


def linear_map(
    function: Callable[..., Any], hidden: jax.Array, head: jax.Array, *arrays: jax.Array, chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Any:  # fmt: skip
    """function(logits, *pieces) for chunks of positions, put together again.

    Args:
        function: takes float32 logits [..., positions, vocab] and the same positions of `arrays`; returns arrays
            [..., positions, *any], in any tree.
        hidden: [..., position, width].
        head: [vocab, width].
        arrays: [..., position] each.
        chunk: tokens at a time, by default `chunk_tokens()`.
        mesh: what the rows and the head are split over.
    """
    size, pieces = cut((hidden, *arrays), hidden.shape[:-1], chunk or chunk_tokens(mesh))
    head = whole(head, hidden, mesh)
    out = jax.lax.map(lambda piece: function(project(piece[0], head), *piece[1:]), pieces)
    return jax.tree.map(lambda parts: join(parts, size, hidden.ndim - 2), out)


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden [..., width] and head [vocab, width]."""
    return dot(hidden, head.astype(hidden.dtype), (hidden.ndim - 1, 1))


def whole(head: jax.Array, hidden: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The head as hidden states are multiplied by it: where fsdp splits it, gathered once for all chunks."""
    if mesh is None:
        return head
    return mesh_lib.constrain(head.astype(hidden.dtype), ("vocab", None), mesh)


def groups(hidden: jax.Array, mesh: Mesh | None) -> int:
    """In how many parts of the rows of hidden states [row, position, width] the head's gradient is summed up.

    Each device keeps a sum of its own while it goes through the chunks; the sums are put together at the end, once.
    """
    devices = mesh_lib.batch_devices(mesh)
    return devices if hidden.ndim > 2 and hidden.shape[0] % devices == 0 else 1


def no_gradient(head: jax.Array, groups: int, mesh: Mesh | None) -> jax.Array:
    """Zeros to add each chunk's `head_gradient` to, float32 [vocab, width], or [group, vocab, width] of several."""
    if groups == 1:
        return jnp.zeros(head.shape, jnp.float32)
    return mesh_lib.constrain(jnp.zeros((groups, *head.shape), jnp.float32), ("batch", "vocab", None), mesh)


def head_gradient(gradient: jax.Array, hidden: jax.Array, groups: int) -> jax.Array:
    """Of a chunk's gradient in the logits [..., vocab] and hidden states [..., width]; shaped as `no_gradient`."""
    leading = () if groups == 1 else (groups,)
    rows = (array.reshape(*leading, -1, array.shape[-1]) for array in (gradient, hidden))
    return dot(*rows, (len(leading), len(leading)), batch=len(leading))


def summed(gradient: jax.Array, groups: int, mesh: Mesh | None) -> jax.Array:
    """The sum over the groups, split over the devices as the head is."""
    return gradient if groups == 1 else mesh_lib.constrain(gradient.sum(axis=0), ("vocab", "embed"), mesh)


def cut(arrays, shape, chunk):
    """Arrays [*shape, ...] as [chunk, *rows, positions of it, ...], filled up with zeros; and how many positions."""
    *rows, size = shape
    length = max(1, min(size, (chunk or chunk_tokens()) // max(1, math.prod(rows))))
    axis = len(rows)

    def cut(array):
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, -size % length)
        array = jnp.pad(array, pad)
        return jnp.moveaxis(array.reshape(*rows, -1, length, *array.shape[axis + 1 :]), axis, 0)

    return size, jax.tree.map(cut, tuple(arrays))


def join(parts, size, axis):
    """The reverse of `cut` for one array [chunk, *rows, positions of it, ...]."""
    parts = jnp.moveaxis(parts, 0, axis)
    parts = parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])
    return jax.lax.slice_in_dim(parts, 0, size, axis=axis)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], out_dtype=jnp.float32, batch: int = 0) -> jax.Array:
    """Contracts one axis of each; products of float32 are real float32 on GPUs and TPUs too.

    The first `batch` axes of both are the same, and stay.
    """
    same = tuple(range(batch))
    dims = (((axes[0],), (axes[1],)), (same, same))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=out_dtype)


def precision(dtype) -> jax.lax.Precision | None:
    """What a product needs so that float32 is not rounded to fewer bits first."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
