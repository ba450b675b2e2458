"""What the frontier pages of all experiments share: every knob on one figure, its prices as a table, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import charts
from kd_jax.reporting.charts import STAR, SYMBOLS, Point, Series, View
from kd_jax.reporting.figures import CMAP, DIRECT, INK, NAMED, canvas, plain, tidy
from kd_jax.reporting.prices import LEVEL, Curve, Match, Price, prices, standing
from kd_jax.reporting.tables import Number, Table

MARKERS = "osD^vPXh<>p8"
LINES = ("-", "--", ":", "-.", (0, (6, 2)), (0, (1, 3)))
# Without its yellow end, which is too light on white.
_ENTROPY_MAP = ListedColormap(colormaps[CMAP](np.linspace(0.0, 0.93, 256)), name="entropy").with_extremes(bad="white")


class Knob(NamedTuple):
    """A knob and its students.

    Attributes:
        name: as text calls it; the legend adds the range of its values.
        values: the settings, as text, in order.
        metrics: name -> [setting, seed]; at least precision, recall and teacher_entropy (of the teacher's own samples
            under it, nats).
    """

    name: str
    values: tuple[str, ...]
    metrics: dict[str, np.ndarray]


def prices_of(knobs: Sequence[Knob], reference: dict[str, np.ndarray], gains: Sequence[float]) -> list[Price]:
    """`kd_jax.reporting.prices.prices` of knobs; `reference` has precision and recall [seed].

    Args:
        knobs: to be compared.
        reference: "precision" and "recall" -> [seed].
        gains: nats of precision.
    """
    curves = {knob.name: Curve(knob.metrics["precision"], knob.metrics["recall"]) for knob in knobs}
    return prices(curves, Curve(reference["precision"], reference["recall"]), gains)


def figure(
    knobs: Sequence[Knob], reference: Knob, direct: Knob | None, *, also: Sequence[Knob] = (),
    zoom: tuple[float, float] | None = None, unit: str = "nats", entropy_label: str | None = None, values: bool = False,
) -> Figure:  # fmt: skip
    """Recall against precision of every knob's students: a marker per knob, the teacher's entropy as colour.

    Points are means over seeds, bars their standard errors. `reference` and `direct` have one setting each. A setting
    whose mean is not finite is left out.

    Args:
        also: further references, of one setting each.
        zoom: an inset of what lies up to this much recall below, and precision above, the reference. It is at the lower
            left, where a frontier has no points.
        unit: of precision and recall.
        entropy_label: of the colours, in place of the teacher's entropy; a setting without one is white.
        values: writes each setting's value beside its point, unless the point is several knobs'.
    """
    drawn = canvas(8.6, 6.4)
    axes = drawn.add_subplot()
    norm = _norm(np.concatenate([_means(knob, "teacher_entropy")[0] for knob in [*knobs, reference]]))
    marked = [(reference, "o", "none", INK, 170), *((knob, "H", "none", INK, 230) for knob in also)]
    marked += [] if direct is None else [(direct, "*", DIRECT, "white", 190)]
    handles = _draw(axes, knobs, marked, norm)
    if values:
        _write_values(axes, knobs)
    bar = drawn.colorbar(ScalarMappable(norm, _ENTROPY_MAP), ax=axes, pad=0.02, aspect=30)
    bar.set_label(entropy_label or rf"teacher's entropy  $-E_{{p'}}[\log p']$  ({unit})")
    drawn.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)
    axes.set_xlabel(rf"recall  $E_{{p^*}}[\log p'']$  ({unit})  better $\rightarrow$")
    axes.set_ylabel(rf"precision  $E_{{p''}}[\log p^*]$  ({unit})  better $\rightarrow$")
    axes.margins(0.04)
    tidy(axes)
    if zoom is not None:
        # The inset is drawn again, not cropped: points and bars keep their size.
        inset = axes.inset_axes((0.09, 0.07, 0.44, 0.38))
        _draw(inset, knobs, marked, norm)
        x, y = (_means(reference, name)[0][0] for name in ("recall", "precision"))
        left, bottom = x - zoom[0], y - 0.15 * zoom[1]
        inset.set(xlim=(left, x + 0.08 * zoom[0]), ylim=(bottom, y + zoom[1]))
        inset.set_title("what is in the box", fontsize=9)
        inset.tick_params(labelsize=8)
        inset.grid(alpha=0.25, linewidth=0.6)
        axes.add_patch(Rectangle((left, bottom), 1.08 * zoom[0], 1.15 * zoom[1], fill=False, edgecolor="0.4"))
    return drawn


def chart(
    knobs: Sequence[Knob], reference: Knob, direct: Knob | None, *, also: Sequence[Knob] = (),
    zoom: tuple[float, float] | None = None, unit: str = "nats", more: Sequence[Series] = (),
) -> dict[str, Any]:  # fmt: skip
    """The interactive form of `figure`, with a colour for each knob; the pointer shows the teacher's entropy.

    Args:
        more: series beside the knobs'.
    """
    series = [
        _series(knob, NAMED[i % len(NAMED)], SYMBOLS[i % len(SYMBOLS)], 9, "solid" if len(knob.values) > 1 else "")
        for i, knob in enumerate(knobs)
    ]
    series += [*more, *(_series(knob, "", "emptyRoundRect", 15) for knob in also)]
    series += [_series(reference, "", "emptyCircle", 15)] + (
        [] if direct is None else [_series(direct, DIRECT, STAR, 18)]
    )
    views = []
    if zoom is not None:
        x, y = (float(_means(reference, name)[0][0]) for name in ("recall", "precision"))
        views = [View("near the reference", (x - zoom[0], x + 0.08 * zoom[0]), (y - 0.15 * zoom[1], y + zoom[1]))]
    return charts.chart(
        series, x_title=f"recall, E[log p″] on p* ({unit}); better →",
        y_title=f"precision, E[log p*] ({unit}); better →", views=views,
    )  # fmt: skip


def _series(knob: Knob, colour: str, symbol: str, size: int, line: str = "") -> Series:
    names = ("recall", "precision", "teacher_entropy")
    (x, x_error), (y, y_error), (entropy, entropy_error) = (_means(knob, name) for name in names)
    points = []
    for i, value in enumerate(knob.values):
        facts = [
            f"{knob.name} = {value}" if value else knob.name, f"precision {Number(y[i], y_error[i])}",
            f"recall {Number(x[i], x_error[i])}", f"teacher's entropy {Number(entropy[i], entropy_error[i])}",
        ]  # fmt: skip
        points.append(Point(x[i], y[i], x_error[i], y_error[i], facts))
    return Series(knob.name, points, colour, symbol, size, line)


def _draw(axes, knobs, marked: Sequence[tuple], norm: Normalize) -> list[Line2D]:
    """All points and lines; returns the legend's entries.

    `marked` are (knob of one setting, marker, colour, edge, size).
    """
    handles = []
    for index, knob in enumerate(knobs):
        # Colour is the entropy where a knob changes it, so knobs differ by marker and line.
        marker, line = MARKERS[index % len(MARKERS)], LINES[index % len(LINES)]
        (x, xerr), (y, yerr) = _means(knob, "recall"), _means(knob, "precision")
        entropy = _means(knob, "teacher_entropy")[0]
        colours = _ENTROPY_MAP(norm(entropy))
        # A knob of the loss leaves the entropy where it is, which then tells nothing: it gets a colour of its own.
        own = len(entropy) > 1 and np.ptp(entropy) < 0.01 * (norm.vmax - norm.vmin)
        colours = [NAMED[index % len(NAMED)]] * len(entropy) if own else colours
        axes.plot(x, y, color="0.5", linewidth=1.0, linestyle=line, zorder=1)
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor="0.65", elinewidth=0.8, capsize=1.5, zorder=2)
        axes.scatter(x, y, c=colours, marker=marker, s=58, edgecolors=INK, linewidths=0.7, zorder=3)
        face = colours[0] if own else "0.88"
        style = {"color": "0.5", "markerfacecolor": face, "markeredgecolor": INK, "markersize": 8}
        label = plain(f"{knob.name}: {_span(knob.values)}")
        handles.append(Line2D([], [], marker=marker, linestyle=line, linewidth=1.0, label=label, **style))
    for knob, marker, colour, edge, size in marked:
        (x, xerr), (y, yerr) = _means(knob, "recall"), _means(knob, "precision")
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5, zorder=4)
        axes.scatter(x, y, marker=marker, s=size, facecolors=colour, edgecolors=edge, linewidths=1.2, zorder=5)
        style = {"linestyle": "", "markerfacecolor": colour, "markeredgecolor": edge, "markersize": 12}
        handles.append(Line2D([], [], marker=marker, label=plain(knob.name), **style))
    return handles


def _span(values: Sequence[str]) -> str:
    """First and last of numbers; of words, which points have no room for, all."""
    if all(map(_is_short, values)):
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
    return ", ".join(values)


def _is_short(value: str) -> bool:
    return len(value) <= 5


def _write_values(axes, knobs: Sequence[Knob]) -> None:
    """The value of each setting beside its point, where the point is one knob's alone and the value is short."""
    texts: dict[tuple[float, float], list[str]] = {}
    for knob in knobs:
        x, y = (_means(knob, name)[0] for name in ("recall", "precision"))
        for *point, value in zip(x, y, knob.values, strict=True):
            # Knobs meet where they change nothing: such a point has no one value.
            texts.setdefault(tuple(point), []).append(value)
    for point, labels in texts.items():
        if len(labels) == 1 and _is_short(labels[0]) and np.isfinite(point).all():
            axes.annotate(
                plain(labels[0]), point, (5, 5), textcoords="offset points", fontsize=7.5, color=INK, zorder=6
            )


def price_table(listed: Sequence[Price]) -> tuple[list[str], list[list[str | Number]]]:
    """Head and rows of a table of prices, by gain, the cheapest first."""
    head = ["gain", "precision", "knob", "recall lost", "price", "above the cheapest"]
    rows = []
    for before, price in zip([None, *listed], listed, strict=False):
        # Prices come by gain with the cheapest first: where the gain changes, a cheapest knob stands.
        first = before is None or before.gain != price.gain
        above = "cheapest" if first else Number(price.extra, price.extra_error)
        own = Number(price.price, price.price_error)
        rows.append([f"{price.gain:g}", f"{price.precision:.2f}", price.knob, f"{price.loss:.2f}", own, above])
    return head, rows


def match_table(listed: Sequence[Match], note: str) -> Table:
    """A line for each way: its standing, and its recall minus the control's at each gain; no rows without matches.

    An asterisk marks an adjusted p-value below 5 %.

    Args:
        listed: all ways at all gains.
        note: whose recall is compared, and what else the page says of the table.
    """
    gains = sorted({match.gain for match in listed})
    head = ["way", "against the control", *(f"gain {gain:g}" for gain in gains)]
    rows = []
    for way in dict.fromkeys(match.way for match in listed):
        own = {match.gain: match for match in listed if match.way == way}
        # A curve that is matched only further on begins beyond this gain.
        outside = lambda gain: "exceeded" if gain < min(own) else "not reached"  # noqa: B023, E731
        cells = [_match_cell(own[gain]) if gain in own else outside(gain) for gain in gains]
        rows.append([way, standing([*own.values()]), *cells])
    return Table("against_cooled_direct", "Against the cooled direct student", head, rows, note)


def contrast(listed: Sequence[Match], way: str, who: str, gain: float) -> str:
    """The preregistered contrast as a sentence.

    Args:
        listed: all matches; `way` and `gain` say which of them was preregistered.
        who: the students of that way, in the plural.
        gain: nats of precision over the direct student.
    """
    wanted = [m for m in listed if (m.way, m.gain) == (way, gain) and m.difference is not None]
    if not wanted:
        return f"The preregistered contrast, at a gain of {gain:g} nats of precision, is not defined in this run."
    difference, more = wanted[0].difference, "more" if wanted[0].difference.mean > 0 else "less"
    above = f"{gain:g} nat{'s' * (gain != 1)}"
    # The sentence says how much more, or how much less; its interval does too.
    low, high = (difference.low, difference.high) if more == "more" else (-difference.high, -difference.low)
    test = f"95 % interval {low:.2f} to {high:.2f}, t test over {difference.dof + 1:g} seeds"
    return (
        f"The preregistered contrast: at equal precision, {above} above the direct student's, {who} have "
        f"{show(abs(difference.mean), difference.error)} nats {more} recall than the direct student sampled at a lower "
        f"temperature ({'one seed, no error' if math.isnan(difference.error) else test})."
    )


def _match_cell(match: Match) -> str | Number:
    if match.difference is None:
        return "control ends below"
    return Number(match.difference.mean, match.difference.error, " *" if match.p_value < LEVEL else "")


def verdict(listed: Sequence[Price], knobs: Sequence[Knob], gains: Sequence[float]) -> list[str]:
    """Sentences: which knob buys precision most cheaply, over all gains and at each, and which cannot be told from it.

    A difference, paired by seed, counts where its p-value is below 5 %, adjusted for all pairs of knobs at all gains.

    Args:
        listed: as `prices_of` returns them.
        knobs: all that were compared.
        gains: nats of precision; for none there are no sentences.
    """
    if not gains:
        return []
    at = {gain: [price for price in listed if price.gain == gain] for gain in gains}
    if not listed:
        return [f"No knob reaches a gain of {_listed([f'{gain:g}' for gain in gains], 'or')} nats."]
    winners: dict[str, list[str]] = {}
    for gain, here in at.items():
        if here:
            # The cheapest is named only where it can be told from all others.
            winner = "no single knob" if _close(here) else here[0].knob
            winners.setdefault(winner, []).append(f"{gain:g}")
    if len(winners) == 1 and "no single knob" not in winners:
        first = f"At every gain compared, the knob that buys precision most cheaply in recall is {[*winners][0]}."
    else:
        each = [f"{winner} at {_listed(its)}" for winner, its in winners.items()]
        first = f"What buys precision most cheaply in recall, by the gain in nats: {'; '.join(each)}."
    return [first] + [_at_gain(gain, here, knobs) for gain, here in at.items()]


def _close(here: Sequence[Price]) -> list[Price]:
    """Those that cannot be told from the first, the cheapest; all of them where there is one seed."""
    # `not <`: a NaN (one seed) cannot be told apart.
    return [price for price in here[1:] if not price.p_value < LEVEL]


def _at_gain(gain: float, here: Sequence[Price], knobs: Sequence[Knob]) -> str:
    if not here:
        return f"No knob reaches a gain of {gain:g} nats."
    text = f"Gain {gain:g}: {here[0].knob} costs {show(here[0].price, here[0].price_error)} nats of recall per nat"
    close = [f"{price.knob} ({show(price.extra, price.extra_error)} more)" for price in _close(here)]
    if close:
        text += f"; no clear difference from it: {_listed(close)}"
    elif len(here) > 1:
        text += f"; all others cost more, {here[1].knob} next by {show(here[1].extra, here[1].extra_error)}"
    missing = [knob for knob in knobs if knob.name not in {price.knob for price in here}]
    # False for one without a finite mean
    lowest = {knob.name: np.fmin.reduce(_means(knob, "precision")[0]) for knob in missing}
    above = [name for name, low in lowest.items() if low > here[0].precision]
    below = [name for name in lowest if name not in above]
    text += f"; not reached by {_listed(below)}" if below else ""
    return text + (f"; exceeded at every setting by {_listed(above)}." if above else ".")


def _means(knob: Knob, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors over seeds [setting]; a mean that is not finite is NaN, an error unknown is 0."""
    pairs = np.array([t_interval(values)[:2] for values in knob.metrics[name]], float).reshape(-1, 2)
    mean, error = pairs.T
    return np.where(np.isfinite(mean), mean, np.nan), np.where(np.isfinite(error), error, 0.0)


def _norm(values: np.ndarray) -> Normalize:
    """A colour scale over the finite values, widened where there is only one."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return Normalize(low, high) if high > low else Normalize(low - 0.5, low + 0.5)


def _listed(names: Sequence[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
