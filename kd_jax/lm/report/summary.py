"""What the rows of a language-model run add up to: students by arm, estimates over seeds, and differences with errors.

Rows have fields for arm, tau, teacher, seed and sample_temperature; nothing is read from names. A student may have rows
at several sample temperatures of its own: the row at 1 is the student as it was trained, the others are
kd_jax.lm.report.cooling's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from kd_jax.lm.sampler_spec import WHOLE
from kd_jax.metrics import statistics
from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import row_kinds, units
from kd_jax.reporting.page import number
from kd_jax.reporting.tables import Number

# Nats per token; each has a `_per_sequence` column beside it, and both a `_se` over the sequences.
LIKELIHOOD = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
TEXT = ("finished", "length_mean", "distinct_2", "repetition_4", "calibration_error", "agreement")
METRICS = (*LIKELIHOOD, *(f"{name}_per_sequence" for name in LIKELIHOOD), *TEXT, "teacher_entropy")
ORDER = ("direct", "distilled", "teacher")
# With fewer samples than this a run only shows that everything works.
SMOKE = 96
# What the fields of a row may hold: a run's folder can be somebody else's, or have been edited.
FIELDS = (
    dict.fromkeys(("kind", "name", "arm"), row_kinds.TEXT)
    | {"seed": row_kinds.INTEGER, "teacher": row_kinds.INTEGER, "perplexity": row_kinds.ANY_NUMBER}
    | dict.fromkeys(("tau", "sample_temperature"), row_kinds.FINITE)
    | dict.fromkeys(
        (
            *METRICS,
            "loss",
            "cross_entropy",
            "divergence",
            "student_entropy",
            "gradient_norm",
            "data_log_prob",
            "share_of_data_logging_checkpoints",
        ),
        row_kinds.NUMBER,
    )
    | dict.fromkeys((*(f"{name}_se" for name in METRICS), "length_sd"), row_kinds.FROM_ZERO)
    | dict.fromkeys(("step", "tokens", "seconds", "num_samples", "num_recall"), row_kinds.SIZE)
)
DISTILL_FIELDS = dict.fromkeys(("policy", "divergence", "data", "tail", "text_choice"), row_kinds.TEXT) | dict.fromkeys(
    ("parameter", "loss_temperature", "teacher_temperature", "hard_weight", "on_policy_fraction", "record_top_k",
     *WHOLE.knobs(), "text_rows", "text_share"),
    row_kinds.NUMBER,
)  # fmt: skip
_NEEDED = {
    "evaluation": ("arm", "name"), "stage": ("name",), "training": ("arm", "name", "step"),
    "validation": ("arm", "name", "step"),
}  # fmt: skip


class Estimate(NamedTuple):
    """One metric of one group.

    Attributes:
        mean: over the students that have a value; NaN where none has.
        error: its standard error, over teachers or seeds (see units), or over the sequences where there is one student;
            NaN if unknown.
        count: students that have a value.
        bad: how many of these values are not finite.
    """

    mean: float
    error: float
    count: int
    bad: int

    def cell(self, size: int) -> Number:
        """The table's cell; `size` is how many seeds the group has, of which some may lack a value."""
        remark = f" ({self.bad} of {self.count} seeds)" if self.bad else ""
        remark += f" (n = {self.count})" if 0 < self.count < size and not self.bad else ""
        return Number(self.mean, self.error, remark)


class Group(NamedTuple):
    """The models of one arm at one tau: one per teacher and seed.

    Attributes:
        arm: "direct", "distilled", "teacher", or a name from config.arms.
        tau: the teacher's sample temperature in the text that is learnt; for the teacher, that of its own samples.
        label: how the page names it.
        rows: evaluation rows at the students' sample temperature 1, one per student; empty before the evaluation.
        estimates: by metric, METRICS and "validation_perplexity".
    """

    arm: str
    tau: float | None
    label: str
    rows: list[dict]
    estimates: dict[str, Estimate]

    @property
    def is_student(self) -> bool:
        """Whether these models were trained as students in this run; among arms by name, those have seeds."""
        named = self.arm not in (*ORDER, "p_star") and all(row.get("seed") is not None for row in self.rows)
        return self.arm in ("direct", "distilled") or named

    @property
    def by_name(self) -> bool:
        """Whether these are students of an arm of config.arms."""
        return self.is_student and self.arm not in ORDER


class Difference(NamedTuple):
    """first - second in one metric.

    Attributes:
        interval: of the mean.
        count: students that both have a value for.
        over: what the error is over, in words.
    """

    interval: Interval
    count: int
    over: str = "no seed"

    @property
    def cell(self) -> Number:
        """The table's cell."""
        return Number(self.interval.mean, self.interval.error)


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    """The rows of one kind."""
    return [row for row in rows if row.get("kind") == kind]


def is_student_row(row: dict) -> bool:
    """Whether an evaluation row is of a model that the run trained as a student."""
    return row.get("seed") is not None and row["arm"] not in ("teacher", "p_star")


def sample_temperature(row: dict) -> float:
    """The temperature at which the model of a row was sampled and scored."""
    value = row.get("sample_temperature")
    return 1.0 if value is None else float(value)


def is_main(row: dict) -> bool:
    """Whether a row is the model's main one: of a student the row at 1, of a teacher the row at its tau."""
    usual = 1.0 if is_student_row(row) or row.get("tau") is None else float(row["tau"])
    return row.get("sample_temperature") is None or sample_temperature(row) == usual


def group_key(row: dict) -> tuple:
    """What makes rows one group: arm and tau. A model without a seed that is not the teacher stands alone."""
    arm, tau = row["arm"], row.get("tau")
    if arm == "teacher":
        return arm, 1.0 if tau is None else float(tau), None  # as it was trained, the teacher has tau 1
    # Models that were only evaluated have no seed: each is a group of its own.
    alone = arm not in ORDER and row.get("seed") is None and row.get("teacher") is None
    return arm, None if tau is None else float(tau), row["name"] if alone else None


def label(arm: str, tau: float | None, name: str | None = None) -> str:
    """How the page names a group.

    Args:
        arm, tau, name: a group's key.
    """
    if arm == "p_star":
        return "p*"
    if arm == "distilled" and tau is not None:
        return f"tau = {tau:g}"
    return (name or arm) + ("" if tau is None else f", tau = {tau:g}")


def position(key: tuple) -> tuple:
    """Sort key of group keys: p*, direct, distilled by tau, teacher by tau, then others by name."""
    arm, tau, name = key
    order = ("p_star", *ORDER)
    return (order.index(arm) if arm in order else len(order), arm, -math.inf if tau is None else tau, name or "")


def check(rows: list[dict], path: Any) -> None:
    """Checks the rows of a metrics.jsonl, once, where they are read.

    Args:
        rows: of the file.
        path: of the file, for messages.
    Raises: ValueError, naming file and row, for a field of another type, or a row that is not a language-model run's.
    """
    for index, row in enumerate(rows, start=1):
        where = f"{path}, row {index}"
        row_kinds.check(row, where, FIELDS)
        missing = [key for key in _NEEDED.get(row.get("kind"), ("kind",)) if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: no {missing[0]}; not a language-model run's row")
        settings = row.get("distill") or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: distill is {settings!r:.40}, not an object")
        row_kinds.check(settings, f"{where}: distill", DISTILL_FIELDS)


def summarise(rows: list[dict]) -> list[Group]:
    """The groups, in the page's order, of all models that were evaluated or have a chosen checkpoint."""
    evaluations: dict[tuple, list[dict]] = {}
    chosen: dict[tuple, list[dict]] = {}
    for row in of_kind(rows, "evaluation"):
        if is_main(row):
            evaluations.setdefault(group_key(row), []).append(row)
    for row in of_kind(rows, "validation"):
        if row.get("chosen"):
            chosen.setdefault(group_key(row), []).append(row)
    groups = []
    # Trained models are listed before they are evaluated.
    for key in sorted(evaluations.keys() | chosen.keys(), key=position):
        members = evaluations.get(key, [])
        estimates = {name: _estimate(members, name) for name in METRICS}
        validations = chosen.get(key, [])
        perplexities = [number(row.get("perplexity")) for row in validations]
        estimates["validation_perplexity"] = _of_values(perplexities, [units.student(row) for row in validations])
        if key[0] == "teacher":
            estimates["teacher_entropy"] = _of_values([], [])  # the same as its entropy, in the column beside
        groups.append(Group(key[0], key[1], label(*key), members, estimates))
    return groups


def students(groups: list[Group]) -> list[Group]:
    """The groups of students that have been evaluated."""
    return [group for group in groups if group.is_student and group.rows]


def direct(groups: list[Group]) -> Group | None:
    """The students that learn p*'s text, if they have been evaluated."""
    return next((group for group in groups if group.arm == "direct" and group.rows), None)


def smoke_samples(groups: list[Group]) -> int | None:
    """How many samples of each student a smoke run has; None for any other run."""
    sizes = [row["num_samples"] for g in students(groups) for row in g.rows if row.get("num_samples") is not None]
    return min(sizes) if sizes and min(sizes) < SMOKE else None


def _of_values(values: list[float], students: list[units.Student], by_sequence: np.ndarray | None = None) -> Estimate:
    interval = units.interval(students, np.array(values), by_sequence)
    return Estimate(interval.mean, interval.error, len(values), sum(not math.isfinite(value) for value in values))


def _estimate(rows: list[dict], name: str) -> Estimate:
    having = [row for row in rows if row.get(name) is not None]
    by_sequence = units.by_sequence(having, name)
    estimate = _of_values([number(row[name]) for row in having], [units.student(row) for row in having], by_sequence)
    # One student says nothing about others; the error over its sequences is all there is.
    if len(having) == 1 and not estimate.bad:
        return estimate._replace(error=_over_sequences(having[0], name))
    return estimate


def _over_sequences(row: dict, name: str) -> float:
    """The standard error of one model's metric over its sequences; NaN where the row has none."""
    spread, count = row.get("length_sd"), row.get("num_samples")
    if name == "length_mean" and row.get("length_mean_se") is None and spread is not None and count:
        return number(spread) / math.sqrt(count)
    return number(row.get(f"{name}_se"))


def difference(first: Group, second: Group, name: str) -> Difference:
    """first - second in one metric, paired by teacher and seed, recall by sequence as well where that is known.

    With one student the error is over sequences, those of the two models taken as independent unless they are known to
    be the same.

    Args:
        first, second: groups of students.
        name: one of METRICS.
    Returns: the difference over the students that both have a value for; NaN where a value is not finite.
    """
    return rows_difference(first.rows, second.rows, name)


def rows_difference(first: list[dict], second: list[dict], name: str) -> Difference:
    """`difference` of two lists of evaluation rows, each with a row per student."""
    # Only students that both lists have a value for can be paired.
    kept = [{units.student(row): row for row in rows if row.get(name) is not None} for rows in (first, second)]
    students = [student for student in kept[0] if student in kept[1]]
    sides = [[rows[student] for student in students] for rows in kept]
    values = np.array([[number(row[name]) for row in rows] for rows in sides])
    # With an infinite value (a recall of -inf) there is no difference: leaving it out would flatter the arm.
    if not students or not np.isfinite(values).all():
        return Difference(Interval(*[math.nan] * 5), len(students))
    parts = [units.by_sequence(rows, name) for rows in sides]
    by_sequence = None if any(part is None for part in parts) else parts[0] - parts[1]
    if len(students) > 1:
        interval = units.interval(students, values[0] - values[1], by_sequence)
        return Difference(interval, len(students), units.words(students))
    if by_sequence is not None:
        interval = statistics.t_interval(by_sequence[0])
    else:
        mean, error = values[0, 0] - values[1, 0], math.hypot(*(_over_sequences(row[0], name) for row in sides))
        reach = 1.96 * error  # sequences are many, so the normal quantile
        interval = Interval(float(mean), error, mean - reach, mean + reach, math.inf)
    return Difference(interval, 1, "1 seed, error over sequences")
