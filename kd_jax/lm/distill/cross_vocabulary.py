"""The loss of learning from a teacher with another vocabulary: aligned spans of one text, chunk by chunk.

uld        sorted probabilities before each span (kd_jax.losses.universal_distance)
aligned    what the models expect at the start of each span (kd_jax.losses.aligned_divergence)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax import losses
from kd_jax.lm.corpus.batches import Pair, Spans
from kd_jax.losses import Shared, Start, head, parameters
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
) -> jax.Array:  # fmt: skip
    """The divergence at the start of each span, from hidden states and heads: float32 [row, span], 0 where masked.

    Logits of a chunk of spans exist at a time, forward and backward; they are projected again backward. The teacher
    gets no gradient.

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
    """
    teacher = teacher._replace(states=jax.lax.stop_gradient(teacher.states), head=jax.lax.stop_gradient(teacher.head))
    both = teacher, student
    heads = [head.whole(side.head, side.states, mesh) for side in both]
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    chunk = chunk or head.chunk_tokens(mesh)
    starts = [_before(side.states, spans) for side, spans in zip(both, pair[3:5], strict=True)]
    if kind == "aligned":
        starts = [
            (before, *_texts(side, weight, spans, one, chunk))
            for before, side, weight, spans, one in zip(
                starts, both, heads, pair[3:5], (teacher_temperature, temperature), strict=True
            )
        ]

    def compare(piece):
        sides, whole, mask = piece
        befores = sides if kind == "uld" else [side[0] for side in sides]
        # Masked before the loss, whose slope at a masked span may be infinite: 0 times that is NaN.
        logits = [
            jnp.where(mask[..., None], head.project(before, weight, side.softcap), 0)
            for before, weight, side in zip(befores, heads, both, strict=True)
        ]
        if kind == "uld":
            return losses.universal_distance(
                teacher_logits=logits[0], student_logits=logits[1], temperature=temperature,
                teacher_temperature=teacher_temperature,
            )  # fmt: skip
        # A masked span is taken for the first of the shared tokens, so that both sides have the same events.
        teacher_start, student_start = (
            Start(one, jnp.where(mask, first, ids[0]), later, single | ~mask)
            for one, (_, first, later, single), ids in zip(logits, sides, shared[:2], strict=True)
        )
        return losses.aligned_divergence(
            divergence, teacher=teacher_start, student=student_start, shared=shared,
            whole=jnp.where(mask, whole, 0),
            temperature=temperature, teacher_temperature=teacher_temperature, parameter=parameter,
        )  # fmt: skip

    size, pieces = head.cut((starts, pair.whole, pair.mask), pair.whole.shape, chunk)
    # A span is projected again in the backward pass: kept logits would be [spans, vocab] of both models.
    values = head.join(jax.lax.map(jax.checkpoint(compare), pieces), size, 1)
    return jnp.where(pair.mask, values, 0.0)


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


def _texts(side: Hidden, weight: jax.Array, spans: Spans, temperature: Scalar, chunk: int) -> tuple[Any, ...]:
    """(first token of each span, log-probability of its later tokens, whether it is one token), [row, span] each.

    Args:
        weight: the side's head, whole on each device.
    """

    def log_prob(piece):
        states, labels = piece
        return -losses.cross_entropy(head.project(states, weight, side.softcap) / temperature, labels)

    # The projection is inside of what is computed again backward: its logits are not kept.
    labels = jnp.roll(side.tokens, -1, axis=1)
    size, pieces = head.cut((side.states, labels), labels.shape, chunk)
    of_next = head.join(jax.lax.map(jax.checkpoint(log_prob), pieces), size, 1)
    # Each span adds up its own positions: differences of running sums would lose digits.
    position = jnp.arange(side.tokens.shape[1])
    last = spans.first + spans.length - 1
    later = (position >= spans.first[..., None]) & (position < last[..., None])
    of_later = jnp.where(later, of_next[:, None], 0).sum(axis=-1)
    return jnp.take_along_axis(side.tokens, spans.first, axis=1), of_later, spans.length == 1
