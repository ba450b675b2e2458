"""One text in two tokenizations: shared spans, shared tokens, and a teacher's samples in a student's ids.

All of it is done on bytes. The end of a sequence counts as a piece of text that both have.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kd_jax.lm.weights.tokenizer import Tokenizer, difference

# Stands for the end of a sequence. It is not UTF-8, and no token has it.
END = b"\xff\xfeend"


class Reencoded(NamedTuple):
    """A text of the teacher in the student's ids.

    Attributes:
        ids: the student's.
        ends: int [ids], the end of each in the text's bytes.
        invalid: bytes that are not UTF-8 and stand as U+FFFD in the text.
        cut: bytes of a character that the end of the teacher's text has cut; they are left out.
    """

    ids: list[int]
    ends: np.ndarray
    invalid: int
    cut: int


class Side(NamedTuple):
    """Spans in one tokenization. A span is a piece of text whose ends both tokenizations share.

    Attributes:
        first: int [span], position of its first token.
        length: int [span], how many tokens it is.
    """

    first: np.ndarray
    length: np.ndarray


def pieces(tokenizer: Tokenizer, ids: Sequence[int], eos_ids: Sequence[int] = ()) -> list[bytes]:
    """The bytes of each id; of other special tokens none, of an end of sequence `END`."""
    table, ends = tokenizer.token_bytes, set(eos_ids)
    out = [END if i in ends else table[i] for i in ids]
    # The space that such a tokenizer puts in front is in its tokens, and not in the text.
    if tokenizer.adds_space:
        start = next((n for n, piece in enumerate(out) if piece), None)
        if start is not None and out[start].startswith(b" "):
            out[start] = out[start][1:]
    return out


def align(teacher: Sequence[bytes], student: Sequence[bytes]) -> tuple[Side, Side]:
    """The shared spans of a text, as short as they can be, in both tokenizations.

    Tokens without bytes (BOS) are in no span.

    Args:
        teacher, student: `pieces` of both; they must be the same bytes when joined.
    Raises: ValueError, naming the byte, where they are not.
    """
    whole, other = b"".join(teacher), b"".join(student)
    if whole != other:
        same = next(
            (i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), min(map(len, (whole, other)))
        )
        raise ValueError(
            f"the texts differ from byte {same}: {whole[same : same + 20]!r} of the teacher, "
            f"{other[same : same + 20]!r} of the student"
        )
    ends = [np.cumsum([len(piece) for piece in side], dtype=np.int64) for side in (teacher, student)]
    # A span ends where a token ends on both sides.
    shared = np.intersect1d(*(np.unique(end[end > 0]) for end in ends))
    sides = []
    for side, end in zip((teacher, student), ends, strict=True):
        # A token without bytes ends where the one before it does, and would be counted with its span.
        text = np.array([bool(piece) for piece in side], bool)
        span = np.searchsorted(shared, end[text])
        first = np.flatnonzero(text)[np.searchsorted(span, np.arange(len(shared)))]
        sides.append(Side(first.astype(np.int32), np.bincount(span, minlength=len(shared)).astype(np.int32)))
    return sides[0], sides[1]


def shared_tokens(
    teacher: Tokenizer, student: Tokenizer, *, teacher_eos: Sequence[int], student_eos: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the tokens that stand for the same bytes in both vocabularies, and of the first end of sequence.

    Of several ids with the same bytes one counts: if possible, one that is not a single-byte token.
    """
    if difference(teacher, student, "", "") is None:
        ids = np.arange(teacher.vocab_size, dtype=np.int32)
        return ids, ids
    tables = [_by_bytes(tokenizer, eos) for tokenizer, eos in ((teacher, teacher_eos), (student, student_eos))]
    both = [piece for piece in tables[0] if piece in tables[1]]
    ids = [np.array([table[piece] for piece in both], np.int32) for table in tables]
    return ids[0], ids[1]


def _by_bytes(tokenizer: Tokenizer, eos: Sequence[int]) -> dict[bytes, int]:
    # Reversed, so that the first of several ids with the same bytes is the one that stays.
    table = dict(reversed([(piece, i) for i, piece in enumerate(tokenizer.token_bytes) if piece]))
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        piece = tokenizer.token_bytes[i]
        if len(piece) == 1 and not token.startswith("<0x"):
            table[piece] = i
    return table | ({END: min(eos)} if eos else {})


def reencode(teacher: Tokenizer, ids: Sequence[int], student: Tokenizer) -> Reencoded:
    """A teacher's sample in the student's ids. Special tokens of the teacher are no text; ends are the caller's."""
    text = b"".join(pieces(teacher, ids))
    # a decoder that may go on: what is left over at the end is the beginning of a character
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoded = decoder.decode(text)
    cut = len(decoder.getstate()[0])
    text_again = decoded.encode()
    invalid = _num_invalid(text[: len(text) - cut])
    student_ids = student.encode(decoded, special=False)
    ends = np.cumsum([len(piece) for piece in pieces(student, student_ids)], dtype=np.int64)
    if (int(ends[-1]) if len(ends) else 0) != len(text_again):
        raise ValueError(f"the student's tokenizer changes the text {decoded[:40]!r}: its ids stand for other bytes")
    return Reencoded(student_ids, ends, invalid, cut)


def _num_invalid(text: bytes) -> int:
    """Bytes that are no part of a character in UTF-8."""
    return len(text) - len(text.decode("utf-8", "ignore").encode())
