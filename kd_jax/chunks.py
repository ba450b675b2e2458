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


def chunk_tokens() -> int:
    """How many tokens' logits are held at a time: few on a CPU, where they should stay in its caches."""
    return 256 if jax.default_backend() == "cpu" else 4096


def linear_map(
    function: Callable[..., Any], hidden: jax.Array, head: jax.Array, *arrays: jax.Array, chunk: int | None = None
) -> Any:
    """function(logits, *pieces) for chunks of positions, put together again.

    Args:
        function: takes float32 logits [..., positions, vocab] and the same positions of `arrays`; returns arrays
            [..., positions, *any], in any tree.
        hidden: [..., position, width].
        head: [vocab, width].
        arrays: [..., position] each.
        chunk: tokens at a time, by default `chunk_tokens()`.
    """
    size, pieces = cut((hidden, *arrays), hidden.shape[:-1], chunk)
    out = jax.lax.map(lambda piece: function(project(piece[0], head), *piece[1:]), pieces)
    return jax.tree.map(lambda parts: join(parts, size, hidden.ndim - 2), out)


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden [..., width] and head [vocab, width]."""
    return dot(hidden, head.astype(hidden.dtype), (hidden.ndim - 1, 1))


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


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], out_dtype=jnp.float32) -> jax.Array:
    """Contracts one axis of each; products of float32 are real float32 on GPUs and TPUs too."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=out_dtype)


def precision(dtype) -> jax.lax.Precision | None:
    """What a product needs so that float32 is not rounded to fewer bits first."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
