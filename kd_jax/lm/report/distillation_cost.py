"""What distillation cost in everything but precision, and which models are suspiciously precise."""

from __future__ import annotations

import math

import numpy as np

from kd_jax.lm.report import cooling, summary
from kd_jax.lm.report.cooling import Curve
from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import units
from kd_jax.reporting.page import number
from kd_jax.reporting.tables import Number, Table

METRICS = {
    "precision": "precision", "recall": "recall", "entropy": "entropy", "calibration_error": "calibration error",
    "agreement": "agreement with p*", "distinct_2": "distinct-2", "repetition_4": "repetition-4",
    "length_mean": "mean length", "finished": "finished (share)",
}  # fmt: skip


def table(students: dict[str, Curve]) -> Table:
    """Each distilled student minus the direct one, at matched precision where the direct student's curve reaches it."""
    direct, rows = students.get("direct"), []
    for arm, curve in students.items() if direct is not None else ():
        if arm == "direct" or not {1.0} <= set(curve.rows) & set(direct.rows):
            continue
        # All metrics at the temperature at which precision is equal.
        matches = {name: cooling.match(curve, 1.0, direct, name) for name in METRICS}
        if matches["recall"] is None:
            cells, beside = [_plain(curve, direct, name) for name in METRICS], "1, precision differs"
        else:
            cells = [Number(*one.interval[:2]) for one in matches.values()]
            # Equal by construction: a standard error would only be rounding.
            cells[0] = Number(0.0, math.nan, " (matched)")
            beside = "{:g} to {:g}".format(*matches["recall"].between)
        rows.append([curve.label, beside, *cells])
    shown = [0, 1, *(i for i in range(2, len(METRICS) + 2) if any(not math.isnan(row[i].mean) for row in rows))]
    head = ["students", "direct sampled at", *METRICS.values()]
    note = (
        "Student − direct student, ± standard error, paired by teacher and seed, and recall by sequence; precision, "
        "recall and entropy in nats per token. Where the direct student was sampled at temperatures whose precision "
        "encloses the student's, it is cooled to equal precision; otherwise it is compared as it is, sampled at 1."
    )
    title = "What distillation cost"
    return Table("distillation_cost", title, [head[i] for i in shown], [[row[i] for i in shown] for row in rows], note)


def _plain(curve: Curve, direct: Curve, metric: str) -> Number:
    return summary.rows_difference(*(list(side.rows[1.0].values()) for side in (curve, direct)), metric).cell


def too_precise(rows: list[dict]) -> Table:
    """Models whose samples p* finds likelier than its own, with what shows how they got there.

    A model that repeats a few likely sentences has a high precision. The direct student, sampled at 1, stands beside.
    """
    models: dict[tuple, list[dict]] = {}
    for row in summary.of_kind(rows, "evaluation"):
        if row.get("precision") is not None and row.get("data_log_prob") is not None and row["arm"] != "p_star":
            models.setdefault((summary.group_key(row), summary.sample_temperature(row)), []).append(row)
    flagged, reference = [], []
    for key, members in sorted(models.items(), key=lambda item: (summary.position(item[0][0]), -item[0][1])):
        excess = np.array([number(row["precision"]) - number(row["data_log_prob"]) for row in members])
        cells = [_mean(members, name) for name in ("precision", "distinct_2", "entropy", "repetition_4")]
        line = [summary.label(*key[0]), f"{key[1]:g}", cells[0], Number(*_interval(members, excess)[:2]), *cells[1:]]
        # NaN is above nothing: without both numbers a model is not suspected.
        if np.mean(excess) > 0:
            flagged.append(line)
        elif key == (("direct", None, None), 1.0):
            reference.append(line)
    head = ("model", "sampled at", "precision", "precision − p*'s own", "distinct-2", "entropy", "repetition-4")
    note = "Likelihoods and entropy in nats per token, ± standard error. The direct student is a reference."
    texts = [
        "These models' samples are likelier under p* than p*'s own validation samples. Such a precision comes from "
        "little variety: see distinct-2, entropy and repetition."
        if flagged else "No model's samples are likelier under p* than its own validation samples."
    ] if models else []  # fmt: skip
    return Table("above_p_star", "More precise than p* itself", head, reference * bool(flagged) + flagged, note, texts)


def _mean(rows: list[dict], metric: str) -> Number:
    return Number(*_interval(rows, np.array([number(row.get(metric)) for row in rows]))[:2])


def _interval(rows: list[dict], values: np.ndarray) -> Interval:
    return units.interval([units.student(row) for row in rows], values)
