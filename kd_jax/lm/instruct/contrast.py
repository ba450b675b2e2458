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

from kd_jax.metrics import statistics
from kd_jax.reporting import units


def at_equal_variety(
    rows: Sequence[dict[str, Any]], *, arm: str, control: str, metric: str = "pass_rate"
) -> dict[str, Any]:
    """The mean difference of a metric over seeds, arm minus control at the control's best comparable temperature.

    Args:
        rows: of kind "instruct".
        arm, control: names of arms that share teachers and seeds, as the config has them ("tau-0.8", "direct").
        metric: of the rows, "pass_rate" or "best_of_n".

    Returns: `difference`, `low` and `high` of its 95 % interval over pairs (None for fewer than two), `pairs`, the
        (teacher, seed) that were compared, and `outside`, those whose arm is as varied as the control at none of its
        temperatures.
    """
    differences, pairs, outside = [], [], []
    for pair in sorted({units.student(row) for row in rows if units.arm(row) == control}):
        # np.interp needs a rising axis.
        curve = sorted(_of(rows, arm, pair, "test"), key=lambda row: row["distinct_2"])
        variety = [row["distinct_2"] for row in curve]
        marks = {row["sample_temperature"]: row for row in _of(rows, control, pair, "test")}
        # Nothing is extrapolated.
        inside = [tau for tau, row in marks.items() if variety and variety[0] <= row["distinct_2"] <= variety[-1]]
        # Of equal pass rates the higher temperature, which is the more varied.
        chosen = [row for row in _of(rows, control, pair, "validation") if row["sample_temperature"] in inside]
        if not chosen:
            outside.append(pair)
            continue
        mark = marks[max((row["pass_rate"], row["sample_temperature"]) for row in chosen)[1]]
        value = np.interp(mark["distinct_2"], variety, [row[metric] for row in curve])
        differences.append(float(value - mark[metric]))
        pairs.append(pair)
    interval = statistics.t_interval(np.array(differences), 0.95) if len(differences) > 1 else None
    return {
        "difference": float(np.mean(differences)) if differences else None,
        "low": None if interval is None else interval.low, "high": None if interval is None else interval.high,
        "pairs": pairs, "outside": outside,
    }  # fmt: skip


def _of(rows: Sequence[dict[str, Any]], arm: str, pair: units.Student, split: str) -> list[dict[str, Any]]:
    return [row for row in rows if (units.arm(row), units.student(row), row["split"]) == (arm, pair, split)]
