"""A student's loss against a teacher from both models' hidden states and heads, in chunks of positions.

The gradient with respect to the student's hidden states and head is worked out in the forward pass, while a chunk's
logits are there: every divergence is a sum of terms of (log p, log q) (see `losses.py`), so what is needed of it is the
terms' slope in log q, element by element. The teacher and all settings get no gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.chunks import chunk_tokens, cut, dot, join, project
from kd_jax.losses import Scalar, masked_mean
from kd_jax.metrics import Mean


class Statistics(NamedTuple):
    """What a run wants to see beside the loss: each a Mean over the masked positions, nats but for the last.

    Attributes:
        divergence: without weight or factor of the temperature.
        cross_entropy: of the labels under the student at temperature 1; of count 0 without labels.
        student_entropy, teacher_entropy: of the distributions that are compared, each at its temperature.
        agreement: share of positions where both models have the same most probable token.
    """

    divergence: Mean
    cross_entropy: Mean
    student_entropy: Mean
    teacher_entropy: Mean
    agreement: Mean


def linear_distillation(
    student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
    labels: jax.Array | None, mask: jax.Array, *, divergence: str = "forward_kl", temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, parameter: Scalar | None = None, hard_weight: Scalar = 0.0,
    num_tokens: int | None = None, chunk: int | None = None,
) -> tuple[Mean, Statistics]:  # fmt: skip
    """(1 - hard_weight) T^2 D(p, q) + hard_weight CE, as `losses.distillation_loss` of the projected hidden states.

    The gradient of the loss's `mean` with respect to the student's hidden states and head is worked out in the forward
    pass; the other members and the statistics carry none, nor do the teacher and the settings.

    Args:
        student_hidden, teacher_hidden: [..., position, width], each of its own width and dtype; what the mask leaves
            out may be anything.
        student_head, teacher_head: [vocab, width].
        labels: int [..., position]; may be None if `hard_weight` is 0 (a number, not traced).
        mask: bool [..., position].
        divergence, temperature, teacher_temperature, parameter, num_tokens: as in `losses`; all but `num_tokens` and
            the name are traced.
        chunk: tokens at a time, by default `chunk_tokens()`.
    Returns: the loss, a Mean whose `mean` is 0 where the mask selects nothing and NaN where a label that counts is not
        an id; and the statistics.
    Raises: ValueError for shapes that do not go together, no tokens at all, or settings out of range.
    """
    losses.check_hard_weight(labels, hard_weight)
    temperature, teacher_temperature = losses.checked_temperatures(temperature, teacher_temperature)
    weights = ((1 - hard_weight) * temperature**2, hard_weight)
    return _from_hidden(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, divergence,
        (temperature, teacher_temperature), parameter, weights, num_tokens, chunk,
    )  # fmt: skip


def linear_divergence(
    student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
    mask: jax.Array, *, divergence: str, temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, num_tokens: int | None = None, chunk: int | None = None,
) -> Mean:  # fmt: skip
    """The divergence alone, without a factor of the temperature; otherwise as `linear_distillation`."""
    temperatures = losses.checked_temperatures(temperature, teacher_temperature)
    return _from_hidden(
        student_hidden, student_head, teacher_hidden, teacher_head, None, mask, divergence, temperatures, parameter,
        (1.0, 0.0), num_tokens, chunk,
    )[0]  # fmt: skip


def linear_top_k_distillation(
    student_hidden: jax.Array, student_head: jax.Array, teacher_ids: jax.Array, teacher_log_probs: jax.Array,
    teacher_tail_log_prob: jax.Array | None, labels: jax.Array | None, mask: jax.Array, *,
    divergence: str = "forward_kl", temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, tail: str = "bucket", hard_weight: Scalar = 0.0, num_tokens: int | None = None,
    chunk: int | None = None,
) -> tuple[Mean, Statistics]:  # fmt: skip
    """`linear_distillation` from the teacher's K most probable tokens: `losses.top_k_divergence` in place of D.

    Args:
        teacher_ids, teacher_log_probs: [..., position, K], the most probable first.
        teacher_tail_log_prob: [..., position], or None as there.
        tail: "bucket" or "renormalise".
    Entropies in the statistics are those of the K tokens and the bucket, which are no more than the models' own.
    """
    losses.check_hard_weight(labels, hard_weight)
    temperatures = losses.checked_temperatures(temperature, teacher_temperature)
    parameter = losses.checked_parameter(divergence, parameter)
    teacher = losses.top_k_teacher(teacher_log_probs, teacher_tail_log_prob, tail)
    _check_shapes(student_hidden, mask, labels, ("teacher_ids", teacher_ids), ("teacher_log_probs", teacher))
    losses.check_vocabulary(student_head.shape[0], student_head.shape[0], num_tokens)
    plan = _Plan(divergence, tail, num_tokens, chunk or chunk_tokens())
    weights = ((1 - hard_weight) * temperatures[0] ** 2, hard_weight)
    scalars = _scalars(temperatures, parameter, weights)
    return _checked_labels(plan, student_hidden, student_head, None, (teacher_ids, teacher), labels, mask, scalars)


class _Plan(NamedTuple):
    """What is fixed when the program is made."""

    divergence: str
    tail: str | None  # None: the teacher is hidden states and a head
    num_tokens: int | None
    chunk: int


def _from_hidden(
    student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, divergence, temperatures, parameter,
    weights, num_tokens, chunk,
):  # fmt: skip
    parameter = losses.checked_parameter(divergence, parameter)
    _check_shapes(student_hidden, mask, labels, ("teacher_hidden", teacher_hidden))
    sizes = teacher_head.shape[0], student_head.shape[0]
    losses.check_vocabulary(*sizes, num_tokens)
    plan = _Plan(divergence, None, num_tokens, chunk or chunk_tokens())
    scalars = _scalars(temperatures, parameter, weights)
    teacher = jax.lax.stop_gradient((teacher_head[: min(sizes)], teacher_hidden))
    student_head = student_head[: min(sizes)]  # which is no copy where nothing is cut
    return _checked_labels(plan, student_hidden, student_head, teacher[0], teacher[1], labels, mask, scalars)


def _scalars(temperatures, parameter, weights):
    values = (*temperatures, *weights, 0.0 if parameter is None else parameter)
    return jax.lax.stop_gradient(tuple(jnp.asarray(value, jnp.float32) for value in values))


def _check_shapes(student_hidden, mask, labels, *arrays):
    shape = student_hidden.shape[:-1]
    shapes = {"mask": mask.shape, **{name: array.shape[:-1] for name, array in arrays}}
    if labels is not None:
        shapes["labels"] = labels.shape
    if 0 in shape or any(other != shape for other in shapes.values()):
        raise ValueError(f"shapes do not go together: student_hidden {student_hidden.shape}, {shapes}")


def _checked_labels(plan, hidden, head, teacher_head, teacher, labels, mask, scalars):
    mask = mask.astype(bool)
    real = plan.num_tokens or head.shape[0]
    if labels is None:
        return _distil(plan, hidden, head, teacher_head, (teacher, None, mask), scalars)
    labels = jnp.where(mask, labels, 0)
    mean, statistics = _distil(plan, hidden, head, teacher_head, (teacher, labels, mask), scalars)
    wrong = ((labels < 0) | (labels >= real)).any()
    # a product, so that the gradient is NaN as well
    return mean._replace(mean=mean.mean * jnp.where(wrong, jnp.nan, 1.0)), statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distil(plan, hidden, head, teacher_head, rest, scalars):
    mask = rest[-1]
    size, pieces = cut((hidden, *rest), mask.shape, plan.chunk)
    values = jax.lax.map(lambda piece: _compare(plan, head, teacher_head, scalars, piece)[0], pieces)
    return _means(plan, values, mask, rest[1] is not None, size)


def _means(plan, values, mask, labelled, size):
    values = jax.tree.map(lambda parts: join(parts, size, mask.ndim - 1), values)
    loss, statistics = (jax.tree.map(lambda value: masked_mean(value, mask), part) for part in values)
    if not labelled:
        statistics = statistics._replace(cross_entropy=masked_mean(jnp.zeros(mask.shape), jnp.zeros_like(mask)))
    return loss, statistics


def _distil_forward(plan, hidden, head, teacher_head, rest, scalars):
    mask = rest[-1]
    count = mask.sum()
    scale = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(jnp.float32)
    size, pieces = cut((hidden, *rest), mask.shape, plan.chunk)

    def step(head_gradient, piece):
        values, gradient = _compare(plan, head, teacher_head, scalars, piece, scale)
        gradient = gradient.astype(hidden.dtype)
        h_gradient = dot(gradient, head.astype(hidden.dtype), (gradient.ndim - 1, 0)).astype(hidden.dtype)
        h = jnp.where(piece[-1][..., None], piece[0], 0)
        rows = (gradient.reshape(-1, head.shape[0]), h.reshape(-1, hidden.shape[-1]))
        return head_gradient + dot(*rows, (0, 0)), (values, h_gradient)

    head_gradient, (values, h_gradient) = jax.lax.scan(step, jnp.zeros(head.shape, jnp.float32), pieces)
    out = _means(plan, values, mask, rest[1] is not None, size)
    return out, (join(h_gradient, size, mask.ndim - 1), head_gradient.astype(head.dtype))


def _distil_backward(plan, gradients, cotangent):
    scale = cotangent[0].mean
    hidden, head = ((gradient * scale).astype(gradient.dtype) for gradient in gradients)
    return hidden, head, None, None, None


_distil.defvjp(_distil_forward, _distil_backward)


def _compare(plan, head, teacher_head, scalars, piece, scale=None):
    """Values of a chunk's positions, and with `scale` that times their gradient in the student's logits."""
    hidden, teacher, labels, mask = piece
    temperature, teacher_temperature, soft_weight, hard_weight, parameter = scalars
    keep = mask[..., None]
    logits = _real(project(jnp.where(keep, hidden, 0), head), plan.num_tokens)
    if plan.tail is None:
        teacher_logits = _real(project(jnp.where(keep, teacher, 0), teacher_head), plan.num_tokens)
        student_logits = logits
    else:
        ids, teacher_logits = teacher
        ids, teacher_logits = jnp.where(keep, ids, jnp.arange(ids.shape[-1])), jnp.where(keep, teacher_logits, 0)
        student_logits, pull = jax.vjp(lambda logits: losses.top_k_student(logits, ids, plan.tail), logits)
    log_p = losses.log_softmax(teacher_logits, teacher_temperature)
    log_q = losses.log_softmax(student_logits, temperature)
    terms, slope = jax.jvp(
        lambda log_q: losses.terms(plan.divergence, log_p, log_q, parameter), (log_q,), (jnp.ones_like(log_q),)
    )
    divergence = terms.sum(axis=-1)
    statistics = Statistics(divergence, divergence, _entropy(log_q), _entropy(log_p), _agree(log_p, log_q))
    value = soft_weight * divergence
    log_q1 = None if labels is None else losses.log_softmax(logits)
    if labels is not None:
        one_hot = jnp.arange(head.shape[0]) == labels[..., None]
        hard = -jnp.where(one_hot, log_q1, 0).sum(axis=-1)
        value = value + hard_weight * hard
        statistics = statistics._replace(cross_entropy=hard)
    if scale is None:
        return (value, statistics), None
    slope = (slope - jnp.exp(log_q) * slope.sum(axis=-1, keepdims=True)) * (soft_weight / temperature)
    gradient = slope if plan.tail is None else pull(slope)[0]
    if labels is not None:
        gradient = gradient + hard_weight * (jnp.exp(log_q1) - one_hot)
    return (value, statistics), jnp.where(keep, gradient * scale, 0)


def _real(logits, num_tokens):
    """Logits of ids that are not real taken away; cutting the head instead would move what lies on several devices."""
    if num_tokens is None or num_tokens == logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)


def _entropy(log_probs):
    return -jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0).sum(axis=-1)


def _agree(log_p, log_q):
    top = (log_p == log_p.max(axis=-1, keepdims=True)) & (log_q == log_q.max(axis=-1, keepdims=True))
    return top.any(axis=-1).astype(jnp.float32)
