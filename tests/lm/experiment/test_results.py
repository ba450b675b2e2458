"""The values of single sequences that a run keeps for its errors."""

import json

import numpy as np
import pytest

from kd_jax.lm import evaluation
from kd_jax.lm.corpus import ingest
from kd_jax.reporting import units
from tests.lm.corpus.test_conversations import SMOLLM2, SYSTEM, TWO_TURNS


def test_recall_of_conversations_is_over_the_tokens_that_are_scored(tmp_path, monkeypatch):
    talks = [TWO_TURNS, [SYSTEM, *TWO_TURNS], TWO_TURNS[:2]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    corpus = ingest.from_dataset(
        tmp_path / "d.jsonl", tmp_path / "c", SMOLLM2, max_length=64, messages_column="messages"
    )
    log_probs = np.array([-9.0, -4.0, -5.0])
    monkeypatch.setattr(evaluation.paired, "_file", lambda *_: tmp_path / "scores.npz")
    np.savez(tmp_path / "scores.npz", log_prob=log_probs)
    learnt = np.array(
        [mask[start:].sum() for mask, start in zip(corpus.loss_masks(), corpus.rows().prompt_length, strict=True)]
    )
    assert (learnt < corpus.rows().length - corpus.rows().prompt_length).any()
    row = {"kind": "evaluation", "name": "m", "seed": 0, "sample_temperature": 1.0, "recall": -18 / learnt.sum()}
    row |= {"kl_data_model": None, "agreement": None}
    evaluation.paired.keep(tmp_path / "recall.npz", tmp_path, [row], corpus.rows())
    units.attach([row], tmp_path)
    assert units.by_sequence([row], "recall").mean() == pytest.approx(row["recall"], rel=1e-6)
