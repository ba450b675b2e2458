"""Arms in words: the preregistered comparison, what students learn, how they differ from the direct student, and cost.

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

# Metrics of the table of what distillation cost, with the heads of their columns.
COSTS = {
    "precision": "precision", "recall": "recall", "entropy": "entropy", "calibration_error": "calibration error",
    "agreement": "agreement with p*", "distinct_2": "distinct-2", "repetition_4": "repetition-4",
    "length_mean": "mean length", "finished": "finished (share)",
}  # fmt: skip


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


def cost_table(students: dict[str, Curve]) -> Table:
    """What distillation cost: each distilled student minus the direct one, where possible at matched precision."""
    direct, rows = students.get("direct"), []
    for arm, curve in students.items() if direct is not None else ():
        if arm == "direct" or not {1.0} <= set(curve.rows) & set(direct.rows):
            continue
        # All metrics at the temperature at which precision is equal.
        matches = {name: cooling.match(curve, 1.0, direct, name) for name in COSTS}
        if matches["recall"] is None:
            cells, beside = [_at_one(curve, direct, name) for name in COSTS], "1, precision differs"
        else:
            cells = [Number(*one.interval[:2]) for one in matches.values()]
            # Equal by construction: a standard error would only be rounding.
            cells[0] = Number(0.0, math.nan, " (matched)")
            beside = "{:g} to {:g}".format(*matches["recall"].between)
        rows.append([curve.label, beside, *cells])
    shown = [0, 1, *(i for i in range(2, len(COSTS) + 2) if any(not math.isnan(row[i].mean) for row in rows))]
    head = ["students", "direct sampled at", *COSTS.values()]
    note = (
        "Student − direct student, ± standard error, paired by teacher and seed, and recall by sequence; precision, "
        "recall and entropy in nats per token. Where the direct student was sampled at temperatures whose precision "
        "encloses the student's, it is cooled to equal precision; otherwise it is compared as it is, sampled at 1."
    )
    title = "What distillation cost"
    return Table("distillation_cost", title, [head[i] for i in shown], [[row[i] for i in shown] for row in rows], note)


def _at_one(curve: Curve, direct: Curve, metric: str) -> Number:
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
        cells = [_members_mean(members, name) for name in ("precision", "distinct_2", "entropy", "repetition_4")]
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


def _members_mean(rows: list[dict], metric: str) -> Number:
    return Number(*_interval(rows, np.array([number(row.get(metric)) for row in rows]))[:2])


def _interval(rows: list[dict], values: np.ndarray) -> Interval:
    return units.interval([units.student(row) for row in rows], values)


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
