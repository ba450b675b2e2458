"""Chosen text: rows and entropies against their definitions, and a kill in the midst of writing."""

import math

import numpy as np
import pytest

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm.corpus.store import Arrival
from kd_jax.lm.decode import chosen_text
from kd_jax.lm.decode.chosen_text import Text


def samples(folder, log_probs, seed=0):
    """A corpus whose row i has i in its ids."""
    rng, rows = np.random.default_rng(seed), []
    for i, value in enumerate(log_probs):
        ids = np.array([1, i, *[5] * int(rng.integers(1, 6))], np.int32)
        rows.append({"index": i, "tokens": ids, "length": len(ids), "prompt_length": 1, "finished": False,
                     "log_prob": value, "sample_log_prob": value})  # fmt: skip
    settings = {
        "source": "m", "model_fingerprint": "m", "tokenizer_fingerprint": None, "dtype": "float32", "prompt": None,
        "prompt_ids": [1], "eos_ids": [0], "sample_temperature": 1.0, "top_k": None, "top_p": None, "seed": 0,
        "max_length": 9, "num_samples": len(rows), "shard_size": 7,
    }  # fmt: skip
    corpus = corpus_lib.create_or_resume(folder, settings, command="test")
    return corpus_lib.write_rows(corpus, [Arrival(rows, 0)])


def write(source, folder, text, num_train=16, num_validation=4):
    return chosen_text.write(
        source, folder, text, num_train=num_train, num_validation=num_validation, command="test", label="test"
    )


def places(corpus):
    return [int(ids[1]) for ids in corpus.rows().tokens]


@pytest.mark.parametrize("choice", ["likeliest", "least_likely"])
def test_the_share_of_highest_or_lowest_probability(tmp_path, choice):
    log_probs, text = np.random.default_rng(1).normal(-20, 5, 80), Text(choice=choice, share=0.25)
    assert text.num_samples(16, 4) == 80
    source = samples(tmp_path / "all", log_probs)
    corpus, surprise, tokens = write(source, tmp_path / "chosen", text)
    expected = np.argsort(log_probs)[-20:] if choice == "likeliest" else np.argsort(log_probs)[:20]
    assert places(corpus) == sorted(expected) and corpus.rows().index.tolist() == list(range(20))
    # the density of the chosen is p / share
    np.testing.assert_allclose(surprise, -(log_probs[sorted(expected)[:16]] - math.log(0.25)))
    rows = corpus.rows()
    assert tokens.tolist() == (rows.length - rows.prompt_length)[:16].tolist()
    np.testing.assert_allclose(rows.sample_log_prob, log_probs[sorted(expected)])


def test_repeated_rows_and_fresh_ones_for_validation(tmp_path):
    text = Text(choice="repeated", share=0.25)
    assert text.num_samples(16, 4) == 8
    source = samples(tmp_path / "all", np.linspace(-9, -2, 8))
    corpus, surprise, _ = write(source, tmp_path / "chosen", text)
    assert places(corpus) == [0, 1, 2, 3] * 4 + [4, 5, 6, 7]
    np.testing.assert_allclose(surprise, math.log(4))


def test_entropy_of_chosen_text_is_exact():
    """Of a distribution over few texts, in closed form."""
    rng = np.random.default_rng(0)
    p = np.sort(rng.dirichlet(np.ones(40)))
    drawn = rng.choice(40, 200_000, p=p)
    text, count = Text(choice="least_likely", share=0.3), 60_000
    kept = drawn[chosen_text.chosen(np.log(p[drawn]), text, count, 0)]
    surprise = math.log(text.share) - np.log(p[kept])
    # the texts of lowest probability whose mass is 0.3, the last of them in part
    mass = np.clip(0.3 - np.concatenate([[0], np.cumsum(p)[:-1]]), 0, p) / 0.3
    # of the last text a part is taken, whose density is that of the whole text
    entropy = -(mass * (np.log(p) - math.log(0.3))).sum()
    assert surprise.mean() == pytest.approx(entropy, abs=0.01)


def test_a_kill_resumes_to_the_same_rows(tmp_path):
    source = samples(tmp_path / "all", np.random.default_rng(1).normal(-20, 5, 80))
    text = Text(choice="likeliest", share=0.25)
    straight, _, _ = write(source, tmp_path / "straight", text)

    class Stop(Exception):
        pass

    def stopped(rows, tokens):
        raise Stop

    settings = straight.manifest["settings"]
    part = corpus_lib.create_or_resume(tmp_path / "killed", settings, command="test")
    taken = chosen_text.chosen(source.columns("sample_log_prob")["sample_log_prob"], text, 16, 4)
    with pytest.raises(Stop):
        corpus_lib.write_rows(part, chosen_text._arrivals(source, taken, 0, 7), stopped)
    assert corpus_lib.open(tmp_path / "killed").num_rows == 7
    again, _, _ = write(source, tmp_path / "killed", text)
    assert corpus_lib.fingerprint(again) == corpus_lib.fingerprint(straight)
    assert corpus_lib.fingerprint(again) != corpus_lib.fingerprint(source)


def test_names_of_texts():
    assert Text().label == "" and Text(rows=32).label == "rows-32"
    assert Text(choice="repeated", share=0.25).label == "repeated-0.25"
    assert Text(32, "likeliest", 0.1).label == "rows-32-likeliest-0.1"
