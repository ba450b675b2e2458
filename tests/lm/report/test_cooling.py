"""Students beside the cooled direct student: values at matched precision against np.interp, errors, and verdicts."""

import numpy as np
import pytest
from scipy import stats

from kd_jax.lm.report import cooling

TEMPERATURES = (1.0, 0.9, 0.8, 0.7)
# the direct student's mean precision and recall at these
DIRECT = ((-7.9, -7.2), (-7.0, -7.3), (-6.2, -7.6), (-5.0, -8.4))


def rows_of(arms, seeds=4, noise=0.02, seed=0, **more):
    """Evaluation rows; `arms` has for each arm (temperature, precision, recall) of its means."""
    rng = np.random.default_rng(seed)
    rows = []
    for arm, points in arms.items():
        for s in range(seeds):
            for t, precision, recall in points:
                apart = rng.normal(0, noise, 2)
                row = {"kind": "evaluation", "name": f"{arm} {s} {t}", "arm": arm, "tau": None, "seed": s}
                row |= {"sample_temperature": t, "precision": precision + apart[0], "recall": recall + apart[1]}
                rows.append(row | more)
    return rows


def direct(points=DIRECT):
    return {"direct": [(t, *point) for t, point in zip(TEMPERATURES, points, strict=True)]}


def mean(rows, arm, t, metric):
    return np.mean([r[metric] for r in rows if r["arm"] == arm and r["sample_temperature"] == t])


def curve_of(rows, metric):
    return np.array([mean(rows, "direct", t, metric) for t in TEMPERATURES])


def test_mean_at_matched_precision_is_numpys_interpolation():
    rows = rows_of(direct() | {"student": [(1.0, -6.5, -7.4), (0.9, -5.5, -7.9)]}, noise=0.1)
    curves = cooling.curves(rows)
    for t, between in ((1.0, (0.9, 0.8)), (0.9, (0.8, 0.7))):
        matched = cooling.match(curves["student"], t, curves["direct"], "recall")
        at = np.interp(mean(rows, "student", t, "precision"), curve_of(rows, "precision"), curve_of(rows, "recall"))
        assert matched.interval.mean == pytest.approx(mean(rows, "student", t, "recall") - at, abs=1e-12)
        assert matched.between == between and matched.interval.dof == 3


def test_error_is_that_of_repeated_runs():
    """The standard error from one run is the spread of the plain interpolation over many runs."""
    apart, errors = [], []
    for seed in range(300):
        rows = rows_of(direct() | {"student": [(1.0, -6.6, -7.4)]}, seeds=8, noise=0.1, seed=seed)
        curves = cooling.curves(rows)
        matched = cooling.match(curves["student"], 1.0, curves["direct"], "recall")
        at = np.interp(mean(rows, "student", 1.0, "precision"), curve_of(rows, "precision"), curve_of(rows, "recall"))
        apart.append(mean(rows, "student", 1.0, "recall") - at)
        errors.append(matched.interval.error)
    # the standard deviation of 300 values is known to 4 %
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(apart, ddof=1), rel=0.15)


def test_seeds_are_paired():
    """What is common to a seed's students cancels."""
    rows = rows_of(direct() | {"student": [(1.0, -6.6, -7.4)]}, noise=0.01)
    before = cooling.curves(rows)
    shifted = cooling.curves([row | {"recall": row["recall"] + 3.0 * row["seed"]} for row in rows])
    one, other = (cooling.match(c["student"], 1.0, c["direct"], "recall").interval for c in (before, shifted))
    assert one.mean == pytest.approx(other.mean) and one.error == pytest.approx(other.error)


@pytest.mark.parametrize("precision", [-8.5, -4.0, np.nan])
def test_beyond_the_measured_temperatures_nothing_is_known(precision):
    curves = cooling.curves(rows_of(direct() | {"student": [(1.0, precision, -7.4)]}))
    assert cooling.match(curves["student"], 1.0, curves["direct"], "recall") is None


def test_infinite_recall_has_no_difference():
    curves = cooling.curves(rows_of(direct() | {"student": [(1.0, -6.5, -np.inf)]}))
    assert np.isnan(cooling.match(curves["student"], 1.0, curves["direct"], "recall").interval.error)
    assert cooling.standings(curves)["student"].verdict == "not tested"


def test_of_several_crossings_the_least_cooled_counts():
    points = ((-7.9, -7.2), (-6.0, -7.5), (-7.0, -7.0), (-5.0, -8.4))
    curves = cooling.curves(rows_of(direct(points) | {"student": [(1.0, -6.5, -7.4)]}))
    assert cooling.match(curves["student"], 1.0, curves["direct"], "recall").between == (1.0, 0.9)


def test_verdicts():
    arms = direct() | {
        "better": [(1.0, -7.5, -7.0), (0.8, -6.0, -7.4)],
        "worse": [(1.0, -7.5, -7.6), (0.8, -6.0, -8.4)],
        "crossing": [(1.0, -7.5, -7.0), (0.8, -6.0, -8.4)],
        "alike": [(1.0, -7.45, -7.25)],
        "beyond": [(1.0, -4.0, -7.0)],
        "part": [(1.0, -7.45, -7.25), (0.8, -6.2, -7.2)],
    }
    curves = cooling.curves(rows_of(arms))
    found = cooling.standings(curves)
    assert {arm: standing.verdict for arm, standing in found.items()} == {
        "better": "dominates", "worse": "is dominated", "crossing": "crosses", "alike": "no clear difference",
        "beyond": "no equal precision measured", "part": "more recall at 1 of 2, else no clear difference",
    }  # fmt: skip
    text = cooling.headline(curves, found)
    assert (
        "better and crossing have more recall; worse has less recall; alike and part have no clear difference" in text
    )
    table = cooling.table(curves, found, smoke=False)
    assert [row[-1] for row in table.rows] == [standing.verdict for standing in found.values()]
    assert {row[-1] for row in cooling.table(curves, found, smoke=True).rows} == {"–"}
    assert len(cooling.temperature_table(curves, found).rows) == 4 + 4 * 2 + 2


def test_verdicts_are_corrected_for_all_comparisons():
    """A difference with p < 0.05 alone is not clear among three: Holm multiplies the smallest p-value by three."""
    apart = np.array([0.08, 0.1, 0.16, 0.05])
    alone = stats.ttest_1samp(apart, 0).pvalue
    assert alone < 0.05 < 3 * alone
    rows = rows_of(direct(), noise=0.0)
    at = [row for row in rows if row["sample_temperature"] == 0.9]
    for arm, values in {"one": apart, "two": [0.1, -0.1, 0, 0], "three": [0, 0.1, -0.1, 0]}.items():
        rows += [{**row, "arm": arm, "recall": row["recall"] + value} for row, value in zip(at, values, strict=True)]
    curves = cooling.curves(rows)
    assert cooling.standings(curves)["one"].verdict == "no clear difference"
    only = cooling.standings({arm: curves[arm] for arm in ("direct", "one")})["one"]
    assert only.verdict == "dominates" and only.matches[0.9].interval.p_value == pytest.approx(alone)


@pytest.mark.parametrize("without", ["direct", "temperatures"])
def test_without_a_cooled_direct_student_there_is_no_standing(without):
    rows = rows_of(direct() | {"student": [(1.0, -6.5, -7.4)]})
    rows = [r for r in rows if (r["arm"] != "direct" if without == "direct" else r["sample_temperature"] == 1)]
    curves = cooling.curves(rows)
    assert cooling.standings(curves) == {} and cooling.headline(curves, {}) is None
    assert cooling.table(curves, {}, smoke=False).rows == []


def test_rows_without_a_sample_temperature_are_at_one():
    rows = [{key: value for key, value in row.items() if key != "sample_temperature"}
            for row in rows_of({"direct": [(1.0, -7.9, -7.2)]})]  # fmt: skip
    assert cooling.curves(rows)["direct"].temperatures == [1.0]


def test_one_student_is_not_tested():
    """Whatever lies between it and the direct student: without an error there is no difference to call unclear."""
    curves = cooling.curves(rows_of(direct() | {"one": [(1.0, -6.5, -12.0)]}, seeds=1))
    standings = cooling.standings(curves)
    assert standings["one"].sides == {1.0: cooling.UNTESTED}
    assert standings["one"].verdict == "not tested"
    line = cooling.headline(curves, standings)
    assert "no tested difference (one student" in line and "no clear difference" not in line
