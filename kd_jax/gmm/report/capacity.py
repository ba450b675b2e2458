"""Other settings of a mixture run: the capacity grid of teacher and student, and one setting changed at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kd_jax.gmm import findings
from kd_jax.gmm.findings import Students, Who
from kd_jax.gmm.specs import GmmSpec
from kd_jax.gmm.students import AXES, DISTILLED
from kd_jax.metrics.statistics import Interval, t_interval
from kd_jax.reporting.figures import canvas
from kd_jax.reporting.tables import Number, Table

NAMES = {
    "dim": "dimensions",
    "num_data": "draws of p*",
    "teacher_components": "teacher components",
    "student_components": "student components",
    "num_distill": "draws of the teacher",
    "separation": "separation of the modes",
}
TEACHER, STUDENT = AXES.index("teacher_components"), AXES.index("student_components")


class Change(NamedTuple):
    """What the largest beta does, compared with the smallest: nats of precision and of recall."""

    precision: Interval
    recall: Interval


def change(students: Students) -> Change:
    """From the smallest to the largest beta of a setting, paired by seed."""
    # Differences within a seed: its students share data and teacher, so most of the spread over seeds cancels.
    ends = (findings.betas(students)[i] for i in (0, -1))
    low, high = (students[Who(DISTILLED, beta)] for beta in ends)
    return Change(*(t_interval(high[name] - low[name]) for name in Change._fields))


def grid(runs: dict[tuple, Students], spec: GmmSpec, base: tuple) -> dict[tuple[int, int], Change]:
    """(teacher, student) -> change, for the settings of `spec.vary.grid`; empty where there are none."""
    changes = {}
    for teacher in spec.vary.grid:
        for student in spec.vary.grid:
            # All axes but these two stay at the base.
            setting = list(base)
            setting[TEACHER], setting[STUDENT] = teacher, student
            if tuple(setting) in runs:
                changes[teacher, student] = change(runs[tuple(setting)])
    return changes


def grid_tables(changes: dict[tuple[int, int], Change], ends: tuple[float, float]) -> list[Table]:
    """A table of the change of precision and one of recall, a line for each teacher.

    Args:
        changes: as `grid` returns them; without any there is no table.
        ends: the smallest and the largest beta.
    """
    teachers, students = (sorted({pair[i] for pair in changes}) for i in (0, 1))
    tables, note = [], f"Change from beta {ends[0]:g} to {ends[1]:g}, in nats; mean ± standard error over seeds."
    for name in Change._fields if changes else ():
        rows = []
        for teacher in teachers:
            cells = [getattr(changes[teacher, student], name) for student in students if (teacher, student) in changes]
            rows.append([f"teacher {teacher}", *(Number(*cell[:2]) for cell in cells)])
        head = ["components", *(f"student {student}" for student in students)]
        tables.append(Table(f"capacity_{name}", f"Capacity: change of {name}", head, rows, note))
    return tables


def figure(changes: dict[tuple[int, int], Change]) -> Figure:
    """The change of precision and of recall over teacher and student components, as two maps."""
    teachers, students = (sorted({pair[i] for pair in changes}) for i in (0, 1))
    drawn = canvas(9.0, 4.0)
    for axes, name in zip(drawn.subplots(1, 2), Change._fields, strict=True):
        values = np.full((len(teachers), len(students)), np.nan)
        for (teacher, student), both in changes.items():
            values[teachers.index(teacher), students.index(student)] = getattr(both, name).mean
        # one scale for gain and loss, white at no change
        reach = max(float(np.nanmax(abs(values))), 1e-6)
        image = axes.imshow(values, cmap="RdBu", vmin=-reach, vmax=reach, origin="lower")
        for (row, column), value in np.ndenumerate(values):
            # The map is dark at both ends.
            colour = "white" if abs(value) > 0.6 * reach else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(students)), [str(n) for n in students])
        axes.set_yticks(range(len(teachers)), [str(n) for n in teachers])
        axes.set(xlabel="student components", ylabel="teacher components", title=f"change of {name} (nats)")
        drawn.colorbar(image, ax=axes, shrink=0.85)
    return drawn


def varied(runs: dict[tuple, Students], base: tuple) -> Table:
    """A line for each setting that differs from the base in one axis alone; no rows where there is none."""
    rows = []
    for index, axis in enumerate(AXES):
        # the grid's settings differ in two axes and have a table of their own, but for its row and column at the base
        settings = [
            s
            for s in runs
            if s[index] != base[index] and s[:index] + s[index + 1 :] == base[:index] + base[index + 1 :]
        ]
        for setting in sorted([*settings, base] if settings else [], key=lambda s: s[index]):
            rows.append(_line(NAMES[axis], setting[index], setting == base, runs[setting]))
    head = ("setting", "value", "seeds", "precision slope", "recall slope", "precision, largest beta",
            "recall, largest beta")  # fmt: skip
    note = "One setting is changed at a time. Slopes are means over all decades, in nats per decade of beta."
    return Table("other_settings", "Other settings", head, rows, note)


def _line(name: str, value: float, is_base: bool, students: Students) -> list[str | Number]:
    betas = findings.betas(students)
    last = students[Who(DISTILLED, betas[-1])]
    slopes = [findings.slope(students, metric, betas[0], betas[-1]) for metric in Change._fields]
    values = [t_interval(last[metric]) for metric in Change._fields]
    cells = (Number(*interval[:2]) for interval in (*slopes, *values))
    return [name, f"{value:g}" + (" (base)" if is_base else ""), str(len(last["recall"])), *cells]
