"""What errors are over: teachers where there are several, else seeds; and the sequences that recall is measured on.

Students of one teacher share its corpus and its text, so with several teachers their seeds are averaged first and the
degrees of freedom are the teachers' less one. Recall, KL(p* || model) and agreement are measured on the same sequences
for every student: their errors are two-way, over these units and the sequences (or their prompts, where these repeat),
wherever the run has kept each sequence's value (recall.npz).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_jax.metrics import statistics
from kd_jax.metrics.statistics import Interval
from kd_jax.storage.files import read_arrays

Student = tuple[int, int | None]  # teacher and seed
# The field of an evaluation row, in memory alone, that has each sequence's share of its metrics, by name.
_BY_SEQUENCE = "by_sequence"


def student(row: dict) -> Student:
    """Teacher and seed of a row; runs from before there were several teachers have teacher 0."""
    return row.get("teacher") or 0, row.get("seed")


def arm(row: dict) -> str:
    """The arm of a row as the config names it: rows of config.taus have the arm "distilled" and their tau."""
    return f"tau-{row['tau']:g}" if row["arm"] == "distilled" and row.get("tau") is not None else row["arm"]


def per_unit(students: Sequence[Student], values: np.ndarray) -> np.ndarray:
    """Values [student, ...] averaged within the units: [teacher, ...] where there are several, else as they are."""
    teachers = [teacher for teacher, _ in students]
    if len(set(teachers)) < 2:
        return np.asarray(values)
    # Sorted: arrays of two arms then have the same teacher in the same place, and can be paired.
    return np.stack([values[np.equal(teachers, one)].mean(0) for one in sorted(set(teachers))])


def words(students: Sequence[Student]) -> str:
    """The units of these students, counted, in words."""
    teachers = len({teacher for teacher, _ in students})
    return f"{teachers} teachers" if teachers > 1 else f"{len(students)} seed{'s' * (len(students) > 1)}"


def interval(students: Sequence[Student], values: np.ndarray, by_sequence: np.ndarray | None = None) -> Interval:
    """A mean over students with its interval.

    Args:
        students: teacher and seed of each.
        values: [student].
        by_sequence: [student, sequence], whose means over sequences are the values, where sequences are shared.
    Returns: of one unit the mean without an error.
    """
    units = per_unit(students, np.asarray(values, np.float64))
    with np.errstate(invalid="ignore"):  # infinities of both signs make NaN
        over_units = statistics.t_interval(units)
    # Two-way errors need several units, and a value of every sequence for each of them.
    if by_sequence is None or len(units) < 2 or not np.isfinite(units).all():
        return over_units
    return statistics.two_way(per_unit(students, by_sequence))


def bootstrap(students: Sequence[Student], by_sequence: np.ndarray | None) -> Interval | None:
    """The hierarchical bootstrap's interval; None with fewer than two teachers, or seeds that differ in number."""
    teachers = sorted({teacher for teacher, _ in students})
    counts = {sum(one == teacher for one, _ in students) for teacher in teachers}
    if by_sequence is None or len(teachers) < 2 or len(counts) > 1:
        return None
    # The bootstrap draws teachers and then seeds within each, so it needs a full array [teacher, seed, sequence].
    order = sorted(range(len(students)), key=lambda i: students[i])
    values = by_sequence[order].reshape(len(teachers), counts.pop(), -1)
    return statistics.hierarchical_bootstrap(values, shared_sequences=True)


def attach(rows: list[dict], folder: Path) -> None:
    """Gives evaluation rows each sequence's share of the metrics on shared sequences, where folder/recall.npz has it.

    Such a metric is a ratio of sums over sequences, of a value to tokens. Linearised, it is the mean of a number for
    each sequence: ratio + (value - ratio * tokens) / mean tokens. Where prompts repeat, there is a number for each
    prompt, since answers to one prompt are not independent.
    """
    path = folder / "recall.npz"
    if not path.exists():
        return
    kept = read_arrays(path)
    sums = {"recall": kept["log_prob"], "agreement": kept.get("agreement")}
    sums["kl_data_model"] = kept["p_star"] - kept["log_prob"] if "p_star" in kept else None
    tokens = kept["tokens"].astype(np.float64)
    keys = zip(kept["name"].tolist(), kept["sample_temperature"].tolist(), strict=True)
    places = {key: i for i, key in enumerate(keys)}
    for row in rows:
        place = places.get((row.get("name"), row.get("sample_temperature")))
        if row.get("kind") != "evaluation" or place is None:
            continue
        row[_BY_SEQUENCE] = {}
        for metric, whole in sums.items():
            # One sequence of probability 0 makes the recall -inf, which has no linearisation.
            if whole is not None and row.get(metric) is not None and np.isfinite(whole[place]).all():
                values = whole[place].astype(np.float64)
                ratio = values.sum() / tokens.sum()
                shares = ratio + (values - ratio * tokens) / tokens.mean()
                shares = statistics.of_clusters(shares, kept["prompt"]) if "prompt" in kept else shares
                row[_BY_SEQUENCE][metric] = shares


def by_sequence(rows: Sequence[dict], metric: str) -> np.ndarray | None:
    """The metric [row, sequence] of rows that were measured on the same sequences; None where that is not so."""
    # Precision and entropy are of each student's own samples.
    if not rows or any(metric not in row.get(_BY_SEQUENCE, ()) for row in rows):
        return None
    return np.stack([row[_BY_SEQUENCE][metric] for row in rows])
