"""Intervals against scipy.stats and against their own promise: 95 % of them hold the truth."""

import numpy as np
import pytest
from scipy import stats

from kd_jax.metrics import statistics


def coverage(simulate, interval, repeats=2000):
    """The share of intervals that hold 0, the true mean."""
    rng = np.random.default_rng(0)
    intervals = [interval(simulate(rng)) for _ in range(repeats)]
    return np.mean([i.low <= 0 <= i.high for i in intervals])


def crossed(rng, units, sequences, unit_sd, sequence_sd, noise_sd):
    unit, sequence = rng.normal(0, unit_sd, (units, 1)), rng.normal(0, sequence_sd, sequences)
    return unit + sequence + rng.normal(0, noise_sd, (units, sequences))


def test_t_interval_and_its_p_value_equal_scipys():
    values = np.random.default_rng(0).normal(0.3, 1, 7)
    got, peer = statistics.t_interval(values), stats.ttest_1samp(values, 0)
    np.testing.assert_allclose((got.low, got.high), peer.confidence_interval(), rtol=1e-12)
    np.testing.assert_allclose((got.error, got.dof), (stats.sem(values), 6), rtol=1e-12)
    np.testing.assert_allclose(got.p_value, peer.pvalue, rtol=1e-12)
    other = values + np.random.default_rng(1).normal(0, 0.1, 7)
    np.testing.assert_allclose(statistics.t_interval(values - other).p_value, stats.ttest_rel(values, other).pvalue)


def test_what_the_values_do_not_tell_is_nan():
    assert np.isnan(statistics.t_interval([1.0])[1:4]).all() and np.isnan(statistics.t_interval([1.0]).p_value)
    broken = statistics.t_interval([1.0, -np.inf, 2.0])
    assert broken.mean == -np.inf and np.isnan(broken.error)
    assert statistics.t_interval([0.0, 0.0]).p_value == 1 and statistics.t_interval([2.0, 2.0]).p_value == 0


@pytest.mark.parametrize("n", [2, 3, 5, 50])
def test_t_intervals_cover(n):
    assert 0.93 < coverage(lambda rng: rng.normal(0, 2, n), statistics.t_interval) < 0.97


def test_t_intervals_of_a_skewed_quantity_cover_at_a_thousand_seeds():
    assert 0.93 < coverage(lambda rng: 1 - rng.exponential(1, 1000), statistics.t_interval) < 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "units, sequences, sds",
    [(2, 50, (0.3, 1, 1)), (3, 100, (1, 1, 1)), (5, 30, (1, 0.3, 2)), (8, 8, (1, 1, 1)), (3, 400, (0.02, 1, 1))],
)
def test_two_way_intervals_cover_and_err_on_the_long_side(units, sequences, sds):
    assert 0.93 < coverage(lambda rng: crossed(rng, units, sequences, *sds), statistics.two_way, 800) < 0.985


def test_two_way_sees_what_one_way_does_not():
    # Ten units on the same 50 sequences: the sequences' own spread is in no difference between units.
    simulate = lambda rng: crossed(rng, 10, 50, 0.1, 2, 0.5)  # noqa: E731
    assert coverage(simulate, lambda values: statistics.t_interval(values.mean(1)), 500) < 0.6
    assert coverage(simulate, statistics.two_way, 500) > 0.93


def test_two_way_variance_is_the_random_effects_models():
    rng, errors, means = np.random.default_rng(0), [], []
    for _ in range(1000):
        got = statistics.two_way(crossed(rng, 6, 40, 1, 2, 1))
        errors.append(got.error**2)
        means.append(got.mean)
    truth = 1 / 6 + 4 / 40 + 1 / 240
    np.testing.assert_allclose(np.var(means), truth, rtol=0.15)
    np.testing.assert_allclose(np.mean(errors), truth, rtol=0.08)


def test_holm():
    got = statistics.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(got, [0.03, 0.06, 0.06, 0.02])  # Holm 1979, worked by hand
    np.testing.assert_allclose(statistics.holm([0.9, 0.5]), [1, 1])
    # the chance of any false rejection among five true hypotheses
    p = np.random.default_rng(0).uniform(size=(2000, 5))
    any_rejected = np.mean([statistics.holm(row).min() < 0.05 for row in p])
    assert 0.035 < any_rejected < 0.065


@pytest.mark.parametrize("shared", [True, False])
def test_bootstrap_error_is_the_formulas_with_many_teachers(shared):
    rng = np.random.default_rng(0)
    sequence = rng.normal(0, 1.5, 60) if shared else rng.normal(0, 1.5, (40, 3, 60))
    values = rng.normal(0, 0.3, (40, 1, 1)) + rng.normal(0, 0.2, (40, 3, 1)) + sequence + rng.normal(0, 1, (40, 3, 60))
    got = statistics.hierarchical_bootstrap(values, shared_sequences=shared)
    peer = statistics.two_way(values.mean(1)) if shared else statistics.t_interval(values.mean((1, 2)))
    np.testing.assert_allclose(got.error, peer.error, rtol=0.15)
    np.testing.assert_allclose((got.low, got.high), (peer.low, peer.high), atol=0.3 * peer.error)


def test_bootstrap_of_sequences_alone_equals_the_plain_one():
    values = np.random.default_rng(0).exponential(1, (1, 1, 200))
    got = statistics.hierarchical_bootstrap(values, shared_sequences=True, num_draws=4000)
    peer = stats.bootstrap((values.ravel(),), np.mean, method="percentile", random_state=1)
    np.testing.assert_allclose((got.low, got.high), peer.confidence_interval, atol=0.02)


def test_errors_have_two_significant_digits():
    for mean, error, text in [
        (-3.5361, 0.0414, "-3.536 ± 0.041"), (-33.52, 0.6961, "-33.52 ± 0.70"), (2.0, 0.00123, "2.0000 ± 0.0012"),
        (1.0, 0.0996, "1.00 ± 0.10"), (-120.4, 12.3, "-120 ± 12"), (1.5, np.nan, "1.500"), (1.5, 0.0, "1.500 ± 0"),
        (np.nan, 1.0, "not available"), (7e-5, 3.14e-6, "0.0000700 ± 0.0000031"),
    ]:  # fmt: skip
        assert statistics.show(mean, error) == text
