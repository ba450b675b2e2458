"""A teacher's samples as a corpus in the student's ids."""

from types import SimpleNamespace

import numpy as np

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm.distill import reencoded
from kd_jax.lm.model import PRESETS, Model
from tests.lm.distill.test_alignment import OTHER, PIECES

PROMPT, TEXTS = "the", [" cat the", " the cat at the cat", " é cat cat cat cat at"]
MAX_LENGTH = 9


def samples(folder):
    """The texts in PIECES' ids after BOS and the prompt; the last one ends inside a character, without an end."""
    prompt = [PIECES.bos_id, *PIECES.encode(PROMPT)]
    rows = [[*prompt, *PIECES.encode(text), PIECES.eos_id] for text in TEXTS]
    half = PIECES.backend.token_to_id("<0xF0>"), PIECES.backend.token_to_id("<0xFF>")
    rows[2] = [*rows[2][:-1], half[1], half[0]]
    # a sample without an end is as long as can be
    assert len(rows[2]) == max(map(len, rows))
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((3, lengths.max()), np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
    settings = {
        "source": "teacher", "model_fingerprint": "0", "tokenizer_fingerprint": None, "dtype": "float32",
        "prompt": None, "prompt_ids": prompt, "eos_ids": [2], "sample_temperature": 1.0, "top_k": None, "top_p": None,
        "seed": 0, "max_length": int(lengths.max()), "num_samples": 3, "shard_size": 2,
    }  # fmt: skip
    zeros = np.zeros(tokens.shape, np.float32)
    batch = SimpleNamespace(
        index=np.arange(3), tokens=tokens, lengths=lengths, prompt_lengths=np.full(3, len(prompt), np.int32),
        finished=np.array([True, True, False]), log_probs=zeros, sample_log_probs=zeros, utilisation=1.0, steps=1,
    )  # fmt: skip
    return corpus_lib.write(corpus_lib.create_or_resume(folder, settings, command="test"), [batch])


def test_rows_are_the_texts_in_the_students_ids(tmp_path):
    student = Model(PRESETS["tiny"], {}, (OTHER.eos_id,), tokenizer=OTHER)
    prompt, teachers = OTHER.encode(PROMPT), samples(tmp_path / "teacher")

    def write():
        return reencoded.write(
            teachers, PIECES, student, tmp_path / "student", student_source="s", prompt_ids=prompt,
            max_length=MAX_LENGTH, command="test",
        )  # fmt: skip

    corpus = write()
    rows = corpus.rows()
    wanted = [[*prompt, *OTHER.encode(text), OTHER.eos_id] for text in TEXTS]
    wanted[2] = [*prompt, *OTHER.encode(TEXTS[2] + "\ufffd")]
    assert len(wanted[0]) <= MAX_LENGTH < len(wanted[1])
    assert [row.tolist() for row in rows.tokens] == [row[:MAX_LENGTH] for row in wanted]
    assert rows.finished.tolist() == [True, False, False] and (rows.prompt_length == len(prompt)).all()
    assert corpus.manifest["reencoded"] == {
        "invalid_bytes": 1, "cut_bytes": 1, "unknown_characters": 0, "special_tokens": 0, "changed_rows": 0,
        "cut_rows": sum(len(row) > MAX_LENGTH for row in wanted),
    }  # fmt: skip
    assert (corpus.kind, corpus.manifest["settings"]["tokenizer_fingerprint"]) == ("data", OTHER.fingerprint)
    assert corpus_lib.fingerprint(write()) == corpus_lib.fingerprint(corpus)  # finished: nothing is written again
