"""The tables of a language-model run's page that are not of its models: what it cost, and its config."""

from __future__ import annotations

import json
from typing import Any

from kd_jax.lm.report import summary
from kd_jax.reporting import row_kinds
from kd_jax.runs.config import flatten

COST = ("stage", "seconds", "share", "tokens", "tokens/s", "data, logging, checkpoints (share)")


def check(manifest: dict, path: Any) -> None:
    """ValueError, naming the file, for what the tables could not be made of."""
    for index, stage in enumerate(_listed(manifest), start=1):
        row_kinds.check(stage, f"{path}: stage {index}", summary.KINDS)
    overhead = manifest.get("overhead") or {}
    if not isinstance(overhead, dict):
        raise ValueError(f"{path}: overhead is {overhead!r:.40}, not an object")
    row_kinds.check(overhead, f"{path}: overhead", {"share": row_kinds.NUMBER})
    if isinstance(manifest.get("seconds"), dict):
        row_kinds.check(manifest["seconds"], f"{path}: seconds", dict.fromkeys(manifest["seconds"], row_kinds.NUMBER))


def _listed(manifest: dict) -> list[dict]:
    """The manifest's stages."""
    stages = manifest.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def cost(rows: list[dict], manifest: dict) -> dict[str, Any]:
    """The table of stages and what is said below it; the stages are the rows', or else the manifest's."""
    stages = summary.of_kind(rows, "stage") or _listed(manifest)
    total = sum(stage.get("seconds") or 0 for stage in stages)
    table, extra, timed = [], 0.0, 0.0
    for stage in stages:
        seconds, tokens = stage.get("seconds"), stage.get("tokens")
        share = stage.get("share_of_data_logging_checkpoints")
        if seconds is not None and share is not None:
            extra, timed = extra + share * seconds, timed + seconds
        table.append([
            stage.get("name", "–"),
            "–" if seconds is None else f"{seconds:,.1f}",
            "–" if not seconds else f"{seconds / total:.1%}",
            "–" if tokens is None else f"{tokens:,}",
            "–" if not seconds or tokens is None else f"{tokens / seconds:,.0f}",
            "–" if share is None else f"{share:.1%}",
        ])  # fmt: skip
    if table:
        table.append(["all stages", f"{total:,.1f}", *["–"] * 4])
    known = [i for i in range(len(COST)) if any(row[i] != "–" for row in table)]
    notes = []
    overhead = manifest.get("overhead") or {}
    share = extra / timed if timed else overhead.get("share")
    if share is not None:
        notes.append(f"Data loading, logging and checkpoints take {share:.1%} of the stages that measure it.")
    if isinstance(manifest.get("seconds"), dict):
        parts = [f"{key} {value:,.1f} s" for key, value in manifest["seconds"].items() if value is not None]
        notes.append(f"The whole run: {', '.join(parts)}.")
    rows = [[row[i] for i in known] for row in table]
    return {"head": [COST[i] for i in known], "rows": rows, "notes": notes}


def settings(config: dict) -> list[tuple[str, str]]:
    """A config as (setting, value in text), one for each leaf."""
    return [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in flatten(config).items()]


def differences(found: Any) -> list[list[str]]:
    """The manifest's "config_differences" ({setting: [base, this run]}) as rows."""
    if not isinstance(found, dict):
        return []
    pairs = {key: value if isinstance(value, list) and len(value) == 2 else ["", value] for key, value in found.items()}
    return [[key, *(v if isinstance(v, str) else json.dumps(v) for v in pair)] for key, pair in pairs.items()]
