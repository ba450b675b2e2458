"""The frontier's figure, its table of prices and its verdict, on knobs with known prices."""

import numpy as np
import pytest

from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import frontier_page
from kd_jax.reporting.frontier_page import Knob
from kd_jax.reporting.prices import Match

NOISE = np.array([-0.3, -0.1, 0.1, 0.3])


def knob(name, gains, losses, noise=0.0, entropy=1.0):
    gains, losses = np.asarray(gains, float)[:, None], np.asarray(losses, float)[:, None]
    metrics = {
        "precision": -7 + gains + 0 * NOISE, "recall": -2.5 - losses - noise * NOISE,
        "teacher_entropy": np.full((len(gains), 4), entropy),
    }  # fmt: skip
    return Knob(name, tuple(f"{g:g}" for g in gains[:, 0]), metrics)


PLAIN = knob("plain", [0], [0])
REFERENCE = {name: PLAIN.metrics[name][0] for name in ("precision", "recall")}


def say(knobs, gains):
    found = frontier_page.prices_of(knobs, REFERENCE, gains)
    return found, frontier_page.verdict(found, knobs, gains)


def test_verdict_names_the_cheapest_of_all_gains():
    found, (first, *rest) = say([knob("dear", [0, 4], [0, 12]), knob("cheap", [0, 4], [0, 8])], (1.0, 2.0))
    assert first == "At every gain compared, the knob that buys precision most cheaply in recall is cheap."
    assert len(rest) == 2 and all("cheap costs 2.00" in text and "dear next by 1.00" in text for text in rest)
    head, rows = frontier_page.price_table(found)
    assert len(head) == len(rows[0]) == 6
    each = [("cheap", "cheapest"), ("dear", "1.000 ± 0")]
    assert [(row[0], row[2], str(row[-1])) for row in rows] == [(gain, *rest) for gain in "12" for rest in each]


def test_verdict_says_where_it_depends_on_the_gain():
    bent = knob("bent", [0, 2, 4], [0, 1, 20])
    _, (first, *_) = say([bent, knob("straight", [0, 4], [0, 12])], (1.0, 2.0, 4.0))
    assert first.endswith("by the gain in nats: bent at 1 and 2; straight at 4.")


def test_difference_within_its_t_interval_is_not_told_apart():
    error = NOISE.std(ddof=1) / 2
    for extra, apart in ((3.1 * error, False), (3.3 * error, True)):  # t at 97.5 %, 3 degrees of freedom, is 3.18
        near = knob("near", [0, 1], [0, 3 + extra], noise=1.0)
        _, (summary, text) = say([knob("first", [0, 1], [0, 3]), near], (1.0,))
        assert ("is first." in summary) == apart and ("no single knob at 1." in summary) != apart
        assert ("all others cost more" in text) == apart and ("no clear difference from it: near" in text) != apart


def test_one_seed_tells_nothing_apart():
    single = [k._replace(metrics={n: v[:, :1] for n, v in k.metrics.items()}) for k in
              (knob("a", [0, 1], [0, 1]), knob("b", [0, 1], [0, 9]))]  # fmt: skip
    found = frontier_page.prices_of(single, {n: v[:1] for n, v in REFERENCE.items()}, (1.0,))
    assert "no clear difference from it: b" in frontier_page.verdict(found, single, (1.0,))[1]


def test_gains_that_no_knob_reaches():
    assert say([knob("a", [0, 1], [0, 1])], ())[1] == []
    assert say([knob("a", [0, 1], [0, 1])], (2.0, 3.0))[1] == ["No knob reaches a gain of 2 or 3 nats."]
    *_, last = say([knob("a", [0, 2], [0, 1]), knob("b", [0, 1], [0, 1])], (1.0, 1.5))[1]
    assert last.endswith("; not reached by b.")
    *_, last = say([knob("a", [0, 2], [0, 1]), knob("b", [0, 1], [0, 1]), knob("c", [3, 4], [1, 2])], (1.5,))[1]
    assert last.endswith("; not reached by b; exceeded at every setting by c.")


def markers(figure):
    """Scatter offsets by the number of points in each."""
    return [np.asarray(c.get_offsets()) for c in figure.axes[0].collections if hasattr(c, "get_sizes")]


def test_figure_has_every_mean_of_every_knob():
    knobs = [knob("a", [0, 1, 4], [0, 1, 9], entropy=1.5), knob("b", [2], [5], entropy=0.5)]
    knobs[0].metrics["recall"][1, 2] = -np.inf
    figure = frontier_page.figure(knobs, PLAIN, knob("direct", [-0.5], [-0.1]))
    drawn = [points[np.isfinite(points).all(1)] for points in markers(figure)]
    drawn = {tuple(np.round(p, 6)) for points in drawn for p in points}
    # of recall and precision, without the setting whose mean is infinite
    assert {(-2.5, -7.0), (-11.5, -3.0), (-7.5, -5.0), (-2.4, -7.5)} <= drawn
    assert not any(abs(precision - -6) < 1e-6 for _, precision in drawn)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a: 0 to 4", "b: 2", "plain", "direct"]


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [[], [knob("a", [0], [0])]])
def test_figure_of_little(knobs, tmp_path):
    from kd_jax.reporting import figures

    assert figures.save(frontier_page.figure(knobs, PLAIN, None), tmp_path, "little").stat().st_size > 1000


def test_chart_has_means_errors_and_the_teachers_entropy():
    direct = knob("direct", [-0.5], [-1])
    made = frontier_page.chart([knob("k", [0, 2], [0, 3], noise=1.0, entropy=1.5)], PLAIN, direct, zoom=(6.0, 1.6))
    first, reference, last = made["panels"][0]["series"]
    assert [point["at"] for point in first["points"]] == [pytest.approx([-2.5, -7]), pytest.approx([-5.5, -5])]
    assert first["points"][1]["error"] == pytest.approx([NOISE.std(ddof=1) / 2, 0])
    facts = first["points"][1]["facts"]
    assert (
        facts[0] == "k = 2" and facts[2].startswith("recall -5.50 ± 0.1") and facts[3] == "teacher's entropy 1.500 ± 0"
    )
    assert (reference["label"], last["label"], last["line"]) == ("plain", "direct", "")
    (view,) = made["views"]
    assert view["x"] == pytest.approx((-8.5, -2.02)) and view["y"] == pytest.approx((-7.24, -5.4))


@pytest.mark.parametrize(
    "low, high, said",
    [(-0.31, 0.17, "0.070 ± 0.086 nats less recall"), (-0.20, -0.02, "0.110 ± 0.086 nats less recall"),
     (0.02, 0.20, "0.110 ± 0.086 nats more recall"), (-0.17, 0.31, "0.070 ± 0.086 nats more recall")],
)  # fmt: skip
def test_contrast_has_the_sign_of_its_words(low, high, said):
    match = Match("way", 1.0, Interval((low + high) / 2, 0.086, low, high, 5), 0.4)
    text = frontier_page.contrast([match], "way", "they", 1.0)
    ends = (-high, -low) if "less" in said else (low, high)
    assert said in text and "95 % interval {:.2f} to {:.2f},".format(*ends) in text


def test_contrast_of_one_seed_has_no_interval():
    match = Match("way", 1.0, Interval(0.5, *[np.nan] * 3, 0), np.nan)
    text = frontier_page.contrast([match], "way", "they", 1.0)
    assert text.endswith("(one seed, no error).") and "nan" not in text


def test_a_way_that_begins_beyond_a_gain_has_exceeded_it():
    near, far = (Interval(mean, 0.1, mean - 0.2, mean + 0.2, 5) for mean in (-0.1, -0.5))
    listed = [Match("whole", gain, near, 0.4) for gain in (1.0, 2.0, 3.0)] + [Match("far", 2.0, far, 0.01)]
    table = frontier_page.match_table(listed, "")
    assert [row[0] for row in table.rows] == ["whole", "far"]
    assert [str(cell) for cell in table.rows[1][2:]] == ["exceeded", "-0.50 ± 0.10 *", "not reached"]
