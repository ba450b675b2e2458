"""The figure of losses while models train, drawn from metrics rows."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_jax.lm.report import figures
from kd_jax.lm.report.summary import ORDER, group_key, label, of_kind, position
from kd_jax.reporting.figures import DIRECT, INK, canvas, plain, tidy
from kd_jax.reporting.page import mean_se, number

LINES = ("-", "--", ":", "-.")


def training(rows: list[dict]) -> Figure | None:
    """Validation and training loss of each training, mean over seeds; None where there are no such rows.

    Where a teacher's distribution is learnt, its divergence is no cross-entropy: that of the text is drawn in its
    place, without the updates on text of the student's own.
    """
    shown = [row for row in map(_of_text, rows) if row is not None]
    if not shown:
        return None
    panels = {"teacher": [], "students": []}
    for row in shown:
        panels["teacher" if row["arm"] == "teacher" else "students"].append(row)
    panels = {title: members for title, members in panels.items() if members}
    keys = sorted({group_key(row) for row in panels.get("students", [])}, key=position)
    taus = [tau for arm, tau, _ in keys if arm == "distilled" and tau is not None]
    styles = _styles(keys, taus)
    counted, unit = _tokens(shown)
    figure = canvas(9.2 if len(panels) > 1 else 6.4, 4.4 + 0.2 * (len(keys) // 4))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, members) in zip(grid, panels.items(), strict=True):
        arms: dict[tuple, list[dict]] = {}
        for row in members:
            arms.setdefault(group_key(row), []).append(row)
        for key, own in arms.items():
            _losses(axes, own, counted, *styles.get(key, (INK, "-")))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(unit)
        axes.set_ylim(_loss_limits(shown))
        tidy(axes)
    grid[0].set_ylabel("loss (nats per token)")
    if taus:
        figures.colourbar(figure, grid[-1], taus)
    figures.legend(figure, _handles(shown, styles))
    return figure


def _of_text(row: dict) -> dict | None:
    """The row with the cross-entropy of text as its loss; None for one that has none."""
    if row["kind"] not in ("training", "validation") or row.get("loss") is None or row.get("on_policy"):
        return None
    return row if row.get("cross_entropy") is None else {**row, "loss": row["cross_entropy"]}


def _styles(keys: list[tuple], taus: list[float]) -> dict[tuple, tuple]:
    """Colour and line of each kind of student."""
    found = {("direct", None, None): (DIRECT, "-")}
    found |= {("distilled", tau, None): (figures.TAU_MAP(figures.norm(taus)(tau)), "-") for tau in taus}
    for i, key in enumerate(key for key in keys if key[0] not in ORDER):
        found[key] = figures.named(i)[0], LINES[i // len(figures.NAMED) % len(LINES)]
    return found


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
    """The curves of one arm at one tau: validation over a band of standard errors, training lightly behind."""
    for kind, style in (("training", {"linewidth": 0.9, "alpha": 0.35}), ("validation", {"linewidth": 1.6})):
        by_step: dict[int, dict[str, tuple[float, float]]] = {}
        for row in of_kind(rows, kind):
            x, loss = counted[row["name"], row["step"]], number(row["loss"])
            by_step.setdefault(row["step"], {})[row["name"]] = (x, loss if math.isfinite(loss) else math.nan)
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
    """(name, step) -> millions of tokens trained on, or steps where some training does not say; and the axis' label."""
    known: dict[str, dict[int, float]] = {}
    for row in of_kind(rows, "training"):
        if row.get("tokens") is not None:
            known.setdefault(row["name"], {0: 0.0})[row["step"]] = row["tokens"] / 1e6
    places = {(row["name"], row["step"]) for row in rows}
    if any(len(known.get(name, {})) < 2 for name, _ in places):
        return {(name, step): step for name, step in places}, "steps"
    found = {}
    for name, step in places:
        steps = sorted(known[name])
        tokens = [known[name][s] for s in steps]
        # Validation falls between the steps that are logged, or after the last of them.
        inside = np.interp(step, steps, tokens)
        found[name, step] = float(inside) if step <= steps[-1] else tokens[-1] * step / steps[-1]
    return found, "tokens trained on (millions)"


def _loss_limits(rows: list[dict]) -> tuple[float, float] | tuple[None, None]:
    """Limits that leave out the first fall, beside which the differences that matter would not show."""
    by_name: dict[str, list[dict]] = {}
    for row in of_kind(rows, "validation") or rows:
        if math.isfinite(row["loss"]):
            by_name.setdefault(row["name"], []).append(row)
    later = []
    for members in by_name.values():
        last = max(row["step"] for row in members)
        later += [row["loss"] for row in members if row["step"] >= 0.1 * last]
    if not later:
        return None, None
    room = 0.15 * (max(later) - min(later)) or 0.1
    return min(later) - room, max(later) + room
