"""The text of a batch in the tokens of a teacher with another vocabulary, and the spans of text that both models have.

Prompt and text are encoded apart, so that no token crosses their border, and every span is learnt as a whole. What the
teacher's tokenizer cannot take over is in no span that is compared: bytes that are not UTF-8, characters without
tokens, texts that it normalises.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from kd_jax.lm.corpus import compatibility
from kd_jax.lm.corpus.batches import Batch, Pair, Spans
from kd_jax.lm.distill import alignment
from kd_jax.lm.distill.alignment import Side
from kd_jax.lm.model import Model
from kd_jax.lm.weights.tokenizer import difference
from kd_jax.losses import Shared

# Rows of the teacher's tokens are padded to so many quarters of the batch's: each width is a program to compile.
_QUARTERS = 4


class _Sequence(NamedTuple):
    """A sequence in the teacher's tokens, and its spans; positions are those in the sequence."""

    tokens: list[int]
    teacher: Side
    student: Side
    compared: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Pairing:
    """Puts the teacher's tokens into batches.

    Attributes:
        teacher, student: their tokenizers and ends of sequence are used, and no weights.
    """

    teacher: Model
    student: Model

    def __post_init__(self):
        for label, model in (("the teacher", self.teacher), ("the student", self.student)):
            alignment.check_bytes(label, model.tokenizer)

    @functools.cached_property
    def shared(self) -> Shared:
        """The tokens that both models have, and the ends of sequence where one of them has several."""
        teacher, student = self.teacher, self.student
        ids = alignment.shared_tokens(
            teacher.tokenizer, student.tokenizer, teacher_eos=teacher.eos_ids, student_eos=student.eos_ids
        )
        # A tokenizer may have added tokens for which its model has no logit.
        real = (ids[0] < teacher.num_tokens) & (ids[1] < student.num_tokens)
        ids = [of_side[real] for of_side in ids]
        if self._same:  # an end is a token like any other
            return Shared(*ids)
        ends = (sorted(i for i in model.eos_ids if i < model.num_tokens) for model in (teacher, student))
        return Shared(*ids, *(np.array(of_side, np.int32) if len(of_side) > 1 else None for of_side in ends))

    @functools.cached_property
    def _same(self) -> bool:
        """Whether both have one vocabulary. Then ids stay as they are: encoded again, sampled ids would be others."""
        return difference(self.teacher.tokenizer, self.student.tokenizer, "", "") is None

    @functools.cached_property
    def _places(self) -> list[np.ndarray]:
        """For each id of the teacher and of the student, which of the shared tokens it is; -1 for none."""
        tables = []
        for model, ids, ends in zip((self.teacher, self.student), self.shared[:2], self.shared[2:], strict=True):
            table = np.full(max(model.num_tokens, model.tokenizer.vocab_size), -1, np.int32)
            table[ids] = np.arange(len(ids))
            if ends is not None:
                table[ends] = table[ends[0]]
            tables.append(table)
        return tables

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its `pair`."""
        leading, length = batch.tokens.shape[:-1], batch.tokens.shape[-1]
        rows = [array.reshape(-1, length) for array in (batch.tokens, batch.segments, batch.mask)]
        paired = [self._row(*row) for row in zip(*rows, strict=True)]
        step = -(-length // _QUARTERS)
        width = -(-max(max(len(row[0]) for row in paired), 2) // step) * step
        # A span has one of the student's tokens at least, and none begins at the first.
        sizes = [width] * 3 + [max(1, length - 1)] * 6
        fills = [0, 0, 0, 1, 1, 1, 1, -1, 0]
        arrays = []
        for size, fill, lists in zip(sizes, fills, zip(*paired, strict=True), strict=True):
            table = np.full((len(lists), size), fill, np.int32)
            for into, values in zip(table, lists, strict=True):
                into[: len(values)] = values
            arrays.append(table.reshape(*leading, size))
        tokens, segments, positions, first, count, own_first, own_count, whole, mask = arrays
        pair = Pair(tokens, segments, positions, Spans(first, count), Spans(own_first, own_count), whole, mask > 0)
        return batch._replace(pair=pair)

    def _row(self, tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """The arrays of a Pair for one row of a batch, not padded."""
        columns: list[list[np.ndarray]] = [[] for _ in range(9)]
        length = 0
        for number in range(1, int(segments.max(initial=0)) + 1):
            (places,) = np.nonzero(segments == number)
            learnt = mask[places]
            # Up to the first token that is learnt; without one, nothing of the sequence is.
            prompt_length = int(learnt.argmax()) + 1 if learnt.any() else len(places)
            ids = tokens[places]
            sequence = self._sequence(ids, prompt_length)
            own, other = sequence.student, sequence.teacher
            new, places_of = np.array(sequence.tokens, np.int32), self._places
            whole = np.where(other.length == 1, places_of[0][new[other.first]], -1)
            own_whole = np.where(own.length == 1, places_of[1][ids[own.first]], -1)
            values = (
                new, np.full(len(new), number), np.arange(len(new)), other.first + length, other.length,
                own.first + places[0], own.length, np.where(own_whole >= 0, own_whole, whole),
                # The position before a span predicts it.
                sequence.compared & learnt[np.maximum(own.first - 1, 0)],
            )  # fmt: skip
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            length += len(new)
        return [np.concatenate(column) if column else np.zeros(0, np.int32) for column in columns]

    def _sequence(self, ids: np.ndarray, prompt_length: int) -> _Sequence:
        if self._same:
            side = Side(np.arange(prompt_length, len(ids)), np.ones(len(ids) - prompt_length, np.int32))
            return _Sequence(ids.tolist(), side, side, np.ones(len(ids) - prompt_length, bool))
        teacher, student = self.teacher, self.student
        prompt, text = ids[:prompt_length].tolist(), ids[prompt_length:].tolist()
        ended = bool(text) and text[-1] in student.eos_ids
        text = text[:-1] if ended else text
        new = list(self._prompt(tuple(prompt)))
        continues = any(alignment.pieces(student.tokenizer, prompt))
        parts = alignment.pieces(student.tokenizer, text, continues=continues)
        readable = alignment.readable(b"".join(parts), teacher.tokenizer)
        new_text, new_parts = alignment.encode(teacher.tokenizer, readable.text, continues=continues)
        compatibility.check_ids("the text in the teacher's tokens", [new_text], teacher)
        # Byte by byte: how much of the new text, and how many lost bytes, there are before each end.
        raw = alignment.ends(parts)
        in_new, in_lost = (np.concatenate([[0], np.cumsum(of)]) for of in (readable.sizes, readable.lost))
        sides = alignment.align(alignment.ends(new_parts), in_new[raw])
        lost = np.concatenate([[0], in_lost[raw]])
        compared = lost[sides[1].first + sides[1].length] == lost[sides[1].first]
        if b"".join(new_parts) != readable.text.encode():
            compared = np.zeros_like(compared)
        if ended:
            sides = [
                Side(np.append(side.first, len(tokens)), np.append(side.length, 1))
                for side, tokens in zip(sides, (new_text, text), strict=True)
            ]
            compared = np.append(compared, True)
        before = len(new), len(prompt)
        shifted = [side._replace(first=side.first + count) for side, count in zip(sides, before, strict=True)]
        return _Sequence([*new, *new_text, *[min(teacher.eos_ids)] * ended], *shifted, compared)

    @functools.cached_property
    def _prompt(self):
        """The teacher's ids for a prompt of the student's: corpora have few, or one for each row."""
        teacher, student = self.teacher, self.student
        return functools.lru_cache(maxsize=1024)(
            lambda ids: alignment.prompt(student.tokenizer, ids, teacher.tokenizer, teacher.eos_ids)
        )
