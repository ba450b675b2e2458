"""Sums and softmax over the vocabulary, in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax.losses.head import dot
from kd_jax.losses.parameters import Scalar

SUM_BLOCK = 1024  # ids that `sums` takes at a time; 512 to 4096 are equally fast
LOG_2 = math.log(2)


def wide(array: jax.Array) -> jax.Array:
    """The array in float32, or in its own dtype if that is wider."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def total(values: jax.Array) -> jax.Array:
    """Sum over the last axis."""
    # XLA's own reductions run on one thread of a CPU, with all that is fused into them; a product with ones does not.
    if jax.default_backend() != "cpu":
        return values.sum(axis=-1)
    return dot(values, jnp.ones(values.shape[-1:], values.dtype), (values.ndim - 1, 0), values.dtype)


def sums(function: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the last axis of the arrays that `function` returns for arrays [..., vocab].

    Args:
        function: works element by element, so that it may be given any part of the vocabulary.
    """
    # On one CPU the vocabulary is gone through in blocks, so that the terms are never written out. This saves some 5 %
    # of a loss' time, within the noise of one run.
    size = arrays[0].shape[-1]
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or size < SUM_BLOCK:
        return tuple(map(total, function(*arrays)))

    def block(start, length=SUM_BLOCK):
        return function(*(jax.lax.dynamic_slice_in_dim(array, start, length, axis=-1) for array in arrays))

    def add(i, blocks_so_far):
        return jax.tree.map(jnp.add, blocks_so_far, block(i * SUM_BLOCK))

    count, rest = divmod(size, SUM_BLOCK)
    # Blocks are added element by element, and the one block that results is summed up at the end.
    empty = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(block, 0))
    whole_blocks = jax.tree.map(total, jax.lax.fori_loop(0, count, add, empty))
    if not rest:
        return whole_blocks
    return jax.tree.map(jnp.add, whole_blocks, jax.tree.map(total, block(size - rest, rest)))


def largest(values: jax.Array) -> jax.Array:
    """Maximum over the last axis, which is kept."""
    *rest, size = values.shape
    # Over several devices the eight lanes would lie on different ones, and an eighth of the logits would be sent.
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or size % 8:
        return values.max(axis=-1, keepdims=True)
    # In two steps, the second a minimum: XLA would merge two maxima and fuse them into the matrix product before,
    # which is slower on CPUs.
    lanes = values.reshape(*rest, 8, size // 8).max(axis=-2)
    return -(-lanes).min(axis=-1, keepdims=True)


def log_softmax(logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """log softmax(logits / temperature) over the last axis, in float32 or wider.

    Args:
        logits: [..., vocab].
        temperature: a scalar above 0.
    """
    logits = wide(logits)
    # The largest logit goes off first: the logarithm of the sum is then small, and so is its rounding error.
    below = (logits - jax.lax.stop_gradient(largest(logits))) / temperature
    return _normalised(below)


@jax.custom_jvp
def _normalised(logits):
    return logits - jnp.log(total(jnp.exp(logits)))[..., None]


@_normalised.defjvp
def _normalised_slope(primals, tangents):
    log_q = _normalised(*primals)
    # Tangents are taken relative to that of a token with most of q, if there is one. Backwards, this token then gets
    # minus the sum of what the others get, which keeps its digits (see `derivatives.gradient`).
    most = log_q > -LOG_2
    rest = jnp.where(most, 0, tangents[0] - total(jnp.where(most, tangents[0], 0))[..., None])
    return log_q, rest - total(jnp.exp(log_q) * rest)[..., None]


def log_sum(logits: jax.Array) -> jax.Array:
    """log sum exp over the last axis; -inf, with gradient 0, where all are -inf."""
    # The shift cancels in the value, so it has no gradient of its own.
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    some = top > -jnp.inf
    # Both branches of a `where` are differentiated, so what is not chosen must be finite too.
    below = jnp.where(some[..., None], logits - jnp.where(some, top, 0)[..., None], 0)
    return jnp.where(some, jnp.log(total(jnp.exp(below))) + top, -jnp.inf)


def weighted(weight: Scalar, values: jax.Array) -> jax.Array:
    """weight * values; 0 where the weight is 0, even if a value is infinite."""
    return jnp.where(jnp.asarray(weight) == 0, 0, weight * values)
