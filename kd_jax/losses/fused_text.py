"""The output projection together with what is wanted of the logits, in chunks: [tokens, vocab] never exists.

Losses here work out their gradients in the forward pass, chunk by chunk, in place of a second projection in the
backward pass. `chunks.py` has what they share; those that compare two models are in `fused_divergence.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.losses.divergences import masked_mean
from kd_jax.losses.fused_teacher import Statistics, linear_distillation, linear_divergence, linear_top_k_distillation
from kd_jax.losses.head import (
    chunk_tokens,
    cut,
    dot,
    groups,
    head_gradient,
    join,
    linear_map,
    no_gradient,
    precision,
    project,
    summed,
    whole,
)
from kd_jax.metrics import Mean

__all__ = [
    "Statistics", "chunk_tokens", "dot", "linear_cross_entropy", "linear_distillation", "linear_divergence",
    "linear_log_prob", "linear_map", "linear_top_k_distillation", "precision", "project",
]  # fmt: skip


def linear_log_prob(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, *, entropy: bool = False, chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Log-probability of each label [..., position], and on request the entropy in nats of each prediction."""

    def score(logits, labels):
        total = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - total
        if not entropy:
            return log_prob, None
        below = logits - total[..., None]
        # a token that cannot be has no part in it: 0 * -inf is NaN
        return log_prob, -jnp.where(below > -jnp.inf, jnp.exp(below) * below, 0).sum(axis=-1)

    return linear_map(score, hidden, head, labels, chunk=chunk, mesh=mesh)


def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, *, chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Mean:  # fmt: skip
    """Cross-entropy in nats of the labels that the mask selects, as a Mean over all of them.

    The gradient of its `mean` with respect to hidden and head is worked out in the forward pass, chunk by chunk, in
    place of a second projection in the backward pass; the other members carry none.

    Args:
        hidden: [..., position, width].
        head: [vocab, width].
        labels: int [..., position]; what the mask leaves out may be anything, but its hidden states must be finite.
        mask: bool [..., position].
        mesh: what the rows and the head are split over.
    Returns: the Mean; its `mean` and the gradient are NaN where a label that counts is not an id of the head.
    Raises: ValueError for shapes that do not go together, or no tokens at all.
    """
    if not hidden.shape[:-1] == labels.shape == mask.shape or 0 in labels.shape:
        raise ValueError(f"shapes do not go together: {hidden.shape}, labels {labels.shape}, mask {mask.shape}")
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    mean = _cross_entropy(hidden, head, labels, mask, chunk or chunk_tokens(mesh), mesh)
    wrong = (labels < 0) | (labels >= head.shape[0])
    # a product, so that the gradient is NaN as well
    return mean._replace(mean=mean.mean * jnp.where(wrong.any(), jnp.nan, 1.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, head, labels, mask, chunk, mesh):
    log_prob, _ = linear_log_prob(hidden, head, labels, chunk=chunk, mesh=mesh)
    return masked_mean(-log_prob, mask)


def _cross_entropy_forward(hidden, head, labels, mask, chunk, mesh):
    dtype, parts = head.dtype, groups(hidden, mesh)
    head = whole(head, hidden, mesh)
    count = mask.sum()
    scale = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(jnp.float32)
    size, pieces = cut((hidden, labels, mask), labels.shape, chunk)

    def step(so_far, piece):
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
        return so_far + head_gradient(gradient, h, parts), (value, h_gradient)

    so_far, (values, h_gradient) = jax.lax.scan(step, no_gradient(head, parts, mesh), pieces)
    values, h_gradient = (join(parts, size, labels.ndim - 1) for parts in (values, h_gradient))
    return masked_mean(values, mask), (h_gradient, summed(so_far, parts, mesh).astype(dtype))


def _cross_entropy_backward(chunk, mesh, gradients, cotangent):
    hidden, head = ((gradient * cotangent.mean).astype(gradient.dtype) for gradient in gradients)
    return hidden, head, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
