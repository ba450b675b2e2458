"""The output projection together with what is wanted of the logits, in chunks: [tokens, vocab] never exists.

Logits of a chunk are float32. Hidden states are [..., position, width]; positions are cut into chunks, and whatever
leads them (rows, split over devices perhaps) stays whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.metrics import Mean


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
    size, pieces = _cut((hidden, *arrays), hidden.shape[:-1], chunk)
    out = jax.lax.map(lambda piece: function(project(piece[0], head), *piece[1:]), pieces)
    return jax.tree.map(lambda parts: _join(parts, size, hidden.ndim - 2), out)


def linear_log_prob(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, *, entropy: bool = False, chunk: int | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of each label [..., position], and on request the entropy in nats of each prediction."""

    def score(logits, labels):
        total = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - total
        if not entropy:
            return log_prob, None
        below = logits - total[..., None]
        # a token that cannot be has no part in it: 0 * -inf is NaN
        return log_prob, -jnp.where(below > -jnp.inf, jnp.exp(below) * below, 0).sum(axis=-1)

    return linear_map(score, hidden, head, labels, chunk=chunk)


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden [..., width] and head [vocab, width]."""
    return dot(hidden, head.astype(hidden.dtype), (hidden.ndim - 1, 1))


def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, *, chunk: int | None = None
) -> Mean:
    """Cross-entropy in nats of the labels that the mask selects, as a Mean over all of them.

    The gradient of its `mean` with respect to hidden and head is worked out in the forward pass, chunk by chunk, in
    place of a second projection in the backward pass; the other members carry none.

    Args:
        hidden: [..., position, width].
        head: [vocab, width].
        labels: int [..., position]; what the mask leaves out may be anything, but its hidden states must be finite.
        mask: bool [..., position].
    Returns: the Mean; its `mean` and the gradient are NaN where a label that counts is not an id of the head.
    Raises: ValueError for shapes that do not go together, or no tokens at all.
    """
    if not hidden.shape[:-1] == labels.shape == mask.shape or 0 in labels.shape:
        raise ValueError(f"shapes do not go together: {hidden.shape}, labels {labels.shape}, mask {mask.shape}")
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    mean = _cross_entropy(hidden, head, labels, mask, chunk or chunk_tokens())
    wrong = (labels < 0) | (labels >= head.shape[0])
    # a product, so that the gradient is NaN as well
    return mean._replace(mean=mean.mean * jnp.where(wrong.any(), jnp.nan, 1.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, labels, mask, chunk):
    log_prob, _ = linear_log_prob(hidden, head, labels, chunk=chunk)
    return _total(-log_prob, mask)


def _total(values, mask):
    # of nothing: 0, so that a batch without a supervised token neither moves anything nor makes NaN
    mean = Mean.of(values.reshape(-1), where=mask.reshape(-1))
    return mean._replace(mean=jnp.where(mean.count > 0, mean.mean, 0.0), count=mean.count.astype(jnp.float32))


def _cross_entropy_forward(hidden, head, labels, mask, chunk):
    width = hidden.shape[-1]
    count = mask.sum()
    scale = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(jnp.float32)
    size, pieces = _cut((hidden, labels, mask), labels.shape, chunk)

    def step(head_gradient, piece):
        h, label, keep = piece
        logits = project(h, head)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        value = (jnp.log(total) + top - jnp.take_along_axis(logits, label[..., None], axis=-1))[..., 0]
        one_hot = jnp.arange(head.shape[0]) == label[..., None]
        gradient = (weights / total - one_hot) * jnp.where(keep, scale, 0)[..., None]
        gradient = gradient.astype(hidden.dtype)
        h_gradient = dot(gradient, head.astype(hidden.dtype), (gradient.ndim - 1, 0)).astype(hidden.dtype)
        rows = (gradient.reshape(-1, head.shape[0]), h.reshape(-1, width))
        return head_gradient + dot(*rows, (0, 0)), (value, h_gradient)

    head_gradient, (values, h_gradient) = jax.lax.scan(step, jnp.zeros(head.shape, jnp.float32), pieces)
    values, h_gradient = (_join(parts, size, labels.ndim - 1) for parts in (values, h_gradient))
    return _total(values, mask), (h_gradient, head_gradient.astype(head.dtype))


def _cross_entropy_backward(chunk, gradients, cotangent):
    hidden_gradient, head_gradient = gradients
    scale = cotangent.mean
    return (
        (hidden_gradient * scale).astype(hidden_gradient.dtype), (head_gradient * scale).astype(head_gradient.dtype),
        None, None,
    )  # fmt: skip


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _cut(arrays, shape, chunk):
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


def _join(parts, size, axis):
    """The reverse of `_cut` for one array [chunk, *rows, positions of it, ...]."""
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
