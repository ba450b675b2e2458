"""One text in two tokenizations: shared spans, shared tokens, and the text of one model in another's ids.

All of it is done on bytes. The end of a sequence counts as a piece of text that both have.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kd_jax.lm.weights.tokenizer import Tokenizer, difference

# Stands for the end of a sequence. It is not UTF-8, and no token has it.
END = b"\xff\xfeend"
# What Python's "surrogateescape" makes of a byte that is not UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")
# Stands for what is no text, or cannot be written.
_SIGN = "\ufffd"
# What a tokenizer must keep: case, accents, runs of spaces, line breaks, compatibility forms, other scripts. It is in
# NFC, which some tokenizers (Qwen's) make of every text.
_PROBE = "The CAT  is\n\tÀ é 12345 \ufb01 ² \u3000漢字 ⴰ 🙂 "


class Reencoded(NamedTuple):
    """The text of one model in another's ids.

    Attributes:
        ids: of the other model.
        ends: int [ids], the end of each in the text's bytes.
        invalid: bytes that are not UTF-8; each stands as U+FFFD in the text.
        cut: bytes of a character that the end of the text has cut; they are left out.
        unknown: characters that the other tokenizer has no tokens for; each stands as U+FFFD.
        special: special tokens, which are no text and are left out.
        changed: whether the other tokenizer normalises the text (NFC, for instance), so that other bytes stand in it.
    """

    ids: list[int]
    ends: np.ndarray
    invalid: int
    cut: int
    unknown: int
    special: int
    changed: bool


class Readable(NamedTuple):
    """Bytes as text, with U+FFFD for what is no text and for what the tokenizer has no ids for.

    Attributes:
        text: the text.
        sizes: int [bytes], how many bytes of the text stand for each byte.
        lost: bool [bytes], for which of them U+FFFD stands.
        invalid: bytes that are not UTF-8; each has a sign of its own.
        unknown: characters that the tokenizer has no ids for.
    """

    text: str
    sizes: np.ndarray
    lost: np.ndarray
    invalid: int
    unknown: int


class Side(NamedTuple):
    """Spans in one tokenization. A span is a piece of text whose ends both tokenizations share.

    Attributes:
        first: int [span], position of its first token.
        length: int [span], how many tokens it is.
    """

    first: np.ndarray
    length: np.ndarray


def pieces(
    tokenizer: Tokenizer, ids: Sequence[int], eos_ids: Sequence[int] = (), *, continues: bool = False
) -> list[bytes]:
    """The bytes of each id; of an end of sequence `END`, of other special tokens none.

    Args:
        tokenizer: of the ids.
        ids: a text.
        eos_ids: ids that end a sequence.
        continues: the ids go on a text that began before them.
    """
    table, ends = tokenizer.token_bytes, set(eos_ids)
    out = [END if i in ends else table[i] for i in ids]
    # The space that such a tokenizer puts in front of a text is in its tokens, and not in the text.
    if tokenizer.adds_space and not continues:
        start = next((n for n, piece in enumerate(out) if piece), None)
        if start is not None and out[start].startswith(b" "):
            out[start] = out[start][1:]
    return out


def encode(tokenizer: Tokenizer, text: str, *, continues: bool = False) -> tuple[list[int], list[bytes]]:
    """The ids of a text and the bytes of each; what looks like a special token is text.

    Args:
        tokenizer: whose ids are wanted.
        text: of characters that it knows, see `readable`.
        continues: the text goes on one that began before it.
    """
    # Such a tokenizer adds a space in front: here it is the space that the text begins with.
    space = continues and tokenizer.adds_space and text[:1] == " " and len(text) > 1
    ids = tokenizer.encode(text[1:] if space else text, special=False)
    return ids, pieces(tokenizer, ids, continues=space)


def check_bytes(label: str, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError, naming the model, for one without a tokenizer, or whose tokenizer changes plain texts.

    Args:
        label: what the message calls the model.
    """
    if tokenizer is None:
        raise ValueError(f"{label} has no tokenizer, which another vocabulary needs")
    text = readable(_PROBE.encode(), tokenizer).text
    if b"".join(encode(tokenizer, text)[1]) != text.encode():
        raise ValueError(f"the tokenizer of {label} changes texts (as by lower case, or NFKC): spans cannot be aligned")


def readable(raw: bytes, tokenizer: Tokenizer) -> Readable:
    """Bytes as a text that a tokenizer has ids for.

    Args:
        raw: the bytes of one model's tokens.
        tokenizer: of the other model.
    """
    text = raw.decode("utf-8", "surrogateescape")
    if not _ESCAPED.search(text) and tokenizer.lost_byte(text) is None:
        return Readable(text, np.ones(len(raw), np.int64), np.zeros(len(raw), bool), 0, 0)
    characters, sizes, lost, invalid, unknown = [], [], [], 0, 0
    for character in text:
        size, is_byte = len(character.encode("utf-8", "surrogateescape")), bool(_ESCAPED.match(character))
        # a lone surrogate cannot be asked for: it has no bytes in UTF-8
        gone = is_byte or tokenizer.lost_byte(character) is not None
        invalid, unknown = invalid + is_byte, unknown + (gone and not is_byte)
        characters.append(_SIGN if gone else character)
        # What stands for a character belongs to the token with its last byte.
        sizes += [0] * (size - 1) + [len(_SIGN.encode())] if gone else [1] * size
        lost += [gone] * size
    return Readable("".join(characters), np.array(sizes, np.int64), np.array(lost), invalid, unknown)


def align(teacher: np.ndarray, student: np.ndarray) -> tuple[Side, Side]:
    """The shared spans of a text, as short as they can be, in both tokenizations.

    Tokens without bytes (BOS) are in no span, unless in its middle.

    Args:
        teacher, student: int [token], where each token ends in the text, in bytes.
    """
    text = [np.diff(end, prepend=0) > 0 for end in (teacher, student)]
    # A span ends where a token ends on both sides.
    shared = np.intersect1d(teacher[text[0]], student[text[1]])
    sides = []
    for end, has_bytes in zip((teacher, student), text, strict=True):
        # A token without bytes ends where the one before it does: it neither begins nor ends a span.
        places, span = np.flatnonzero(has_bytes), np.searchsorted(shared, end[has_bytes])
        numbers = np.arange(len(shared))
        first = places[np.searchsorted(span, numbers)]
        last = places[np.searchsorted(span, numbers, side="right") - 1]
        sides.append(Side(first.astype(np.int32), (last - first + 1).astype(np.int32)))
    return sides[0], sides[1]


def ends(parts: Sequence[bytes]) -> np.ndarray:
    """Where each of the `pieces` ends in the text, in bytes."""
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


def shared_tokens(
    teacher: Tokenizer, student: Tokenizer, *, teacher_eos: Sequence[int], student_eos: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the tokens that stand for the same bytes in both vocabularies, and of the first ends of sequence.

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
    table = dict(reversed([(piece, i) for i, piece in enumerate(tokenizer.token_bytes) if piece and i not in eos]))
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        piece = tokenizer.token_bytes[i]
        if len(piece) == 1 and not token.startswith("<0x"):
            table[piece] = i
    return table | ({END: min(eos)} if eos else {})


def reencode(source: Tokenizer, ids: Sequence[int], target: Tokenizer, *, continues: bool = False) -> Reencoded:
    """A text in the ids of another tokenizer.

    Args:
        source: tokenizer of the ids.
        ids: a text, without the end of sequence.
        target: whose ids are wanted.
        continues: the ids go on a text that began before them.
    """
    parts = pieces(source, ids, continues=continues)
    raw = b"".join(parts)
    # A decoder that may go on: what is left over at the end is the beginning of a character.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    cut = len(decoder.getstate()[0])
    text = readable(raw[: len(raw) - cut], target)
    new, new_parts = encode(target, text.text, continues=continues)
    return Reencoded(
        ids=new, ends=ends(new_parts), invalid=text.invalid, cut=cut,
        unknown=text.unknown, special=sum(not source.token_bytes[i] for i in ids),
        changed=b"".join(new_parts) != text.text.encode(),
    )  # fmt: skip


def prompt(source: Tokenizer, ids: Sequence[int], target: Tokenizer, eos_ids: Sequence[int]) -> list[int]:
    """A prompt in the ids of another tokenizer: its BOS, if it has one, and the text.

    Where there is neither, it is an end of sequence, which separates texts in the training of such models.

    Args:
        source: tokenizer of the ids.
        ids: the prompt.
        target: whose ids are wanted.
        eos_ids: the ends of sequence of the other model.
    """
    new = reencode(source, ids, target).ids
    new = new if target.bos_id is None else target.with_bos(new)
    return new or [min(eos_ids)]
