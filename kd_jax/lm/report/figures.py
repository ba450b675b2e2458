"""Figures of the language-model experiment, drawn from groups (`kd_jax.lm.report.summary.summarise`).

Every function returns a matplotlib `Figure`; `kd_jax.reporting.figures.save` writes it. Values that are not finite are
left out. All likelihoods are in nats per token.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_jax.lm.report.cooling import Curve
from kd_jax.lm.report.summary import ORDER, Group
from kd_jax.reporting.figures import CMAP, DIRECT, DISTILLED, INK, NAMED, canvas, label_points, plain, tidy
from kd_jax.reporting.page import number

# Without its yellow end, which is too light for lines on white.
TAU_MAP = ListedColormap(colormaps[CMAP](np.linspace(0.0, 0.9, 256)), name="tau")
TAU = r"teacher's sampling temperature $\tau$"
FAINT = {"s": 20, "alpha": 0.35, "linewidths": 0, "zorder": 2}
BARS = {"fmt": "none", "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}
MARKS = "s^vP<X>p"


def named(index: int) -> tuple[str, str]:
    """Colour and marker of an arm by its place among the arms by name; the first 24 pairs differ."""
    return NAMED[index % len(NAMED)], MARKS[index % len(MARKS)]


def arms_by_name(groups: list[Group]) -> list[tuple[Group, str, str]]:
    """The students of arms by name that have a value, each group with its colour and marker."""
    students = [group for group in groups if group.by_name]
    return [(group, *named(index)) for index, group in enumerate(students) if _has_value(group)]


def _has_value(group: Group) -> bool:
    return bool(group.estimates["precision"].count + group.estimates["recall"].count)


def split(groups: list[Group]) -> tuple[list[Group], list[Group], list[Group]]:
    """Students of config.taus in order of tau, the direct students, and the teacher in order of tau."""
    arms = {arm: [g for g in groups if g.arm == arm and _has_value(g)] for arm in ("distilled", "direct", "teacher")}
    distilled = sorted((g for g in arms["distilled"] if g.tau is not None), key=lambda g: g.tau)
    return distilled, arms["direct"][:1], sorted(arms["teacher"], key=lambda g: g.tau)


def _column(groups: list[Group], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors of one metric [groups]; NaN for a mean that is not finite, 0 for an unknown error."""
    mean = np.array([g.estimates[name].mean for g in groups], float)
    error = np.array([g.estimates[name].error for g in groups], float)
    return np.where(np.isfinite(mean), mean, np.nan), np.where(np.isfinite(error), error, 0.0)


def _seeds(group: Group, *names: str) -> list[np.ndarray]:
    """The single seeds' values, an array [seeds] for each metric; empty where there is one seed."""
    rows = group.rows if len(group.rows) > 1 else []
    values = np.array([[number(row.get(name)) for name in names] for row in rows]).reshape(len(rows), len(names))
    return list(np.where(np.isfinite(values), values, np.nan).T)


def norm(taus: list[float]) -> Normalize:
    """The colour scale over tau, widened where there is only one."""
    # A scale of no width has no colours.
    low, high = min(taus), max(taus)
    return Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)


def colourbar(figure: Figure, axes, taus: list[float]) -> None:
    """Adds the colour scale's legend to axes, with a tick at each tau where they are few."""
    bar = figure.colorbar(ScalarMappable(norm(taus), TAU_MAP), ax=axes, pad=0.02, aspect=30)
    bar.set_label(TAU)
    if _sparse(taus):
        bar.set_ticks(taus, labels=[f"{tau:g}" for tau in taus])


def _sparse(taus: list[float]) -> bool:
    """Whether every tau can be a tick: at most 8, and none too near the next."""
    return 0 < len(taus) <= 8 and bool((np.diff(sorted(taus)) > 0.08 * (max(taus) - min(taus))).all())


def _tau_axis(axes, groups: list[Group]) -> None:
    """Labels the axis and puts its ticks at the taus."""
    axes.set_xlabel(TAU)
    taus = sorted({g.tau for g in groups if g.arm in ("distilled", "teacher") and g.tau is not None})
    if _sparse(taus):
        axes.set_xticks(taus, labels=[f"{tau:g}" for tau in taus])


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """A legend above the axes, where it hides no data."""
    if handles:
        columns = min(4 if figure.get_figwidth() > 8 else 3, len(handles))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def marker(label: str, marker: str, colour, size: float = 8, **style) -> Line2D:
    """A legend's entry.

    Args:
        label: the text.
        marker: of matplotlib.
        colour: of the face.
        size: in points.
    """
    style = {"linestyle": "", "markeredgecolor": "white", **style}
    return Line2D([], [], color=colour, marker=marker, markersize=size, label=plain(label), **style)


def frontier(groups: list[Group], curves: dict[str, Curve]) -> Figure:
    """Recall against precision: the mean of each arm, its single seeds, and its curve over sample temperatures.

    Args:
        groups: as `summary.summarise` returns them.
        curves: students by arm, as `cooling.curves` returns them.
    """
    figure = canvas(7.4, 5.4)
    axes = figure.add_subplot()
    distilled, direct, teacher = split(groups)
    handles = []
    if distilled:
        handles.append(_draw_distilled(figure, axes, distilled))
    for group in direct:
        _draw_group(axes, group, DIRECT, "*", size=260, edge="white")
        handles.append(marker("direct (no teacher)", "*", DIRECT, 15))
    (x, _), (y, _) = _column(teacher, "recall"), _column(teacher, "precision")
    if np.isfinite(x + y).any():
        axes.scatter(x, y, marker="D", s=60, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=4)
        handles.append(marker("teacher", "D", INK, 7, markerfacecolor="none", markeredgecolor=INK))
    # Models that the run did not train, such as published ones.
    others = [g for g in groups if not g.is_student and g.arm not in ORDER]
    (x, _), (y, _) = _column(others, "recall"), _column(others, "precision")
    if np.isfinite(x + y).any():
        axes.scatter(x, y, marker="s", s=45, color="0.5", zorder=4)
        handles.append(marker("other models", "s", "0.5", 7))
    named = arms_by_name(groups)
    for group, colour, mark in named:
        _draw_group(axes, group, colour, mark, size=60, edge=INK)
    if any(len(group.rows) > 1 for group in (*distilled, *direct)):
        handles.append(marker("single seeds", "o", "0.5", 5, alpha=0.5))
    handles += draw_curves(axes, curves, colours_of(groups))
    axes.set_xlabel(r"recall  $E_{p^*}[\log p'']$  (nats per token)  better $\rightarrow$")
    axes.set_ylabel(r"precision  $E_{p''}[\log p^*]$  (nats per token)  better $\rightarrow$")
    axes.margins(0.08)
    tidy(axes)
    # An arm is named beside its point; in the legend where there is no room.
    shown = [*(group for group, _, _ in named), *distilled, *direct, *teacher]
    points = list(zip(_column(shown, "recall")[0], _column(shown, "precision")[0], strict=True))
    written = label_points(axes, points, {i: (group.label, INK) for i, (group, _, _) in enumerate(named)})
    for i, (group, colour, mark) in enumerate(named):
        if i not in written:
            handles.append(marker(group.label, mark, colour, 8, markeredgecolor=INK, markeredgewidth=0.6))
    legend(figure, handles)
    return figure


def _draw_distilled(figure: Figure, axes, distilled: list[Group]) -> Line2D:
    """The students of config.taus, coloured by tau; returns the legend's entry."""
    taus = [g.tau for g in distilled]
    (x, xerr), (y, yerr) = _column(distilled, "recall"), _column(distilled, "precision")
    colours = TAU_MAP(norm(taus)(taus))
    axes.plot(x, y, color="0.75", linewidth=1.2, zorder=1)
    for group, colour in zip(distilled, colours, strict=True):
        axes.scatter(*_seeds(group, "recall", "precision"), color=colour, **FAINT)
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor="0.35", **BARS)
    axes.scatter(x, y, c=colours, s=75, edgecolors="white", linewidths=0.8, zorder=4)
    if len(taus) > 1:  # a single one has no scale
        colourbar(figure, axes, taus)
        return marker("distilled", "o", "0.75", 9, markerfacecolor=DISTILLED, linestyle="-")
    return marker(distilled[0].label, "o", colours[0], 9)


def _draw_group(axes, group: Group, colour, mark: str, size: float, edge: str) -> None:
    """One arm's mean with errors, and its single seeds."""
    (x, xerr), (y, yerr) = _column([group], "recall"), _column([group], "precision")
    axes.scatter(*_seeds(group, "recall", "precision"), marker=mark, color=colour, **FAINT)
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor=colour, **BARS)
    axes.scatter(x, y, marker=mark, s=size, color=colour, edgecolors=edge, linewidths=0.7, zorder=5)


def colours_of(groups: list[Group]) -> dict[str, tuple]:
    """Colour of each student's arm, by its name."""
    distilled, _, _ = split(groups)
    taus = [g.tau for g in distilled]
    colours = {"direct": DIRECT} | {group.arm: colour for group, colour, _ in arms_by_name(groups)}
    return colours | {f"tau-{tau:g}": TAU_MAP(norm(taus)(tau)) for tau in taus}


def draw_curves(axes, curves: dict[str, Curve], colours: dict[str, tuple]) -> list[Line2D]:
    """Each student's mean curve over its own sample temperatures; the direct student's, the control, is labelled.

    Args:
        axes: to draw on.
        curves: students by arm.
        colours: by arm; grey for those without.
    Returns: the legend's entries.
    """
    # A curve needs two temperatures, and students that have all of them.
    drawn = {arm: curve for arm, curve in curves.items() if len(curve.temperatures) > 1 and curve.students}
    for arm, curve in drawn.items():
        x, y = (_finite(curve.values(name, curve.students).mean(1)) for name in ("recall", "precision"))
        # The line that distillation has to beat is drawn strongest, with its temperatures.
        control = arm == "direct"
        style = {"linewidth": 1.6, "alpha": 1.0} if control else {"linewidth": 1.0, "alpha": 0.7}
        axes.plot(x, y, "--.", color=colours.get(arm, "0.5"), markersize=5, zorder=2, **style)
        for temperature, *point in zip(curve.temperatures, x, y, strict=True) if control else ():
            if np.isfinite(point).all():
                axes.annotate(f"{temperature:g}", point, (5, -9), textcoords="offset points", fontsize=8, color=DIRECT)
    handles = []
    if "direct" in drawn:
        low, high = drawn["direct"].temperatures[-1], drawn["direct"].temperatures[0]
        text = f"direct, sampled at {high:g} to {low:g}"
        handles.append(Line2D([], [], linestyle="--", marker=".", color=DIRECT, label=text))
    if set(drawn) - {"direct"}:
        handles.append(Line2D([], [], linestyle="--", marker=".", color="0.5", label="distilled, cooled"))
    return handles


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _against(axes, groups: list[Group], x_name: str | None, y_name: str) -> None:
    """Draws one metric of the students against tau (`x_name` None) or against another metric."""
    distilled, direct, _ = split(groups)
    y, yerr = _column(distilled, y_name)
    x, xerr = (np.array([g.tau for g in distilled], float), None) if x_name is None else _column(distilled, x_name)
    for group, here in zip(distilled, x, strict=True):
        (seeds,) = _seeds(group, y_name)
        axes.scatter(np.full(len(seeds), here), seeds, color=DISTILLED, **FAINT)
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="o-", color=DISTILLED, markersize=5, linewidth=1.3, capsize=2.5)
    for group in direct:
        (mean,), (error,) = _column([group], y_name)
        if np.isfinite(mean):
            axes.axhspan(mean - error, mean + error, color=DIRECT, alpha=0.15, linewidth=0)
            axes.axhline(mean, color=DIRECT, linestyle="--", linewidth=1.3)
    shown = bool(np.isfinite(x + y).any())
    for group, colour, mark in arms_by_name(groups) if x_name is not None else []:
        (x, xerr), (y, yerr) = _column([group], x_name), _column([group], y_name)
        style = {"color": colour, "markeredgecolor": INK, "markeredgewidth": 0.6, "markersize": 6.5, "capsize": 2.5}
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt=mark, **style)
        shown |= bool(np.isfinite(x + y).any())
    if not shown:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="0.5")
    tidy(axes)


def _handles(groups: list[Group], with_teacher: bool) -> list[Line2D]:
    """The legend of `curves` (with the teacher, and arms by name) and of `divergences`."""
    distilled, direct, teacher = split(groups)
    handles = [Line2D([], [], color=DISTILLED, marker="o", markersize=5, label="distilled")] if distilled else []
    if direct:
        handles.append(Line2D([], [], color=DIRECT, linestyle="--", label="direct (no teacher)"))
    if teacher and with_teacher:
        handles.append(
            marker("teacher's own samples", "D", INK, 6, linestyle=":", markerfacecolor="none", markeredgecolor=INK)
        )
    if with_teacher:
        for group, colour, mark in arms_by_name(groups):
            handles.append(marker(group.label, mark, colour, 7, markeredgecolor=INK, markeredgewidth=0.6))
    return handles


def curves(groups: list[Group]) -> Figure:
    """Precision and recall against tau, if students of config.taus exist, and against the teacher's entropy."""
    distilled, _, teacher = split(groups)
    columns = {None: TAU} if distilled else {}
    columns["teacher_entropy"] = "teacher's entropy (nats per token)"
    figure = canvas(9.2 if distilled else 6.4, 6.8)
    grid = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
    style = {"color": INK, "linestyle": ":", "linewidth": 1.2, "marker": "D", "markersize": 5.5}
    for row, name in zip(grid, ("precision", "recall"), strict=True):
        for axes, x_name in zip(row, columns, strict=True):
            _against(axes, groups, x_name, name)
            # For the teacher itself, x is the entropy of its own samples.
            x = _column(teacher, "entropy")[0] if x_name else [g.tau for g in teacher]
            axes.plot(x, _column(teacher, name)[0], markerfacecolor="none", **style)
        row[0].set_ylabel(f"{name} (nats per token)")
    for axes, text in zip(grid[1], columns.values(), strict=True):
        axes.set_xlabel(text)
    if distilled:
        _tau_axis(grid[1, 0], groups)
    legend(figure, _handles(groups, with_teacher=True))
    return figure


def embedding_map(rows: list[dict], x: str, y: str) -> Figure:
    """Embeddings of p*'s texts and of each model's in the plane, a panel a model, on the same axes.

    Args:
        rows: of the run's embedding_map.jsonl.
        x, y: the fields that have the coordinates.
    """
    names = list(dict.fromkeys(row["name"] for row in rows if row["arm"] != "p_star"))
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure = canvas(2.6 * columns, 2.7 * lines + 0.4)
    grid = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(grid, names, strict=False):
        for colour, members in (("0.6", [r for r in rows if r["arm"] == "p_star"]),
                                (DISTILLED, [r for r in rows if r["name"] == name])):  # fmt: skip
            axes.scatter([r[x] for r in members], [r[y] for r in members], s=8, color=colour, alpha=0.6, linewidths=0)
        axes.set_title(plain(name), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    handles = [marker("p*'s texts", "o", "0.6", 6), marker("the model's", "o", DISTILLED, 6)]
    legend(figure, handles)
    return figure


def divergences(groups: list[Group]) -> Figure | None:
    """Both Kullback-Leibler divergences between student and p* against tau; None without students of config.taus."""
    if not split(groups)[0]:
        return None
    figure = canvas(9.2, 3.9)
    names = {"kl_model_data": r"KL$(p''\,\Vert\,p^*)$", "kl_data_model": r"KL$(p^*\,\Vert\,p'')$"}
    for axes, (name, symbol) in zip(figure.subplots(1, 2), names.items(), strict=True):
        _against(axes, groups, None, name)
        _tau_axis(axes, groups)
        axes.set_ylabel(f"{symbol}  (nats per token)")
    legend(figure, _handles(groups, with_teacher=False))
    return figure
