"""Several models beside one p* on a page: the plane of precision and recall, and tables of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kd_jax.reporting import charts, page, tables
from kd_jax.reporting.charts import Point, Series
from kd_jax.reporting.figures import canvas, label_points, palette, plain, tidy
from kd_jax.reporting.tables import Number, Table
from kd_jax.storage import files

TITLE = "Models against p*: precision and recall"
# What the columns distinct-2 and repetition-4 of a table of texts are.
VARIETY = (
    "Distinct-2: distinct pairs of tokens over all pairs, in all samples together; it falls with their number. "
    "Repetition-4: mean over sequences of the share of runs of four tokens that occurred before."
)
# name, title, columns (name of a row's value, head) and note of each table
TABLES = (
    ("likelihood", "Likelihood",
     (("precision", "precision"), ("recall", "recall"), ("entropy", "entropy"), ("kl_model_data", "KL(model‖p*)"),
      ("kl_data_model", "KL(p*‖model)")),
     "Nats per token, ± standard error over sequences."),
    ("text", "The text",
     (("finished", "finished (share)"), ("length_mean", "mean length (tokens)"), ("distinct_2", "distinct-2"),
      ("repetition_4", "repetition-4"), ("calibration_error", "calibration error"), ("agreement", "agreement with p*")),
     VARIETY),
    ("embeddings", "By embeddings",
     (("knn_precision", "precision"), ("knn_recall", "recall"), ("knn_density", "density"),
      ("knn_coverage", "coverage"), ("clipped_density", "clipped density"), ("clipped_coverage", "clipped coverage"),
      ("mauve", "MAUVE"), ("vendi_score", "Vendi score"), ("prompt_diversity", "diversity by prompt")),
     "Of the samples' embeddings beside those of validation rows; metrics.jsonl has each one's bias at this size."),
)  # fmt: skip
TEMPLATE = """<p class="lead"><strong>{{ lead }}</strong></p><nav></nav>
<h2>Precision and recall</h2>
{{ figure("frontier", caption) }}
{% for table in tables %}{{ section(table) }}
{% endfor %}<h2>How to read the numbers</h2>
<p>Precision is the mean log-probability that p* gives to a model's samples: are they good? Recall is the mean
log-probability that the model gives to p*'s own text: does it cover p*? A model that is sampled at a lower temperature
gains precision and loses recall; compare models at equal precision.</p>
"""
_CAPTION = "Bars are standard errors over sequences; a line joins the temperatures at which a model was sampled."


def write(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Writes report.html, and its figure and tables into figures/.

    Args:
        rows: of an evaluation, one for each model and sample temperature.
        folder: of the evaluation, with its manifest.
    Returns: the page's path.
    """
    shown = [table for table in (_table(rows, *each) for each in TABLES) if table.rows]
    tables.save(shown, folder)
    html = page.render(
        TEMPLATE, folder=folder, title=TITLE, lead=lead(rows), caption=_CAPTION, tables=shown,
        images=page.embed({"frontier": figure(rows)}, folder), charts={"frontier": chart(rows)},
        command=page.read_json(folder / "manifest.json").get("command", ""),
    )  # fmt: skip
    path = folder / "report.html"
    files.write_text(path, html)
    return path


def lead(rows: Sequence[dict[str, Any]]) -> str:
    """The result in a sentence: which models have the highest precision and the highest recall."""
    best, widest = (max(rows, key=lambda row: row[name]) for name in ("precision", "recall"))
    if len(rows) == 1:
        return f"{label(best)} has {_value(best, 'precision')} and {_value(best, 'recall')}, in nats per token."
    if best is widest:
        return f"{label(best)} has the highest precision and the highest recall."
    return (
        f"{label(best)} has the highest precision ({_value(best, 'precision')}), {label(widest)} the highest recall "
        f"({_value(widest, 'recall')}), in nats per token."
    )


def _value(row: dict[str, Any], name: str) -> str:
    return f"{name} {Number(row[name], row[f'{name}_se'])}"


def label(row: dict[str, Any]) -> str:
    """A row's model, and its sample temperature where that is not 1."""
    return row["name"] if row["sample_temperature"] == 1 else f"{row['name']} at {row['sample_temperature']:g}"


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Recall against precision; rows whose values are not finite are left out."""
    drawn = canvas(8.6, 5.6)
    axes, points, labels = drawn.add_subplot(), [], {}
    models = _models(rows)
    for (name, several), colour in zip(models.items(), palette(len(models)), strict=True):
        finite = [row for row in several if math.isfinite(row["precision"]) and math.isfinite(row["recall"])]
        if finite:
            labels[len(points)] = (plain(name), colour)
            at = [(row["recall"], row["precision"]) for row in finite]
            errors = [[row[f"{metric}_se"] for row in finite] for metric in ("recall", "precision")]
            axes.errorbar(
                *zip(*at, strict=True), xerr=errors[0], yerr=errors[1], color=colour, marker="o", markersize=6,
                linewidth=1, linestyle="--", elinewidth=0.8,
            )  # fmt: skip
            points += at
    axes.set_xlabel(r"recall, E[log model] on p*'s text  (nats per token)  better $\rightarrow$")
    axes.set_ylabel(r"precision, E[log p*] of samples  (nats per token)  better $\rightarrow$")
    tidy(axes)
    label_points(axes, points, labels)
    return drawn


def chart(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The interactive form of `figure`."""
    models = _models(rows)
    series = [
        Series(name, [_point(row) for row in several], colour, line="dashed" if len(several) > 1 else "")
        for (name, several), colour in zip(models.items(), palette(len(models)), strict=True)
    ]
    return charts.chart(
        series, x_title="recall, E[log model] on p*'s text (nats per token); better →",
        y_title="precision, E[log p*] of samples (nats per token); better →",
    )  # fmt: skip


def _point(row: dict[str, Any]) -> Point:
    numbers = [_value(row, name) for name in ("precision", "recall", "entropy")]
    facts = [label(row), *numbers, f"{row['num_samples']} samples", f"source: {row['source']}"]
    return Point(row["recall"], row["precision"], row["recall_se"], row["precision_se"], facts)


def _models(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by model, in the order of temperatures."""
    models: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row["sample_temperature"]):
        models.setdefault(row["name"], []).append(row)
    return models


def _table(rows: Sequence[dict[str, Any]], name: str, title: str, columns: Sequence[tuple], note: str) -> Table:
    """A table with a line for each row; columns that no row has a value for are left out."""
    columns = [column for column in columns if any(row[column[0]] is not None for row in rows)]
    lines = [
        [label(row), *(Number(page.number(row[key]), page.number(row.get(f"{key}_se"))) for key, _ in columns)]
        for row in rows
    ]
    return Table(name, title, ["model", *(head for _, head in columns)], lines if columns else [], note)
