"""The loss of learning from a teacher with another vocabulary: aligned spans of one text, chunk by chunk.

uld        sorted probabilities before each span (kd_jax.losses.universal_distance)
aligned    what the models expect at the start of each span (kd_jax.losses.aligned_divergence)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax import losses
from kd_jax.lm.corpus.batches import Pair, Spans
from kd_jax.losses import Shared, Start, parameters
from kd_jax.losses import head as head_lib
from kd_jax.losses.parameters import Scalar

# How distributions over two vocabularies are compared.
KINDS = ("aligned", "uld")


class Hidden(NamedTuple):
    """One model's side of a loss.

    Attributes:
        states: [row, position, width], hidden states.
        head: [vocab, width], cut to the real ids.
        tokens: int [row, position].
        softcap: of the logits; None for none.
    """

    states: jax.Array
    head: jax.Array
    tokens: jax.Array
    softcap: float | None = None


def linear_aligned_divergence(
    *, teacher: Hidden, student: Hidden, pair: Pair, shared: Shared, kind: str = "aligned",
    divergence: str = "forward_kl", parameter: Scalar | None = None, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, chunk: int | None = None, mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The divergence at the start of each span, from hidden states and heads.

    Logits of a chunk of spans exist at a time. The gradient is computed in the forward pass, while they are there: a
    backward pass would project the teacher's hidden states again, most of the work where its vocabulary is large.

    Args:
        teacher, student: hidden states of the pair's tokens, and of the batch's.
        pair: the spans, see kd_jax.lm.distill.pairing.
        shared: the tokens that both models have.
        kind: one of KINDS.
        divergence, parameter: of "aligned".
        temperature: divides both models' logits.
        teacher_temperature: divides the teacher's, in its place.
        chunk: spans at a time, by default as many as kd_jax.losses takes tokens.
        mesh: what rows and heads are split over.
    Returns: the sum over the spans of the mask, which has first derivatives in the student's hidden states and head;
        and its terms, float32 [row, span], 0 where masked, which have none.
    """
    teacher = teacher._replace(states=jax.lax.stop_gradient(teacher.states), head=jax.lax.stop_gradient(teacher.head))
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    chunk = chunk or head_lib.chunk_tokens(mesh)
    plan = _Plan(kind, divergence, (teacher.softcap, student.softcap), chunk, mesh)
    texts = [
        _texts(side, spans, pair.mask, one, chunk, mesh) if kind == "aligned" else _no_texts(pair.mask)
        for side, spans, one in zip(
            (teacher, student), (pair.teacher, pair.student), (teacher_temperature, temperature), strict=True
        )
    ]
    spans = _Spans(_before(teacher.states, pair.teacher), *texts, pair.whole, pair.mask)
    numbers = _Numbers(temperature, teacher_temperature, parameter, shared)
    later, spans = spans.student.later, spans._replace(student=spans.student._replace(later=None))
    others = jax.lax.stop_gradient((teacher.head, spans, numbers))
    return _compared(plan, _before(student.states, pair.student), student.head, later, *others)


class _Plan(NamedTuple):
    """What the compiled program depends on; of the soft caps, the teacher's first."""

    kind: str
    divergence: str
    softcaps: tuple[float | None, float | None]
    chunk: int
    mesh: Mesh | None


class _Text(NamedTuple):
    """One model's text of each span, [row, span] each: see kd_jax.losses.Start."""

    first: jax.Array
    later: jax.Array | None
    single: jax.Array


class _Spans(NamedTuple):
    """The arrays over spans, of all or of a chunk: [row, span, ...]."""

    teacher_before: jax.Array
    teacher: _Text
    student: _Text
    whole: jax.Array
    mask: jax.Array


class _Numbers(NamedTuple):
    """What is traced and the same for all spans."""

    temperature: jax.Array
    teacher_temperature: jax.Array
    parameter: Scalar | None
    shared: Shared


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _compared(plan, before, head, later, teacher_head, spans, numbers):
    size, pieces = head_lib.cut((before, later, spans), spans.mask.shape, plan.chunk)
    heads = _whole(plan, before, head, spans, teacher_head)

    def values(piece):
        logits = head_lib.project(_selected(piece[0], piece[2].mask), heads[1], plan.softcaps[1])
        return _values(plan, logits, *piece[1:], heads[0], numbers)

    # Without a derivative (in validation) no gradient is computed.
    return _sum(head_lib.join(jax.lax.map(values, pieces), size, 1), spans.mask)


@_compared.defjvp
def _compared_jvp(plan, primals, tangents):
    out, gradients = _with_gradient(plan, *primals)
    return out, (head_lib.inner_product(gradients, tangents[:3]), jnp.zeros_like(out[1]))


def _with_gradient(plan, before, head, later, teacher_head, spans, numbers):
    """The sum and its terms, and the gradients of the sum in `before`, `head` and `later`."""
    size, pieces = head_lib.cut((before, later, spans), spans.mask.shape, plan.chunk)
    groups, (teacher_head, whole) = head_lib.groups(before, plan.mesh), _whole(plan, before, head, spans, teacher_head)

    def step(so_far, piece):
        before, later, spans = piece
        before = _selected(before, spans.mask)
        logits = head_lib.project(before, whole, plan.softcaps[1])
        values, pull_back = jax.vjp(lambda *own: _values(plan, *own, spans, teacher_head, numbers), logits, later)
        gradient, of_later = pull_back(jnp.ones_like(values))
        # The slope at a masked span may be infinite.
        gradient, of_later = _selected(gradient, spans.mask), jnp.where(spans.mask, of_later, 0)
        gradient = head_lib.through_softcap(gradient, logits, plan.softcaps[1]).astype(before.dtype)
        of_before = head_lib.dot(gradient, whole.astype(before.dtype), (gradient.ndim - 1, 0)).astype(before.dtype)
        return so_far + head_lib.head_gradient(gradient, before, groups), (values, of_before, of_later)

    of_head, parts = jax.lax.scan(step, head_lib.no_gradient(head, groups, plan.mesh), pieces)
    values, of_before, of_later = (head_lib.join(part, size, 1) for part in parts)
    of_head = head_lib.summed(of_head, groups, plan.mesh).astype(head.dtype)
    return _sum(values, spans.mask), (of_before, of_head, of_later)


def _whole(plan, before, head, spans, teacher_head):
    """Both heads, the teacher's first, gathered before the loop over chunks and not in each of its steps."""
    return head_lib.whole(teacher_head, spans.teacher_before, plan.mesh), head_lib.whole(head, before, plan.mesh)


def _selected(array, mask):
    """The array with 0 at the spans that are masked, which may hold NaN."""
    return jnp.where(mask[..., None], array, 0)


def _sum(values, mask):
    values = jnp.where(mask, values, 0.0)
    return values.sum(), values


def _values(plan: _Plan, logits, later, spans: _Spans, teacher_head, numbers: _Numbers):
    """The divergence of each span of a chunk, from the student's logits."""
    mask = spans.mask
    teacher_logits = head_lib.project(_selected(spans.teacher_before, mask), teacher_head, plan.softcaps[0])
    temperatures = {"temperature": numbers.temperature, "teacher_temperature": numbers.teacher_temperature}
    if plan.kind == "uld":
        return losses.universal_distance(teacher_logits=teacher_logits, student_logits=logits, **temperatures)
    # A masked span is taken for the first of the shared tokens, so that both sides have the same events.
    texts = spans.teacher, spans.student._replace(later=later)
    teacher, student = (
        Start(one, jnp.where(mask, text.first, ids[0]), jnp.where(mask, text.later, -1.0), text.single | ~mask)
        for one, text, ids in zip((teacher_logits, logits), texts, numbers.shared[:2], strict=True)
    )
    return losses.aligned_divergence(
        plan.divergence, teacher=teacher, student=student, shared=numbers.shared,
        whole=jnp.where(mask, spans.whole, 0), parameter=numbers.parameter, **temperatures,
    )  # fmt: skip


def at_first_tokens(values: jax.Array, spans: Spans, length: int) -> jax.Array:
    """Values of spans [row, span] at the positions that predict their first tokens, 0 elsewhere: [row, length]."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], length), values.dtype).at[rows, spans.first - 1].add(values)


def at_all_tokens(mask: jax.Array, spans: Spans, length: int) -> jax.Array:
    """Whether the token after each position is in a span of the mask: bool [row, length]."""
    # One up where a span begins and one down after its end; their running sum is 1 inside.
    ones = mask.astype(jnp.int32)
    up = at_first_tokens(ones, spans, length)
    return jnp.cumsum(up - at_first_tokens(ones, Spans(spans.first + spans.length, None), length), axis=1) > 0


def _before(states: jax.Array, spans: Spans) -> jax.Array:
    """Hidden states [row, span, width] of the positions before spans: the state at a position predicts the next one."""
    return jnp.take_along_axis(states, jnp.maximum(spans.first - 1, 0)[..., None], axis=1)


def _texts(side: Hidden, spans: Spans, mask: jax.Array, temperature: Scalar, chunk: int, mesh: Mesh | None) -> _Text:
    """The text of each span in a model's tokens."""
    weight = head_lib.whole(side.head, side.states, mesh)
    last = spans.first + spans.length - 1
    position = jnp.arange(side.tokens.shape[1])
    in_span = (position >= spans.first[..., None]) & (position < last[..., None]) & mask[..., None]
    # Most spans are one token, so few positions are inside of a span. They come first, and chunks without any are
    # passed over.
    order = jnp.argsort(~in_span.any(axis=1), axis=1, stable=True)
    states = jnp.take_along_axis(side.states, order[..., None], axis=1)
    labels, in_span = (
        jnp.take_along_axis(array, order[:, None] if array.ndim == 3 else order, axis=-1)
        for array in (jnp.roll(side.tokens, -1, axis=1), in_span)
    )

    def log_probs(piece):
        states, labels, _ = piece
        return -losses.cross_entropy(head_lib.project(states, weight, side.softcap) / temperature, labels)

    def of_some(piece):
        # The projection is inside of what is computed again backward: its logits are not kept.
        nothing = lambda piece: jnp.zeros(piece[1].shape, jnp.float32)  # noqa: E731
        return jax.lax.cond(piece[2].any(), jax.checkpoint(log_probs), nothing, piece)

    size, pieces = head_lib.cut((states, labels, in_span.any(axis=1)), labels.shape, chunk)
    of_next = head_lib.join(jax.lax.map(of_some, pieces), size, 1)
    # Each span adds up its own positions: differences of running sums would lose digits.
    later = jnp.where(in_span, of_next[:, None], 0).sum(axis=-1)
    return _Text(jnp.take_along_axis(side.tokens, spans.first, axis=1), later, spans.length == 1)


def _no_texts(mask: jax.Array) -> _Text:
    """Sorted probabilities do not ask for the text."""
    return _Text(jnp.zeros(mask.shape, jnp.int32), jnp.zeros(mask.shape), jnp.ones(mask.shape, bool))
