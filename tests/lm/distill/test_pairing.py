"""Batches in the tokens of a teacher with another vocabulary."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Layout
from kd_jax.lm.distill import alignment
from kd_jax.lm.distill.pairing import Pairing
from kd_jax.lm.model import PRESETS, Model
from tests.lm.distill.test_alignment import OTHER, PIECES, WORDS


def model(tokenizer):
    return Model(PRESETS["tiny"], {}, (tokenizer.eos_id,), tokenizer=tokenizer)


def pairing_of(teacher, student):
    return Pairing(model(teacher), model(student))


def batch_of(tokenizer, texts, *, prompt=(), row_length=0, parts=1):
    """The texts after a prompt, by default an end of sequence; each ends with one."""
    prompt = list(prompt) or [tokenizer.eos_id]
    rows = [np.array([*prompt, *tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    layout = Layout(len(rows), max(map(len, rows)), row_length, parts)
    return batches.arrange(rows, np.full(len(rows), len(prompt)), layout)


def spans_of(batch, teacher, student):
    """The bytes of every span that is compared, in both models' tokens."""
    found = []
    pair = batch.pair
    for place in zip(*np.nonzero(pair.mask), strict=True):
        texts = []
        for tokens, spans, tokenizer in ((pair.tokens, pair.teacher, teacher), (batch.tokens, pair.student, student)):
            first = spans.first[place]
            ids = tokens[place[:-1]][first : first + spans.length[place]].tolist()
            texts.append(b"".join(alignment.pieces(tokenizer, ids, [tokenizer.eos_id], continues=True)))
        assert texts[0] == texts[1]
        found.append((place[:-1], texts[0]))
    return found


TEXTS = ["the cat", "that the cat is", "a", "é the cat 🙂"]


@pytest.mark.parametrize("teacher, student", [(WORDS, OTHER), (PIECES, WORDS), (OTHER, PIECES)])
@pytest.mark.parametrize("layout", [{}, {"row_length": 40, "parts": 2}])
def test_spans_of_a_batch_are_its_texts(teacher, student, layout):
    batch = pairing_of(teacher, student)(batch_of(student, TEXTS, **layout))
    whole = b"".join(text for _, text in sorted(spans_of(batch, teacher, student), key=lambda one: one[0]))
    texts = [text.encode() + alignment.END for text in TEXTS]
    assert sorted(whole.split(alignment.END)) == sorted(b"".join(texts).split(alignment.END))
    pair = batch.pair
    assert pair.tokens.shape[:2] == batch.tokens.shape[:2] and (pair.segments.max(-1) == batch.segments.max(-1)).all()
    # every row of the teacher's is a text after the prompt, which for a model without BOS is an end of sequence
    starts = pair.tokens[(pair.positions == 0) & (pair.segments > 0)]
    assert (starts == (teacher.eos_id if teacher.bos_id is None else teacher.bos_id)).all() and len(starts) == 4


def test_a_prompt_is_in_no_span_and_no_token_crosses_its_end():
    prompt = [OTHER.backend.token_to_id("t")]
    batch = pairing_of(WORDS, OTHER)(batch_of(OTHER, ["he cat"], prompt=prompt))
    assert b"".join(text for _, text in spans_of(batch, WORDS, OTHER)) == b"he cat" + alignment.END
    assert batch.pair.tokens[0, 0, :2].tolist() == [*WORDS.encode("t"), *WORDS.encode("he cat")[:1]]


def test_whole_names_the_shared_token_that_a_span_is():
    pairing = pairing_of(WORDS, OTHER)
    batch = pairing(batch_of(OTHER, TEXTS[:2]))
    names = [WORDS.token_bytes[i] or alignment.END for i in pairing.shared.teacher]
    for (_, text), whole in zip(spans_of(batch, WORDS, OTHER), batch.pair.whole[batch.pair.mask], strict=True):
        assert whole == (names.index(text) if text in names else -1)
    assert (batch.pair.whole[batch.pair.mask] == -1).any()  # " the" is no token of one of them


def test_what_is_no_text_is_not_compared():
    """One byte that is not UTF-8, and one beginning of a character at the end of a row that was cut."""
    byte = [PIECES.backend.token_to_id(f"<0x{b:02X}>") for b in (0xC3, 0xF0)]
    ids = np.array([1, *PIECES.encode("the"), byte[0], *PIECES.encode(" cat"), byte[1]])
    batch = pairing_of(WORDS, PIECES)(batches.arrange([ids], np.array([1]), Layout(1, len(ids))))
    assert b"".join(text for _, text in spans_of(batch, WORDS, PIECES)) == b"the cat"
    # the teacher reads U+FFFD in their places
    assert WORDS.decode(batch.pair.tokens[0, 0][batch.pair.segments[0, 0] > 0][1:]) == "the\ufffd cat\ufffd"


def test_one_vocabulary_keeps_the_ids():
    # these ids are not those that the tokenizer gives for their text
    ids = np.array([WORDS.eos_id, *map(WORDS.backend.token_to_id, "the"), WORDS.eos_id])
    batch = pairing_of(WORDS, WORDS)(batches.arrange([ids], np.array([1]), Layout(1, len(ids))))
    assert batch.pair.tokens[0, 0, : len(ids)].tolist() == ids.tolist()
    assert batch.pair.mask.sum() == batch.mask.sum() == 4 and (batch.pair.student.length == 1).all()


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the teacher has no tokenizer"):
        Pairing(Model(PRESETS["tiny"], {}, (2,)), model(WORDS))


def padded(tokenizer):
    """With an added token that is no special one, so that texts may have it."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["[PAD]"])
    return dataclasses.replace(tokenizer, backend=backend)


def test_added_tokens_without_weights_are_in_no_event():
    teacher, student = padded(WORDS), padded(OTHER)
    sizes = WORDS.vocab_size, OTHER.vocab_size
    models = [
        model(one)._replace(architecture=dataclasses.replace(PRESETS["tiny"], vocab_size=size))
        for one, size in zip((teacher, student), sizes, strict=True)
    ]
    plain = pairing_of(WORDS, OTHER).shared
    for found, wanted, size in zip(Pairing(*models).shared[:2], plain[:2], sizes, strict=True):
        assert found.tolist() == wanted.tolist() and found.max() < size
    same = Pairing(models[0], models[0]).shared
    assert same.teacher.tolist() == same.student.tolist() == list(range(WORDS.vocab_size))
    with pytest.raises(ValueError, match="the text in the teacher's tokens has id .*PAD"):
        Pairing(*models)(batch_of(OTHER, ["the [PAD]"]))
