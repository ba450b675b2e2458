"""What all figures share: canvas, colours, style and saving.

Only matplotlib's object interface is used, so its global state stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kd_jax.storage.files import replacing

# Its lightness rises evenly, so that it can be read without colour too.
CMAP = "viridis"
DIRECT = "#d1495b"
DISTILLED = "#2b5d8a"
TEACHER = "#3a7d44"
INK = "#333333"
# Colours of methods: Okabe and Ito's, which the colour-blind tell apart, without the two lightest and darkest.
NAMED = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
_LONGEST = 200


def canvas(width: float, height: float) -> Figure:
    """An empty figure of that many inches with its own Agg canvas."""
    # Constrained: a legend outside the axes gets room of its own.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """A text for a figure: no formula, no control characters, and shortened."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    # A dollar sign would begin a formula.
    return text.replace("$", r"\$")


def tidy(axes) -> None:
    """A light grid and no top or right frame."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def palette(count: int) -> list[str]:
    """`count` CSS colours for things without an order, such as runs or models."""
    # tab10 is told apart by most readers; more than that share a wider scale.
    colours = colormaps["tab10"].colors if count <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [to_hex(colour) for colour in colours[:count]]


def label_points(axes, points: Sequence[tuple[float, float]], labels: dict[int, tuple[str, str]]) -> list[int]:
    """Writes labels beside points, where there is room; call it when all is drawn.

    Args:
        axes: to write on.
        points: all points that a label must not cover.
        labels: text and colour by the index of its point.
    Returns: the indices of labels that were written.
    """
    places = axes.transAxes.inverted().transform(axes.transData.transform(np.asarray(points, float).reshape(-1, 2)))
    written: list[int] = []
    for index, (text, colour) in labels.items():
        x, y = places[index]
        # About the width and height of the text, as shares of the axes; near the right edge it is left of its point.
        wide, high = 0.02 + 0.014 * len(text), 0.05
        left = x - wide if x + wide > 1 else x
        others = [place for i, place in enumerate(places) if i != index]
        covered = any(left <= u <= left + wide and -0.3 * high < v - y < high for u, v in others)
        if np.isfinite((x, y)).all() and not covered:
            align, offset = ("right", -7) if left < x else ("left", 7)
            axes.annotate(plain(text), points[index], (offset, 4), textcoords="offset points", fontsize=8.5,
                          color=colour, ha=align, va="bottom", zorder=7)  # fmt: skip
            written.append(index)
    return written


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `name`.pdf, `name`.png (150 dpi) and `name`.svg into `folder`; returns the SVG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    # The layout is made once. Otherwise each savefig makes it again, which takes longer than drawing.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # PDF for papers, PNG for slides and READMEs, SVG for the page.
    for kind, options in (("pdf", {}), ("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        path = folder / f"{name}.{kind}"
        # Without the salt, ids within an SVG are random, and the same run's page would differ each time.
        with replacing(path) as file, matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(file, format=kind, **options)
    return path
