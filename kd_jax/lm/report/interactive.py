"""Interactive charts of a language-model run: its frontier, and curves against tau and the teacher's entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from kd_jax.lm.report import figures
from kd_jax.lm.report.cooling import Curve
from kd_jax.lm.report.summary import Group
from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import charts
from kd_jax.reporting.charts import Panel, Point, Series
from kd_jax.reporting.figures import DIRECT, DISTILLED

# What the pointer shows of a student, where it is known.
FACTS = {"precision": "precision", "recall": "recall", "entropy": "entropy", "teacher_entropy": "teacher's entropy",
         "distinct_2": "distinct-2", "length_mean": "mean length"}  # fmt: skip
# Metrics of the figures `curves` and `divergences`, with their axes.
CURVES = {"precision": "precision; better →", "recall": "recall; better →"}
DIVERGENCES = {"kl_model_data": "KL(p″‖p*)", "kl_data_model": "KL(p*‖p″)"}


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
        symbol = "circle" if group.arm in ("direct", "distilled") else charts.SYMBOLS[i % len(charts.SYMBOLS)]
        points = [_chart_point(group)]
        if arm in curves:
            points += [_cooled(curves[arm], t) for t in curves[arm].temperatures if t != 1 and curves[arm].students]
        style = {"size": 13 if group.arm == "direct" else 10, "line": "dashed" if len(points) > 1 else ""}
        series.append(Series(group.label, points, to_hex(colours[arm]), symbol, **style))
    if teacher:
        series.append(Series("teacher", [_chart_point(group) for group in teacher], charts.INK, "emptyDiamond", 9))
    return charts.chart(
        series, x_title="recall, E[log p″] on p*'s text (nats per token); better →",
        y_title="precision, E[log p*] (nats per token); better →",
    )  # fmt: skip


def against(groups: list[Group], metrics: Mapping[str, str], *, entropy: bool) -> dict[str, Any]:
    """Metrics against tau, where students of config.taus exist.

    Args:
        groups: as `summary.summarise` returns them.
        metrics: to be shown, with the titles of their axes.
        entropy: whether they are shown against the teacher's entropy as well, with arms by name and the teacher.
    """
    columns = {None: "tau"} if figures.split(groups)[0] else {}
    columns |= {"teacher_entropy": "teacher's entropy (nats per token)"} if entropy else {}
    return charts.panels([
        Panel("", _against(groups, x_name, y_name, entropy), x_title, f"{y_title} (nats per token)")
        for y_name, y_title in metrics.items() for x_name, x_title in columns.items()
    ])  # fmt: skip


def _against(groups: list[Group], x_name: str | None, y_name: str, with_teacher: bool) -> list[Series]:
    """The series of one panel; `x_name` None is tau."""
    distilled, direct, teacher = figures.split(groups)

    def point(group: Group, x_name: str | None = x_name) -> Point:
        y, x = group.estimates[y_name], None if x_name is None else group.estimates[x_name]
        place = (group.tau, math.nan) if x is None else (x.mean, x.error)
        facts = [group.label, f"{FACTS.get(y_name, DIVERGENCES.get(y_name))} {y.cell(len(group.rows))}"]
        facts += [] if x is None else [f"{FACTS[x_name]} {x.cell(len(group.rows))}"]
        return Point(place[0], y.mean, place[1], y.error, facts, group.rows[0]["name"])

    series = [Series("distilled", [point(group) for group in distilled], DISTILLED, "circle", 8, "solid")]
    if with_teacher:
        # For the teacher itself, x is the entropy of its own samples.
        samples = [point(group, "entropy" if x_name else None) for group in teacher]
        series.append(Series("teacher's own samples", samples, charts.INK, "emptyDiamond", 9, "dotted"))
    if x_name is not None:
        named = enumerate(figures.arms_by_name(groups))
        series += [
            Series(group.label, [point(group)], colour, charts.SYMBOLS[i % len(charts.SYMBOLS)], 10)
            for i, (group, colour, _) in named
        ]
    places = [one.x for each in series for one in each.points if math.isfinite(one.x)]
    for group in direct if places else []:
        # The direct student has no teacher: it is a level, over the width of the others.
        level = point(group, None)._replace(y_error=math.nan)
        ends = [level._replace(x=x) for x in (min(places), max(places))]
        series.append(Series(group.label, ends, DIRECT, "circle", 6, "dashed"))
    return series


def cooled(curves: dict[str, Curve]) -> list[Series]:
    """Every arm's students over their own sample temperatures, where they were sampled at several."""
    return [
        Series(f"{curve.label}, cooled", [_cooled(curve, temperature) for temperature in curve.temperatures],
               DIRECT if arm == "direct" else "#999999", "circle", 6, "dashed")
        for arm, curve in curves.items() if len(curve.temperatures) > 1 and curve.students
    ]  # fmt: skip


def _chart_point(group: Group) -> Point:
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
    means = {name: t_interval(curve.values(name, curve.students)[index])[:2] for name in FACTS}
    facts = [f"{curve.label}, sampled at {temperature:g}"]
    facts += [f"{FACTS[name]} {show(*value)}" for name, value in means.items() if np.isfinite(value[0])]
    (x, x_error), (y, y_error) = means["recall"], means["precision"]
    return Point(x, y, x_error, y_error, facts)
