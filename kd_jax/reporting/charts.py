"""Interactive charts of a page. ECharts draws them (vendor/, version 6.0.0, Apache 2.0), inside the page's one file.

ECharts, because its common build is 0.7 MB where Plotly's is 4.6, and needs no server, build step or Python package.
The still figure of the same name is on the page too, and is what shows where scripts are off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from markupsafe import Markup

# Symbols of ECharts for series that share a chart; its "pin" and "arrow" are not centred on their point.
SYMBOLS = ("rect", "triangle", "diamond", "roundRect", "emptyTriangle", "emptyRect")
STAR = "path://M12 1l3.2 7.6 8.3.7-6.3 5.4 1.9 8.1L12 18.5 4.9 22.8l1.9-8.1L.5 9.3l8.3-.7z"
# A colour that is the text's own, dark on light paper and light on dark.
INK = ""


class Point(NamedTuple):
    """A point of a chart.

    Attributes:
        x, y: where it is; one that is not finite is left out.
        x_error, y_error: half lengths of its error bars; none where not finite.
        facts: what the pointer shows, a line each.
        model: name of the model whose samples a click shows; None without samples.
    """

    x: float
    y: float
    x_error: float
    y_error: float
    facts: Sequence[str]
    model: str | None = None


class Series(NamedTuple):
    """Points of one kind, with an entry in the legend; series of one label share it.

    Attributes:
        label: of the legend.
        points: in order.
        colour: of CSS, or INK.
        symbol: of ECharts: "circle", "diamond", "triangle", "rect", "emptyCircle" and so on.
        size: of the symbol, in pixels.
        line: how the points are joined: "solid", "dashed", "dotted", or "" where they are not.
        opacity: of points and line.
    """

    label: str
    points: Sequence[Point]
    colour: str
    symbol: str = "circle"
    size: int = 9
    line: str = ""
    opacity: float = 1.0


class Panel(NamedTuple):
    """One of the diagrams of a chart.

    Attributes:
        title: above it.
        series: those without a point are left out.
        x_title, y_title: of the axes, with units.
        y: lowest and highest value of the y axis; by default it shows all.
        x_log: whether the x axis is logarithmic.
    """

    title: str
    series: Sequence[Series]
    x_title: str = ""
    y_title: str = ""
    y: tuple[float, float] | None = None
    x_log: bool = False


class View(NamedTuple):
    """A part of the plane that a button of a chart shows.

    Attributes:
        label: of the button.
        x, y: lowest and highest value of each axis.
    """

    label: str
    x: tuple[float, float]
    y: tuple[float, float]


def chart(series: Sequence[Series], *, x_title: str, y_title: str, views: Sequence[View] = ()) -> dict[str, Any]:
    """What interactive.js draws a chart of one diagram from, as plain values.

    Args:
        series: those without a point are left out.
        x_title, y_title: of the axes, with units.
        views: parts of it that have a button, beside the whole.
    """
    return {**panels([Panel("", series, x_title, y_title)]), "views": [view._asdict() for view in views]}


def panels(every: Sequence[Panel], *, shared: Sequence[Series] = (), same_axes: bool = False) -> dict[str, Any]:
    """What interactive.js draws a chart of several diagrams from; they have one legend.

    Args:
        every: the diagrams, in order.
        shared: series that each of them shows, behind its own.
        same_axes: whether all have the same range, without numbers, and zoom together.
    """
    shown = [panel._asdict() | {"series": _drawn(panel.series)} for panel in every]
    return {"panels": shown, "shared": _drawn(shared), "same_axes": same_axes, "views": []}


def _drawn(series: Sequence[Series]) -> list[dict[str, Any]]:
    shown = []
    for one in series:
        points = [
            {"at": [point.x, point.y], "error": [_known(point.x_error), _known(point.y_error)],
             "facts": list(point.facts), "model": point.model}
            for point in one.points if math.isfinite(point.x) and math.isfinite(point.y)
        ]  # fmt: skip
        if points:
            shown.append({**one._asdict(), "points": points})
    return shown


def _known(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def data(value: Any) -> Markup:
    """A value as JSON that may stand inside a <script> element."""
    # Else a sample with </script> in its text would end the element.
    return Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def scripts(with_charts: bool) -> Markup:
    """The <script> elements of a page that has charts or a browser of samples."""
    folder = resources.files("kd_jax.reporting")
    names = ["vendor/echarts.common.min.js"] * with_charts + ["interactive.js"]
    return Markup("".join(f"<script>{folder.joinpath(name).read_text('utf-8')}</script>\n" for name in names))
