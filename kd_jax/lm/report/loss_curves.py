"""The figure of trainings: a panel for each loss that something was trained on, and one for each of what is logged."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_jax.lm.report import figures
from kd_jax.lm.report.comparison import loss_name
from kd_jax.lm.report.summary import ORDER, group_key, label, of_kind, position
from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import charts
from kd_jax.reporting.figures import DIRECT, INK, NAMED, canvas, plain, tidy
from kd_jax.reporting.page import number

# Lines of matplotlib, and as ECharts calls them.
LINES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
# What is logged beside the loss, with a title and an axis; panels without values are left out.
LOGGED = {
    "cross_entropy": ("cross-entropy on the text", "nats per token"),
    "divergence": ("divergence from the teacher", "nats per token"),
    "agreement": ("agreement with the teacher", "share of tokens"),
    "student_entropy": ("student's entropy", "nats per token"),
    "teacher_entropy": ("teacher's entropy", "nats per token"),
    "gradient_norm": ("gradient norm, before clipping", "gradient norm"),
}
# Points of a curve in the interactive chart; the still figure has all.
_MOST = 150


class Curve(NamedTuple):
    """One field of one group of models while they train, mean over seeds.

    Attributes:
        key: of the group.
        kind: "training" or "validation".
        steps: updates [n].
        x: the same on the panels' axis [n].
        mean, error: [n]; NaN where it is not finite.
    """

    key: tuple
    kind: str
    steps: np.ndarray
    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


class Panel(NamedTuple):
    """One diagram.

    Attributes:
        title, y_title: as text.
        curves: of every group, training before validation.
        chosen: key, x and value of each chosen checkpoint.
        limits: of the y axis; None where matplotlib or ECharts may choose.
    """

    title: str
    y_title: str
    curves: list[Curve]
    chosen: list[tuple[tuple, float, float]]
    limits: tuple[float, float] | None


class Trainings(NamedTuple):
    """What the figure and the chart show.

    Attributes:
        panels: in order.
        x_title: of all panels.
        styles: colour and line of each group.
        taus: of students of config.taus.
    """

    panels: list[Panel]
    x_title: str
    styles: dict[tuple, tuple[str, str]]
    taus: list[float]


def read(rows: list[dict]) -> Trainings | None:
    """The curves of all trainings; None where there are no such rows.

    Panels of losses come first, each with the loss that its models were trained on, by name: losses of different panels
    are not comparable.
    """
    losses = by_loss(rows)
    shown = [row for members in losses.values() for row in members]
    if not shown:
        return None
    keys = sorted({group_key(row) for row in shown if row["arm"] != "teacher"}, key=position)
    taus = [tau for arm, tau, _ in keys if arm == "distilled" and tau is not None]
    counted, x_title = _tokens(shown)
    panels = [
        _panel(who, f"{loss} (nats per token)", members, "loss", counted) for (who, loss), members in losses.items()
    ]
    for field, (title, unit) in LOGGED.items():
        members = [row for row in shown if row.get(field) is not None]
        # a divergence or cross-entropy that is itself the loss has its panel already
        if any(row[field] != row["loss"] for row in members):
            panels.append(_panel(title, unit, members, field, counted))
    return Trainings(panels, x_title, _styles(keys, taus), taus)


def by_loss(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The rows of trainings by (who learns, name of the loss): the teacher first, then students of text."""
    names = {group_key(row): loss_name(row.get("distill") or {}) for row in of_kind(rows, "evaluation")}
    panels: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["kind"] in ("training", "validation") and row.get("loss") is not None:
            # before the evaluation only the row itself tells that a divergence is learnt
            fallback = "divergence" if row.get("divergence") is not None else "cross-entropy"
            who = "teacher" if row["arm"] == "teacher" else "students"
            panels.setdefault((who, names.get(group_key(row), fallback)), []).append(row)
    return dict(sorted(panels.items(), key=lambda item: (item[0][0] != "teacher", item[0][1])))


def figure(trainings: Trainings) -> Figure:
    """Training and validation curves of each arm, mean over seeds."""
    panels, styles = trainings.panels, trainings.styles
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = canvas(max(6.4, 4.6 * columns), 3.6 * lines + 0.8 + 0.2 * (len(styles) // 4))
    # Axes are not shared: losses of different panels are of different kinds.
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, styles)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(trainings.x_title)
        axes.set_ylabel(panel.y_title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if trainings.taus:
        figures.colourbar(figure, grid, trainings.taus)
    figures.legend(figure, _handles(trainings))
    return figure


def chart(trainings: Trainings) -> dict[str, Any]:
    """The interactive form of `figure`; the pointer shows update and value."""
    shown = [
        charts.Panel(panel.title, _series(panel, trainings), trainings.x_title, panel.y_title, panel.limits)
        for panel in trainings.panels
    ]
    return charts.panels(shown)


def _series(panel: Panel, trainings: Trainings) -> list[charts.Series]:
    series = []
    # validation first, as the legend looks like the first of a name
    for curve in sorted(panel.curves, key=lambda curve: curve.kind != "validation"):
        colour, line = trainings.styles.get(curve.key, (charts.INK, "-"))
        name = _name(curve.key)
        points = []
        for i in range(0, len(curve.steps), max(1, math.ceil(len(curve.steps) / _MOST))):
            value = f"{panel.y_title}: {show(curve.mean[i], curve.error[i])}"
            facts = [name, f"{curve.kind}, update {curve.steps[i]:g}", f"{trainings.x_title}: {curve.x[i]:.3g}", value]
            points.append(charts.Point(curve.x[i], curve.mean[i], math.nan, math.nan, facts))
        size, opacity = (4, 0.4) if _is_faint(panel, curve) else (6, 1.0)
        series.append(charts.Series(name, points, colour, "circle", size, LINES[line], opacity))
    for key, x, value in panel.chosen:
        facts = [_name(key), "chosen checkpoint", f"{panel.y_title}: {value:.3f}"]
        colour, _ = trainings.styles.get(key, (charts.INK, "-"))
        series.append(
            charts.Series(_name(key), [charts.Point(x, value, math.nan, math.nan, facts)], colour, "diamond", 10)
        )
    return series


def _name(key: tuple) -> str:
    # a teacher's key has the tau of its samples, which its training does not depend on
    return "teacher" if key[0] == "teacher" else label(*key)


def _is_faint(panel: Panel, curve: Curve) -> bool:
    """Whether a curve is of training, in a panel where the validation matters more."""
    return curve.kind == "training" and any(other.kind == "validation" for other in panel.curves)


def _panel(title: str, y_title: str, rows: list[dict], field: str, counted: dict[tuple, float]) -> Panel:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(group_key(row), []).append(row)
    curves = [
        _curve(key, kind, members, field, counted)
        for key, own in groups.items() for kind in ("training", "validation") if (members := of_kind(own, kind))
    ]  # fmt: skip
    chosen = [
        (group_key(row), counted[row["name"], row["step"]], number(row[field]))
        for row in of_kind(rows, "validation") if row.get("chosen")
    ]  # fmt: skip
    return Panel(title, y_title, curves, chosen, _limits(rows, field))


def _curve(key: tuple, kind: str, rows: list[dict], field: str, counted: dict[tuple, float]) -> Curve:
    by_step: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        value = number(row[field])
        point = counted[row["name"], row["step"]], value if math.isfinite(value) else math.nan
        by_step.setdefault(row["step"], []).append(point)
    # Means over the seeds that have the step: one that was stopped does not end the curve of the others.
    steps = sorted(by_step)
    values = [np.array(by_step[step]) for step in steps]
    mean, error = np.array([t_interval(points[:, 1])[:2] for points in values]).reshape(-1, 2).T
    return Curve(key, kind, np.array(steps), np.array([points[:, 0].mean() for points in values]), mean, error)


def _draw(axes, panel: Panel, styles: dict[tuple, tuple[str, str]]) -> None:
    """The curves of one panel: validation in a band of its standard error, training in a thin line behind."""
    for curve in panel.curves:
        colour, line = styles.get(curve.key, (INK, "-"))
        style = {"linewidth": 0.9, "alpha": 0.35} if _is_faint(panel, curve) else {"linewidth": 1.6}
        marker = "." if len(curve.x) == 1 else None
        axes.plot(curve.x, curve.mean, color=colour, linestyle=line, marker=marker, **style)
        if curve.kind == "validation":
            low, high = curve.mean - curve.error, curve.mean + curve.error
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
    for key, x, value in panel.chosen:
        colour, _ = styles.get(key, (INK, "-"))
        axes.scatter([x], [value], marker="v", s=42, color=colour, edgecolors="white", linewidths=0.7, zorder=4)
    axes.set_ylim(panel.limits)
    tidy(axes)


def _styles(keys: list[tuple], taus: list[float]) -> dict[tuple, tuple[str, str]]:
    """Colour and line of each group of students."""
    styles = {("direct", None, None): (DIRECT, "-")}
    styles |= {("distilled", tau, None): (to_hex(figures.TAU_MAP(figures.norm(taus)(tau))), "-") for tau in taus}
    lines = list(LINES)
    for i, key in enumerate(key for key in keys if key[0] not in ORDER):
        # Lines change only after all colours have been used.
        styles[key] = figures.named(i)[0], lines[i // len(NAMED) % len(lines)]
    return {key: style for key, style in styles.items() if key in keys}


def _handles(trainings: Trainings) -> list[Line2D]:
    handles = [
        Line2D([], [], color="0.3", linewidth=1.6, label="validation"),
        Line2D([], [], color="0.3", linewidth=1, alpha=0.35, label="training"),
    ]
    if any(panel.chosen for panel in trainings.panels):
        handles.append(figures.marker("chosen checkpoint", "v", "0.3", 8))
    for key, (colour, line) in trainings.styles.items():
        name = "direct (no teacher)" if key[0] == "direct" else label(*key)
        # students of config.taus have the colour scale
        if key[0] != "distilled":
            handles.append(Line2D([], [], color=colour, linestyle=line, linewidth=1.6, label=plain(name)))
    return handles


def _tokens(rows: list[dict]) -> tuple[dict[tuple, float], str]:
    """(name, step) -> millions of tokens trained on (steps, if a training has no token counts), and the axis' label."""
    known: dict[str, dict[int, float]] = {}
    for row in of_kind(rows, "training"):
        if row.get("tokens") is not None:
            known.setdefault(row["name"], {0: 0.0})[row["step"]] = row["tokens"] / 1e6
    places = {(row["name"], row["step"]) for row in rows}
    # One axis for all: a training without token counts puts all of them on steps.
    if any(len(known.get(name, {})) < 2 for name, _ in places):
        return {(name, step): step for name, step in places}, "steps"
    millions = {}
    for name, step in places:
        steps = sorted(known[name])
        tokens = [known[name][s] for s in steps]
        # Validation can fall between the steps that are logged, or after the last of them.
        inside = np.interp(step, steps, tokens)
        millions[name, step] = float(inside) if step <= steps[-1] else tokens[-1] * step / steps[-1]
    return millions, "tokens trained on (millions)"


def _limits(rows: list[dict], field: str) -> tuple[float, float] | None:
    """Limits without the first tenth of the steps, whose fall would hide the differences that matter."""
    by_name: dict[str, list[dict]] = {}
    # Of a loss, training is shown as far as it is near the validation.
    for row in (field == "loss" and of_kind(rows, "validation")) or rows:
        # A value that is not finite has no place in a figure, and would take the limits along.
        if math.isfinite(number(row[field])):
            by_name.setdefault(row["name"], []).append(row)
    later = []
    for members in by_name.values():
        last = max(row["step"] for row in members)
        later += [number(row[field]) for row in members if row["step"] >= 0.1 * last]
    if not later:
        return None
    # One value alone still needs an axis.
    room = 0.15 * (max(later) - min(later)) or 0.1
    return min(later) - room, max(later) + room
