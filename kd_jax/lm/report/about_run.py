"""What the page says of a run itself: what its stages cost, its config, and what is missing."""

from __future__ import annotations

import json
from typing import Any

from kd_jax.lm.report import summary
from kd_jax.lm.report.summary import Group
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
    """Which trained model a row is of. The teacher is trained once, and evaluated at several values of tau."""
    return ("teacher",) if row["arm"] == "teacher" else (row["arm"], row.get("tau"), row.get("seed"))
