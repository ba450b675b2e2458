"""Log-probabilities and the cross-entropy of text, straight from hidden states and head, in chunks of positions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.losses import head as head_lib
from kd_jax.losses.divergences import masked_mean
from kd_jax.losses.head import chunk_tokens, dot, linear_map, project, real_only
from kd_jax.metrics import Mean


def linear_log_prob(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, *, entropy: bool = False, num_tokens: int | None = None,
    softcap: float | None = None, chunk: int | None = None, mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Log-probability of each label and, on request, the entropy of each prediction.

    Args:
        hidden: [..., position, width].
        head: [vocab, width].
        labels: int [..., position].
        entropy: whether to return it.
        num_tokens: number of real ids; the others, which pad the vocabulary, get probability 0.
        softcap: of the logits, see `kd_jax.losses.head.project`.
        chunk: tokens at a time, by default `chunk_tokens()`.
        mesh: what the rows and the head are split over.
    Returns: log-probabilities [..., position] and entropies [..., position] in nats, or None; float32.
    """

    def score(logits, labels):
        logits = real_only(logits, num_tokens or head.shape[0])
        total = jax.nn.logsumexp(logits, axis=-1)
        log_prob = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - total
        if not entropy:
            return log_prob, None
        log_probs = logits - total[..., None]
        # A token of probability 0 adds 0 to the entropy; 0 * -inf would be NaN.
        return log_prob, -jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0).sum(axis=-1)

    return linear_map(score, hidden, head, labels, softcap=softcap, chunk=chunk, mesh=mesh)


def linear_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, mask: jax.Array, *, num_tokens: int | None = None,
    softcap: float | None = None, chunk: int | None = None, mesh: Mesh | None = None,
) -> Mean:  # fmt: skip
    """Cross-entropy in nats of the labels that the mask selects, as a Mean over all of them.

    The gradient of its `mean` with respect to hidden states and head is computed in the forward pass, chunk by chunk,
    while the logits are there; a backward pass would have to project a second time. The other members carry none.

    Args:
        hidden: [..., position, width].
        head: [vocab, width].
        labels: int [..., position]; masked ones may be anything, but their hidden states must be finite.
        mask: bool [..., position].
        num_tokens: number of real ids; the others, which pad the vocabulary, get probability 0.
        softcap: of the logits, see `kd_jax.losses.head.project`.
        chunk: tokens at a time, by default `chunk_tokens()`.
        mesh: what the rows and the head are split over.
    Returns: the Mean; its `mean` and the gradient are NaN where a selected label is not a real id.
    Raises: ValueError for shapes that do not go together, or no tokens at all.
    """
    if not hidden.shape[:-1] == labels.shape == mask.shape or 0 in labels.shape:
        raise ValueError(f"shapes do not go together: {hidden.shape}, labels {labels.shape}, mask {mask.shape}")
    num_tokens = num_tokens or head.shape[0]
    mask = mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    chunk = chunk or chunk_tokens(mesh)
    mean = _cross_entropy(num_tokens, softcap, chunk, mesh, hidden, head, labels, mask)
    wrong = (labels < 0) | (labels >= num_tokens)
    # A product, so that the gradient is NaN as well.
    return mean._replace(mean=mean.mean * jnp.where(wrong.any(), jnp.nan, 1.0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _cross_entropy(num_tokens, softcap, chunk, mesh, hidden, head, labels, mask):
    log_prob, _ = linear_log_prob(hidden, head, labels, num_tokens=num_tokens, softcap=softcap, chunk=chunk, mesh=mesh)
    return masked_mean(-log_prob, mask)


@_cross_entropy.defjvp
def _cross_entropy_jvp(num_tokens, softcap, chunk, mesh, primals, tangents):
    mean, gradients = head_lib.undivided(_with_gradient, 4)(num_tokens, softcap, chunk, mesh, *primals)
    tangent = jax.tree.map(jnp.zeros_like, mean)
    return mean, tangent._replace(mean=head_lib.inner_product(gradients, tangents[:2]))


def _with_gradient(num_tokens, softcap, chunk, mesh, hidden, head, labels, mask):
    """The Mean, and the gradients of its `mean` in hidden states and head."""
    dtype, groups = head.dtype, head_lib.groups(hidden, mesh)
    head = head_lib.whole(head, hidden, mesh)
    scale = head_lib.share_of_one(mask)
    size, pieces = head_lib.cut((hidden, labels, mask), labels.shape, chunk)

    def step(so_far, piece):
        h, label, keep = piece
        capped = project(h, head, softcap)
        logits = real_only(capped, num_tokens)
        # One exponential gives the value and, divided by its sum, the softmax of the gradient.
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        value = (jnp.log(total) + top - jnp.take_along_axis(logits, label[..., None], axis=-1))[..., 0]
        # Softmax less one-hot is the gradient of each token's value; `scale` makes it that of the mean.
        one_hot = jnp.arange(head.shape[0]) == label[..., None]
        gradient = (weights / total - one_hot) * jnp.where(keep, scale, 0)[..., None]
        # In the hidden states' dtype, as a backward pass would have it; the head's is added up in float32.
        gradient = head_lib.through_softcap(gradient, capped, softcap).astype(hidden.dtype)
        h_gradient = dot(gradient, head.astype(hidden.dtype), (gradient.ndim - 1, 0)).astype(hidden.dtype)
        return so_far + head_lib.head_gradient(gradient, h, groups), (value, h_gradient)

    so_far, (values, h_gradient) = jax.lax.scan(step, head_lib.no_gradient(head, groups, mesh), pieces)
    values, h_gradient = (head_lib.join(parts, size, labels.ndim - 1) for parts in (values, h_gradient))
    return masked_mean(values, mask), (h_gradient, head_lib.summed(so_far, groups, mesh).astype(dtype))
