"""The figure of losses while models train: a panel for each loss that something was trained on."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_jax.lm.report import figures
from kd_jax.lm.report.comparison import loss_name
from kd_jax.lm.report.summary import ORDER, group_key, label, of_kind, position
from kd_jax.reporting.figures import DIRECT, INK, canvas, plain, tidy
from kd_jax.reporting.page import mean_se, number

LINES = ("-", "--", ":", "-.")


def training(rows: list[dict]) -> Figure | None:
    """Training and validation loss of each arm, mean over seeds; None where there are no such rows.

    Every panel shows the loss that its models were trained on, by name: losses of different panels are not comparable.
    """
    panels = by_loss(rows)
    shown = [row for members in panels.values() for row in members]
    if not shown:
        return None
    keys = sorted({group_key(row) for row in shown if row["arm"] != "teacher"}, key=position)
    taus = [tau for arm, tau, _ in keys if arm == "distilled" and tau is not None]
    styles = _styles(keys, taus)
    counted, unit = _tokens(shown)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = canvas(max(6.4, 4.6 * columns), 3.6 * lines + 0.8 + 0.2 * (len(keys) // 4))
    # Axes are not shared: losses of different panels are of different kinds.
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, ((who, loss), members) in zip(grid, panels.items(), strict=False):
        _panel(axes, members, counted, styles)
        axes.set_title(who, fontsize=11)
        axes.set_xlabel(unit)
        axes.set_ylabel(f"{loss} (nats per token)")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if taus:
        figures.colourbar(figure, grid, taus)
    figures.legend(figure, _handles(shown, styles))
    return figure


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


def _panel(axes, rows: list[dict], counted: dict[tuple, float], styles: dict[tuple, tuple]) -> None:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(group_key(row), []).append(row)
    for key, members in groups.items():
        _losses(axes, members, counted, *styles.get(key, (INK, "-")))
    axes.set_ylim(_loss_limits(rows))
    tidy(axes)


def _styles(keys: list[tuple], taus: list[float]) -> dict[tuple, tuple]:
    """Colour and line of each group of students."""
    styles = {("direct", None, None): (DIRECT, "-")}
    styles |= {("distilled", tau, None): (figures.TAU_MAP(figures.norm(taus)(tau)), "-") for tau in taus}
    for i, key in enumerate(key for key in keys if key[0] not in ORDER):
        # Lines change only after all colours have been used.
        styles[key] = figures.named(i)[0], LINES[i // len(figures.NAMED) % len(LINES)]
    return styles


def _handles(rows: list[dict], styles: dict[tuple, tuple]) -> list[Line2D]:
    handles = [
        Line2D([], [], color="0.3", linewidth=1.6, label="validation"),
        Line2D([], [], color="0.3", linewidth=1, alpha=0.35, label="training"),
    ]
    if any(row.get("chosen") for row in rows):
        handles.append(figures.marker("chosen checkpoint", "v", "0.3", 8))
    if any(row["arm"] == "direct" for row in rows):
        handles.append(Line2D([], [], color=DIRECT, linewidth=1.6, label="direct (no teacher)"))
    for key, (colour, line) in styles.items():
        if key[0] not in ORDER:
            handles.append(Line2D([], [], color=colour, linestyle=line, linewidth=1.6, label=plain(label(*key))))
    return handles


def _losses(axes, rows: list[dict], counted: dict[tuple, float], colour, line) -> None:
    """The curves of one group: validation in a band of its standard error, training in a thin line behind."""
    for kind, style in (("training", {"linewidth": 0.9, "alpha": 0.35}), ("validation", {"linewidth": 1.6})):
        by_step: dict[int, dict[str, tuple[float, float]]] = {}
        for row in of_kind(rows, kind):
            x, loss = counted[row["name"], row["step"]], number(row["loss"])
            by_step.setdefault(row["step"], {})[row["name"]] = (x, loss if math.isfinite(loss) else math.nan)
        # Means over the seeds that have the step: one that was stopped does not end the curve of the others.
        steps = [np.array(list(by_step[step].values())) for step in sorted(by_step)]
        x = np.array([values[:, 0].mean() for values in steps])
        mean, error = np.array([mean_se(values[:, 1]) for values in steps]).reshape(-1, 2).T
        axes.plot(x, mean, color=colour, linestyle=line, marker="." if len(x) == 1 else None, **style)
        if kind == "validation":
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    chosen = [row for row in of_kind(rows, "validation") if row.get("chosen")]
    x, y = [counted[row["name"], row["step"]] for row in chosen], [number(row["loss"]) for row in chosen]
    axes.scatter(x, y, marker="v", s=42, color=[colour], edgecolors="white", linewidths=0.7, zorder=4)


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


def _loss_limits(rows: list[dict]) -> tuple[float, float] | tuple[None, None]:
    """Limits without the first tenth of the steps, whose fall would hide the differences that matter."""
    by_name: dict[str, list[dict]] = {}
    for row in of_kind(rows, "validation") or rows:
        # A loss that is not finite has no place in a figure, and would take the limits along.
        if math.isfinite(row["loss"]):
            by_name.setdefault(row["name"], []).append(row)
    later = []
    for members in by_name.values():
        last = max(row["step"] for row in members)
        later += [row["loss"] for row in members if row["step"] >= 0.1 * last]
    if not later:
        return None, None
    # One value alone still needs an axis.
    room = 0.15 * (max(later) - min(later)) or 0.1
    return min(later) - room, max(later) + room
