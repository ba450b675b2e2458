"""Shared spans of two tokenizations, and the teacher's text in the student's ids."""

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kd_jax.lm.distill import alignment
from kd_jax.lm.weights.tokenizer import Tokenizer
from tests.golden import texts


def byte_level(merges=(), special=("<end>",)):
    """A byte-level BPE tokenizer: all bytes, these merges, and special tokens after them."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return Tokenizer(backend, eos_id=backend.token_to_id("<end>"))


def sentencepiece(pieces, *, prefix=False):
    """A SentencePiece-like BPE tokenizer with bytes for what is unknown."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *pieces]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [(t[:n], t[n:]) for t in pieces for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    if prefix:
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_id=2)


WORDS = byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("c", "a"), ("ca", "t")])
OTHER = byte_level([("h", "e"), ("t", "he"), ("a", "t"), ("c", "at"), ("Ġ", "cat")], special=("<pad>", "<end>"))
PIECES = sentencepiece(["▁", "t", "h", "e", "c", "a", "th", "the", "▁the", "ca", "▁ca", "é"])


@pytest.mark.parametrize("tokenizer", [WORDS, PIECES, sentencepiece(["▁", "a", "▁a"], prefix=True)])
@pytest.mark.parametrize("name", sorted(texts.TEXTS))
def test_pieces_are_the_bytes_of_the_text(tokenizer, name):
    text = texts.TEXTS[name][:300]
    assert b"".join(alignment.pieces(tokenizer, tokenizer.encode(text, special=False))) == text.encode()


def test_special_tokens_and_ends():
    ids = [1, *PIECES.encode("a"), 2]
    assert alignment.pieces(PIECES, ids) == [b"", b"a", b""]
    assert alignment.pieces(PIECES, ids, eos_ids=(2,)) == [b"", b"a", alignment.END]


def test_spans_by_hand():
    teacher = [b"", b"the", b" ", b"c", b"at", alignment.END]
    student = [b"th", b"e", b" cat", alignment.END]
    sides = alignment.align(alignment.ends(teacher), alignment.ends(student))
    # "the", " cat", the end
    assert [side.first.tolist() for side in sides] == [[1, 2, 5], [0, 2, 3]]
    assert [side.length.tolist() for side in sides] == [[1, 3, 1], [2, 1, 1]]


@pytest.mark.parametrize("text", ["the cat", " the  cat", "é", "", "the\ncaté the"])
def test_spans_have_the_same_bytes_and_cannot_be_cut(text):
    pieces = [alignment.pieces(one, one.encode(text)) for one in (WORDS, PIECES)]
    sides = alignment.align(*map(alignment.ends, pieces))
    spans = [
        [b"".join(pieces[i][first : first + n]) for first, n in zip(*side, strict=True)] for i, side in enumerate(sides)
    ]
    assert spans[0] == spans[1] and b"".join(spans[0]) == text.encode()
    for number, span in enumerate(spans[0]):
        inner = [
            set(np.cumsum([len(p) for p in pieces[i][side.first[number] : side.first[number] + side.length[number]]]))
            for i, side in enumerate(sides)
        ]
        assert inner[0] & inner[1] == {len(span)}


def test_what_comes_after_the_last_shared_end_is_in_no_span():
    sides = alignment.align(np.array([2, 5]), np.array([2, 3, 4]))
    assert [(side.first.tolist(), side.length.tolist()) for side in sides] == [([0], [1]), ([0], [1])]


def test_shared_tokens():
    ids = alignment.shared_tokens(WORDS, PIECES, teacher_eos=(WORDS.eos_id,), student_eos=(2,))
    tables = WORDS.token_bytes, PIECES.token_bytes
    both = {tables[0][i]: (int(i), int(j)) for i, j in zip(*ids, strict=True)}
    assert all(tables[0][i] == tables[1][j] for i, j in both.values())
    assert both.pop(b"") == (WORDS.eos_id, 2)  # the ends
    # every byte is in both vocabularies, once; "a" as the piece, not as the byte
    assert len(both) == 256 + len({b"th", b"the", b" the", b"ca"})
    assert both[b"a"][1] == PIECES.backend.token_to_id("a") != PIECES.backend.token_to_id("<0x61>")
    same = alignment.shared_tokens(WORDS, WORDS, teacher_eos=(), student_eos=())
    assert all((ids == np.arange(WORDS.vocab_size)).all() for ids in same)


def test_reencoded_samples():
    ids = [1, *PIECES.encode("the cat é"), 2]
    found = alignment.reencode(PIECES, ids, WORDS)
    assert found.ids == WORDS.encode("the cat é") and (found.invalid, found.cut) == (0, 0)
    assert found.ends.tolist() == np.cumsum([len(WORDS.token_bytes[i]) for i in found.ids]).tolist()


def test_bytes_that_are_no_text_are_counted():
    byte = [PIECES.backend.token_to_id(f"<0x{b:02X}>") for b in range(256)]
    # 0xC3 alone inside, and the first two of the four bytes of an emoji at the end
    found = alignment.reencode(
        PIECES, [*PIECES.encode("a"), byte[0xC3], *PIECES.encode("a"), byte[0xF0], byte[0x9F]], WORDS
    )
    assert WORDS.decode(found.ids) == "a\ufffda" and (found.invalid, found.cut) == (1, 2)


def test_special_tokens_in_a_text_stay_text():
    found = alignment.reencode(PIECES, PIECES.encode("<end>", special=False), WORDS)
    assert WORDS.eos_id not in found.ids and WORDS.decode(found.ids) == "<end>"


def test_special_tokens_and_unknown_characters_are_counted():
    ids = [*PIECES.encode("a"), 1, *PIECES.encode("b\x04")]
    lacking = byte_level()
    vocab = {t: i for t, i in lacking.backend.get_vocab(with_added_tokens=False).items() if t != chr(256 + 4)}
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get))}
    lacking.backend.model = models.BPE(vocab=vocab, merges=[])
    tokenizer = Tokenizer(lacking.backend)
    found = alignment.reencode(PIECES, ids, tokenizer)
    assert tokenizer.decode(found.ids) == "ab\ufffd" and (found.unknown, found.special) == (1, 1)
    assert alignment.readable("b\x04é".encode(), tokenizer).sizes.tolist() == [1, 3, 1, 1]


def test_each_byte_that_is_not_utf8_is_one_sign():
    found = alignment.readable(b"\xc3a\xf0\x9f\xc3\xa9", WORDS)
    assert found.text == "\ufffda\ufffd\ufffdé" and (found.invalid, found.unknown) == (3, 0)
    assert found.lost.tolist() == [True, False, True, True, False, False] and found.sizes.tolist() == [3, 1, 3, 3, 1, 1]


SPACED = sentencepiece(["▁", "a", "▁a", "b"], prefix=True)


def test_the_space_in_front_of_a_text():
    """Such a tokenizer writes "a a" as "▁a" "▁a": the first space is not in the text, the second is."""
    first = SPACED.backend.token_to_id("▁a")
    assert alignment.reencode(SPACED, [first, first], WORDS).ids == WORDS.encode("a a")
    assert alignment.reencode(SPACED, [first, first], WORDS, continues=True).ids == WORDS.encode(" a a")
    assert alignment.reencode(WORDS, WORDS.encode(" a a"), SPACED, continues=True).ids == [first, first]
    assert alignment.reencode(WORDS, WORDS.encode("a a"), SPACED).ids == [first, first]


def test_prompts():
    assert alignment.prompt(WORDS, WORDS.encode("the"), PIECES, (2,)) == [1, *PIECES.encode("the")]
    # A prompt that is BOS alone, for models with BOS and without
    assert alignment.prompt(PIECES, [1], SPACED, (2,)) == [1] and alignment.prompt(PIECES, [1], WORDS, (7, 5)) == [5]


def test_a_tokenizer_that_changes_texts():
    """NFKC is refused before any work; NFC changes texts that few models write, and these are counted."""
    changing = byte_level()
    alignment.check_bytes("m", changing)
    changing.backend.normalizer = tokenizers.normalizers.NFC()
    alignment.check_bytes("m", changing)
    found = [alignment.reencode(PIECES, PIECES.encode(text), changing) for text in ("e\u0301", "\u00e9")]
    assert [one.changed for one in found] == [True, False] and found[0].ids == found[1].ids
    changing.backend.normalizer = tokenizers.normalizers.NFKC()
    with pytest.raises(ValueError, match="the tokenizer of m changes texts"):
        alignment.check_bytes("m", changing)
    with pytest.raises(ValueError, match="m has no tokenizer"):
        alignment.check_bytes("m", None)
