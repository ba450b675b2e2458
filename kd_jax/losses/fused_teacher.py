"""A student's loss against a teacher from both models' hidden states and heads, in chunks of positions.

The gradient with respect to the student's hidden states and head is computed in the forward pass, while a chunk's
logits are there. The teacher and all settings get no gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.losses import derivatives, divergences, parameters, reductions
from kd_jax.losses import head as head_lib
from kd_jax.losses.divergences import masked_mean
from kd_jax.losses.head import chunk_tokens, cut, dot, join, project, real_only
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.table import TABLE, checked_parameter
from kd_jax.metrics import Mean


class Statistics(NamedTuple):
    """What is logged beside the loss: each a Mean over the selected positions, in nats but for the agreement.

    Attributes:
        divergence: D(p, q), without its weight and without T^2.
        cross_entropy: of the labels under the student at temperature 1; its count is 0 without labels.
        student_entropy, teacher_entropy: of q and p as they are compared, each at its temperature.
        agreement: share of positions where both models have the same most probable token.
    """

    divergence: Mean
    cross_entropy: Mean
    student_entropy: Mean
    teacher_entropy: Mean
    agreement: Mean


def linear_distillation(
    *, teacher_hidden: jax.Array, teacher_head: jax.Array, student_hidden: jax.Array, student_head: jax.Array,
    labels: jax.Array | None, mask: jax.Array, divergence: str = "forward_kl", temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, parameter: Scalar | None = None, hard_weight: Scalar = 0.0,
    num_tokens: int | None = None, softcap: float | None = None, teacher_softcap: float | None = None,
    chunk: int | None = None, mesh: Mesh | None = None,
) -> tuple[Mean, Statistics]:  # fmt: skip
    """(1 - hard_weight) T^2 D(p, q) + hard_weight CE: `losses.distillation_loss` of the projected hidden states.

    The loss's `mean` has derivatives, forward and backward, in the student's hidden states and head. They are computed
    in the forward pass. The other members of the loss, the statistics, the teacher and the settings carry none.

    Args:
        student_hidden, teacher_hidden: [..., position, width], each with its own width and dtype; masked positions may
            hold anything.
        student_head, teacher_head: [vocab, width].
        labels: int [..., position]; may be None if `hard_weight` is 0 (a number, not traced).
        mask: bool [..., position].
        divergence, temperature, teacher_temperature, parameter, num_tokens: as in `losses.distillation_loss`; all but
            `num_tokens` and the name are traced.
        softcap, teacher_softcap: of the student's and the teacher's logits, see `kd_jax.losses.head.project`.
        chunk: tokens at a time, by default `chunk_tokens()`.
        mesh: what the rows and the student's head are split over. The teacher's head is laid out in the same way,
            wherever it was, so that both models' logits are on the same devices and none of them are sent.
    Returns: the loss, a Mean whose `mean` is 0 where the mask selects nothing and NaN where a selected label is not a
        real id; and the statistics.
    Raises: ValueError for shapes that do not go together, no tokens at all, or settings out of range.
    """
    hard_weight = parameters.checked_hard_weight(labels, hard_weight)
    temperatures = parameters.checked_temperatures(temperature, teacher_temperature)
    soft_weight = (1 - hard_weight) * temperatures[0] ** 2
    settings = _settings(divergence, temperatures, parameter, soft_weight, hard_weight)
    tokens = _Tokens(student_hidden, teacher_hidden, labels, mask)
    caps = softcap, teacher_softcap
    return _from_hidden(tokens, student_head, teacher_head, divergence, settings, num_tokens, caps, chunk, mesh)


def linear_divergence(
    *, teacher_hidden: jax.Array, teacher_head: jax.Array, student_hidden: jax.Array, student_head: jax.Array,
    mask: jax.Array, divergence: str, temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, num_tokens: int | None = None, chunk: int | None = None,
) -> Mean:  # fmt: skip
    """The divergence alone, without T^2.

    Args: as in `linear_distillation`.
    Returns: a Mean, in nats; its `mean` is 0 where the mask selects nothing.
    Raises: ValueError as in `linear_distillation`.
    """
    temperatures = parameters.checked_temperatures(temperature, teacher_temperature)
    settings = _settings(divergence, temperatures, parameter, 1.0, 0.0)
    tokens = _Tokens(student_hidden, teacher_hidden, None, mask)
    caps = None, None
    return _from_hidden(tokens, student_head, teacher_head, divergence, settings, num_tokens, caps, chunk, None)[0]


def linear_top_k_distillation(
    *, teacher_ids: jax.Array, teacher_log_probs: jax.Array, teacher_tail_log_prob: jax.Array | None,
    student_hidden: jax.Array, student_head: jax.Array, labels: jax.Array | None, mask: jax.Array,
    divergence: str = "forward_kl", temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, tail: str = "bucket", hard_weight: Scalar = 0.0, num_tokens: int | None = None,
    softcap: float | None = None, chunk: int | None = None, mesh: Mesh | None = None,
) -> tuple[Mean, Statistics]:  # fmt: skip
    """`linear_distillation` from the teacher's K most probable tokens, with `losses.top_k_divergence` as D.

    Args:
        teacher_ids, teacher_log_probs: [..., position, K], the most probable first.
        teacher_tail_log_prob: [..., position], or None as in `losses.top_k_divergence`.
        tail: "bucket" or "renormalise".
        others: as in `linear_distillation`.
    Returns: the loss and the statistics; the entropies are over the K tokens and the bucket.
    Raises: ValueError as in `linear_distillation` and `losses.top_k_divergence`.
    """
    hard_weight = parameters.checked_hard_weight(labels, hard_weight)
    temperatures = parameters.checked_temperatures(temperature, teacher_temperature)
    soft_weight = (1 - hard_weight) * temperatures[0] ** 2
    settings = _settings(divergence, temperatures, parameter, soft_weight, hard_weight)
    vocab = student_head.shape[0]
    parameters.check_vocabulary(vocab, vocab, num_tokens)
    tail = divergences.checked_tail(tail, teacher_ids.shape[-1], num_tokens or vocab)
    plan = _Plan(divergence, tail, num_tokens or vocab, (softcap, None), chunk or chunk_tokens(mesh), mesh)
    teacher = divergences.top_k_teacher(teacher_log_probs, teacher_tail_log_prob, tail)
    tokens = _Tokens(student_hidden, (teacher_ids, teacher), labels, mask)
    _check_shapes(tokens, teacher_ids=teacher_ids, teacher_log_probs=teacher)
    return _labelled(plan, tokens, student_head, None, settings)


class _Plan(NamedTuple):
    """What the compiled program depends on."""

    divergence: str
    tail: str | None  # None: the teacher is hidden states and a head
    num_tokens: int
    softcaps: tuple[float | None, float | None]  # of the student, of the teacher
    chunk: int
    mesh: Mesh | None


class _Settings(NamedTuple):
    """The numbers of a loss, traced, so that other values need no other program; float32."""

    temperature: jax.Array
    teacher_temperature: jax.Array
    parameter: jax.Array
    soft_weight: jax.Array
    hard_weight: jax.Array


class _Tokens(NamedTuple):
    """The arrays over positions, [..., position, ...]: of all of them or of a chunk."""

    hidden: jax.Array
    teacher: Any  # hidden states, or ids and logits of the outcomes
    labels: jax.Array | None
    mask: jax.Array


def _settings(divergence, temperatures, parameter, soft_weight, hard_weight) -> _Settings:
    parameter = checked_parameter(divergence, parameter)
    values = (*temperatures, 0.0 if parameter is None else parameter, soft_weight, hard_weight)
    return _Settings(*(jnp.asarray(value, jnp.float32) for value in values))


def _from_hidden(tokens: _Tokens, head, teacher_head, divergence, settings, num_tokens, softcaps, chunk, mesh):
    _check_shapes(tokens, teacher_hidden=tokens.teacher)
    sizes = teacher_head.shape[0], head.shape[0]
    parameters.check_vocabulary(*sizes, num_tokens)
    plan = _Plan(divergence, None, num_tokens or min(sizes), softcaps, chunk or chunk_tokens(mesh), mesh)
    # What the longer head has more is cut off here. Padding that both have is masked later (`real_only`).
    head, teacher_head = head[: min(sizes)], teacher_head[: min(sizes)]
    return _labelled(plan, tokens, head, teacher_head, settings)


def _check_shapes(tokens: _Tokens, **teacher):
    shapes = {"mask": tokens.mask.shape, **{name: array.shape[:-1] for name, array in teacher.items()}}
    if tokens.labels is not None:
        shapes["labels"] = tokens.labels.shape
    positions = tokens.hidden.shape[:-1]
    if 0 in positions or any(shape != positions for shape in shapes.values()):
        raise ValueError(f"shapes do not go together: student_hidden {tokens.hidden.shape}, {shapes}")


def _labelled(plan, tokens: _Tokens, head, teacher_head, settings) -> tuple[Mean, Statistics]:
    mask = tokens.mask.astype(bool)
    labels = None if tokens.labels is None else jnp.where(mask, tokens.labels, 0)
    # The derivative rule below has no tangents for these: a gradient that is asked for is 0, not an error.
    teacher_head, teacher, settings = jax.lax.stop_gradient((teacher_head, tokens.teacher, settings))
    loss, statistics = _distil(plan, tokens.hidden, head, teacher_head, teacher, labels, mask, settings)
    if labels is None:
        return loss, statistics
    wrong = ((labels < 0) | (labels >= plan.num_tokens)).any()
    # A product, so that the gradient is NaN as well.
    return loss._replace(mean=loss.mean * jnp.where(wrong, jnp.nan, 1.0)), statistics


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _distil(plan, hidden, head, teacher_head, teacher, labels, mask, settings):
    size, pieces = cut(_Tokens(hidden, teacher, labels, mask), mask.shape, plan.chunk)
    head, teacher_head = _whole(plan, hidden, head, teacher, teacher_head)
    # Without a derivative (in validation) no gradient is computed.
    values = jax.lax.map(lambda piece: _compare(plan, _Tokens(*piece), head, teacher_head, settings)[0], pieces)
    return _means(values, size, mask)


@_distil.defjvp
def _distil_jvp(plan, primals, tangents):
    (loss, statistics), gradients = head_lib.undivided(_with_gradient, 1)(plan, *primals)
    tangent, no_tangents = jax.tree.map(jnp.zeros_like, (loss, statistics))
    tangent = tangent._replace(mean=head_lib.inner_product(gradients, tangents[:2]))
    return (loss, statistics), (tangent, no_tangents)


def _with_gradient(plan, hidden, head, teacher_head, teacher, labels, mask, settings):
    """The loss and the statistics, and the gradients of the loss's `mean` in hidden states and head."""
    scale = head_lib.share_of_one(mask)
    size, pieces = cut(_Tokens(hidden, teacher, labels, mask), mask.shape, plan.chunk)
    dtype, groups = head.dtype, head_lib.groups(hidden, plan.mesh)
    head, teacher_head = _whole(plan, hidden, head, teacher, teacher_head)

    def step(so_far, piece):
        values, gradient = _compare(plan, _Tokens(*piece), head, teacher_head, settings, scale)
        # In the hidden states' dtype, as a backward pass would have it: the products are as fast as the forward ones.
        # The head's gradient is still added up in float32 over the chunks.
        gradient, h = gradient.astype(hidden.dtype), _selected(piece[0], piece[-1])
        h_gradient = dot(gradient, head.astype(hidden.dtype), (gradient.ndim - 1, 0)).astype(hidden.dtype)
        return so_far + head_lib.head_gradient(gradient, h, groups), (values, h_gradient)

    so_far, (values, h_gradient) = jax.lax.scan(step, head_lib.no_gradient(head, groups, plan.mesh), pieces)
    gradients = join(h_gradient, size, mask.ndim - 1), head_lib.summed(so_far, groups, plan.mesh).astype(dtype)
    return _means(values, size, mask), gradients


def _whole(plan, hidden, head, teacher, teacher_head):
    """Both heads, gathered before the loop over chunks and not in each of its steps."""
    if teacher_head is not None:
        teacher_head = head_lib.whole(teacher_head, teacher, plan.mesh)
    return head_lib.whole(head, hidden, plan.mesh), teacher_head


def _means(values, size, mask):
    loss, statistics = jax.tree.map(lambda parts: masked_mean(join(parts, size, mask.ndim - 1), mask), values)
    if statistics.cross_entropy is None:
        # A Mean of nothing, so that the statistics have one structure with labels and without.
        nothing = masked_mean(jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, bool))
        statistics = statistics._replace(cross_entropy=nothing)
    return loss, statistics


def _compare(plan, tokens: _Tokens, head, teacher_head, settings: _Settings, scale=None):
    """Loss and statistics of a chunk, [..., position], and with `scale` the gradient in its logits times `scale`."""
    # Masked positions are 0 before anything is computed from them: 0 times the NaN of a gradient would still be NaN.
    capped = project(_selected(tokens.hidden, tokens.mask), head, plan.softcaps[0])
    logits = real_only(capped, plan.num_tokens)
    if plan.tail is None:
        teacher = project(_selected(tokens.teacher, tokens.mask), teacher_head, plan.softcaps[1])
        teacher = real_only(teacher, plan.num_tokens)
        soft, entropies, agreement, gradient = _soft(plan, settings, teacher, logits)
    else:
        ids, teacher = tokens.teacher[0], _selected(tokens.teacher[1], tokens.mask)
        # The divergence is one of K or K + 1 outcomes; its gradient goes back to the logits of all tokens.
        outcomes, pull_back = jax.vjp(lambda logits: divergences.top_k_student(logits, ids, plan.tail), logits)
        soft, entropies, _, gradient = _soft(plan, settings, teacher, outcomes)
        (gradient,) = pull_back(gradient)
        agreement = _top_k_agreement(teacher[..., : ids.shape[-1]], outcomes[..., : ids.shape[-1]], logits)
    statistics = Statistics(soft, None, *entropies, agreement)
    # `weighted`: where the weight is 0 the divergence may be infinite.
    value = reductions.weighted(settings.soft_weight, soft)
    if tokens.labels is not None:
        hard, hard_gradient = _hard(logits, tokens.labels)
        value, statistics = (
            value + reductions.weighted(settings.hard_weight, hard),
            statistics._replace(cross_entropy=hard),
        )
        gradient = gradient + settings.hard_weight * hard_gradient
    if scale is None:
        return (value, statistics), None
    gradient = head_lib.through_softcap(gradient, capped, plan.softcaps[0])
    return (value, statistics), _selected(gradient * scale, tokens.mask)


def _selected(array, mask):
    """The array with 0 at the positions that are masked, which may hold NaN."""
    return jnp.where(mask[..., None], array, 0)


def _soft(plan, settings: _Settings, teacher, student):
    """The divergence, both entropies, the agreement, and the weighted gradient in the student's logits."""
    # Log-probabilities are recomputed in each reduction over the vocabulary; storing them is slower.
    row = TABLE[plan.divergence]
    temperatures = settings.teacher_temperature, settings.temperature
    tops = reductions.largest(teacher), reductions.largest(student)

    def below(*both):
        return [(logits - top) / t for logits, top, t in zip(both, tops, temperatures, strict=True)]

    logs = [
        jnp.log(one)[..., None]
        for one in reductions.sums(lambda *both: tuple(map(jnp.exp, below(*both))), teacher, student)
    ]

    def log_softmaxes(*both):
        return [x - log for x, log in zip(below(*both), logs, strict=True)]

    def terms(*both):
        log_p, log_q = log_softmaxes(*both)
        # Agreement by comparison with the largest logits: it adds up over blocks of the vocabulary, as an argmax would
        # not.
        same = (both[0] == tops[0]) & (both[1] == tops[1])
        term = row.term(log_p, log_q, settings.parameter)
        return term, _entropy(log_q), _entropy(log_p), same.astype(jnp.float32)

    divergence, *entropies, agreement = reductions.sums(terms, teacher, student)
    divergence = row.of_sum(divergence, settings.parameter)
    gradient = derivatives.gradient(plan.divergence, *log_softmaxes(teacher, student), settings.parameter)
    # log q is the log-softmax of logits / T, which gives the gradient in the logits a factor of 1 / T.
    gradient = gradient * (settings.soft_weight / settings.temperature)
    # Tokens that tie for the most probable in both models were counted once each.
    return divergence, entropies, jnp.minimum(agreement, 1), gradient


def _entropy(log_probs):
    probs = jnp.exp(log_probs)
    return -probs * jnp.where(probs > 0, log_probs, 0)


def _top_k_agreement(teacher, student, logits):
    """The agreement, from both models' logits of the K tokens and the student's logits of all tokens."""
    best = teacher == teacher.max(axis=-1, keepdims=True)
    student_there = jnp.where(best, student, -jnp.inf).max(axis=-1)
    return (student_there == logits.max(axis=-1)).astype(jnp.float32)


def _hard(logits, labels):
    """Cross-entropy at temperature 1 and its gradient in the logits."""
    # The label's logit is picked by a comparison with all ids, in the same pass as the sum: a gather would need the
    # logits of a split vocabulary on one device.
    top, ids = reductions.largest(logits), jnp.arange(logits.shape[-1])

    def parts(logits, ids):
        below = logits - top
        return jnp.exp(below), jnp.where(ids == labels[..., None], below, 0)

    total, chosen = reductions.sums(parts, logits, ids)
    log_total = jnp.log(total)
    return log_total - chosen, jnp.exp(logits - top - log_total[..., None]) - (ids == labels[..., None])
