"""Distillation from a teacher with another vocabulary: aligned spans of one text, compared chunk by chunk.

These are functions for a training of one's own: the text is given in both tokenizations (`pair`), and the loss is that
of hidden states and heads of both models, as in kd_jax.fused. The experiment's policies do not use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses
from kd_jax.lm.distill import alignment
from kd_jax.lm.model import Model
from kd_jax.losses import Shared, Start, head
from kd_jax.metrics import Mean

# The divergences of kd_jax.losses over aligned spans, and the universal distance, which ignores token identities.
UNIVERSAL = "universal"
DIVERGENCES = (*losses.DIVERGENCES, UNIVERSAL)


class Text(NamedTuple):
    """Texts in one model's tokens, and their spans.

    Attributes:
        tokens: int [row, position].
        first: int [row, span], position of a span's first token; 1 where there is no span.
        length: int [row, span], how many tokens a span is; 1 where there is none.
    """

    tokens: Any
    first: Any
    length: Any


class Pair(NamedTuple):
    """Texts in both models' tokens.

    Attributes:
        teacher, student: the same texts and spans.
        whole: int [row, span], which of the shared tokens is the span's text; -1 for none.
        mask: bool [row, span], where there is a span that both models predict.
    """

    teacher: Text
    student: Text
    whole: Any
    mask: Any


def shared(teacher: Model, student: Model) -> Shared:
    """The tokens that both models have."""
    ids = alignment.shared_tokens(
        teacher.tokenizer, student.tokenizer, teacher_eos=teacher.eos_ids, student_eos=student.eos_ids
    )
    return Shared(*ids)


def pair(
    teacher: Model, student: Model, teacher_rows: Sequence[Sequence[int]], student_rows: Sequence[Sequence[int]],
    shared: Shared,
) -> Pair:  # fmt: skip
    """Arrays of the same texts in both models' ids; what starts a sequence (BOS) is among the ids.

    A model does not predict the first id of a row: the span that begins there is masked, so that a row should start
    with an id that both have before the text, or lose its first word.

    Raises: ValueError, naming the row, where the texts are not the same bytes.
    """
    models = teacher, student
    aligned, wholes = [], []
    ids_of = (
        {int(i): n for n, i in enumerate(np.asarray(shared.teacher))},
        {int(i): n for n, i in enumerate(np.asarray(shared.student))},
    )
    for number, rows in enumerate(zip(teacher_rows, student_rows, strict=True)):
        pieces = [alignment.pieces(m.tokenizer, row, m.eos_ids) for m, row in zip(models, rows, strict=True)]
        try:
            sides = alignment.align(*pieces)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        aligned.append(sides)
        whole = np.full(len(sides[0].first), -1, np.int32)
        # A span that is one token of a model is a shared token if that token is shared.
        for side, row, known in zip(sides, rows, ids_of, strict=True):
            for span in np.flatnonzero(side.length == 1):
                whole[span] = known.get(int(row[side.first[span]]), whole[span])
        wholes.append(whole)
    # At least one, masked: arrays without spans would have no shape to compile for.
    spans = max(1, max(len(whole) for whole in wholes))

    def text(rows, which):
        return Text(
            _table(rows, max(map(len, rows)), 0),
            _table([sides[which].first for sides in aligned], spans, 1),
            _table([sides[which].length for sides in aligned], spans, 1),
        )

    texts = text(teacher_rows, 0), text(student_rows, 1)
    there = _table([np.ones(len(whole), np.int32) for whole in wholes], spans, 0) > 0
    # A row's first token is predicted by nothing.
    mask = there & (texts[0].first > 0) & (texts[1].first > 0)
    return Pair(*texts, _table(wholes, spans, -1), mask)


def linear_aligned_divergence(
    student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array, pair: Pair,
    shared: Shared, *, divergence: str = "forward_kl", parameter: float | None = None, temperature: float = 1.0,
    softcaps: tuple[float | None, float | None] = (None, None), chunk: int | None = None,
) -> Mean:  # fmt: skip
    """T^2 times the divergence of a span's start, as a Mean over all spans, from hidden states and heads.

    Logits of a chunk of spans exist at a time, forward and backward; they are projected again backward. The teacher
    gets no gradient.

    Args:
        student_hidden, teacher_hidden: [row, position, width] of the tokens of `pair`.
        student_head, teacher_head: [vocab, width], cut to the real ids.
        pair, shared: see there.
        divergence: one of DIVERGENCES.
        parameter: of the divergence.
        temperature: divides both models' logits.
        softcaps: of the logits, teacher's and student's.
        chunk: spans at a time, by default as many as kd_jax.losses takes tokens.
    """
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    chunk = chunk or head.chunk_tokens()
    starts = [
        _starts(hidden, weight, text, temperature, softcap, chunk)
        for hidden, weight, text, softcap in zip(
            (teacher_hidden, student_hidden), (teacher_head, student_head), pair[:2], softcaps, strict=True
        )
    ]

    def compare(piece):
        sides, whole = piece
        logits = [
            head.project(hidden, weight, softcap)
            for (hidden, *_), weight, softcap in zip(sides, (teacher_head, student_head), softcaps, strict=True)
        ]
        if divergence == UNIVERSAL:
            return losses.universal_distance(
                teacher_logits=logits[0], student_logits=logits[1], temperature=temperature
            )
        teacher, student = (Start(one, *side[1:]) for one, side in zip(logits, sides, strict=True))
        return losses.aligned_divergence(
            divergence,
            teacher=teacher,
            student=student,
            shared=shared,
            whole=whole,
            temperature=temperature,
            parameter=parameter,
        )

    # Spans of all rows in one line: rows have different numbers of them, and chunks are then equally full.
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (starts, jnp.asarray(pair.whole)))
    size, pieces = head.cut(flat, flat[1].shape, chunk)
    # A span is projected again in the backward pass: kept logits would be [spans, vocab] of both models
    values = head.join(jax.lax.map(jax.checkpoint(compare), pieces), size, 0)
    return losses.masked_mean(temperature**2 * values, jnp.asarray(pair.mask).reshape(-1))


def _starts(hidden, weight, text: Text, temperature, softcap, chunk):
    """(hidden state before a span, its first token, log-probability of its later tokens, whether it is one token)."""
    tokens, first, length = (jnp.asarray(array) for array in text)

    def log_prob(piece):
        hidden, labels = piece
        log_probs = losses.cross_entropy(head.project(hidden, weight, softcap) / temperature, labels)
        return -log_probs

    size, pieces = head.cut((hidden[:, :-1], tokens[:, 1:]), tokens[:, 1:].shape, chunk)
    of_token = head.join(jax.lax.map(jax.checkpoint(log_prob), pieces), size, 1)
    # Each span adds up its own positions: differences of running sums would lose digits.
    position = jnp.arange(1, tokens.shape[1])
    later = (position > first[..., None]) & (position < (first + length)[..., None])
    of_later = jnp.where(later, of_token[:, None], 0).sum(axis=-1)
    # The state at a position predicts the next one: a span is predicted by the position before it.
    before = jnp.take_along_axis(hidden, jnp.maximum(first - 1, 0)[..., None], axis=1)
    return before, jnp.take_along_axis(tokens, first, axis=1), of_later, length == 1


def _table(rows: Sequence[Any], width: int, fill: int) -> np.ndarray:
    table = np.full((len(rows), width), fill, np.int32)
    for into, row in zip(table, rows, strict=True):
        into[: len(row)] = row
    return table
