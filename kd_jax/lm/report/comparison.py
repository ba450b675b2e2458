"""Arms in words: the preregistered comparison, what students learn, and how they differ from the direct student.

`comparable` has the students of a run for a page of several runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.lm.experiment.knobs import ContrastSpec
from kd_jax.lm.report import cooling, expectations, summary
from kd_jax.lm.report.cooling import Curve
from kd_jax.lm.report.summary import Group
from kd_jax.lm.sampler_spec import WHOLE
from kd_jax.metrics import statistics
from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import page, units
from kd_jax.reporting.page import number
from kd_jax.reporting.run_comparison import METRICS, Run, Student
from kd_jax.reporting.tables import Number, Table
from kd_jax.runs.settings import freeze

TEXTS = {"p_star": "p*'s text", "samples": "the teacher's text", "mix": "p*'s and the teacher's text"}
_NATS = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
_SAMPLER = {name: "tau" if name == "sample_temperature" else name.replace("_", "-") for name in WHOLE.knobs()}


def table(groups: list[Group]) -> Table:
    """A line for each arm that learns from the teacher, with its differences from the direct student."""
    direct, lines = summary.direct(groups), []
    for group in summary.students(groups):
        if group is direct:
            continue
        apart = [Number(math.nan)] * 2
        if direct is not None:
            apart = [summary.difference(group, direct, name).cell for name in ("precision", "recall")]
        lines.append([group.label, learns(group.rows[0]), *apart])
    head = ("students", "learn", "precision − direct's", "recall − direct's")
    note = "Nats per token, ± standard error, paired by seed. All students are sampled at 1."
    return Table("arms", "What students learn, beside the direct student", head, lines, note)


def headline(groups: list[Group]) -> str:
    """How many arms differ from the direct student, in one sentence; all comparisons are corrected together (Holm)."""
    # All differences are tested before any is named: the count of clear ones is then not inflated by choosing.
    arms, direct = [group for group in groups if group.by_name and group.rows], summary.direct(groups)
    if direct is None:
        return "Distilled students cannot be compared with the direct student, which has not been evaluated."
    places = [(group, name) for group in arms for name in ("precision", "recall")]
    intervals = [summary.difference(group, direct, name).interval for group, name in places]
    p_values = expectations.adjusted([interval.p_value for interval in intervals])
    counts = {(name, sign): 0 for name in ("precision", "recall") for sign in (1, -1)}
    for (_, name), interval, p_value in zip(places, intervals, p_values, strict=True):
        # NaN is below nothing, so a difference that could not be tested counts as neither higher nor lower.
        counts[name, 1 if interval.mean > 0 else -1] += p_value < expectations.LEVEL
    return (
        f"Of {len(arms)} ways of distilling, beside the direct student: precision is clearly higher in "
        f"{counts['precision', 1]} and lower in {counts['precision', -1]}; recall is clearly higher in "
        f"{counts['recall', 1]} and lower in {counts['recall', -1]}."
    )


def loss_name(settings: dict[str, Any]) -> str:
    """The loss that students with these `distill` settings are trained on."""
    if settings.get("policy", "sequence") == "sequence":
        return "cross-entropy"
    name = (settings.get("divergence") or "divergence").replace("_", " ").replace(" kl", " KL")
    if settings.get("parameter") is not None:
        name += f" ({settings['parameter']:g})"
    if settings.get("hard_weight"):
        name += f" + {settings['hard_weight']:g} cross-entropy"
    return name


def learns(row: dict[str, Any]) -> str:
    """What the student of an evaluation row learns, in words."""
    settings = row.get("distill") or {}
    policy = settings.get("policy", "sequence")
    if policy == "sequence":
        sampled = _sampled(settings or {"sample_temperature": row.get("tau")})
        return f"{_text(settings)}{sampled}"
    parts = [loss_name(settings)]
    for key, words in (("loss_temperature", "loss temperature"), ("teacher_temperature", "teacher temperature")):
        # 1 is the model's own distribution, and needs no words.
        if settings.get(key) not in (None, 1.0):
            parts.append(f"{words} {settings[key]:g}")
    data = settings.get("data") or "p_star"
    text = TEXTS.get(data, data) + (_sampled(settings) if data != "p_star" else "")
    if policy == "on_policy":
        share = settings.get("on_policy_fraction")
        text = f"the student's own text{'' if share is None else f' in {share:.0%} of updates'}, else {text}"
    if policy == "offline":
        count = "" if settings.get("record_top_k") is None else f"{settings['record_top_k']:g} "
        parts.append(f"recorded of the teacher's {count}most probable tokens (tail: {settings.get('tail')})")
    return f"{', '.join(parts)}; on {text}"


def _text(settings: dict[str, Any]) -> str:
    """Which of the teacher's samples are learnt."""
    rows, share = settings.get("text_rows"), settings.get("text_share")
    text = "the teacher's text" if not rows else f"{rows:,} rows of the teacher's text"
    if share is None:
        return text
    words = {
        "likeliest": f"the likeliest {share:.3g} of {text}", "least_likely": f"the least likely {share:.3g} of {text}",
        "repeated": f"{text}, of which {share:.3g} differ",
    }  # fmt: skip
    return words.get(settings.get("text_choice"), text)


def _sampled(settings: dict[str, Any]) -> str:
    """How the teacher's text was sampled."""
    parts = [f"{word} = {settings[name]:g}" for name, word in _SAMPLER.items() if settings.get(name) is not None]
    return f" at {', '.join(parts)}" if parts else ""


def read_contrast(config: dict[str, Any]) -> ContrastSpec:
    """The comparison that a run's config.json names; one without an arm where it names none."""
    return freeze(ContrastSpec, config.get("contrast") or {}, "config.contrast")


def preregistered(contrast: ContrastSpec, curves: dict[str, Curve]) -> str | None:
    """The comparison with its interval; None where the run has none.

    Args:
        contrast: of the config.
        curves: students by arm, as `cooling.curves` returns them.
    """
    if not contrast.arm:
        return None
    missing = [arm for arm in (contrast.arm, contrast.other) if arm not in curves or 1.0 not in curves[arm].rows]
    if missing:
        return f"Preregistered comparison: {missing[0]} has not been evaluated."
    arm, other = curves[contrast.arm], curves[contrast.other]
    start = f"Preregistered comparison: {contrast.metric.replace('_', ' ')} of {arm.label} minus that of {other.label}"
    if not contrast.at_equal_precision:
        sides = [list(curve.rows[1.0].values()) for curve in (arm, other)]
        apart = summary.rows_difference(*sides, contrast.metric)
        return f"{start} is {_contrast_amount(apart.interval, contrast.metric, apart.over)}."
    start += ", cooled to equal precision,"
    apart = cooling.differences(arm, 1.0, other, contrast.metric)
    if apart is None:
        return f"{start} is not known: no two of the latter's sample temperatures enclose this precision."
    interval = units.interval(apart.students, apart.values, apart.by_sequence)
    over = units.words(apart.students)
    if apart.by_sequence is not None:
        over += f" and {apart.by_sequence.shape[1]} sequences"
    text = f"{start} is {_contrast_amount(interval, contrast.metric, over)}"
    again = units.bootstrap(apart.students, apart.by_sequence)
    return text + (f"; hierarchical bootstrap {again.low:.3g} to {again.high:.3g}." if again else ".")


def _contrast_amount(interval: Interval, metric: str, over: str) -> str:
    amount = statistics.show(interval.mean, interval.error) + " nats per token" * (metric in _NATS)
    if math.isnan(interval.error):
        return f"{amount}, without an error ({over})"
    dof = "normal" if math.isinf(interval.dof) else f"t with {interval.dof:.3g} degrees of freedom"
    return (
        f"{amount} (95 % interval {interval.low:.3g} to {interval.high:.3g}, {dof}, p = {interval.p_value:.2g}; "
        f"over {over})"
    )


def comparable(folder: Path) -> Run:
    """The students of a run, for a page of several runs (kd_jax.reporting.run_comparison).

    Raises: FileNotFoundError, ValueError or RunError, naming the file, for a run that cannot be read or has not been
        evaluated yet.
    """
    rows, config = page.read_rows(folder), page.read_json(folder / "config.json")
    manifest = page.read_json(folder / "manifest.json")
    summary.check(rows, folder / "metrics.jsonl")
    units.attach(rows, folder)
    # Lower sample temperatures of the direct student alone: it is what every way of distilling is measured against.
    students = [
        _comparable(curve, temperature)
        for curve in cooling.curves(rows).values()
        for temperature in curve.temperatures
        if temperature == 1.0 or curve.arm == "direct"
    ]
    if not students:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no evaluated students yet; finish the run first")
    # The name of the stage's folder is a digest of all that its rows depend on.
    stages = {stage["name"]: Path(stage["folder"]).name for stage in manifest.get("stages") or []}
    smoke = summary.smoke_samples(summary.summarise(rows)) is not None
    # The direct student first; then the order of the run's page.
    students.sort(key=lambda student: student.kind != "direct")
    return Run(
        config, manifest, students, seeds=config.get("seed"), recall_rows=stages.get("p_star/validation"),
        unit="nats per token", smoke=smoke,
    )  # fmt: skip


def _comparable(curve: Curve, temperature: float) -> Student:
    by_student = curve.rows[temperature]
    members = sorted(by_student)
    rows = [by_student[member] for member in members]
    # Settings of tau are one knob, which a line joins; any other arm is a point of its own.
    kind = "distilled" if rows[0]["arm"] == "distilled" else curve.arm
    label = curve.label
    if temperature != 1.0:
        kind, label = "cooled", f"{label} at {temperature:g}"
    return Student(
        label, kind, members, {name: np.array([number(row.get(name)) for row in rows]) for name in METRICS},
        units.by_sequence(rows, "recall"), {name: number(rows[0].get(f"{name}_se")) for name in METRICS},
    )  # fmt: skip
