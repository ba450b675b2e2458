import itertools
import math

import numpy as np
import pytest

from kd_jax.lm import corpus
from kd_jax.lm.evaluation import estimates


def test_the_two_averages_are_what_their_names_say():
    # token log-probabilities -.1 -.2 -.3 and five times -.4: neither exponentiated nor averaged twice
    got = estimates.averages("recall", np.array([-0.6, -2.0]), np.array([3, 5]))
    assert got["recall"] == pytest.approx(-2.6 / 8)
    assert math.exp(-got["recall"]) == pytest.approx(1.3840306, rel=1e-6)
    assert got["recall_per_sequence"] == pytest.approx(-1.3)
    assert got["recall_per_sequence_se"] == pytest.approx(0.7)  # sd 1.4 / sqrt(2), over sqrt(2)
    # residuals -0.6 + 3 * 0.325 and -2 + 5 * 0.325, by hand
    assert got["recall_se"] == pytest.approx(math.sqrt(2 * (0.375**2 + 0.375**2)) / 8)


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
    assert estimates.averages("recall", values, tokens)["recall_per_sequence"] == pytest.approx(-500.9189385, abs=1e-9)
    got = estimates.averages("recall", np.array([-1.0, -np.inf, -2.0]), np.array([1, 2, 3]))
    assert got["recall"] == got["recall_per_sequence"] == -math.inf
    assert math.isnan(got["recall_se"]) and math.isnan(got["recall_per_sequence_se"])
    with pytest.raises(ValueError, match="recall: sequence 1 has NaN"):
        estimates.averages("recall", np.array([-1.0, np.nan]), np.array([1, 2]))


def test_too_few_values_have_no_standard_error():
    mean, error = estimates.per_token(np.array([-6.0]), np.array([3]))
    assert mean == -2 and math.isnan(error) and math.isnan(estimates.per_sequence(np.array([-6.0]))[1])
    assert all(math.isnan(x) for x in estimates.per_token(np.zeros(0), np.zeros(0)))


def test_share_and_lengths():
    mean, error = estimates.share(np.array([True] * 20 + [False] * 80))
    assert (mean, error) == (pytest.approx(0.2), pytest.approx(0.04))
    got = estimates.lengths(np.array([1, 2, 3, 4, 10]))
    assert (got["length_mean"], got["length_sd"]) == (4, pytest.approx(math.sqrt(50 / 4)))
    quantiles = {"0.05": 1.2, "0.25": 2, "0.5": 3, "0.75": 4, "0.95": 8.8}
    assert got["length_quantiles"] == pytest.approx(quantiles)


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


def test_numbers_of_a_few_rows():
    rows = corpus.Rows(
        index=np.arange(2), tokens=[np.array([9, 4, 5, 4, 5, 4, 2]), np.array([9, 4, 4])], length=np.array([7, 3]),
        prompt_length=np.array([1, 1]), finished=np.array([True, False]), log_prob=np.array([-6.0, -3.0]),
        sample_log_prob=np.array([-4.0, -2.0]),
    )  # fmt: skip
    under, recall = np.array([-9.0, -1.0]), np.array([-5.0, -np.inf])
    data_tokens, data = np.array([2, 3]), np.array([-3.0, -4.0])
    got = estimates.numbers(rows, under, data_tokens, recall, data, from_p_star=True)
    assert (got["num_samples"], got["num_tokens"], got["num_recall"], got["num_recall_tokens"]) == (2, 8, 2, 5)
    assert (got["precision"], got["precision_per_sequence"]) == (-10 / 8, -5)
    # of the distribution the samples are from, whatever the model itself gives them
    assert (got["entropy"], got["entropy_per_sequence"]) == (6 / 8, 3)
    assert (got["kl_model_data"], got["kl_model_data_per_sequence"]) == (4 / 8, 2)
    assert got["kl_model_data_per_sequence_se"] == pytest.approx(3)  # of the differences 5 and -1
    assert (got["recall"], got["recall_num_infinite"], got["precision_num_infinite"]) == (-math.inf, 1, 0)
    assert got["kl_data_model"] == math.inf and math.isnan(got["kl_data_model_se"])
    assert (got["data_log_prob"], got["data_log_prob_per_sequence"]) == (-7 / 5, -3.5)
    # the prompt is no part of what is counted: 1-grams 4 5 2 of eight; 4-grams 4545 5454 4542 of one row
    assert (got["distinct_1"], got["distinct_4"], got["repetition_4"]) == (3 / 8, 1, 0)
    assert got["length_mean"] == 4 and got["finished"] == 0.5

    absent = estimates.numbers(rows, under, data_tokens, None, data, from_p_star=True)
    assert {absent[name] for name in absent if name.startswith(("recall", "kl_data"))} == {None}
    foreign = estimates.numbers(rows, under, data_tokens, data, data, from_p_star=False)
    assert foreign["kl_data_model"] is None and foreign["recall"] == -7 / 5
    assert got.keys() == absent.keys() == foreign.keys()
