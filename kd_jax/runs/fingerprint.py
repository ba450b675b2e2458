"""A digest of weights: of every bit, and independent of their layout over devices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.parallel import distributed


def fingerprint(params: Any) -> str:
    """A hex digest of a tree of weights: names, shapes, dtypes and bits, independent of their layout over devices."""
    return digest(line(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params))


def line(path: tuple, leaf: jax.Array) -> str:
    """One weight's part of the fingerprint; `path` is its place in the tree (a JAX key path)."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{name} {leaf.shape} {leaf.dtype} {distributed.fetch(_sums(leaf)).tolist()}"


def digest(lines: Iterable[str]) -> str:
    """The fingerprint from the lines of all weights, in any order."""
    # Sorted: a tree's order of leaves is JAX's business.
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Two sums, over all elements, of a hash of (position, bits). uint32 wraps, so any order gives the same sums."""
    # Bits, not values: 0.0 and -0.0 are different weights, and a NaN is equal to itself.
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    # The position in the whole array, whatever part of it a device has.
    for axis in reversed(range(leaf.ndim)):
        step = jnp.uint32(stride % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * step
        stride *= leaf.shape[axis]
    # Digits of the golden ratio and of pi: two hashes with nothing in common, 64 bits together.
    seeds = (0x9E3779B9, 0x243F6A88)
    return jnp.stack([_mix(bits ^ _mix(position ^ jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in seeds])


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of uint32 in which each input bit reaches each output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
