"""Prices on curves whose prices are known exactly, and their standard errors against the jackknife."""

import numpy as np
import pytest

from kd_jax.reporting.prices import Curve, loss_at, prices

SEEDS = 6
RNG = np.random.default_rng(0)
REFERENCE = Curve(-7 + RNG.normal(0, 0.3, SEEDS), -2.5 + RNG.normal(0, 0.1, SEEDS))


def curve(gains, losses, along=0.0, across=0.0):
    """A curve from gains and losses [setting]: each seed's own is moved by `along` and `across` [seed]."""
    gains, losses = np.asarray(gains, float)[:, None] + along, np.asarray(losses, float)[:, None] + across
    return Curve(REFERENCE.precision + gains, REFERENCE.recall - losses)


def error(values):
    return np.std(values, ddof=1) / np.sqrt(len(values))


def test_straight_curves_have_their_slope_for_a_price_at_every_gain():
    found = prices({"dear": curve([0, 4], [0, 12]), "cheap": curve([0, 1, 4], [0, 2, 8])}, REFERENCE, (0.5, 1.0, 3.0))
    assert [(p.knob, p.gain) for p in found] == [(k, g) for g in (0.5, 1.0, 3.0) for k in ("cheap", "dear")]
    for p in found:
        slope = {"cheap": 2.0, "dear": 3.0}[p.knob]
        np.testing.assert_allclose([p.price, p.loss], [slope, slope * p.gain], rtol=1e-12)
        np.testing.assert_allclose(p.precision, REFERENCE.precision.mean() + p.gain)
        np.testing.assert_allclose(p.extra, slope - 2, atol=1e-12)
        assert p.price_error < 1e-12 and p.extra_error < 1e-12 and p.num_seeds == SEEDS


def test_curve_is_interpolated_between_neighbouring_settings():
    bent = {"knob": curve([0, 2, 4], [0, 1, 9])}
    for gain, loss, between in ((1.0, 0.5, (0, 1)), (2.0, 1.0, (0, 1)), (2.5, 3.0, (1, 2)), (4.0, 9.0, (1, 2))):
        (p,) = prices(bent, REFERENCE, [gain])
        np.testing.assert_allclose([p.loss, p.price], [loss, loss / gain])
        assert p.between == between


def test_errors_are_those_of_the_seeds_and_shared_noise_cancels_between_knobs():
    own, shared = RNG.normal(size=(2, SEEDS))
    own, shared = own - own.mean(), shared - shared.mean()
    curves = {"a": curve([0, 4], [0, 8], across=shared), "b": curve([0, 4], [0, 12], across=shared + own)}
    a, b = prices(curves, REFERENCE, [2.0])
    assert (a.knob, b.knob) == ("a", "b")
    np.testing.assert_allclose([a.price, b.price, b.extra], [2, 3, 1])
    np.testing.assert_allclose(a.price_error, error(shared) / 2)
    np.testing.assert_allclose(b.price_error, error(shared + own) / 2)
    np.testing.assert_allclose(b.extra_error, error(own) / 2)
    assert (a.extra, a.extra_error) == (0, 0)


def test_noise_along_a_straight_curve_is_no_error():
    along = RNG.normal(size=SEEDS)
    (p,) = prices({"knob": curve([0, 4], [0, 8], along=along, across=2 * along)}, REFERENCE, [2.0])
    np.testing.assert_allclose(p.price, 2)
    assert p.price_error < 1e-12


def test_errors_agree_with_the_jackknife_of_the_mean_curve():
    rng = np.random.default_rng(1)
    seeds = 40
    gains = np.array([0.0, 1.5, 4.0])[:, None] + 0.3 * rng.normal(size=(3, seeds))
    losses = np.array([0.0, 1.0, 8.0])[:, None] + 0.4 * rng.normal(size=(3, seeds)) + rng.normal(size=seeds)
    values, _ = loss_at(gains, losses, 2.5)
    left_out = []
    for seed in range(seeds):
        rest = np.arange(seeds) != seed
        left_out.append(np.interp(2.5, gains[:, rest].mean(1), losses[:, rest].mean(1)))
    jackknife = np.sqrt((seeds - 1) / seeds * np.sum((left_out - np.mean(left_out)) ** 2))
    np.testing.assert_allclose(values.mean(), np.interp(2.5, gains.mean(1), losses.mean(1)))
    np.testing.assert_allclose(error(values), jackknife, rtol=0.05)


def test_interpolation_is_attained_by_taking_one_of_two_students_at_random():
    # densities on 5 points; precision and recall exactly
    rng = np.random.default_rng(2)
    p_star, a, b = rng.dirichlet(np.ones(5), 3)
    precision = lambda q: q @ np.log(p_star)  # noqa: E731
    recall = lambda q: p_star @ np.log(q)  # noqa: E731
    mixed = 0.3 * a + 0.7 * b
    np.testing.assert_allclose(precision(mixed), 0.3 * precision(a) + 0.7 * precision(b))
    assert recall(mixed) > 0.3 * recall(a) + 0.7 * recall(b)


def test_least_loss_counts_where_a_curve_passes_a_gain_more_than_once():
    (p,) = prices({"knob": curve([0, 3, 1, 3], [0, 9, 1, 4])}, REFERENCE, [2.0])
    np.testing.assert_allclose(p.loss, 2.5)
    assert p.between == (2, 3)
    (p,) = prices({"knob": curve([2, 2, 0], [5, 3, 0])}, REFERENCE, [2.0])
    np.testing.assert_allclose(p.loss, 3)


def test_what_does_not_reach_a_gain_is_absent():
    curves = {"short": curve([0, 1], [0, 1]), "late": curve([2, 4], [2, 4]), "point": curve([1], [1])}
    found = prices(curves, REFERENCE, (0.5, 1.5, 3.0))
    assert [(p.gain, p.knob) for p in found] == [(0.5, "short"), (3.0, "late")]


def test_setting_with_a_value_that_is_not_finite_is_left_out():
    broken = curve([0, 2, 4], [0, 1, 8])
    broken.recall[1, 2] = -np.inf
    with np.errstate(all="raise"):
        (p,) = prices({"knob": broken}, REFERENCE, [2.0])
    np.testing.assert_allclose(p.loss, 4)
    assert p.between == (0, 2)


def test_one_seed_has_a_price_and_no_error():
    one = Curve(*(values[:1] for values in REFERENCE))
    (p,) = prices({"knob": Curve(*(values[:, :1] for values in curve([0, 4], [0, 8])))}, one, [1.0])
    np.testing.assert_allclose(p.price, 2)
    assert np.isnan(p.price_error) and np.isnan(p.extra_error)


@pytest.mark.parametrize(
    "curves, reference, gains, said",
    [
        ({"knob": Curve(np.ones((2, 5)), np.ones((2, 5)))}, REFERENCE, [1.0], r"knob: .*6 seeds.*\(2, 5\)"),
        ({"knob": Curve(np.ones((2, 6)), np.ones((3, 6)))}, REFERENCE, [1.0], "knob"),
        ({"knob": Curve(np.ones(6), np.ones(6))}, REFERENCE, [1.0], "knob"),
        ({}, Curve(np.ones((2, 6)), np.ones((2, 6))), [1.0], "reference"),
        ({}, REFERENCE._replace(recall=np.full(SEEDS, -np.inf)), [1.0], "reference.*finite"),
        ({}, REFERENCE, [0.0], "gain of 0"),
        ({}, REFERENCE, [np.nan], "gain of nan"),
    ],
)
def test_wrong_input_is_named(curves, reference, gains, said):
    with pytest.raises(ValueError, match=said):
        prices(curves, reference, gains)
