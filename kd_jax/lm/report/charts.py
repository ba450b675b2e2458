"""The interactive frontier of a language-model run: the same points as in `figures.frontier`, with what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from kd_jax.lm.report import figures
from kd_jax.lm.report.cooling import Curve
from kd_jax.lm.report.summary import Group
from kd_jax.reporting import charts
from kd_jax.reporting.charts import Point, Series
from kd_jax.reporting.figures import INK
from kd_jax.reporting.page import mean_se, show

# What the pointer shows of a student, where it is known.
FACTS = {"precision": "precision", "recall": "recall", "entropy": "entropy", "teacher_entropy": "teacher's entropy",
         "distinct_2": "distinct-2", "length_mean": "mean length"}  # fmt: skip
SYMBOLS = ("rect", "triangle", "diamond", "roundRect", "pin", "arrow")


def frontier(groups: list[Group], curves: dict[str, Curve]) -> dict[str, Any]:
    """Recall against precision: each arm's mean with errors, and its curve over sample temperatures.

    Args:
        groups: as `summary.summarise` returns them.
        curves: students by arm, as `cooling.curves` returns them.
    """
    distilled, direct, teacher = figures.split(groups)
    colours = figures.colours_of(groups)
    named = [group for group, _, _ in figures.arms_by_name(groups)]
    series = []
    for i, group in enumerate([*direct, *distilled, *named]):
        arm = f"tau-{group.tau:g}" if group.arm == "distilled" else group.arm
        symbol = "circle" if group.arm in ("direct", "distilled") else SYMBOLS[i % len(SYMBOLS)]
        points = [_point(group)]
        if arm in curves:
            points += [_cooled(curves[arm], t) for t in curves[arm].temperatures if t != 1 and curves[arm].students]
        style = {"size": 13 if group.arm == "direct" else 10, "line": "dashed" if len(points) > 1 else ""}
        series.append(Series(group.label, points, to_hex(colours[arm]), symbol, **style))
    if teacher:
        series.append(Series("teacher", [_point(group) for group in teacher], INK, "emptyDiamond", 9))
    return charts.chart(
        series, x_title="recall, E[log p″] on p*'s text (nats per token); better →",
        y_title="precision, E[log p*] (nats per token); better →",
    )  # fmt: skip


def _point(group: Group) -> Point:
    """An arm's mean as it was trained, with the settings that its first model's row has."""
    facts = [group.label, f"{len(group.rows)} model{'s' * (len(group.rows) != 1)}"]
    for name, label in FACTS.items():
        estimate = group.estimates[name]
        facts += [f"{label} {estimate.cell(len(group.rows))}"] if estimate.count else []
    facts += [f"{key} {value}" for key, value in (group.rows[0].get("distill") or {}).items() if value is not None]
    estimates = group.estimates["recall"], group.estimates["precision"]
    return Point(
        *(one.mean for one in estimates), *(one.error for one in estimates), facts, model=group.rows[0]["name"]
    )


def _cooled(curve: Curve, temperature: float) -> Point:
    """The mean of an arm's students at a lower sample temperature of their own."""
    index = curve.temperatures.index(temperature)
    means = {name: mean_se(curve.values(name, curve.students)[index]) for name in FACTS}
    facts = [f"{curve.label}, sampled at {temperature:g}"]
    facts += [f"{FACTS[name]} {show(*value)}" for name, value in means.items() if np.isfinite(value[0])]
    (x, x_error), (y, y_error) = means["recall"], means["precision"]
    return Point(x, y, x_error, y_error, facts)
