"""Figures of the language-model experiment, drawn from groups (`kd_jax.lm.summary.summarise`) and metrics rows.

Every function returns a matplotlib `Figure`; `kd_jax.figures.save` writes it. What is not finite is left out. All
likelihoods are in nats per token.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_jax.figures import CMAP, DIRECT, DISTILLED, INK, canvas, tidy
from kd_jax.lm.summary import ORDER, Group, group_key, of_kind
from kd_jax.page import mean_se, number

# Without its yellow end, which is too light for lines on white.
TAU_MAP = ListedColormap(colormaps[CMAP](np.linspace(0.0, 0.9, 256)), name="tau")
TAU = r"teacher's sampling temperature $\tau$"
FAINT = {"s": 20, "alpha": 0.35, "linewidths": 0, "zorder": 2}
BARS = {"fmt": "none", "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}


def split(groups: list[Group]) -> tuple[list[Group], list[Group], list[Group]]:
    """Students of a teacher in order of tau, the direct students, and the teacher in order of tau."""
    arms = {
        arm: [g for g in groups if g.arm == arm and g.estimates["precision"].count + g.estimates["recall"].count]
        for arm in ("distilled", "direct", "teacher")
    }
    distilled = sorted((g for g in arms["distilled"] if g.tau is not None), key=lambda g: g.tau)
    return distilled, arms["direct"][:1], sorted(arms["teacher"], key=lambda g: g.tau)


def _column(groups: list[Group], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors of one metric [groups]; a mean that is not finite is NaN, an error unknown is 0."""
    mean = np.array([g.estimates[name].mean for g in groups], float)
    error = np.array([g.estimates[name].error for g in groups], float)
    return np.where(np.isfinite(mean), mean, np.nan), np.where(np.isfinite(error), error, 0.0)


def _seeds(group: Group, *names: str) -> list[np.ndarray]:
    """The single seeds' values, an array [seeds] for each metric; nothing where there is one seed."""
    rows = group.rows if len(group.rows) > 1 else []
    values = np.array([[number(row.get(name)) for name in names] for row in rows]).reshape(len(rows), len(names))
    return list(np.where(np.isfinite(values), values, np.nan).T)


def _norm(taus: list[float]) -> Normalize:
    """The colour scale over tau, widened where there is only one."""
    low, high = min(taus), max(taus)
    return Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)


def _colourbar(figure: Figure, axes, taus: list[float]) -> None:
    """The colour scale's legend; a few taus are its ticks, many are not."""
    bar = figure.colorbar(ScalarMappable(_norm(taus), TAU_MAP), ax=axes, pad=0.02, aspect=30)
    bar.set_label(TAU)
    if _sparse(taus):
        bar.set_ticks(taus, labels=[f"{tau:g}" for tau in taus])


def _sparse(taus: list[float]) -> bool:
    """Whether every tau can be a tick: few, and none too near the next."""
    return 0 < len(taus) <= 8 and bool((np.diff(sorted(taus)) > 0.08 * (max(taus) - min(taus))).all())


def _tau_axis(axes, groups: list[Group]) -> None:
    """Names the axis and ticks it at the taus themselves."""
    axes.set_xlabel(TAU)
    taus = sorted({g.tau for g in groups if g.arm in ("distilled", "teacher") and g.tau is not None})
    if _sparse(taus):
        axes.set_xticks(taus, labels=[f"{tau:g}" for tau in taus])


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    """Above the axes, where no data can be."""
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)


def _marker(label: str, marker: str, colour, size: float = 8, **style) -> Line2D:
    style = {"linestyle": "", "markeredgecolor": "white", **style}
    return Line2D([], [], color=colour, marker=marker, markersize=size, label=label, **style)


def frontier(groups: list[Group]) -> Figure:
    """Recall against precision: a point per tau, the single seeds behind it, the direct student and the teacher."""
    figure = canvas(7.4, 5.4)
    axes = figure.add_subplot()
    distilled, direct, teacher = split(groups)
    handles = []
    if distilled:
        taus = [g.tau for g in distilled]
        (x, xerr), (y, yerr) = _column(distilled, "recall"), _column(distilled, "precision")
        colours = TAU_MAP(_norm(taus)(taus))
        axes.plot(x, y, color="0.75", linewidth=1.2, zorder=1)
        for group, colour in zip(distilled, colours, strict=True):
            axes.scatter(*_seeds(group, "recall", "precision"), color=colour, **FAINT)
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor="0.35", **BARS)
        axes.scatter(x, y, c=colours, s=75, edgecolors="white", linewidths=0.8, zorder=4)
        _colourbar(figure, axes, taus)
        handles.append(_marker("distilled", "o", "0.75", 9, markerfacecolor=DISTILLED, linestyle="-"))
    for group in direct:
        (x, xerr), (y, yerr) = _column([group], "recall"), _column([group], "precision")
        axes.scatter(*_seeds(group, "recall", "precision"), marker="*", color=DIRECT, **{**FAINT, "s": 45})
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, ecolor=DIRECT, **BARS)
        axes.scatter(x, y, marker="*", s=260, color=DIRECT, edgecolors="white", linewidths=0.8, zorder=5)
        handles.append(_marker("direct (no teacher)", "*", DIRECT, 15))
    (x, _), (y, _) = _column(teacher, "recall"), _column(teacher, "precision")
    if np.isfinite(x + y).any():
        axes.scatter(x, y, marker="D", s=60, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=4)
        handles.append(_marker("teacher", "D", INK, 7, markerfacecolor="none", markeredgecolor=INK))
    others = [g for g in groups if g.arm not in ORDER]
    (x, _), (y, _) = _column(others, "recall"), _column(others, "precision")
    if np.isfinite(x + y).any():
        axes.scatter(x, y, marker="s", s=45, color="0.5", zorder=4)
        handles.append(_marker("other models", "s", "0.5", 7))
    if any(len(group.rows) > 1 for group in (*distilled, *direct)):
        handles.append(_marker("single seeds", "o", "0.5", 5, alpha=0.5))
    axes.set_xlabel(r"recall  $E_{p^*}[\log p'']$  (nats per token)")
    axes.set_ylabel(r"precision  $E_{p''}[\log p^*]$  (nats per token)")
    axes.margins(0.08)
    tidy(axes)
    _legend(figure, handles)
    return figure


def _against(axes, groups: list[Group], x_name: str | None, y_name: str) -> None:
    """One metric of the students against tau (`x_name` None) or against another metric, beside the direct student."""
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
    if not np.isfinite(x + y).any():
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="0.5")
    tidy(axes)


def _handles(groups: list[Group], with_teacher: bool) -> list[Line2D]:
    distilled, direct, teacher = split(groups)
    handles = [Line2D([], [], color=DISTILLED, marker="o", markersize=5, label="distilled")] if distilled else []
    if direct:
        handles.append(Line2D([], [], color=DIRECT, linestyle="--", label="direct (no teacher)"))
    if teacher and with_teacher:
        handles.append(
            _marker("teacher's own samples", "D", INK, 6, linestyle=":", markerfacecolor="none", markeredgecolor=INK)
        )
    return handles


def curves(groups: list[Group]) -> Figure:
    """Precision and recall against tau and against the teacher's measured entropy."""
    figure = canvas(9.2, 6.8)
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    teacher = split(groups)[2]
    for i, name in enumerate(("precision", "recall")):
        _against(grid[i, 0], groups, None, name)
        _against(grid[i, 1], groups, "teacher_entropy", name)
        y, _ = _column(teacher, name)
        style = {"color": INK, "linestyle": ":", "linewidth": 1.2, "marker": "D", "markersize": 5.5}
        for axes, x in zip(grid[i], ([g.tau for g in teacher], _column(teacher, "entropy")[0]), strict=True):
            axes.plot(x, y, markerfacecolor="none", **style)
        grid[i, 0].set_ylabel(f"{name} (nats per token)")
    _tau_axis(grid[1, 0], groups)
    grid[1, 1].set_xlabel("teacher's measured entropy (nats per token)")
    _legend(figure, _handles(groups, with_teacher=True))
    return figure


def divergences(groups: list[Group]) -> Figure:
    """Both Kullback-Leibler divergences between student and p* against tau."""
    figure = canvas(9.2, 3.9)
    names = {"kl_model_data": r"KL$(p''\,\Vert\,p^*)$", "kl_data_model": r"KL$(p^*\,\Vert\,p'')$"}
    for axes, (name, symbol) in zip(figure.subplots(1, 2), names.items(), strict=True):
        _against(axes, groups, None, name)
        _tau_axis(axes, groups)
        axes.set_ylabel(f"{symbol}  (nats per token)")
    _legend(figure, _handles(groups, with_teacher=False))
    return figure


def training(rows: list[dict]) -> Figure | None:
    """Validation and training loss of each training, mean over seeds; None where there are no such rows."""
    shown = [row for row in rows if row["kind"] in ("training", "validation") and row.get("loss") is not None]
    if not shown:
        return None
    panels = {"teacher": [], "students": []}
    for row in shown:
        panels["teacher" if row["arm"] == "teacher" else "students"].append(row)
    panels = {title: members for title, members in panels.items() if members}
    taus = sorted({row["tau"] for row in panels.get("students", []) if row.get("tau") is not None})
    counted, unit = _tokens(shown)
    figure = canvas(9.2 if len(panels) > 1 else 6.4, 4.4)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, members) in zip(grid, panels.items(), strict=True):
        arms: dict[tuple, list[dict]] = {}
        for row in members:
            arms.setdefault(group_key(row), []).append(row)
        for (arm, tau, _), own in arms.items():
            by_tau = arm not in ("teacher", "direct") and tau is not None
            colour = TAU_MAP(_norm(taus)(tau)) if by_tau else {"direct": DIRECT}.get(arm, INK)
            _losses(axes, own, counted, colour)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(unit)
        axes.set_ylim(_loss_limits(shown))
        tidy(axes)
    grid[0].set_ylabel("loss (nats per token)")
    if taus:
        _colourbar(figure, grid[-1], taus)
    _legend(figure, _training_handles(shown))
    return figure


def _training_handles(rows: list[dict]) -> list[Line2D]:
    handles = [
        Line2D([], [], color="0.3", linewidth=1.6, label="validation"),
        Line2D([], [], color="0.3", linewidth=1, alpha=0.35, label="training"),
    ]
    if any(row.get("chosen") for row in rows):
        handles.append(_marker("chosen checkpoint", "v", "0.3", 8))
    if any(row["arm"] == "direct" for row in rows):
        handles.append(Line2D([], [], color=DIRECT, linewidth=1.6, label="direct (no teacher)"))
    return handles


def _losses(axes, rows: list[dict], counted: dict[tuple, float], colour) -> None:
    """The curves of one arm at one tau: validation over a band of standard errors, training lightly behind."""
    for kind, style in (("training", {"linewidth": 0.9, "alpha": 0.35}), ("validation", {"linewidth": 1.6})):
        by_step: dict[int, dict[str, tuple[float, float]]] = {}
        for row in of_kind(rows, kind):
            x, loss = counted[row["name"], row["step"]], number(row["loss"])
            by_step.setdefault(row["step"], {})[row["name"]] = (x, loss if math.isfinite(loss) else math.nan)
        steps = [np.array(list(by_step[step].values())) for step in sorted(by_step)]
        x = np.array([values[:, 0].mean() for values in steps])
        mean, error = np.array([mean_se(values[:, 1]) for values in steps]).reshape(-1, 2).T
        axes.plot(x, mean, color=colour, marker="." if len(x) == 1 else None, **style)
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
