"""Figures of the mixture experiment. Each function takes arrays and returns a matplotlib `Figure`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatterSciNotation
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from kd_jax.gmm import findings
from kd_jax.gmm.findings import COOLED_PLAIN, RANDOM_CHOICE, Students, Who
from kd_jax.gmm.mixture import Mixture
from kd_jax.gmm.students import CONTROLS, DIRECT, DISTILLED, PLAIN
from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import charts
from kd_jax.reporting.charts import Panel, Point, Series, View
from kd_jax.reporting.figures import CMAP, INK, TEACHER, canvas, tidy
from kd_jax.reporting.figures import DIRECT as RED
from kd_jax.reporting.figures import DISTILLED as BLUE

# The arrays of a run's panels.npz: data, beta, and the parameters of these mixtures.
MIXTURES = ("p_star", "teacher", "sharpened", "direct", "distilled")
PANELS = ("data", "beta", *(f"{name}_{field}" for name in MIXTURES for field in Mixture._fields))
LEVELS = (-4.5, -2.0, -0.5)  # log-density below the mode: a Gaussian's 3, 2 and 1 sigma contours
MARKS = dict(zip(CONTROLS, "v<^", strict=True))
_TWO = ("recall", "precision")
ZOOM = (3.2, 1.7)  # nats of recall below, and of precision above, the direct student in the zoomed panel


def _points(students: Students, whos: list[Who], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and half lengths of 95 % intervals of one metric; gaps where a mean is not finite."""
    intervals = [t_interval(students[who][name]) for who in whos]
    mean = np.array([interval.mean for interval in intervals])
    # half lengths, which is what matplotlib's error bars take
    half = np.array([interval.high - interval.mean for interval in intervals])
    return np.where(np.isfinite(mean), mean, np.nan), np.where(np.isfinite(half), half, 0.0)


def _line(axes, students: Students, whos: list[Who], **style) -> None:
    (x, xerr), (y, yerr) = (_points(students, whos, name) for name in ("recall", "precision"))
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, elinewidth=0.8, capsize=1.5, **style)


def frontier(students: Students, ways: dict[str, list[Who]]) -> Figure:
    """Recall against precision: all of it, and beside it what lies near the direct student."""
    drawn = canvas(10.0, 5.4)
    whole, near = drawn.subplots(1, 2)
    distilled = [Who(DISTILLED, beta) for beta in findings.betas(students)]
    # a single beta needs a range of colours all the same
    low, high = distilled[0].beta, distilled[-1].beta
    norm = LogNorm(low, high) if high > low else LogNorm(low / 2, low * 2)
    cooled = findings.temperatures(students, Who(DIRECT))
    for axes in (whole, near):
        _line(axes, students, distilled, color="0.6", linewidth=1.2, zorder=2, label="_")
        (x, _), (y, _) = (_points(students, distilled, name) for name in ("recall", "precision"))
        axes.scatter(x, y, c=[who.beta for who in distilled], cmap=CMAP, norm=norm, s=46, edgecolors="white",
                     linewidths=0.7, zorder=4, label="student of a sharpened teacher")  # fmt: skip
        if COOLED_PLAIN in ways:
            _line(axes, students, ways[COOLED_PLAIN], color=BLUE, fmt="s--", markersize=4, linewidth=1, zorder=3,
                  label="student of the unsharpened teacher, cooled")  # fmt: skip
        # without its end, the most sharpened student: the last step is a long way down in recall
        if RANDOM_CHOICE in ways:
            _line(axes, students, ways[RANDOM_CHOICE][:-1], color="0.35", fmt=":", linewidth=1.3, zorder=2,
                  label="random choice: unsharpened or most sharpened")  # fmt: skip
        for arm in CONTROLS:
            if Who(arm) in students:
                _line(axes, students, [Who(arm)], color=TEACHER, fmt=MARKS[arm], markersize=7, zorder=3, linestyle="",
                      label="student of one component of the teacher" if arm == CONTROLS[0] else "_")  # fmt: skip
                if axes is whole:
                    ((u,), _), ((v,), _) = (_points(students, [Who(arm)], name) for name in _TWO)
                    # the middle one of three in a row: its label would touch a neighbour's on their side
                    offset, align = ((-6, -14), "right") if arm == CONTROLS[1] else ((6, 6), "left")
                    axes.annotate(arm, (u, v), offset, textcoords="offset points", fontsize=9, color=TEACHER,
                                  ha=align, zorder=7)  # fmt: skip
        _line(axes, students, cooled, color=RED, fmt="o-", markersize=4, linewidth=1.6, zorder=5,
              label="direct student, cooled")  # fmt: skip
        _line(axes, students, [Who(DIRECT)], color=RED, fmt="*", markersize=14, zorder=6, linestyle="",
              markeredgecolor="white", label="direct student")  # fmt: skip
        axes.set_xlabel(r"recall  $E_{p^*}[\log p'']$  (nats)  better $\rightarrow$")
        tidy(axes)
    whole.set_ylabel(r"precision  $E_{p''}[\log p^*]$  (nats)  better $\rightarrow$")
    (x,), (y,) = (_points(students, [Who(DIRECT)], name)[0] for name in ("recall", "precision"))
    (left, right), (bottom, top) = _near(x, y)
    near.set(xlim=(left, right), ylim=(bottom, top))
    # a few, since all labels would touch
    for who in {*cooled[::4], cooled[-1]}:
        (u,), (v,) = (_points(students, [who], name)[0] for name in ("recall", "precision"))
        near.annotate(f"T={who.temperature:g}", (u, v), (-7, 4), textcoords="offset points", fontsize=8, color=RED,
                      ha="right", annotation_clip=True)  # fmt: skip
    whole.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor="0.4", zorder=7))
    drawn.colorbar(ScalarMappable(norm, CMAP), ax=near, label=r"$\beta$", format=LogFormatterSciNotation())
    handles, labels = whole.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return drawn


def chart(students: Students, ways: dict[str, list[Who]]) -> dict[str, Any]:
    """The interactive form of `frontier`."""

    def point(who: Who) -> Point:
        (x, x_half), (y, y_half) = (map(lambda one: one.item(), _points(students, [who], name)) for name in _TWO)
        setting = [] if who.beta is None else [f"beta {who.beta:g}"]
        setting += [f"sampled at {who.temperature:g}"] if who.share is None else [f"share of one {who.share:g}"]
        facts = [who.arm, *setting, f"precision {show(y, y_half)}", f"recall {show(x, x_half)}", "(95 % intervals)"]
        return Point(x, y, x_half, y_half, facts)

    def series(label: str, whos: list[Who], colour: str, symbol: str = "circle", line: str = "solid") -> Series:
        return Series(label, [point(who) for who in whos], colour, symbol, 8, line)

    cooled = findings.temperatures(students, Who(DIRECT))
    distilled = [Who(DISTILLED, beta) for beta in findings.betas(students)]
    shown = [
        series("student of a sharpened teacher", distilled, TEACHER, "diamond"),
        series("student of the unsharpened teacher, cooled", ways.get(COOLED_PLAIN, []), BLUE, "rect", "dashed"),
        series(
            "random choice: unsharpened or most sharpened", ways.get(RANDOM_CHOICE, []), "#777777", "circle", "dotted"
        ),
    ]
    for arm, symbol in zip(CONTROLS, ("triangle", "emptyTriangle", "roundRect"), strict=True):
        whos = [who for who in [Who(arm)] if who in students]
        shown.append(series(f"student of the teacher's {arm} component", whos, "#9a6d00", symbol, ""))
    # last, so that it lies on top
    shown.append(series("direct student, cooled", cooled, RED))
    plain = point(Who(DIRECT))
    near = View("near the direct student", *_near(plain.x, plain.y))
    return charts.chart(
        shown, x_title="recall, E[log p″] on p* (nats); better →", y_title="precision, E[log p*] (nats); better →",
        views=[near],
    )  # fmt: skip


def curve_chart(students: Students) -> dict[str, Any]:
    """The interactive form of `curves`."""
    distilled = [Who(DISTILLED, beta) for beta in findings.betas(students)]
    others = [who for who in (Who(PLAIN), *map(Who, CONTROLS)) if who in students]

    def series(label: str, whos: list[Who], x_name: str | None, y_name: str, *style) -> Series:
        y, y_half = _points(students, whos, y_name)
        x, x_half = (
            _points(students, whos, x_name) if x_name else ([who.beta for who in whos], np.full(len(whos), np.nan))
        )
        points = [
            Point(x[i], y[i], x_half[i], y_half[i], [
                label + (f", beta {who.beta:g}" if who.beta else ""), f"{y_name} {show(y[i], y_half[i])}",
                *([f"entropy {show(x[i], x_half[i])}"] if x_name else []), "(95 % intervals)",
            ]) for i, who in enumerate(whos)
        ]  # fmt: skip
        return Series(label, points, *style)

    def panel(x_name: str | None, y_name: str) -> Panel:
        shown = [series("distilled", distilled, x_name, y_name, BLUE, "circle", 7, "solid")]
        if x_name:  # these have no beta
            symbols = dict(zip((PLAIN, *CONTROLS), ("rect", "triangle", "emptyTriangle", "roundRect"), strict=True))
            shown += [
                series("unsharpened" if who.arm == PLAIN else f"{who.arm} component", [who], x_name, y_name, TEACHER,
                       symbols[who.arm], 9) for who in others
            ]  # fmt: skip
        (mean,), (half,) = _points(students, [Who(DIRECT)], y_name)
        at = [one.x for each in shown for one in each.points if math.isfinite(one.x)] or [math.nan]
        facts = ["direct", f"{y_name} {show(mean, half)}", "(95 % intervals)"]
        ends = [Point(x, mean, math.nan, math.nan, facts) for x in (min(at), max(at))]
        shown.append(Series("direct", ends, RED, "circle", 6, "dashed"))
        title = "entropy of what the student is fitted to (nats)" if x_name else "beta"
        return Panel("", shown, title, f"{y_name} (nats); better →", x_log=x_name is None)

    return charts.panels([panel(x_name, y_name) for y_name in _TWO[::-1] for x_name in (None, "teacher_entropy")])


def _near(x: float, y: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The part of the plane around the direct student: lowest and highest recall, and precision."""
    return (x - ZOOM[0], x + 0.12 * ZOOM[0]), (y - 0.1 * ZOOM[1], y + ZOOM[1])


def curves(students: Students) -> Figure:
    """Precision and recall against beta and against the entropy of what the student was fitted to."""
    drawn = canvas(9.0, 6.6)
    axes = drawn.subplots(2, 2, sharey="row")
    distilled = [Who(DISTILLED, beta) for beta in findings.betas(students)]
    entropy, entropy_error = _points(students, distilled, "teacher_entropy")
    others = [who for who in (Who(PLAIN), *map(Who, CONTROLS)) if who in students]
    for i, name in enumerate(("precision", "recall")):
        y, yerr = _points(students, distilled, name)
        style = {"fmt": "o-", "color": BLUE, "markersize": 4.5, "linewidth": 1.3, "capsize": 2}
        axes[i, 0].errorbar([who.beta for who in distilled], y, yerr=yerr, label="distilled", **style)
        axes[i, 1].errorbar(entropy, y, xerr=entropy_error, yerr=yerr, label="distilled", **style)
        # These have no beta: they are drawn against entropy alone.
        for who in others:
            (x, xerr), (v, verr) = (_points(students, [who], metric) for metric in ("teacher_entropy", name))
            label = "unsharpened" if who.arm == PLAIN else f"{who.arm} component"
            axes[i, 1].errorbar(x, v, xerr=xerr, yerr=verr, fmt=MARKS.get(who.arm, "s"), color=TEACHER, label=label)
        (mean,), (half,) = _points(students, [Who(DIRECT)], name)
        for one in axes[i]:
            one.axhspan(mean - half, mean + half, color=RED, alpha=0.15, linewidth=0)
            one.axhline(mean, color=RED, linestyle="--", linewidth=1.3, label="direct")
            tidy(one)
        axes[i, 0].set(xscale="log", ylabel=f"{name} (nats)")
    axes[1, 0].set_xlabel(r"$\beta$")
    axes[1, 1].set_xlabel("entropy of what the student is fitted to (nats)")
    axes[0, 1].legend(frameon=False, loc="best", fontsize=8)
    return drawn


class _Picture(NamedTuple):
    """A mixture on the panels' grid, and draws from it. In NumPy: compiling would take longer than the drawing."""

    x: np.ndarray  # [G], the grid's axis, the same for both dimensions
    log_density: np.ndarray  # [G, G]
    draws: np.ndarray  # [500, 2]
    dropped: np.ndarray  # [n, 2], modes of p* outside its lowest contour


def _picture(arrays: dict[str, np.ndarray], name: str, x: np.ndarray) -> _Picture:
    log_weights, means, covariances = (arrays[f"{name}_{field}"].astype(float) for field in Mixture._fields)
    matrices = covariances if covariances.ndim == 3 else covariances[:, :, None] * np.eye(2)

    def log_density(points: np.ndarray) -> np.ndarray:
        parts = zip(log_weights, means, matrices, strict=True)
        return logsumexp([w + multivariate_normal(m, c).logpdf(points) for w, m, c in parts], axis=0)

    # A seed of its own: these draws are for the eye and enter no number.
    rng = np.random.default_rng(0)
    # Weights need not be normalised (gmm.mixture.Mixture).
    weights = np.exp(log_weights - log_weights.max())
    component = rng.choice(len(weights), 500, p=weights / weights.sum())
    noise = np.einsum("nij,nj->ni", np.linalg.cholesky(matrices)[component], rng.normal(size=(500, 2)))
    on_grid, modes = log_density(np.stack(np.meshgrid(x, x), -1)), arrays["p_star_means"].astype(float)
    dropped = modes[log_density(modes) < on_grid.max() + min(LEVELS)]
    return _Picture(x, on_grid, means[component] + noise, dropped)


def _contours(axes, picture: _Picture, colour: str, linestyle: str = "solid") -> None:
    """Contours of one log density at fixed depths below its mode on the grid."""
    # far tails would only make contour search work on huge numbers
    top = picture.log_density.max()
    values = np.clip(picture.log_density, top - 1e3, top)
    axes.contour(picture.x, picture.x, values, levels=[top + v for v in LEVELS], colors=[colour],
                 linewidths=(0.8, 1.1, 1.4), linestyles=linestyle)  # fmt: skip


def _mark_dropped(axes, picture: _Picture) -> None:
    axes.scatter(*picture.dropped.T, marker="x", s=90, color="black", linewidths=2.0, zorder=5)


def _dots(axes, points: np.ndarray, colour: str, size: float = 4.0, alpha: float = 0.35) -> None:
    # More dots would only darken the same spots.
    axes.scatter(points[:1000, 0], points[:1000, 1], s=size, color=colour, alpha=alpha, linewidths=0)


def panels(arrays: dict[str, np.ndarray]) -> Figure:
    """Six panels on the same limits: target, data, teacher, sharpened teacher's samples, and both students."""
    drawn = canvas(10.0, 7.0)
    grid = drawn.subplots(2, 3, sharex=True, sharey=True).ravel()
    # The same limits for all panels, with room for a wide student.
    reach = 2.0 * max(float(abs(arrays["p_star_means"]).max()), 0.75)
    x = np.linspace(-reach, reach, 160)
    p_star, teacher, sharpened, direct, distilled = (_picture(arrays, name, x) for name in MIXTURES)
    title = rf"$\beta$ = {float(arrays['beta']):g}"
    grid[0].set_title(r"$p^*$ and its samples")
    _dots(grid[0], p_star.draws, "0.5")
    _contours(grid[0], p_star, INK)
    grid[1].set_title("training data and direct student")
    _dots(grid[1], arrays["data"], "0.2", size=9, alpha=0.7)
    _contours(grid[1], direct, RED)
    _mark_dropped(grid[1], direct)
    grid[2].set_title("teacher")
    _dots(grid[2], arrays["data"], "0.2", size=9, alpha=0.5)
    _contours(grid[2], teacher, TEACHER)
    _mark_dropped(grid[2], teacher)
    grid[3].set_title(f"sharpened teacher's samples, {title}")
    _contours(grid[3], p_star, "0.8")
    _dots(grid[3], sharpened.draws, TEACHER)
    _mark_dropped(grid[3], sharpened)
    grid[4].set_title(f"distilled student, {title}")
    _dots(grid[4], distilled.draws, BLUE)
    _contours(grid[4], distilled, BLUE)
    _mark_dropped(grid[4], distilled)
    grid[5].set_title(r"both students over $p^*$")
    _contours(grid[5], p_star, "0.75")
    _contours(grid[5], direct, RED, "dashed")
    _contours(grid[5], distilled, BLUE)
    for axes in grid:
        axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color="0.75", label=r"$p^*$"),
        Line2D([], [], color=RED, linestyle="dashed", label="direct"),
        Line2D([], [], color=BLUE, label="distilled"),
        Line2D([], [], color="black", linestyle="", marker="x", markeredgewidth=2, label="dropped mode"),
    ]
    drawn.legend(handles=handles, loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    return drawn
