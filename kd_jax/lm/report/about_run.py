"""What the page says of a run itself: what its stages cost, its config, and what is missing."""

from __future__ import annotations

import json
import math
from typing import Any

from kd_jax.lm.report import summary
from kd_jax.lm.report.summary import Group
from kd_jax.reporting import units
from kd_jax.reporting.tables import Table
from kd_jax.runs.config import flatten

COLUMNS = ("stage", "seconds", "share", "tokens", "tokens/s", "data, logging, checkpoints (share)")

KINDS = {
    "evaluation": "evaluation (no frontier, no tables of likelihoods)",
    "validation": "validation during training (no curves of validation loss, no chosen checkpoints)",
    "training": "training losses",
    "stage": "stages (what they cost)",
}


def cost(rows: list[dict], manifest: dict[str, Any]) -> Table:
    """The stages with their time and tokens; a column that no stage has a value for is left out.

    Args:
        rows: of the run's metrics.jsonl.
        manifest: of its manifest.json.
    """
    stages = summary.of_kind(rows, "stage")
    total = sum(stage.get("seconds") or 0 for stage in stages)
    lines = [_line(stage, total) for stage in stages]
    if lines:
        lines.append(["all stages", f"{total:,.1f}", *["–"] * 4])
    # A column of dashes says nothing.
    shown = [i for i in range(len(COLUMNS)) if any(line[i] != "–" for line in lines)]
    note = []
    timed = [s for s in stages if s.get("seconds") and s.get("share_of_data_logging_checkpoints") is not None]
    if timed:
        # Weighted by time: the plain mean of shares would let a short stage count as much as a long one.
        extra = sum(stage["share_of_data_logging_checkpoints"] * stage["seconds"] for stage in timed)
        share = extra / sum(stage["seconds"] for stage in timed)
        note.append(f"Data loading, logging and checkpoints take {share:.1%} of the stages that measure it.")
    if isinstance(manifest.get("seconds"), dict):
        parts = [f"{key} {value} s" for key, value in manifest["seconds"].items()]
        note.append(f"The last start of the run took: {', '.join(parts)}.")
    rows = [[line[i] for i in shown] for line in lines]
    return Table("stages", "Where the time went", [COLUMNS[i] for i in shown], rows, " ".join(note))


def _line(stage: dict[str, Any], total: float) -> list[str]:
    seconds, tokens = stage.get("seconds"), stage.get("tokens")
    share = stage.get("share_of_data_logging_checkpoints")
    return [
        stage["name"],
        "–" if seconds is None else f"{seconds:,.1f}",
        "–" if not seconds else f"{seconds / total:.1%}",
        "–" if tokens is None else f"{tokens:,}",
        "–" if not seconds or tokens is None else f"{tokens / seconds:,.0f}",
        "–" if share is None else f"{share:.1%}",
    ]


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A config as (setting, value as text), one for each leaf."""
    return [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in flatten(config).items()]


def missing(rows: list[dict], groups: list[Group], samples: list[dict]) -> list[str]:
    """What the run does not have (yet), in words.

    Args:
        rows: of its metrics.jsonl.
        groups: as `summary.summarise` returns them.
        samples: of its samples.jsonl.
    """
    texts = [text for kind, text in KINDS.items() if not summary.of_kind(rows, kind)]
    if not samples:
        texts.append("samples.jsonl (no samples side by side)")
    # What has been trained but not evaluated is what the run still has to do.
    trained = {_identity(row): row["name"] for row in rows if row["kind"] in ("training", "validation")}
    evaluated = {_identity(row) for row in summary.of_kind(rows, "evaluation")}
    waiting = sorted(name for identity, name in trained.items() if identity not in evaluated)
    if evaluated and waiting:
        texts.append(f"evaluation of: {', '.join(waiting)}")
    if evaluated and summary.direct(groups) is None:
        texts.append("the direct student's evaluation")
    return texts


def _identity(row: dict) -> tuple:
    """The trained model that a row belongs to; each teacher is evaluated at several values of tau."""
    student = units.student(row)
    return ("teacher", student[0]) if row["arm"] == "teacher" else (row["arm"], row.get("tau"), *student)


def errors(groups: list[Group]) -> str:
    """What the standard errors are over, in words."""
    if _num_teachers(groups) > 1:
        return (
            f"Mean over n students ± standard error over {_num_teachers(groups)} teachers, whose seeds are averaged; "
            "of recall over its sequences as well."
        )
    if max((len(group.rows) for group in groups if group.is_student), default=0) > 1:
        return "Mean ± standard error over n seeds; where n = 1, over the model's sequences."
    return "There is one seed: errors are over its sequences, and other seeds may differ by more."


def definitions(groups: list[Group]) -> list[str]:
    """What was done, what the words mean, and what the errors cover."""
    rows = [row for group in summary.students(groups) for row in group.rows]

    def sizes(name: str) -> str:
        values = sorted({row[name] for row in rows if row.get(name) is not None})
        return " to ".join(dict.fromkeys(f"{size:,}" for size in values[:1] + values[-1:]))

    counts = [(sizes("num_samples"), "samples of each student"), (sizes("num_recall"), "validation samples of p*")]
    counted = " and ".join(f"{size} {what}" for size, what in counts if size)
    # Where p* drew these samples, no model's recall can be expected above this.
    bound = next((row["data_log_prob"] for row in rows if row.get("data_log_prob") is not None), None)
    texts = [
        "p* is the distribution that is learnt, the teacher p′ and the students p″ learn from it. The direct student "
        "learns text of p*. A distilled student learns text that the teacher sampled at the temperature tau, or what "
        "the table of arms says. Precision is the mean log-probability that p* gives to a student's samples; recall is "
        "the mean log-probability that the student gives to validation samples of p*"
        + (f"; on {counted}." if counted else ".")
        + (f" p* gives {bound:.3f} nats per token to these validation samples." if bound is not None else "")
    ]
    count = max((len(group.rows) for group in groups if group.is_student), default=0)
    teachers = _num_teachers(groups)
    size = teachers if teachers > 1 else count
    if size > 1:
        nested = " Each teacher has its own corpus of p* and its own students, whose seeds are averaged."
        over = f"{size} {'teachers' if teachers > 1 else 'seeds'}"
        texts.append(
            f"Differences are paired by teacher and seed, with t intervals over {over} ({size - 1} degrees of freedom)."
            f"{nested * (teachers > 1)} Recall is of the same sequences for all models; where the run has kept their "
            "values (recall.npz), its errors are two-way, over these and the sequences, and its differences are paired "
            "by both. A difference is called clear where p < 0.05 after Holm's correction for the comparisons made "
            "together; the preregistered one, if there is one, stands alone."
        )
    if teachers == 1 and any(group.arm == "teacher" for group in groups):
        texts.append("All students have the same teacher: the errors do not cover how another would differ.")
    return texts


def _num_teachers(groups: list[Group]) -> int:
    return len({units.student(row)[0] for group in groups if group.is_student for row in group.rows})


def captions(groups: list[Group]) -> dict[str, str]:
    over = "seeds" if any(len(g.rows) > 1 for g in groups) else "sequences (one seed)"
    over = "teachers" if _num_teachers(groups) > 1 else over
    # A mean that is not finite has no place on an axis, but must not vanish without a word.
    gone = [
        f"{g.label} ({name})"
        for g in groups
        for name in ("precision", "recall")
        if g.is_student and g.rows and not math.isfinite(g.estimates[name].mean)
    ]
    absent = f" Not drawn, because not finite: {', '.join(gone)}." if gone else ""
    named = " and each arm by name" if any(group.by_name for group in groups) else ""
    return {
        "frontier": f"Mean at each tau{named}; bars are standard errors over {over}. Dashed curves: a student sampled "
        "at lower temperatures, where it was evaluated there." + absent,
        "curves": f"Bars and band are standard errors over {over}; the dashed line is the direct student." + absent,
        "divergences": f"Divergences between student (p″) and p*, per token; errors over {over}.",
        "training": "Each panel shows the loss that its models are trained on, mean over seeds with a band of one "
        "standard error; values of different losses cannot be compared. The axis leaves out the first fall.",
    }
