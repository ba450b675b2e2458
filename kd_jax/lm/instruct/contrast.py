"""The contrast that an instruction run declares before it is run: one arm's pass rate minus another's, as varied.

Cooling a model makes its answers better and less varied. So each seed of `control` is taken at its best temperature,
which the validation split chooses, and `arm` is read off at the same distinct-2 on the test split, between its own two
nearest temperatures. Students of several teachers are compared within their teacher and seed.
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
    """The mean difference of a metric over seeds, arm minus control at the control's best temperature.

    Args:
        rows: of kind "instruct".
        arm, control: names of arms that share teachers and seeds.
        metric: of the rows, "pass_rate" or "best_of_n".

    Returns: `difference`, `low` and `high` of its 95 % interval over pairs (None for fewer than two), `pairs`, the
        (teacher, seed) that were compared, and `outside`, those whose arm never is as varied as the control: nothing is
        extrapolated.
    """
    differences, pairs, outside = [], [], []
    for pair in sorted({units.student(row) for row in rows if row["arm"] == control}):
        chosen = _of(rows, control, pair, "validation")
        # Of equal pass rates the higher temperature, which is the more varied.
        best = max(chosen, key=lambda row: (row["pass_rate"], row["sample_temperature"]))["sample_temperature"]
        (mark,) = (row for row in _of(rows, control, pair, "test") if row["sample_temperature"] == best)
        # np.interp needs a rising axis.
        curve = sorted(_of(rows, arm, pair, "test"), key=lambda row: row["distinct_2"])
        variety = [row["distinct_2"] for row in curve]
        if not curve or not variety[0] <= mark["distinct_2"] <= variety[-1]:
            outside.append(pair)
            continue
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
    return [row for row in rows if (row["arm"], units.student(row), row["split"]) == (arm, pair, split)]
