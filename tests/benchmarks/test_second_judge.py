"""A second judge's precision, and the table of both."""

import jax
import numpy as np
import pytest

from benchmarks import second_judge
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import PRESETS, Model
from tests.lm.distill.test_alignment import OTHER, PIECES
from tests.lm.distill.test_reencoded import PROMPT, TEXTS, samples


def test_precision_is_the_judges_log_probability_of_the_text(tmp_path):
    """The text in the judge's ids, scored by the whole forward pass; the prompt and the end are not scored."""
    architecture = PRESETS["tiny"]
    judge = Model(architecture, model_lib.init(jax.random.key(0), architecture), (OTHER.eos_id,), tokenizer=OTHER)
    corpus = samples(tmp_path)
    total = 0.0
    for text in (TEXTS[0], TEXTS[1], TEXTS[2] + "\ufffd"):  # the last sample ends with a byte that is no text
        prompt, body = OTHER.encode(PROMPT), OTHER.encode(text)
        prompt = prompt if OTHER.bos_id is None else OTHER.with_bos(prompt)
        ids = np.array([[*prompt, *body]], np.int32)
        hidden = model_lib.forward(judge.params, architecture, ids)
        logits = np.asarray(hidden @ model_lib.head(judge.params).T, np.float64)[0, :, : judge.num_tokens]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += sum(log_probs[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1]))
    rows = corpus.rows()
    count = sum(map(len, rows.tokens)) - rows.prompt_length.sum() - rows.finished.sum()
    assert second_judge.precisions(judge, PIECES, [corpus, corpus]) == pytest.approx([total / count] * 2, rel=1e-5)


def test_table_has_both_judges():
    def row(arm, seed, temperature, precision, recall):
        return {
            "kind": "evaluation", "name": f"{arm}/seed-{seed}", "arm": arm, "tau": None, "seed": seed, "teacher": 0,
            "sample_temperature": temperature, "precision": precision, "recall": recall,
        }  # fmt: skip

    first = [
        row(arm, seed, t, precision + 0.1 * seed, recall)
        for seed in (0, 1)
        for arm, t, precision, recall in (("direct", 1.0, -8, -7), ("direct", 0.8, -6, -7.5), ("mine", 1.0, -7, -7.5))
    ]
    second = [one | {"precision": one["precision"] - 2 * (one["arm"] == "mine")} for one in first]
    lines = second_judge.table(first, second, "mine").splitlines()
    # half way on the direct student's line recall is -7.25; the second judge finds a precision that it never reaches
    assert lines[3].startswith("mine*") and "-0.250" in lines[3] and lines[3].rstrip().endswith("not reached")
