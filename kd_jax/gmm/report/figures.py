"""Figures of the mixture distillation experiment, drawn from summary rows.

Every drawing function takes plain data (rows from `kd_jax.gmm.report.page.summarise` or the arrays of `panels.npz`) and
returns a matplotlib `Figure`; `kd_jax.reporting.figures.save` writes it.
"""

from __future__ import annotations

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation

from kd_jax.reporting.figures import CMAP, DIRECT, DISTILLED, INK, TEACHER, canvas, tidy

SETTING = ("dim", "num_data", "teacher_components", "student_components", "separation")
SETTING_NAMES = {
    "dim": "dimension",
    "num_data": "training points",
    "teacher_components": "teacher components",
    "student_components": "student components",
    "separation": "separation",
}
# The arrays of a run's panels.npz.
PANELS = (
    "grid_x", "grid_y", "beta", "data", "log_p_star", "log_teacher", "log_direct", "log_distilled", "samples_p_star",
    "samples_teacher", "samples_direct", "samples_distilled",
)  # fmt: skip
LEVELS = (-4.5, -2.0, -0.5)  # log-density below the mode: a Gaussian's 3, 2 and 1 sigma contours


def _split(summary: list[dict]) -> tuple[list[dict], list[dict]]:
    """The distilled rows in order of beta (positive ones: the axis is logarithmic), and the direct rows."""
    distilled = sorted((r for r in summary if r["arm"] == "distilled" and r["beta"] > 0), key=lambda r: r["beta"])
    return distilled, [r for r in summary if r["arm"] == "direct"]


def _column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors of one metric; non-finite means are left as gaps and missing errors drawn as 0."""
    mean = np.array([r[f"{name}_mean"] for r in rows], float)
    error = np.array([r[f"{name}_se"] for r in rows], float)
    return np.where(np.isfinite(mean), mean, np.nan), np.where(np.isfinite(error), error, 0.0)


def _norm(betas: np.ndarray) -> LogNorm:
    """A logarithmic colour scale over the betas, widened when there is only one."""
    low, high = float(np.min(betas)), float(np.max(betas))
    return LogNorm(low, high) if high > low else LogNorm(low / 2, low * 2)


def frontier(summary: list[dict]) -> Figure:
    """Recall against precision, one point per beta, with standard errors over seeds and the direct student."""
    figure = canvas(7.0, 5.0)
    axes = figure.add_subplot()
    distilled, direct = _split(summary)
    if distilled:
        betas = np.array([r["beta"] for r in distilled])
        (x, xerr), (y, yerr) = _column(distilled, "recall"), _column(distilled, "precision")
        axes.plot(x, y, color="0.65", linewidth=1.2, zorder=1)
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor="0.45", elinewidth=1, capsize=2, zorder=2)
        norm = _norm(betas)
        axes.scatter(x, y, c=betas, cmap=CMAP, norm=norm, s=55, edgecolors="white", linewidths=0.7, zorder=3)
        figure.colorbar(ScalarMappable(norm, CMAP), ax=axes, label=r"$\beta$", format=LogFormatterSciNotation())
    for row in direct[:1]:
        (x, xerr), (y, yerr) = _column([row], "recall"), _column([row], "precision")
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=DIRECT, elinewidth=1, capsize=2, zorder=4)
        axes.scatter(x, y, marker="*", s=230, color=DIRECT, edgecolors="white", linewidths=0.8, zorder=5)
    handles = [
        Line2D([], [], color="0.65", marker="o", markerfacecolor=DISTILLED, markeredgecolor="white", label="distilled")
    ]
    if direct:
        handles.append(
            Line2D([], [], linestyle="", color=DIRECT, marker="*", markersize=13, label="direct (no teacher)")
        )
    axes.legend(handles=handles, frameon=False, loc="best")
    axes.set_xlabel(r"recall  $E_{p^*}[\log p'']$  (nats)")
    axes.set_ylabel(r"precision  $E_{p''}[\log p^*]$  (nats)")
    axes.margins(0.08)
    tidy(axes)
    return figure


def curves(summary: list[dict]) -> Figure:
    """Precision and recall against beta and against the sharpened teacher's entropy."""
    figure = canvas(9.0, 6.6)
    grid = figure.subplots(2, 2, sharey="row")
    distilled, direct = _split(summary)
    betas = np.array([r["beta"] for r in distilled])
    entropy, entropy_error = _column(distilled, "teacher_entropy")
    for i, name in enumerate(("precision", "recall")):
        y, yerr = _column(distilled, name)
        style = {"fmt": "o-", "color": DISTILLED, "markersize": 4.5, "linewidth": 1.3, "capsize": 2}
        grid[i, 0].errorbar(betas, y, yerr=yerr, label="distilled", **style)
        grid[i, 1].errorbar(entropy, y, xerr=entropy_error, yerr=yerr, label="distilled", **style)
        if len(betas):
            grid[i, 0].set_xscale("log")
        for axes in grid[i]:
            for row in direct[:1]:
                (mean,), (error,) = _column([row], name)
                if np.isfinite(mean):
                    axes.axhspan(mean - error, mean + error, color=DIRECT, alpha=0.15, linewidth=0)
                    axes.axhline(mean, color=DIRECT, linestyle="--", linewidth=1.3, label="direct")
            tidy(axes)
        grid[i, 0].set_ylabel(f"{name} (nats)")
    grid[1, 0].set_xlabel(r"$\beta$")
    grid[1, 1].set_xlabel("sharpened teacher's entropy (nats)")
    grid[0, 0].legend(frameon=False, loc="best")
    return figure


def _contours(axes, panels: dict, name: str, colour: str, linestyle: str = "solid") -> None:
    """Contours of one log density at fixed depths below its mode on the grid."""
    values = np.asarray(panels[name], float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    top = float(finite.max())
    values = np.clip(np.where(np.isnan(values), top - 1e3, values), top - 1e3, top)
    axes.contour(
        panels["grid_x"], panels["grid_y"], values, levels=[top + v for v in LEVELS], colors=[colour],
        linewidths=(0.8, 1.1, 1.4), linestyles=linestyle,
    )  # fmt: skip


def _dots(axes, points: np.ndarray, colour: str, size: float = 4.0, alpha: float = 0.35) -> None:
    """At most a thousand points as small dots."""
    points = np.asarray(points)[:1000]
    axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=alpha, linewidths=0)


def panels(arrays: dict) -> Figure:
    """Six panels on the same limits: target, data, teacher, sharpened teacher's samples, and both students."""
    figure = canvas(10.0, 7.0)
    grid = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    beta = float(np.asarray(arrays["beta"]))
    sharpened = rf"$\beta$ = {beta:g}"
    grid[0].set_title(r"$p^*$ and its samples")
    _dots(grid[0], arrays["samples_p_star"], "0.5")
    _contours(grid[0], arrays, "log_p_star", INK)
    grid[1].set_title("training data and direct student")
    _dots(grid[1], arrays["data"], "0.2", size=9, alpha=0.7)
    _contours(grid[1], arrays, "log_direct", DIRECT)
    grid[2].set_title("teacher")
    _dots(grid[2], arrays["data"], "0.2", size=9, alpha=0.5)
    _contours(grid[2], arrays, "log_teacher", TEACHER)
    grid[3].set_title(f"sharpened teacher's samples, {sharpened}")
    _contours(grid[3], arrays, "log_p_star", "0.8")
    _dots(grid[3], arrays["samples_teacher"], TEACHER)
    grid[4].set_title(f"distilled student, {sharpened}")
    _dots(grid[4], arrays["samples_distilled"], DISTILLED)
    _contours(grid[4], arrays, "log_distilled", DISTILLED)
    grid[5].set_title(r"both students over $p^*$")
    _contours(grid[5], arrays, "log_p_star", "0.75")
    _contours(grid[5], arrays, "log_direct", DIRECT, "dashed")
    _contours(grid[5], arrays, "log_distilled", DISTILLED)
    x, y = np.asarray(arrays["grid_x"]), np.asarray(arrays["grid_y"])
    for axes in grid:
        axes.set(aspect="equal", xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color="0.75", label=r"$p^*$"),
        Line2D([], [], color=DIRECT, linestyle="dashed", label="direct"),
        Line2D([], [], color=DISTILLED, label="distilled"),
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return figure


def varied_axes(summary: list[dict]) -> dict[str, list[tuple]]:
    """For each setting axis, the settings (base first) that differ from the base in that axis alone."""
    settings = list(dict.fromkeys(r["setting"] for r in summary))
    found: dict[str, list[tuple]] = {}
    for setting in settings[1:]:
        changed = [i for i in range(len(SETTING)) if setting[i] != settings[0][i]]
        if len(changed) == 1:
            found.setdefault(SETTING[changed[0]], [settings[0]]).append(setting)
    return found


def comparison(summary: list[dict]) -> Figure | None:
    """Small multiples of the frontier, one per varied axis, a line per value; None if nothing is varied."""
    varied = varied_axes(summary)
    if not varied:
        return None
    columns = min(3, len(varied))
    lines = -(-len(varied) // columns)
    figure = canvas(max(5.0, 3.9 * columns), 3.7 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (axis, settings) in zip(grid, varied.items(), strict=False):
        index = SETTING.index(axis)
        ordered = sorted(settings, key=lambda s: s[index])
        for k, setting in enumerate(ordered):
            colour = f"C{k % 10}"
            distilled, direct = _split([r for r in summary if r["setting"] == setting])
            (x, xerr), (y, yerr) = _column(distilled, "recall"), _column(distilled, "precision")
            label = f"{setting[index]:g}" + (" (base)" if setting == settings[0] else "")
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="o-", color=colour, markersize=3.5, linewidth=1.2,
                          elinewidth=0.7, label=label)  # fmt: skip
            for row in direct[:1]:
                x, y = _column([row], "recall")[0], _column([row], "precision")[0]
                axes.scatter(x, y, marker="*", s=110, color=colour, edgecolors="white", linewidths=0.6, zorder=4)
        axes.set_title(SETTING_NAMES[axis], fontsize=10)
        axes.set(xlabel="recall (nats)", ylabel="precision (nats)")
        axes.legend(frameon=False, fontsize=8, loc="best")
        tidy(axes)
    for axes in grid[len(varied) :]:
        axes.set_visible(False)
    return figure
