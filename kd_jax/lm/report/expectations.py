"""What the experiment expects of precision and recall, and whether a run shows it.

Four expectations: precision falls and recall rises with tau, and the direct student has the lowest precision and the
highest recall of all students of config.taus. All comparisons behind them are corrected together (Holm 1979).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kd_jax.lm.report.summary import Difference, Group, difference, direct
from kd_jax.metrics import statistics

LEVEL = 0.05
VERDICTS = {"holds": "Holds", "fails": "Does not hold", "unclear": "Not shown", "untested": "Not tested"}


class Finding(NamedTuple):
    """An expectation of the experiment.

    Attributes:
        verdict: "holds" or "fails" (a difference in the expected or the opposite direction, p < 0.05 after Holm's
            correction), "unclear" or "untested".
        text: in words, with the numbers.
    """

    verdict: str
    text: str


class _Comparison(NamedTuple):
    difference: Difference
    sign: int
    other: str


def findings(groups: list[Group]) -> list[Finding]:
    """The four expectations: both trends with tau, then the direct student's recall and precision."""
    expectations = [("precision", -1), ("recall", +1)]
    trends = [_trend_comparisons(groups, *each) for each in expectations]
    ends = [_direct_comparisons(groups, *each) for each in reversed(expectations)]
    # by identity: two comparisons can have equal numbers
    tested = [one for comparisons in (*trends, *ends) for one in comparisons]
    verdicts = dict(zip(map(id, tested), _verdicts(tested), strict=True))
    results = [_trend(name, sign, own, verdicts) for (name, sign), own in zip(expectations, trends, strict=True)]
    return results + [
        _end(groups, name, sign, own, verdicts) for (name, sign), own in zip(reversed(expectations), ends, strict=True)
    ]


def adjusted(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values of those that are numbers; NaN stays NaN and is not counted as a comparison."""
    # A comparison that could not be made must not make the others stricter.
    known = [p for p in p_values if not math.isnan(p)]
    corrected = iter(statistics.holm(known)) if known else iter(())
    return [math.nan if math.isnan(p) else float(next(corrected)) for p in p_values]


def _verdicts(comparisons: list[_Comparison]) -> list[str]:
    p_values = adjusted([one.difference.interval.p_value for one in comparisons])
    return [_verdict(one, p) for one, p in zip(comparisons, p_values, strict=True)]


def _verdict(comparison: _Comparison, p_value: float) -> str:
    if math.isnan(p_value):
        return "untested"
    if p_value >= LEVEL:
        return "unclear"
    return "holds" if comparison.sign * comparison.difference.interval.mean > 0 else "fails"


def headline(results: list[Finding]) -> str:
    """The outcome in one sentence.

    Args:
        results: as `findings` returns them.
    """
    trends, ends = [f.verdict for f in results[:2]], [f.verdict for f in results[2:]]
    if "untested" in trends:
        return "This run cannot tell yet whether precision is traded for recall."
    if trends != ["holds", "holds"]:
        return "The expected trade of precision for recall does not show in this run."
    shows = "Students of a more selective teacher have higher precision and lower recall"
    if ends == ["holds", "holds"]:
        return f"{shows}; the direct student has the lowest precision and the highest recall."
    if "untested" in ends:
        return f"{shows}; the direct student has not been compared."
    return f"{shows}; the direct student is not clearly at the end of both."


def _with_value(groups: list[Group], name: str) -> list[Group]:
    students = [g for g in groups if g.arm == "distilled" and g.tau is not None and g.estimates[name].count]
    return sorted(students, key=lambda group: group.tau)


def _trend_comparisons(groups: list[Group], name: str, sign: int) -> list[_Comparison]:
    """The highest tau against the lowest."""
    students = _with_value(groups, name)
    if len(students) < 2:
        return []
    low, high = students[0], students[-1]
    # One test, of the two ends: their difference is the largest, and no shape between them has to be assumed.
    return [_Comparison(difference(high, low, name), sign, f"from tau = {low.tau:g} to {high.tau:g}")]


def _direct_comparisons(groups: list[Group], name: str, sign: int) -> list[_Comparison]:
    """The direct student against every student of config.taus."""
    # Against each student: "the lowest of all" is a claim about all of them.
    first = direct(groups)
    if first is None or not first.estimates[name].count:
        return []
    return [_Comparison(difference(first, group, name), sign, group.label) for group in _with_value(groups, name)]


def _trend(name: str, sign: int, comparisons: list[_Comparison], verdicts: dict[int, str]) -> Finding:
    expected = f"{name} {'rises' if sign > 0 else 'falls'} with tau"
    if not comparisons:
        return Finding("untested", f"Whether {expected}: fewer than two values of tau have a value.")
    # A trend is one comparison, of its two ends.
    (comparison,) = comparisons
    verdict, change, span = verdicts[id(comparison)], comparison.difference, comparison.other
    if verdict == "untested":
        return Finding(verdict, f"Whether {expected}: {_why_untested(change)} {span}.")
    if verdict == "unclear":
        text = f"Expected: {expected}. It changes by {amount(change)} {span}: no clear change after Holm's correction."
        return Finding(verdict, text)
    moves = f"{'rises' if change.interval.mean > 0 else 'falls'} by {amount(change, absolute=True)} {span}"
    if verdict == "holds":
        return Finding(verdict, f"{name.capitalize()} {moves}.")
    return Finding(verdict, f"Expected: {expected}. It {moves}.")


def _end(groups: list[Group], name: str, sign: int, comparisons: list[_Comparison], verdicts: dict) -> Finding:
    """Whether the direct student has the highest (sign 1) or lowest (-1) value of all."""
    claim = f"the direct student has the {'highest' if sign > 0 else 'lowest'} {name}"
    if not comparisons:
        missing = "distilled" if direct(groups) is not None else "direct"
        return Finding("untested", f"Whether {claim}: no {missing} student has a value.")
    # The claim is about all students, so the worst verdict counts, and among equals the closest student.
    ranks = ("fails", "untested", "unclear", "holds")

    def rank(comparison: _Comparison) -> tuple[int, float]:
        return ranks.index(verdicts[id(comparison)]), sign * comparison.difference.interval.mean

    worst = min(comparisons, key=rank)
    verdict, apart = verdicts[id(worst)], worst.difference
    if verdict == "untested":
        return Finding(verdict, f"Whether {claim}: {_why_untested(apart)} for it and {worst.other}.")
    side = "above" if apart.interval.mean > 0 else "below"
    where = f"{amount(apart, absolute=True)} {side} {worst.other}"
    if verdict == "holds":
        return Finding(verdict, f"{claim[0].upper()}{claim[1:]}, {where}, the closest.")
    clear = ": no clear difference after Holm's correction" if verdict == "unclear" else ""
    return Finding(verdict, f"Expected: {claim}. It is {where}{clear}.")


def amount(change: Difference, absolute: bool = False) -> str:
    """A difference in words, with its interval.

    Args:
        change: any difference in nats per token.
        absolute: shows its size alone, for sentences that name the direction.
    """
    mean, error, low, high, _ = change.interval
    if absolute and mean < 0:
        mean, low, high = -mean, -high, -low
    interval = "" if math.isnan(error) else f" (95 % interval {low:.3g} to {high:.3g}; {change.over})"
    return f"{statistics.show(mean, error)} nats per token{interval}"


def _why_untested(change: Difference) -> str:
    if not change.count:
        return "no seed has both values"
    return "a value is not finite" if math.isnan(change.interval.mean) else "there is no standard error"
