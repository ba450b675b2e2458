"""The report page of a language-model run: its finding, figures, samples side by side, tables, cost and config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from kd_jax.lm.experiment import knobs
from kd_jax.lm.report import (
    about_run,
    comparison,
    cooling,
    distillation_cost,
    expectations,
    figures,
    frontier,
    loss_curves,
    summary,
)  # fmt: skip
from kd_jax.lm.report import samples as samples_lib
from kd_jax.lm.report.cooling import Curve, Standing
from kd_jax.lm.report.summary import Group
from kd_jax.reporting import page, tables
from kd_jax.reporting.page import Beside
from kd_jax.reporting.tables import Table
from kd_jax.storage import files

TITLE = "Distilling a language model: precision against recall"
KNOBS_TITLE = "Knobs of selectivity for a language model: the price of precision"
# name, title, columns (metric, head) and note of each table of models
TABLES = (
    ("per_token", "Per token",
     (("precision", "precision"), ("recall", "recall"), ("entropy", "entropy"), ("kl_model_data", "KL(p″‖p*)"),
      ("kl_data_model", "KL(p*‖p″)"), ("teacher_entropy", "teacher's entropy")),
     "Nats per token. Teacher's entropy: of the text that is learnt as it was drawn, or of the distribution that is "
     "learnt at the temperature in the loss, on held-out rows of its text."),
    ("per_sequence", "Per sequence",
     (("precision_per_sequence", "precision"), ("recall_per_sequence", "recall"),
      ("entropy_per_sequence", "entropy"), ("kl_model_data_per_sequence", "KL(p″‖p*)"),
      ("kl_data_model_per_sequence", "KL(p*‖p″)")),
     "Nats per sequence."),
    ("text", "The text, and validation",
     (("finished", "finished (share)"), ("length_mean", "mean length (tokens)"), ("distinct_2", "distinct-2"),
      ("repetition_4", "repetition-4"), ("calibration_error", "calibration error"), ("agreement", "agreement with p*"),
      ("validation_perplexity", "validation perplexity")),
     "Distinct-2: distinct pairs of tokens over all pairs, in all samples together; it falls with their number. "
     "Repetition-4: mean over sequences of the share of runs of four tokens that occurred before. The validation "
     "perplexity is the chosen checkpoint's, padding not counted."),
)  # fmt: skip
NOT_COOLED = (
    "The direct student was not evaluated at lower sample temperatures, which also trade recall for precision: this "
    "run cannot tell what distillation adds to mere cooling."
)

STYLE = """.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; } .beside > div { flex: 1 1 24rem; min-width: 0; }
.lead { font-size: 1.1rem; } .findings li { margin: .25rem 0; }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.samples td > div { width: 17rem; max-height: 22rem; overflow-y: auto; } .samples td:first-child { min-width: 2rem; }
.samples th { text-align: left; }
.special { color: var(--link); background: var(--shade); border-radius: 3px; }
.cut { color: var(--warn); font-style: italic; }
summary { cursor: pointer; }
"""
TEMPLATE = """<p class="lead"><strong>{{ finding }}</strong></p>
{% for text in caveats %}<p>{{ text }}</p>
{% endfor %}<nav></nav>
{% if "frontier" in images or beside %}<h2>What distillation did</h2>
{% if beside %}<div class="beside"><div><h3>This run</h3>{{ figure("frontier", captions.frontier) }}</div>
{% for other in beside %}<div><h3>{{ other.title }}</h3>
<figure><img alt="frontier of {{ other.title }}" src="data:image/png;base64,{{ other.image }}"></figure>
{{ grid(["metric", "slope (" ~ other.note ~ ")"], other.slopes) }}</div>{% endfor %}</div>
{% else %}{{ figure("frontier", captions.frontier) }}{% endif %}
<ul class="findings">{% for verdict, text in findings %}<li><strong>{{ verdict }}.</strong> {{ text }}</li>
{% endfor %}</ul>{% endif %}
{% if samples.rows %}<h2>Samples side by side</h2>
<div class="scroll samples"><table>
<thead><tr>{% for h in samples.head %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{% for index, cells in samples.rows %}<tr><td>{{ index }}</td>{% for cell in cells %}<td>{% if cell %}<div>
{%- for text, special in cell.pieces %}{% if special %}<span class="special">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}{% if cell.cut %}<span class="cut"> [{{ cell.cut }}]</span>{% endif -%}
</div>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">A column is one model, of the seed named; a row is one index. Special tokens are shaded; “cut” marks a
text that reached the longest length allowed before it ended.</p>{% endif %}
{% for table in tables %}{{ section(table) }}
{% endfor %}
{% if "curves" in images %}<h2>Against {% if "divergences" in images %}tau and {% endif %}the teacher's entropy</h2>
{{ figure("curves", captions.curves) }}
{{ figure("divergences", captions.divergences) }}{% endif %}
{% if "training" in images %}<h2>Training</h2>
{{ figure("training", captions.training) }}{% endif %}
<h2>How to read the numbers</h2>
{% for text in definitions %}<p>{{ text }}</p>
{% endfor %}{% if missing %}<h2>Not in this run yet</h2>
<ul>{% for text in missing %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{% if cost.rows %}{{ section(cost) }}{% endif %}
{% if config %}<h2>Config</h2>
<details><summary>{{ config | length }} settings</summary>{{ grid(["setting", "value"], config) }}</details>{% endif %}
"""


class _Run(NamedTuple):
    """What a run's folder says, read once.

    Attributes:
        rows, config, manifest: of the folder's files.
        groups: models by arm and tau.
        curves: students by arm, over their sample temperatures.
        standings: each arm beside the cooled direct student.
        smoke: samples of each student, where they are too few for conclusions; else None.
    """

    rows: list[dict]
    config: dict[str, Any]
    manifest: dict[str, Any]
    groups: list[Group]
    curves: dict[str, Curve]
    standings: dict[str, Standing]
    smoke: int | None


def _read(folder: Path) -> _Run:
    rows = page.read_rows(folder)
    summary.check(rows, folder / "metrics.jsonl")
    groups, curves = summary.summarise(rows), cooling.curves(rows)
    return _Run(
        rows, page.read_json(folder / "config.json"), page.read_json(folder / "manifest.json"), groups, curves,
        cooling.standings(curves), summary.smoke_samples(groups),
    )  # fmt: skip


def write(folder: str | Path, beside: Sequence[Beside] = ()) -> Path:
    """Writes a run's figures and tables into figures/, and its report.html.

    What the run does not have yet is named on the page, and the rest is shown.

    Args:
        folder: of the run.
        beside: other runs' frontiers to show next to this one's.
    Returns: the page's path.
    Raises: FileNotFoundError, ValueError or RunError, naming the file, for one that cannot be read.
    """
    folder = Path(folder)
    run = _read(folder)
    samples = samples_lib.read(folder / "samples.jsonl")
    frontier_config = _frontier_config(run.config, folder / "config.json")
    section = frontier.section(frontier_config, run.curves, run.smoke is not None)
    # What a run has no values for is left out, so that a page can be made at any time.
    drawn, captions = _figures(run), _captions(run.groups)
    if section is not None:
        drawn["frontier"], captions["frontier"] = section.figure, section.caption
    shown, cost = _tables(run, section), about_run.cost(run.rows, run.manifest)
    tables.save([*shown, cost], folder)
    html = page.render(
        TEMPLATE,
        folder=folder,
        style=STYLE,
        title=TITLE if frontier_config is None else KNOBS_TITLE,
        finding=finding(run.groups, run.curves, run.standings),
        caveats=_caveats(run, section),
        findings=_findings(run),
        images=page.embed(drawn, folder),
        captions=captions,
        beside=beside,
        samples=samples_lib.side_by_side(samples),
        tables=shown,
        definitions=_definitions(run.groups),
        missing=about_run.missing(run.rows, run.groups, samples) + frontier.missing(frontier_config, run.curves),
        cost=cost,
        config=about_run.settings(run.config),
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path


def result(folder: str | Path) -> list[str]:
    """A finished run in short: its finding in one sentence, and a table of at most four lines.

    The table has the direct student, and the distilled students of lowest and highest precision.
    """
    run = _read(Path(folder))
    # A mean that is not finite cannot be ranked.
    students = [g for g in summary.students(run.groups) if math.isfinite(g.estimates["precision"].mean)]
    ranked = sorted((g for g in students if g.arm != "direct"), key=lambda g: g.estimates["precision"].mean)
    direct = [g for g in students if g.arm == "direct"]
    lines = [("students", "precision", "recall", "entropy")]
    for group in direct + ranked[:1] + ranked[1:][-1:]:
        cells = [str(group.estimates[name].cell(len(group.rows))) for name in ("precision", "recall", "entropy")]
        lines.append((group.label, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [finding(run.groups, run.curves, run.standings), *text]


def finding(groups: list[Group], curves: dict[str, Curve], standings: dict[str, Standing]) -> str:
    """The run's result in one sentence; of a smoke run, that it has none.

    Args:
        groups: as `summary.summarise` returns them.
        curves, standings: as `cooling.curves` and `cooling.standings` return them.
    """
    smoke = summary.smoke_samples(groups)
    if smoke is not None:
        return f"This is a smoke run ({smoke} samples of each student): all stages work, and nothing can be concluded."
    # Cooling is the trivial way to buy precision, so the comparison with it comes before the trade itself.
    matched = cooling.headline(curves, standings)
    if matched is not None:
        return matched
    if any(group.arm == "distilled" for group in groups) or not any(group.by_name for group in groups):
        return expectations.headline(expectations.findings(groups))
    return comparison.headline(groups)


def _findings(run: _Run) -> list[tuple[str, str]]:
    """The expectations of students by tau with their verdicts; none for a smoke run, or one without such students."""
    if run.smoke is not None or not any(group.arm in ("distilled", "direct") for group in run.groups):
        return []
    if not any(g.arm == "distilled" for g in run.groups) and any(g.by_name for g in run.groups):
        return []
    return [(expectations.VERDICTS[one.verdict], one.text) for one in expectations.findings(run.groups)]


def _caveats(run: _Run, section: frontier.Section | None) -> list[str]:
    """What else belongs at the top of the page."""
    if run.smoke is not None or not summary.students(run.groups):
        return []
    texts = [] if section is None else list(section.headlines)
    return texts + ([] if run.standings else [NOT_COOLED])


def _tables(run: _Run, section: frontier.Section | None) -> list[Table]:
    """All tables of models that have something to show, in the page's order."""
    every = [
        cooling.table(run.curves, run.standings, run.smoke is not None),
        distillation_cost.table(run.curves),
        distillation_cost.too_precise(run.rows),
        *([] if section is None else section.tables),
        comparison.table(run.groups),
        *(_model_table(run.groups, *each) for each in TABLES),
        cooling.temperature_table(run.curves, run.standings),
    ]
    return [table for table in every if table.rows or (table.texts and table.name in ("above_p_star", "prices"))]


def _model_table(groups: list[Group], name: str, title: str, columns: Sequence[tuple], note: str) -> Table:
    """A table of estimates; a column that no group has a value for is left out."""
    columns = [column for column in columns if any(g.estimates[column[0]].count for g in groups)]
    rows = []
    for group in groups:
        estimates = [group.estimates[metric] for metric, _ in columns]
        if any(estimate.count for estimate in estimates):
            size = max(estimate.count for estimate in group.estimates.values())
            rows.append([group.label, size, *(estimate.cell(size) for estimate in estimates)])
    return Table(name, title, ["model", "n", *(head for _, head in columns)], rows, f"{note} {_errors(groups)}")


def _errors(groups: list[Group]) -> str:
    """What the standard errors are over, in words."""
    if max((len(group.rows) for group in groups if group.is_student), default=0) > 1:
        return "Mean ± standard error over n seeds; where n = 1, over the model's sequences."
    return "There is one seed: errors are over its sequences, and other seeds may differ by more."


def _definitions(groups: list[Group]) -> list[str]:
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
    if count > 1:
        texts.append(
            f"Differences are paired by seed, with t intervals over {count} seeds ({count - 1} degrees of freedom). A "
            "difference is called clear where p < 0.05 after Holm's correction for the comparisons made together."
        )
    if len({row.get("seed") for g in groups for row in g.rows if g.arm == "teacher"}) == 1:
        texts.append("All students have the same teacher: the errors do not cover how another would differ.")
    return texts


def _captions(groups: list[Group]) -> dict[str, str]:
    over = "seeds" if any(len(g.rows) > 1 for g in groups) else "sequences (one seed)"
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


def _frontier_config(config: dict, path: Path) -> knobs.Frontier | None:
    """The config's knobs; ValueError names the file too."""
    try:
        return knobs.read(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _figures(run: _Run) -> dict[str, Figure]:
    """The figures that the run has values for."""
    drawn = {"training": loss_curves.training(run.rows)}
    if any(group.rows for group in run.groups):
        drawn["frontier"] = figures.frontier(run.groups, run.curves)
        drawn["curves"], drawn["divergences"] = figures.curves(run.groups), figures.divergences(run.groups)
    return {name: figure for name, figure in drawn.items() if figure is not None}
