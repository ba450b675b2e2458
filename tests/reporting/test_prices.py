"""Prices on curves whose prices are known exactly, and their standard errors against the jackknife."""

import numpy as np
from scipy import stats

from kd_jax.metrics.statistics import Interval, holm
from kd_jax.reporting.prices import Curve, Match, loss_at, matches, prices, standing

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


def test_a_random_choice_between_two_students_has_more_recall_than_the_line_between_them():
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


def test_nothing_is_known_beside_a_value_that_is_not_finite():
    broken = curve([0, 2, 4, 6], [0, 1, 8, 9])
    broken.recall[1, 2] = -np.inf
    with np.errstate(all="raise"):
        (p,) = prices({"knob": broken}, REFERENCE, [1.0, 3.0, 5.0])
    np.testing.assert_allclose(p.loss, 8.5)
    assert p.gain == 5.0 and p.between == (2, 3)


def test_one_seed_has_a_price_and_no_error():
    one = Curve(*(values[:1] for values in REFERENCE))
    (p,) = prices({"knob": Curve(*(values[:, :1] for values in curve([0, 4], [0, 8])))}, one, [1.0])
    np.testing.assert_allclose(p.price, 2)
    assert np.isnan(p.price_error) and np.isnan(p.extra_error)


def test_p_values_are_adjusted_for_all_pairs_at_all_gains():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.5, (3, SEEDS))
    curves = {name: curve([0, 4], [0, 8 + extra], across=noise[i]) for i, (name, extra) in enumerate(
        (("a", 0.0), ("b", 1.0), ("c", 4.0)))}  # fmt: skip
    found = prices(curves, REFERENCE, (1.0, 2.0))
    raw, named = [], {}
    for gain in (1.0, 2.0):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            extra = gain / 4 * ((0, 1, 4)[i] - (0, 1, 4)[j])
            raw.append(stats.ttest_1samp(noise[i] - noise[j] + extra, 0).pvalue)
            named[gain, f"{'abc'[i]}{'abc'[j]}"] = len(raw) - 1
    adjusted = holm(raw)
    for price in found:
        at = [p for p in found if p.gain == price.gain]
        if price is not at[0]:
            pair = "".join(sorted((price.knob, at[0].knob)))
            np.testing.assert_allclose(price.p_value, adjusted[named[price.gain, pair]], rtol=1e-9)


def test_matches_are_paired_and_the_preregistered_one_is_not_adjusted():
    noise = np.random.default_rng(4).normal(0, 0.2, SEEDS)
    control = curve([0, 2], [0, 1], across=noise)
    ways = {"better": curve([0, 4], [0, 1], across=noise), "worse": curve([0, 4], [0, 8], across=2 * noise)}
    found = matches(ways, control, REFERENCE, (1.0, 3.0), preregistered=("worse", 1.0))
    at = {(m.way, m.gain): m for m in found}
    np.testing.assert_allclose(at["better", 1.0].difference.mean, 0.5 - 0.25)
    np.testing.assert_allclose(at["worse", 1.0].difference.mean, 0.5 - 2 - noise.mean())
    np.testing.assert_allclose(at["worse", 1.0].p_value, stats.ttest_1samp(-1.5 - noise, 0).pvalue, rtol=1e-6)
    assert at["better", 3.0].difference is None and np.isnan(at["better", 3.0].p_value)
    standings = {way: standing([m for m in found if m.way == way]) for way in ways}
    assert standings == {"better": "dominates", "worse": "is dominated"}


def test_standings():
    make = lambda mean, p: Match("way", 1.0, Interval(mean, 0.1, 0, 0, 5), p)  # noqa: E731
    assert standing([make(1, 0.01), make(-1, 0.01)]) == "crosses"
    assert standing([make(1, 0.01), make(2, 0.01), make(3, np.nan)._replace(difference=None)]) == "dominates"
    assert standing([make(1, 0.01), make(-1, 0.5)]) == "more recall at 1 of 2, else no clear difference"
    assert standing([make(1, 0.5)]) == "no clear difference"
    assert standing([Match("way", 1.0, None, np.nan)]) == "beyond the control's reach"
    assert standing([]) == "reaches none of the gains"
