import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kd_jax.lm.corpus import Arrival, create_or_resume, shards, write_rows
from kd_jax.lm.evaluation import estimates


def test_the_two_averages_are_what_their_names_say():
    # token log-probabilities -.1 -.2 -.3 and five times -.4: neither exponentiated nor averaged twice
    ratio, ratio_se, mean, mean_se = estimates.both_averages(np.array([-0.6, -2.0]), np.array([3, 5]))
    assert ratio == pytest.approx(-2.6 / 8) and math.exp(-ratio) == pytest.approx(1.3840306, rel=1e-6)
    assert mean == pytest.approx(-1.3) and mean_se == pytest.approx(0.7)  # sd 1.4 / sqrt(2), over sqrt(2)
    # residuals -0.6 + 3 * 0.325 and -2 + 5 * 0.325, by hand
    assert ratio_se == pytest.approx(math.sqrt(2 * (0.375**2 + 0.375**2)) / 8)


@pytest.mark.long
def test_standard_errors_are_the_spread_over_repeats():
    random, repeats, count = np.random.default_rng(0), 3000, 150
    tokens = random.geometric(0.15, (repeats, count))
    # values that depend on the lengths in a way that is not linear, so that the ratio's error is not the mean's
    values = -0.7 * tokens - 0.02 * tokens**2 + random.normal(0, 2, tokens.shape)
    for function in (estimates.per_token, lambda values, _: estimates.per_sequence(values)):
        means, errors = np.array([function(*pair) for pair in zip(values, tokens, strict=True)]).T
        assert errors.mean() == pytest.approx(means.std(), rel=0.05)


def test_equal_lengths_make_the_averages_one():
    values = np.random.default_rng(1).normal(-9, 2, 40)
    ratio, error = estimates.per_token(values, np.full(40, 7))
    mean, mean_error = estimates.per_sequence(values)
    assert (7 * ratio, 7 * error) == (pytest.approx(mean, rel=1e-12), pytest.approx(mean_error, rel=1e-12))
    assert mean == pytest.approx(values.mean(), rel=1e-14)
    assert mean_error == pytest.approx(values.std(ddof=1) / math.sqrt(40), rel=1e-13)


def test_a_far_value_is_kept_and_an_infinite_one_is_no_nan():
    values, tokens = np.array([-5000.9189385, *[-0.9189385] * 9]), np.ones(10, int)
    assert estimates.both_averages(values, tokens)[2] == pytest.approx(-500.9189385, abs=1e-9)
    ratio, ratio_se, mean, mean_se = estimates.both_averages(np.array([-1.0, -np.inf, -2.0]), np.array([1, 2, 3]))
    assert ratio == mean == -math.inf and math.isnan(ratio_se) and math.isnan(mean_se)


def test_too_few_values_have_no_standard_error():
    mean, error = estimates.per_token(np.array([-6.0]), np.array([3]))
    assert mean == -2 and math.isnan(error) and math.isnan(estimates.per_sequence(np.array([-6.0]))[1])
    assert all(math.isnan(x) for x in estimates.per_token(np.zeros(0), np.zeros(0)))


def test_share_and_lengths():
    mean, error = estimates.share(np.array([True] * 20 + [False] * 80))
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(0.04))
    mean, sd, quantiles = estimates.lengths(np.array([1, 2, 3, 4, 10]))
    assert (mean, sd) == (4, pytest.approx(math.sqrt(50 / 4)))
    assert quantiles == pytest.approx({"0.05": 1.2, "0.25": 2, "0.5": 3, "0.75": 4, "0.95": 8.8})


def test_a_difference_has_the_errors_of_both():
    random = np.random.default_rng(3)
    sets = [(random.normal(size=40), random.integers(1, 9, 40)) for _ in range(2)]
    (a, a_se), (b, b_se) = (estimates.per_token(*pair) for pair in sets)
    assert estimates.difference(sets[0], sets[1]) == (a - b, pytest.approx(math.hypot(a_se, b_se)))


def test_calibration_error_by_hand():
    # 4 tokens of confidence 0.2 on average, 1 right; 6 of 0.9, 3 right: (|1 - 0.8| + |3 - 5.4|) / 10
    assert estimates.calibration_error(np.array([[4, 0.8, 1], [0, 0, 0], [6, 5.4, 3]])) == pytest.approx(0.26)
    assert math.isnan(estimates.calibration_error(np.zeros((15, 3))))


def grams(row, n):
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def test_distinct_and_repetition_by_hand():
    rows = [np.array([5, 6, 5, 6, 5, 6]), np.array([6, 5]), np.array([], int)]
    # 1-grams 5 6; 2-grams 56 65, the second row's among them; 3-grams 565 656; 4-grams 5656 6565 5656
    assert estimates.distinct(rows) == [2 / 8, 2 / 6, 2 / 4, 2 / 3]
    # only the first row has 4-grams; of 2-grams it has 5, two of them different, and the second row one
    assert estimates.repetition(rows) == pytest.approx(1 / 3)
    assert estimates.repetition(rows, 2) == pytest.approx((3 / 5 + 0) / 2)
    short = [np.array([1]), np.array([2, 1])]
    assert estimates.distinct(short)[:2] == [2 / 3, 1]
    assert all(math.isnan(x) for x in [*estimates.distinct(short)[2:], estimates.repetition(short)])


def test_distinct_and_repetition_of_random_rows():
    random = np.random.default_rng(2)
    ids = np.array([0, 3, 49151, 2**31 - 1], np.int32)
    rows = [ids[random.integers(0, 4, length)] for length in random.integers(0, 25, 60)]
    for n in (1, 2, 3, 4):
        each = [grams(row.tolist(), n) for row in rows]
        every = list(itertools.chain(*each))
        assert estimates.distinct(rows, n)[-1] == len(set(every)) / len(every)
        expected = np.mean([1 - len(set(some)) / len(some) for some in each if some])
        assert estimates.repetition(rows, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_the_entropy_of_a_corpus_reads_no_tokens(tmp_path, monkeypatch):
    from tests.lm.evaluation.test_precision_recall import drawn, random_model

    corpus = drawn(random_model(0), tmp_path / "c", 40, shard_size=16)
    rows, read, columns = corpus.rows(), shards.read, []
    monkeypatch.setattr(
        shards, "read", lambda folder, shard, names: columns.append(names) or read(folder, shard, names)
    )
    expected = estimates.per_token(-rows.sample_log_prob, rows.length - rows.prompt_length)
    assert estimates.corpus_entropy(corpus) == expected
    assert columns == [["length", "prompt_length", "sample_log_prob"]] * 3


ENTROPY = """
import resource, sys
from kd_jax.lm import corpus
from kd_jax.lm.evaluation import estimates

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
before = peak()
print(*estimates.corpus_entropy(corpus.open(sys.argv[1])), (peak() - before) / 1024)
"""


@pytest.mark.long
def test_the_entropy_of_a_large_corpus_takes_little_memory(tmp_path):  # N19
    rows, length, block = 200_000, 512, 1000  # 390 MiB of ids
    settings = {
        "source": "m", "model_fingerprint": "a", "prompt_ids": [1], "eos_ids": [2], "max_length": length,
        "num_samples": rows, "shard_size": 1000, "seed": 0,
    }  # fmt: skip
    tokens = np.random.default_rng(0).integers(3, 49152, (block, length), dtype=np.int32)
    one = {"length": length, "prompt_length": 1, "finished": False, "log_prob": -1.0}
    arrivals = (
        Arrival([one | {"index": i + j, "tokens": tokens[j], "sample_log_prob": -511.0 * (j % 3)}
                 for j in range(block)], block * length)
        for i in range(0, rows, block)
    )  # fmt: skip
    write_rows(create_or_resume(tmp_path / "c", settings, command="test"), arrivals)
    done = subprocess.run(
        [sys.executable, "-c", ENTROPY, tmp_path / "c"], cwd=Path(__file__).parents[3], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    entropy, error, mebibytes = map(float, done.stdout.split())
    assert entropy == pytest.approx(np.mean(np.arange(block) % 3), rel=1e-12) and 0 < error < 0.01
    assert mebibytes < 200
