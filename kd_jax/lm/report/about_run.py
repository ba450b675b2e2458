"""What the page says of a run itself: what its stages cost, its config, and what is missing; and a model's card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.lm.experiment.arms import of_teacher
from kd_jax.lm.report import comparison, summary
from kd_jax.lm.report.summary import Group
from kd_jax.reporting import page, units
from kd_jax.reporting.model_card import Card
from kd_jax.reporting.page import number
from kd_jax.reporting.tables import Number, Table
from kd_jax.runs.config import flatten

COLUMNS = ("stage", "seconds", "share", "tokens", "tokens/s", "data, logging, checkpoints (share)")

# Counts of a stage that re-encodes text (kd_jax.lm.distill.reencoded), and how the page calls them.
REENCODED = {
    "invalid_bytes": "bytes not UTF-8", "cut_bytes": "bytes of a character cut at the end",
    "unknown_characters": "characters without tokens", "special_tokens": "special tokens left out",
    "changed_rows": "rows normalised", "cut_rows": "rows cut",
}  # fmt: skip
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


def reencoded(rows: list[dict]) -> Table:
    """What got lost where a teacher's samples became text, and then ids of the students' vocabulary.

    Args:
        rows: of the run's metrics.jsonl.
    """
    lines = []
    for stage in summary.of_kind(rows, "stage"):
        if isinstance(counts := stage.get("reencoded"), dict):
            lines.append([stage["name"], *(f"{n or 0:,}" for n in (stage.get("rows"), *map(counts.get, REENCODED)))])
    note = (
        "The teacher's samples as bytes, encoded for the students. A byte that is not UTF-8 and a character without "
        "tokens stand as U+FFFD. A row is cut where the students need more tokens than a sequence may have; it then "
        "has no end. The teacher's probabilities are of its own tokens: it has no precision and recall here."
    )
    title = "The text of a teacher with another vocabulary"
    return Table("reencoded", title, ["stage", "rows", *REENCODED.values()], lines, note)


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
    """What stands below each figure of the page, by the figure's name."""
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
        "training": "First panels: the loss that their models are trained on, mean over seeds with a band of one "
        "standard error; values of different losses cannot be compared. Then what is logged beside it. Axes leave out "
        "the first fall.",
    }


def map_captions(rows: list[dict]) -> dict[str, str]:
    """Captions of the maps of embeddings.

    Args:
        rows: of the run's embedding_map.jsonl.
    """
    share = f"{rows[0].get('share', math.nan):.0%}" if rows else ""
    axes = "the same axes in all panels: p*'s in grey, the model's in colour. Under the pointer a point's text shows."
    return {
        "embedding_map": "Mean hidden states of texts on the two directions in which p*'s vary most "
        f"({share} of their variance), {axes}",
        "embedding_umap": f"The same by UMAP fitted to p*'s texts, {axes} Distances between far points mean little.",
    }


class Exported(NamedTuple):
    """A model of a run: what kd_jax.lm.weights.load takes, and what its card says."""

    source: str
    card: Card


def exported(run: Path, name: str) -> Exported:
    """A model that a run trained.

    Args:
        run: the run folder.
        name: of a student, as the run's rows and figures have it ("tau-0.8/seed-0"), or of a teacher: "teacher", and
            "teacher/teacher-1" and so on where there are several.
    Raises: ValueError for a name that is not one of them (naming those that are), and for a run without evaluation;
        FileNotFoundError or RunError, naming the file, for one that cannot be read.
    """
    rows, config = page.read_rows(run), page.read_json(run / "config.json")
    summary.check(rows, run / "metrics.jsonl")
    models = {}
    for row in summary.of_kind(rows, "evaluation"):
        if summary.is_student_row(row) or row["arm"] == "teacher":
            # A teacher has a row for each tau of its samples; they are one model.
            student = summary.is_student_row(row)
            models.setdefault(row["name"] if student else of_teacher("teacher", row.get("teacher") or 0), []).append(
                row
            )
    if name not in models:
        known = f"; its models are {', '.join(models)}" if models else "; none of its models is evaluated yet"
        raise ValueError(f"{run} has no model {name!r}{known}")
    return Exported(_home(run, models[name][0]["source"]), _card(run, name, models[name], rows, config))


def _home(run: Path, source: str) -> str:
    """The source of a model; its folder in this run, also where the run was moved since its rows were written."""
    _, stages, rest = source.rpartition("/stages/")
    moved = run / "stages" / rest
    return str(moved) if stages and moved.exists() else source


def _card(run: Path, name: str, own: list[dict], rows: list[dict], config: dict[str, Any]) -> Card:
    role = "teacher" if own[0]["arm"] == "teacher" else "student"
    manifest, row = page.read_json(run / "manifest.json"), own[0]
    learnt = "p*'s text" if role == "teacher" or row["arm"] == "direct" else comparison.learns(row)
    teacher, data, p_star = (config.get(part) or {} for part in ("teacher", "data", "p_star"))
    made = f"A language model made with kd_jax, as a {role}. It learnt {learnt}."
    if role == "teacher" and teacher.get("source"):
        made = f"The model `{teacher['source']}` as it is: the teacher of a run of kd_jax."
    start = config.get(role, {}).get("source" if role == "student" else "init") or ""
    count, length = config.get("num_train", "some"), config.get("sampling", {}).get("max_length", "unknown")
    facts = {
        "Data": f"p*, the distribution that is learnt, is {_p_star(data, p_star)}; {count} sequences of it, of at most "
        f"{length} tokens. The licences of p* and of the data may apply to this model."
    }
    if role == "student" and row["arm"] != "direct":
        source = teacher.get("source")
        facts["Teacher"] = f"The model `{source}`." if source else "A model that was trained on text of p*."
    smoke = summary.smoke_samples(summary.summarise(rows)) is not None
    flat = {key: value for key, value in flatten(config).items() if key.startswith((f"{role}.", "train.", "seed"))}
    flat |= {f"distill.{key}": value for key, value in (row.get("distill") or {}).items()}
    settings = {key: value for key, value in flat.items() if value not in (None, "", [], ())}  # those that are set
    return Card(
        title=f"{name} of {run.absolute().name}",
        summary=made + " It comes from a smoke run and is good for nothing but tests." * smoke,
        facts=facts, settings=settings, results=[_results(own, rows)],
        reproduction={key: manifest[key] for key in ("command", "versions", "git_commit") if manifest.get(key)},
        # Paths of this machine mean nothing to others; a revision is no part of an id.
        base_model=start.partition("@")[0] if start.count("/") == 1 and not Path(start).exists() else "",
    )  # fmt: skip


def _p_star(data: dict[str, Any], p_star: dict[str, Any]) -> str:
    if data.get("source"):
        return f"the data `{data['source']}`"
    source = p_star.get("source")
    return f"the model `{source}`" if source else f"a model with random weights ({p_star.get('architecture')})"


def _results(own: list[dict], rows: list[dict]) -> Table:
    """The model's metrics at each of its sample temperatures, and the direct student's of the same teacher and seed."""
    direct = [
        row for row in summary.of_kind(rows, "evaluation")
        if row["arm"] == "direct" and units.student(row) == units.student(own[0]) and summary.is_main(row)
    ]  # fmt: skip
    shown = [*own, *(row for row in direct if row not in own)]
    names = ("precision", "recall", "entropy")
    lines = [
        [row["name"], f"{summary.sample_temperature(row):g}",
         *(Number(number(row.get(name)), number(row.get(f"{name}_se"))) for name in names)]
        for row in shown
    ]  # fmt: skip
    note = (
        "Nats per token, ± standard error over sequences. Precision is the mean log-probability that p* gives to the "
        "model's samples; recall is the mean log-probability that the model gives to held-out text of p*."
    )
    return Table("results", "Results", ("model", "sample temperature", *names), lines, note)
