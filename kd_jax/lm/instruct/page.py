"""The part of a run's page on instructions: pass rates, and the answers of all students side by side with verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kd_jax.lm.instruct import contrast
from kd_jax.reporting import charts, row_kinds, units
from kd_jax.reporting.charts import Panel, Point, Series
from kd_jax.reporting.figures import INK, canvas, plain, tidy
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
TEMPLATE = """{% if instruct.rates.rows %}{{ section(instruct.rates) }}
{{ figure("pass_rates", captions.pass_rates) }}{% endif %}
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
CAPTION = (
    "Left: share of right answers against how varied they are, a point for each sample temperature. "
    "Right: share of instructions with a right answer among n. Test instructions; bars are standard errors."
)
_COLUMNS = {
    "pass_rate": "pass rate", "best_of_n": "best of n", "distinct_2": "distinct-2", "repetition_4": "repetition-4",
    "finished": "ends", "length_mean": "length",
}  # fmt: skip
_MARKS = "os^vP<X>D"
_PANELS = {"pass_rate": "pass rate of one answer", "best_of_n": "best of {n} answers"}


def read(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What TEMPLATE shows of a run.

    Args:
        folder: of the run, with answers.jsonl if it has any.
        rows: of its metrics.jsonl.

    Raises: ValueError, naming file and row, for one that is not an answer's.
    """
    # none where there is no file
    answers = files.read_rows(folder / "answers.jsonl", texts=("prompt", "answer"))
    for number, row in enumerate(answers, start=1):
        row_kinds.check(row, f"{folder / 'answers.jsonl'}, row {number}", _ANSWER)
    return {"rates": table(rows), **side_by_side(answers)}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Pass rates on the test split, a line for each arm and sample temperature."""
    groups = _groups(rows)
    lines = [
        [label, f"{tau:g}", *(Number(*_mean(members, metric)) for metric in _COLUMNS)]
        for label, by_temperature in groups.items() for tau, members in by_temperature.items()
    ]  # fmt: skip
    first = _first(groups)
    note = "" if first is None else (
        f"Share of answers that a checker finds right, on {first['num_instructions']} instructions of held-out "
        f"templates and nouns, n = {first['samples_per_prompt']} answers to each. Best of n: the share of instructions "
        "with a right answer among these. Ends: the share of answers that end before the longest length. ± standard "
        "error, over instructions where an arm has one student, else over students."
    )  # fmt: skip
    return Table("pass_rates", "Instructions: pass rates", ("model", "sampled at", *_COLUMNS.values()), lines, note)


def figure(rows: Sequence[dict[str, Any]], colours: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]] | None:
    """Pass rate and best of n against variety, a curve for each arm: still and interactive; None without such rows.

    Args:
        rows: of metrics.jsonl.
        colours: of matplotlib, by the arm's label; one that has none, such as p*, is drawn in the text's colour.
    """
    groups = _groups(rows)
    if not groups:
        return None
    drawn, panels, each = canvas(9.2, 4.2), [], _first(groups)["samples_per_prompt"]
    for axes, (metric, text) in zip(drawn.subplots(1, 2), _PANELS.items(), strict=True):
        title, series = text.format(n=each), []
        for i, (label, by_temperature) in enumerate(groups.items()):
            colour, mark = colours.get(label, INK), _MARKS[i % len(_MARKS)]
            x = [_mean(members, "distinct_2")[0] for members in by_temperature.values()]
            y, error = zip(*(_mean(members, metric) for members in by_temperature.values()), strict=True)
            axes.errorbar(x, y, yerr=np.nan_to_num(error), color=colour, marker=mark, markersize=6, linewidth=1.3,
                          capsize=2.5, label=plain(label))  # fmt: skip
            at = [Point(a, b, math.nan, e, [f"{label}, sampled at {tau:g}", f"{title} {b:.3f}", f"distinct-2 {a:.3f}"])
                  for a, b, e, tau in zip(x, y, error, by_temperature, strict=True)]  # fmt: skip
            shown = charts.INK if label not in colours else to_hex(colour)
            series.append(Series(label, at, shown, charts.SYMBOLS[i % len(charts.SYMBOLS)], line="solid"))
        axes.set_xlabel("distinct-2 of the answers; more varied →")
        axes.set_ylabel(title)
        tidy(axes)
        panels.append(Panel("", series, "distinct-2 of the answers", title))
    drawn.legend(handles=axes.get_legend_handles_labels()[0], loc="outside upper center", ncols=5, frameon=False)
    return drawn, charts.panels(panels)


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Rows of the test split by arm and sample temperature, in their order."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        if row.get("kind") == "instruct" and row["split"] == "test":
            groups.setdefault(_arm(row), {}).setdefault(row["sample_temperature"], []).append(row)
    return groups


def _first(groups: dict[str, dict[float, list[dict[str, Any]]]]) -> dict[str, Any] | None:
    """A row of the groups: all have the same numbers of instructions and answers."""
    return next((members[0] for by_temperature in groups.values() for members in by_temperature.values()), None)


def _mean(rows: Sequence[dict[str, Any]], metric: str) -> tuple[float, float]:
    """Mean over students with its standard error; of one student the error is over instructions, where it is known."""
    if len(rows) == 1:
        return rows[0][metric], rows[0].get(f"{metric}_se", math.nan)
    return units.interval([units.student(row) for row in rows], np.array([row[metric] for row in rows]))[:2]


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
    if row["tau"] is None:
        return row["arm"]
    return ("" if row["arm"] == "distilled" else f"{row['arm']}, ") + f"tau = {row['tau']:g}"


def declared(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str | None:
    """The contrast that the config declares, in a sentence; None where there is none.

    Args:
        rows: of metrics.jsonl.
        settings: config.instruct.
    """
    rates = [row for row in rows if row.get("kind") == "instruct"]
    if not settings.get("arm") or not rates:
        return None
    arm, control = settings["arm"], settings["control"]
    out = contrast.at_equal_variety(rates, arm=arm, control=control)
    said = f"The declared contrast: pass rate of {arm} minus that of {control}, as varied"
    if out["difference"] is None:
        return f"{said}: no seed can be compared, as {arm} is nowhere as varied as {control}."
    interval = "" if out["low"] is None else f" (95 % interval {out['low']:+.3f} to {out['high']:+.3f})"
    outside = f"; {len(out['outside'])} more cannot be compared" if out["outside"] else ""
    count = len(out["pairs"])
    return f"{said}: {out['difference']:+.3f}{interval}, {count} pair{'s' * (count > 1)} of students{outside}."
