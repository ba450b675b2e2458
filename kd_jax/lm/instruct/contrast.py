"""The contrast that an instruction run declares before it is run: one arm's pass rate minus another's, as varied.

Cooling a model makes its answers better and less varied. So each seed of `control` is taken at its best temperature
among those at which `arm` can be as varied; the validation split chooses it. `arm` is read off at the same distinct-2
on the test split, between its own two nearest temperatures. Students of several teachers are compared within their
teacher and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax.reporting import units


def at_equal_variety(
    rows: Sequence[dict[str, Any]], *, arm: str, control: str, metric: str = "pass_rate"
) -> dict[str, Any]:
    """The mean difference of a metric over seeds, arm minus control at the control's best comparable temperature.

    Args:
        rows: of kind "instruct".
        arm, control: names of arms that share teachers and seeds, as the config has them ("tau-0.8", "direct").
        metric: of the rows, "pass_rate" or "best_of_n".

    Returns: `difference`; `low` and `high` of its 95 % interval over teachers, where there are several, or seeds (None
        for fewer than two); `pairs`, the (teacher, seed) that were compared; and `outside`, those whose arm is as
        varied as the control at none of its temperatures.
    """
    differences, pairs, outside = [], [], []
    for pair in sorted({units.student(row) for row in rows if units.arm(row) == control}):
        curve = sorted(_of(rows, arm, pair, "test"), key=lambda row: -row["sample_temperature"])
        marks = {row["sample_temperature"]: row for row in _of(rows, control, pair, "test")}
        inside = [tau for tau, row in marks.items() if _at(curve, row["distinct_2"], metric) is not None]
        # Of equal pass rates the higher temperature, which is the more varied.
        chosen = [row for row in _of(rows, control, pair, "validation") if row["sample_temperature"] in inside]
        if not chosen:
            outside.append(pair)
            continue
        mark = marks[max((row["pass_rate"], row["sample_temperature"]) for row in chosen)[1]]
        differences.append(_at(curve, mark["distinct_2"], metric) - mark[metric])
        pairs.append(pair)
    interval = units.interval(pairs, np.array(differences)) if differences else None
    known = interval is not None and np.isfinite(interval.error)
    return {
        "difference": None if interval is None else interval.mean,
        "low": interval.low if known else None, "high": interval.high if known else None,
        "pairs": pairs, "outside": outside,
    }  # fmt: skip


def _at(curve: Sequence[dict[str, Any]], variety: float, metric: str) -> float | None:
    """The metric at a distinct-2, between two neighbouring temperatures, the highest that enclose it; or None."""
    # A curve of one temperature has a value there alone.
    for one, other in zip(curve, curve[1:] or curve, strict=False):
        start, end = one["distinct_2"], other["distinct_2"]
        if min(start, end) <= variety <= max(start, end):
            share = (variety - start) / (end - start) if end != start else 0.0
            return (1 - share) * one[metric] + share * other[metric]
    return None  # nothing is extrapolated


def _of(rows: Sequence[dict[str, Any]], arm: str, pair: units.Student, split: str) -> list[dict[str, Any]]:
    return [row for row in rows if (units.arm(row), units.student(row), row["split"]) == (arm, pair, split)]
