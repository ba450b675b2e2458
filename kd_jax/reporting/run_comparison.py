"""Several runs of one experiment on one page: their frontiers on one axis, their settings, and differences with errors.

An experiment hands over its students as `Student`s; how they were trained does not matter here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from kd_jax.metrics import statistics
from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import charts, page, tables, units
from kd_jax.reporting.charts import STAR, Point, Series
from kd_jax.reporting.figures import INK, canvas, palette, plain, tidy
from kd_jax.reporting.tables import Number, Table
from kd_jax.runs.config import flatten
from kd_jax.storage import files

# Beginnings of the settings that say what p* is, a distribution of whole texts after a prompt: with another one,
# numbers of two runs mean different things.
_P_STAR = ("p_star.", "data.", "sampling.prompt", "sampling.max_length", "dim", "separation")
# Points that are named in the figure; more would cover each other.
_LABELLED = 12
# Settings that the pointer shows of a point.
_FACTS = 8
TITLE = "Runs compared: precision against recall"
METRICS = ("precision", "recall")
TEMPLATE = """<p class="lead"><strong>{{ lead }}</strong></p>
{% for text in caveats %}<p>{{ text }}</p>
{% endfor %}<nav></nav>
<h2>All runs on one frontier</h2>
{{ figure("compare", caption) }}
{% for table in tables %}{{ section(table) }}
{% endfor %}"""
_CAPTION = (
    "Means with their standard errors, a colour for each run. Points are students sampled at temperature 1, a line "
    "joins settings of one kind, a star is the direct student, and a dashed line is the direct student sampled at "
    "lower temperatures. The still figure names the students of the first run."
)
_NOTE = (
    "± standard error, in {unit}. Differences are from {first}. Paired: both runs have the same seeds and, for recall, "
    "the same held-out rows, so that what they share is no noise. Unpaired: the errors of both runs add up (Welch). "
    "Nothing is corrected for the number of comparisons."
)


class Student(NamedTuple):
    """Students of one run that were made alike, with one value of each metric for each of them.

    Attributes:
        label: tells them apart within a run; students of two runs with one label are compared.
        kind: "direct", "cooled" (the direct student at a lower sample temperature), or what a line joins.
        members: teacher and seed of each student.
        values: "precision" and "recall" [member], nats.
        by_sequence: recall [member, sequence], where it is known.
        errors: of a single member, the standard error of each metric over its sequences.
    """

    label: str
    kind: str
    members: list[units.Student]
    values: dict[str, np.ndarray]
    by_sequence: np.ndarray | None = None
    errors: dict[str, float] = {}


class Run(NamedTuple):
    """What is compared of a run.

    Attributes:
        config, manifest: its files.
        students: in the order of the table.
        seeds: what its seeds stand for; members of two runs are paired where this is equal.
        recall_rows: what recall was measured on; it is paired where this is equal. None where it is not known.
        unit: of the metrics.
        smoke: whether it is too small for conclusions.
        name: what the page calls it.
    """

    config: dict[str, Any]
    manifest: dict[str, Any]
    students: list[Student]
    seeds: Any
    recall_rows: Any
    unit: str
    smoke: bool
    name: str = ""


def of_mixtures(
    folder: Path, students: Sequence[tuple[str, str, dict[str, np.ndarray]]], *, first_seed: int, smoke: bool
) -> Run:
    """A run whose every seed has data, a teacher and fresh draws for recall of its own.

    Args:
        folder: of the run.
        students: label, kind and metrics [seed] of each.
        first_seed: the others count up from it.
        smoke: whether it is too small for conclusions.
    """
    listed = []
    for label, kind, metrics in students:
        members = [(0, first_seed + i) for i in range(len(metrics["recall"]))]
        listed.append(Student(label, kind, members, {metric: metrics[metric] for metric in METRICS}))
    config, manifest = (page.read_json(folder / f"{name}.json") for name in ("config", "manifest"))
    return Run(config, manifest, listed, seeds="absolute", recall_rows="of each seed", unit="nats", smoke=smoke)


def estimate(student: Student, metric: str) -> Interval:
    """The mean over the members with its interval; of a single member the interval is over its sequences."""
    values = student.values[metric]
    if len(values) == 1:
        mean, error = float(values[0]), student.errors.get(metric, math.nan)
        # sequences are many, so the normal quantile
        return Interval(mean, error, mean - 1.96 * error, mean + 1.96 * error, math.inf)
    return units.interval(student.members, values, student.by_sequence if metric == "recall" else None)


def difference(first: Run, second: Run, label: str, metric: str) -> tuple[Interval, str]:
    """The second run's metric minus the first run's, and how the two were paired.

    Args:
        first, second: runs that both have a student of this label.
        label: of the student.
        metric: one of METRICS.
    """
    a, b = (next(one for one in run.students if one.label == label) for run in (first, second))
    # On other rows of recall, the rows are noise of their own, which pairing by seed alone would leave out.
    same_rows = first.recall_rows is not None and first.recall_rows == second.recall_rows
    paired = first.seeds == second.seeds and (metric != "recall" or same_rows)
    common = [member for member in a.members if member in b.members] if paired else []
    if common:
        places = [[one.members.index(member) for member in common] for one in (a, b)]
        sides = [one.values[metric][place] for one, place in zip((a, b), places, strict=True)]
        sequences = None
        if metric == "recall" and a.by_sequence is not None and b.by_sequence is not None:
            sequences = b.by_sequence[places[1]] - a.by_sequence[places[0]]
        unit = "teacher" if len({teacher for teacher, _ in common}) > 1 else "seed"
        if len(common) > 1:
            with np.errstate(invalid="ignore"):  # two infinite recalls have no difference
                apart = units.interval(common, sides[1] - sides[0], sequences)
            count = len({teacher for teacher, _ in common}) if unit == "teacher" else len(common)
            return apart, f"paired by {count} {unit}s" + (" and by sequence" if sequences is not None else "")
        if sequences is not None:
            return statistics.t_interval(sequences[0]), "paired by sequence"
    return _welch(estimate(a, metric), estimate(b, metric)), "unpaired"


def _welch(a: Interval, b: Interval) -> Interval:
    """b - a of independent means, with Welch's degrees of freedom (Satterthwaite 1946)."""
    parts = np.array([a.error**2, b.error**2])
    error, mean = float(np.sqrt(parts.sum())), b.mean - a.mean
    spread = sum(part**2 / dof for part, dof in zip(parts, (a.dof, b.dof), strict=True) if dof)
    dof = parts.sum() ** 2 / spread if spread else math.inf
    reach = stdtrit(dof, 0.975) * error
    return Interval(mean, error, mean - reach, mean + reach, float(dof))


def write(runs: Sequence[Run], out: Path, command: str) -> tuple[Path, Table]:
    """Writes out/compare.html and, in out/figures, the figure and the tables.

    Args:
        runs: two or more of one experiment, with names that differ; differences are from the first.
        out: a folder; what else is in it stays.
        command: what makes the page again.
    Returns: the page's path, and the table of students.
    """
    out.mkdir(parents=True, exist_ok=True)
    students, settings = student_table(runs), settings_table(runs)
    tables.save([students, settings], out)
    smoke = [run.name for run in runs if run.smoke]
    caveats = unfinished(runs)
    caveats += [f"Smoke runs, too small for conclusions: {', '.join(smoke)}."] if smoke else []
    apart = [row[0] for row in settings.rows if row[0].startswith(_P_STAR)]
    if apart:
        caveats.insert(0, f"p* differs between these runs ({', '.join(apart)}): their numbers cannot be compared.")
    html = page.render(
        TEMPLATE, folder=out, command=command, title=TITLE, lead=_lead(runs, settings), caption=_CAPTION,
        caveats=caveats,
        images=page.embed({"compare": figure(runs)}, out), charts={"compare": chart(runs, settings)},
        tables=[students, settings],
    )  # fmt: skip
    path = out / "compare.html"
    files.write_text(path, html)
    return path, students


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run that is not known to be finished."""
    return list(filter(None, (page.unfinished(run.name, run.manifest) for run in runs)))


def student_table(runs: Sequence[Run]) -> Table:
    """A line for each student of each run, beside the student of the same label in the first run."""
    first = runs[0]
    labels = list(dict.fromkeys(one.label for run in runs for one in run.students if one.kind != "cooled"))
    lines = []
    for label in labels:
        for run in runs:
            student = next((one for one in run.students if one.label == label), None)
            if student is None:
                continue
            cells = [Number(*estimate(student, metric)[:2]) for metric in METRICS]
            apart, how = [Number(math.nan)] * 2, "–"
            if run is not first and any(one.label == label for one in first.students):
                pairs = [difference(first, run, label, metric) for metric in METRICS]
                apart = [Number(*interval[:2]) for interval, _ in pairs]
                how = "; ".join(
                    dict.fromkeys(f"{metric}: {way}" for metric, (_, way) in zip(METRICS, pairs, strict=True))
                )
                how = pairs[0][1] if pairs[0][1] == pairs[1][1] else how
            lines.append([label, run.name, *cells, *apart, how])
    head = ("students", "run", *METRICS, *(f"{metric} − {first.name}'s" for metric in METRICS), "differences")
    return Table("compare", "Students", head, lines, _NOTE.format(unit=first.unit, first=first.name))


def settings_table(runs: Sequence[Run]) -> Table:
    """The settings that are not the same in all runs; versions and commits of the code too, where they differ."""
    flat = [flatten(run.config) for run in runs]
    for row, run in zip(flat, runs, strict=True):
        code = {key: run.manifest[key] for key in ("git_commit", "versions") if run.manifest.get(key)}
        row |= {f"({key.replace('_', ' ')})": value for key, value in flatten(code).items()}
    keys = list(dict.fromkeys(key for row in flat for key in row))
    texts = {key: [_text(row[key]) if key in row else "–" for row in flat] for key in keys}
    lines = [[key, *values] for key, values in texts.items() if len(set(values)) > 1]
    code = any(line[0].startswith("(") for line in lines)
    note = "All other settings are the same." + " In brackets: the code that made the run." * code
    return Table("settings", "What differs", ("setting", *(run.name for run in runs)), lines, note)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _lead(runs: Sequence[Run], settings: Table) -> str:
    names = [row[0] for row in settings.rows if not row[0].startswith("(")]
    if not names:
        return f"{len(runs)} runs with the same settings."
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{len(runs)} runs that differ in {len(names)} setting{'s' * (len(names) > 1)}: {shown}."


def figure(runs: Sequence[Run]) -> Figure:
    """Recall against precision of all runs' students; a student whose mean is not finite is left out."""
    drawn = canvas(8.6, 6.4)
    axes = drawn.add_subplot()
    for run, colour in zip(runs, palette(len(runs)), strict=True):
        axes.plot([], [], marker="o", color=colour, label=plain(run.name))
        for kind, students in _kinds(run).items():
            _draw(axes, students, kind, colour)
    _write_labels(axes, [one for one in runs[0].students if one.kind != "cooled"])
    axes.set_xlabel(rf"recall  $E_{{p^*}}[\log p'']$  ({runs[0].unit})  better $\rightarrow$")
    axes.set_ylabel(rf"precision  $E_{{p''}}[\log p^*]$  ({runs[0].unit})  better $\rightarrow$")
    tidy(axes)
    drawn.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)
    return drawn


def chart(runs: Sequence[Run], settings: Table) -> dict[str, Any]:
    """The interactive form of `figure`; the pointer shows a student's numbers and how its run's settings differ.

    Args:
        runs: as `write` takes them.
        settings: as `settings_table` returns it.
    """
    series = []
    for place, (run, colour) in enumerate(zip(runs, palette(len(runs)), strict=True), start=1):
        differs = [f"{row[0]}: {row[place]}" for row in settings.rows if not row[0].startswith("(")]
        differs = differs[:_FACTS] + ["…"] * (len(differs) > _FACTS)
        for kind, students in _kinds(run).items():
            points = [_point(run, one, differs) for one in students]
            symbol, size = (STAR, 16) if kind == "direct" else ("circle", 5 if kind == "cooled" else 9)
            line = "dashed" if kind == "cooled" else "solid" if len(points) > 1 else ""
            series.append(Series(run.name, points, colour, symbol, size, line))
    return charts.chart(
        series, x_title=f"recall, E[log p″] on p* ({runs[0].unit}); better →",
        y_title=f"precision, E[log p*] ({runs[0].unit}); better →",
    )  # fmt: skip


def _kinds(run: Run) -> dict[str, list[Student]]:
    """The students by kind. The line of the cooled ones begins at the direct student, below its star."""
    kinds = {}
    for student in run.students:
        kinds.setdefault(student.kind, []).append(student)
    if "cooled" in kinds:
        kinds = {"cooled": kinds.get("direct", []) + kinds.pop("cooled")} | kinds
    return kinds


def _point(run: Run, student: Student, differs: list[str]) -> Point:
    both = {metric: estimate(student, metric) for metric in METRICS}
    count = f"{len(student.members)} student{'s' * (len(student.members) > 1)}"
    numbers = [f"{metric} {Number(*interval[:2])}" for metric, interval in both.items()]
    precision, recall = both.values()
    # as in the still figure, cooled students have no error bars
    errors = (math.nan, math.nan) if student.kind == "cooled" else (recall.error, precision.error)
    return Point(recall.mean, precision.mean, *errors, [run.name, f"{student.label}, {count}", *numbers, *differs])


def _draw(axes: Any, students: Sequence[Student], kind: str, colour: Any) -> None:
    points = np.array([[estimate(one, metric)[:2] for metric in METRICS] for one in students])  # [student, metric, 2]
    points = points[np.isfinite(points[..., 0]).all(1)]
    (precision, precision_error), (recall, recall_error) = points.transpose(1, 2, 0)
    if kind == "cooled":
        axes.plot(recall, precision, color=colour, linestyle="--", linewidth=1, zorder=1)
        return
    marker, size = ("*", 13) if kind == "direct" else ("o", 6)
    axes.errorbar(
        recall, precision, xerr=np.nan_to_num(recall_error), yerr=np.nan_to_num(precision_error), color=colour,
        marker=marker, markersize=size, linewidth=1.2, elinewidth=0.8, zorder=3,
    )  # fmt: skip


def _write_labels(axes: Any, students: Sequence[Student]) -> None:
    """Each student's label beside its point, where there is room for them."""
    if len(students) > _LABELLED:
        return
    for student in students:
        precision, recall = (estimate(student, metric).mean for metric in METRICS)
        if np.isfinite([precision, recall]).all():
            axes.annotate(
                plain(student.label), (recall, precision), (-5, -11), textcoords="offset points", fontsize=8, color=INK,
                ha="right",
            )  # fmt: skip
