"""What the experiment expects, and the verdicts: t tests from SciPy with Holm's correction, and their words."""

import numpy as np
import pytest
from scipy import stats

from kd_jax.lm.report import expectations, summary
from kd_jax.metrics import statistics
from tests.lm.report.test_page import make_rows, of


def found(rows):
    return expectations.findings(summary.summarise(rows))


def paired(rows, one, other, metric):
    """Mean, standard error and 95 % interval of the difference over seeds, in words."""
    apart = np.array(of(rows, *one, metric)) - np.array(of(rows, *other, metric))
    apart = apart if apart.mean() > 0 else -apart
    error = stats.sem(apart)
    low, high = stats.t.interval(0.95, apart.size - 1, apart.mean(), error)
    text = statistics.show(apart.mean(), error)
    return f"{text} nats per token (95 % interval {low:.3g} to {high:.3g}; {apart.size} seeds)"


def test_where_all_holds():
    rows = make_rows()
    low, high, direct = ("distilled", 0.8), ("distilled", 1.0), ("direct", None)
    recall, precision = (paired(rows, direct, high, metric) for metric in ("recall", "precision"))
    assert [one.text for one in found(rows)] == [
        f"Precision falls by {paired(rows, high, low, 'precision')} from tau = 0.8 to 1.",
        f"Recall rises by {paired(rows, high, low, 'recall')} from tau = 0.8 to 1.",
        f"The direct student has the highest recall, {recall} above tau = 1, the closest.",
        f"The direct student has the lowest precision, {precision} below tau = 1, the closest.",
    ]
    assert {one.verdict for one in found(rows)} == {"holds"}
    assert expectations.headline(found(rows)).endswith(
        "the direct student has the lowest precision and the highest recall."
    )


def test_where_it_does_not_hold():
    # Precision rises, recall stands still, and one student beats the direct one in recall.
    values = {None: (-7.0, -7.5), 0.8: (-7.9, -7.8), 0.875: (-7.5, -7.1), 0.95: (-7.4, -7.8), 1.0: (-7.3, -7.8)}
    rows = make_rows(values=values, noise=0.02)
    trend, flat, recall, precision = found(rows)
    low, high, direct = ("distilled", 0.8), ("distilled", 1.0), ("direct", None)
    assert (
        trend.text == f"Expected: precision falls with tau. It rises by {paired(rows, high, low, 'precision')} "
        "from tau = 0.8 to 1."
    )
    assert flat.text.startswith("Expected: recall rises with tau. It changes by ") and "no clear change" in flat.text
    apart = paired(rows, direct, ("distilled", 0.875), "recall")
    assert recall.text == f"Expected: the direct student has the highest recall. It is {apart} below tau = 0.875."
    apart = paired(rows, direct, low, "precision")
    assert precision.text == f"Expected: the direct student has the lowest precision. It is {apart} above tau = 0.8."
    assert [one.verdict for one in (trend, flat, recall, precision)] == ["fails", "unclear", "fails", "fails"]
    assert "does not show" in expectations.headline(found(rows))


def rows_of(steps):
    """Students whose recall rises by these steps from tau = 0.8 to 1; seeds differ by much more."""
    return [
        {"kind": "evaluation", "name": f"{tau} {seed}", "arm": "distilled", "tau": tau, "seed": seed, "recall": y}
        for seed, step in enumerate(steps) for tau, y in ((0.8, 9.0 * seed), (1.0, 9.0 * seed + step))
    ]  # fmt: skip


@pytest.mark.parametrize("spread, verdict", [(0.4, "holds"), (1.5, "unclear")])
def test_a_difference_is_clear_by_the_t_test_over_seeds(spread, verdict):
    steps = 1 + spread * np.array([1.0, -1.0, 0.5, -0.5])
    assert (stats.ttest_1samp(steps, 0).pvalue < 0.05) == (verdict == "holds")
    assert found(rows_of(steps))[1].verdict == verdict
    assert found(rows_of(-steps))[1].verdict == {"holds": "fails"}.get(verdict, verdict)


def test_two_seeds_need_more_than_two_standard_errors():
    steps = (0.8, 1.2)  # five standard errors, p = 0.13
    assert stats.ttest_1samp(steps, 0).pvalue > 0.05 and found(rows_of(steps))[1].verdict == "unclear"


def test_comparisons_are_corrected_together():
    p_values = expectations.adjusted([0.04, float("nan"), 0.001, 0.02])
    assert np.isnan(p_values[1]) and [p_values[i] for i in (0, 2, 3)] == pytest.approx([0.04, 0.003, 0.04])


def row(arm, tau, seed, recall):
    return {"kind": "evaluation", "name": f"{arm} {tau} {seed}", "arm": arm, "tau": tau, "seed": seed, "recall": recall}


def test_student_that_leaves_doubt_decides_about_the_direct_one():
    # 0.1 and surely so above tau = 1; 0.5 above tau = 0.8, but by 0.5 ± 0.5
    rows = [row("direct", None, s, -7.0) for s in (0, 1)] + [row("distilled", 1.0, s, -7.1) for s in (0, 1)]
    rows += [row("distilled", 0.8, 0, -7.0), row("distilled", 0.8, 1, -8.0)]
    assert found(rows)[2].verdict == "unclear" and "above tau = 0.8" in found(rows)[2].text
    rows[-1]["recall"] = -np.inf
    assert found(rows)[2].verdict == "untested" and "a value is not finite" in found(rows)[2].text
    rows[2]["recall"] = rows[3]["recall"] = -6.9
    assert found(rows)[2].verdict == "fails"
