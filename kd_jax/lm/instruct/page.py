"""The part of a run's page on instructions: pass rates, and the answers of all students side by side with verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_jax.lm.instruct import contrast
from kd_jax.reporting import row_kinds
from kd_jax.reporting.tables import Number, Table
from kd_jax.storage import files

# Prompts on the page; answers.jsonl has all of them.
_SHOWN = 60
_ANSWER = dict.fromkeys(("name", "arm", "prompt", "task", "answer"), row_kinds.TEXT) | {
    "seed": row_kinds.INTEGER, "index": row_kinds.INTEGER, "sample_temperature": row_kinds.FINITE,
}  # fmt: skip

STYLE = """.verdict { font-weight: bold; } .right { color: #1a7f37; } .wrong { color: var(--warn); }
#answers-right:checked ~ .scroll .wrong-one, #answers-wrong:checked ~ .scroll .right-one { visibility: hidden; }
"""
# A radio button before the table hides what has the other verdict: no script is needed, nor is one allowed everywhere.
TEMPLATE = """{% if instruct.rates.rows %}{{ section(instruct.rates) }}{% endif %}
{% if instruct.prompts %}<h2>Answers to instructions</h2>
<div>
<input type="radio" name="answers" id="answers-all" checked><label for="answers-all">all answers</label>
<input type="radio" name="answers" id="answers-right"><label for="answers-right">right ones</label>
<input type="radio" name="answers" id="answers-wrong"><label for="answers-wrong">wrong ones</label>
<div class="scroll samples"><table><thead><tr><th>instruction</th>
{% for h in instruct.columns %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{% for prompt, cells in instruct.prompts %}<tr><td>{{ prompt }}</td>{% for cell in cells %}<td>{% if cell %}
<div class="{{ "right-one" if cell.passed else "wrong-one" }}">
<span class="verdict {{ "right" if cell.passed else "wrong" }}">{{ "right" if cell.passed else "wrong" }}</span>
{{ cell.answer }}</div>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></div>
<p class="note">The first answer of each model at its lowest sample temperature, of the lowest seed, to the first
{{ instruct.prompts | length }} test instructions; answers.jsonl has all of them.</p>{% endif %}"""
_HEAD = ("model", "split", "temperature", "pass rate", "best of n", "distinct-2", "ends", "length")
_NOTE = (
    "Share of answers that a checker finds right, on held-out templates and nouns; best of n: the share of "
    "instructions with a right one among n answers."
)


def read(folder: Path, rows: Sequence[dict[str, Any]], declared: dict[str, Any] | None = None) -> dict[str, Any]:
    """What TEMPLATE shows of a run.

    Args:
        folder: of the run, with answers.jsonl if it has any.
        rows: of its metrics.jsonl.
        declared: the contrast that the config declares: its `arm` and `control`; None for a smoke run.

    Raises: ValueError, naming file and row, for one that is not an answer's.
    """
    rates = [row for row in rows if row.get("kind") == "instruct"]
    answers = files.read_rows(folder / "answers.jsonl") if (folder / "answers.jsonl").exists() else []
    for number, row in enumerate(answers, start=1):
        row_kinds.check(row, f"{folder / 'answers.jsonl'}, row {number}", _ANSWER)
    said = _contrast(rates, declared)
    lines = [_line(row) for row in rates]
    table = Table("pass_rates", "Instructions: pass rates", _HEAD, lines, _NOTE, [said] if said else [])
    return {"rates": table, **side_by_side(answers)}


def side_by_side(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts in rows, arms in columns: of each arm the lowest seed at its lowest temperature, p* first."""
    models: dict[str, tuple] = {}
    for row in answers:
        key = _key(row)
        label = _arm(row)
        models[label] = min(models.get(label, key), key)
    columns = {label: {} for label in sorted(models, key=lambda label: (label != "p*", label))}
    prompts: dict[int, str] = {}
    for row in answers:
        label = _arm(row)
        if models[label] == _key(row):
            columns[label][row["index"]] = row
            prompts[row["index"]] = row["prompt"]
    lines = [(prompts[i], [column.get(i) for column in columns.values()]) for i in sorted(prompts)[:_SHOWN]]
    heads = [f"{label} at {models[label][2]:g}" for label in columns]
    return {"columns": heads, "prompts": lines}


def _key(row: dict[str, Any]) -> tuple:
    return row.get("teacher") or 0, row["seed"] or 0, row["sample_temperature"], row["name"]


def _arm(row: dict[str, Any]) -> str:
    if row["arm"] == "p_star":
        return "p*"
    return row["arm"] if row["tau"] is None else f"{row['arm']}, tau {row['tau']:g}"


def _line(row: dict[str, Any]) -> list[str | Number]:
    name = "p*" if row["name"] == "p_star" else row["name"]
    return [
        name, row["split"], f"{row['sample_temperature']:g}", Number(row["pass_rate"], row["pass_rate_se"]),
        Number(row["best_of_n"], remark=f" (n = {row['samples_per_prompt']})"),
        *(Number(row[metric]) for metric in ("distinct_2", "finished", "length_mean")),
    ]  # fmt: skip


def _contrast(rates: Sequence[dict[str, Any]], declared: dict[str, Any] | None) -> str:
    if not declared or not declared.get("arm") or not rates:
        return ""
    arm, control = declared["arm"], declared["control"]
    out = contrast.at_equal_variety(rates, arm=arm, control=control)
    said = f"Declared before the run: pass rate of {arm} minus that of {control} at its best temperature, as varied"
    if out["difference"] is None:
        return f"{said}: no seed can be compared, as {arm} is nowhere as varied as {control}."
    interval = "" if out["low"] is None else f" (95 % interval {out['low']:+.3f} to {out['high']:+.3f})"
    outside = f"; {len(out['outside'])} more cannot be compared" if out["outside"] else ""
    return f"{said}: {out['difference']:+.3f}{interval}, {len(out['pairs'])} pairs of students{outside}."
