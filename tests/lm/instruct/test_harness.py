"""Models for lm-evaluation-harness: the same results as its own class for transformers, on the same weights."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from kd_jax.lm import decode, weights
from tests.faults.model_files import build_tokenizer
from tests.lm.weights.checkpoints import TINY, write_folder

pytestmark = pytest.mark.parity
lm_eval = pytest.importorskip("lm_eval")
TEXTS = ["", "the cat", "One, two; and then", "x", "ab\n cd", "Zum Beispiel: Größe"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(folder)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    shape = dataclasses.replace(TINY, vocab_size=size, max_position_embeddings=64)
    return write_folder(folder, architecture=shape, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=None)


@pytest.fixture(scope="module")
def models(folder):
    from lm_eval.models.huggingface import HFLM

    from kd_jax.lm.instruct.harness import HarnessModel

    # it does not count the last token, which is predicted but not read
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, max_length=63)
    return HarnessModel(weights.load(folder)), theirs


def requests(kind, *arguments):
    return [lm_eval.api.instance.Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_log_likelihoods(models):
    pairs = [(text, " and more of it" * n) for text in TEXTS for n in (1, 2)]
    # longer than the model's 64 positions
    pairs.append(("a long context " * 20, "with an end"))
    ours, theirs = (model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for model in models)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], rtol=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_whole_texts_in_windows(models):
    texts = [(text,) for text in (*TEXTS[1:], "a text of more than one window " * 12)]
    ours, theirs = (model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for model in models)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_greedy_answers_and_stop_strings(models):
    settings = {"until": ["q"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(text, settings) for text in TEXTS[1:]] + [("the cat", {**settings, "until": [], "max_gen_toks": 5})]
    ours, theirs = (model.generate_until(requests("generate_until", *prompts), disable_tqdm=True) for model in models)
    assert ours == theirs and any(ours)


def test_generation_settings_are_those_of_the_harness(models):
    settings = [
        {"until": [], "max_new_tokens": 3, "do_sample": False}, {"until": [], "max_tokens": 4},
        # of one candidate, whatever the temperature
        {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 9.0, "top_k": 1},
        {"until": [], "max_gen_toks": 5, "temperature": 9.0, "min_p": 1.0},
    ]  # fmt: skip
    prompts = [("the cat", one) for one in settings]
    ours, theirs = (model.generate_until(requests("generate_until", *prompts), disable_tqdm=True) for model in models)
    assert ours == theirs and all(ours)
    with pytest.raises(ValueError, match="generation setting repetition_penalty=1.3 is not one of do_sample, "):
        models[0].generate_until(requests("generate_until", ("x", {"until": [], "repetition_penalty": 1.3})))


def test_greedy_continuations_are_known_as_such(models):
    model, _ = models
    ids = model.tok_encode("the cat")
    tokens, lengths, _ = decode.generate(model.model, ids, 1, max_length=len(ids) + 4, top_k=1)
    greedy = tokens[0, len(ids) : lengths[0]].tolist()
    other = [*greedy[:-1], greedy[-1] ^ 1]
    results = model._loglikelihood_tokens([(None, ids, greedy), (None, ids, other)])
    assert [is_greedy for _, is_greedy in results] == [True, False] and results[0][0] > results[1][0]


def test_a_task_from_start_to_end(models, tmp_path):
    rows = [{"question": text, "answer": " yes"} for text in TEXTS[1:]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {
        "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.json")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_target": 0, "doc_to_choice": [" yes", " no"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    ours, theirs = (lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0) for model in models)
    assert ours["results"]["local"]["acc,none"] == theirs["results"]["local"]["acc,none"]
