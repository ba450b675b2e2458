"""The report page of a language-model run: its finding, figures, samples side by side, tables, cost and config."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.figure import Figure

from kd_jax.lm.experiment import knobs
from kd_jax.lm.instruct import page as instruct_page
from kd_jax.lm.report import (
    about_run,
    comparison,
    cooling,
    expectations,
    figures,
    frontier,
    interactive,
    loss_curves,
    summary,
)  # fmt: skip
from kd_jax.lm.report import samples as samples_lib
from kd_jax.lm.report.cooling import Curve, Standing
from kd_jax.lm.report.summary import Group
from kd_jax.reporting import models_page, page, tables, units
from kd_jax.reporting.page import Beside
from kd_jax.reporting.tables import Table
from kd_jax.storage import files

T = TypeVar("T")
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
     f"{models_page.VARIETY} The validation perplexity is the chosen checkpoint's, padding not counted."),
)  # fmt: skip
NOT_COOLED = (
    "The direct student was not evaluated at lower sample temperatures, which also trade recall for precision: this "
    "run cannot tell what distillation adds to mere cooling."
)

STYLE = """.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; } .beside > div { flex: 1 1 24rem; min-width: 0; }
.findings li { margin: .25rem 0; }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.samples td > div { width: 17rem; max-height: 22rem; overflow-y: auto; } .samples td:first-child { min-width: 2rem; }
.samples th { text-align: left; }
.special { color: var(--link); background: var(--shade); border-radius: 3px; }
.cut { color: var(--warn); font-style: italic; }
summary { cursor: pointer; }
.browser ol { padding: 0; list-style: none; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line); }
.browser li { padding: .5rem .8rem; border-bottom: 1px solid var(--line); white-space: pre-wrap; }
.browser small { color: var(--faint); } .browser label { margin-right: 1rem; white-space: nowrap; }
.browser select { max-width: 100%; }
"""
TEMPLATE = """{% if preregistered %}<p class="lead"><strong>{{ preregistered }}</strong></p>
{% endif %}<p class="lead"><strong>{{ finding }}</strong></p>
{% for text in caveats %}<p>{{ text }}</p>
{% endfor %}<nav></nav>
{% if "frontier" in images or beside %}<h2>What distillation did</h2>
{% if beside %}<div class="beside"><div><h3>This run</h3>{{ figure("frontier", captions.frontier) }}</div>
{% for other in beside %}<div><h3>{{ other.title }}</h3>
<figure><img alt="frontier of {{ other.title }}" src="data:image/svg+xml;base64,{{ other.image }}"></figure>
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
{% if browsed %}<h2>All samples of this page</h2>
<div class="browser" data-rows="samples" hidden>
<p><label>Model <select class="model"></select></label> <label hidden>Prompt <select class="prompt"></select></label>
<label>Search <input type="search"></label>
<label><input type="checkbox" checked> shade tokens that p* finds unlikely</label> <span class="count note"></span></p>
<ol></ol></div><p>They are shown where scripts run; samples.jsonl has them, too.</p>
<script type="application/json" id="samples">{{ json(browsed) }}</script>{% endif %}
{{ INSTRUCT }}
{% if "embedding_map" in images %}<h2>Where the texts lie</h2>
{{ figure("embedding_map", captions.embedding_map) }}
{{ figure("embedding_umap", captions.embedding_umap) }}{% endif %}
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
        preregistered: the comparison that the config names, in a sentence; None without one, or in a smoke run.
        smoke: samples of each student, where they are too few for conclusions; else None.
    """

    rows: list[dict]
    config: dict[str, Any]
    manifest: dict[str, Any]
    groups: list[Group]
    curves: dict[str, Curve]
    standings: dict[str, Standing]
    preregistered: str | None
    smoke: int | None


def _read(folder: Path) -> _Run:
    rows = page.read_rows(folder)
    summary.check(rows, folder / "metrics.jsonl")
    units.attach(rows, folder)
    groups, curves, config = summary.summarise(rows), cooling.curves(rows), page.read_json(folder / "config.json")
    named, smoke = _named(comparison.read_contrast, config, folder / "config.json"), summary.smoke_samples(groups)
    at_equal = named.arm if named.at_equal_precision and (named.other, named.metric) == ("direct", "recall") else None
    preregistered = None
    if smoke is None:
        preregistered = instruct_page.declared(rows, config.get("instruct") or {})
        preregistered = preregistered or comparison.preregistered(named, curves)
    return _Run(
        rows, config, page.read_json(folder / "manifest.json"), groups, curves, cooling.standings(curves, at_equal),
        preregistered, smoke,
    )  # fmt: skip


def write(folder: str | Path, beside: Sequence[Beside] = (), note: str = "") -> Path:
    """Writes a run's figures and tables into figures/, and its report.html.

    What the run does not have yet is named on the page, and the rest is shown.

    Args:
        folder: of the run.
        beside: other runs' frontiers to show next to this one's.
        note: what to know before all else.
    Returns: the page's path.
    Raises: FileNotFoundError, ValueError or RunError, naming the file, for one that cannot be read.
    """
    folder = Path(folder)
    run = _read(folder)
    samples, places = samples_lib.read(folder / "samples.jsonl"), samples_lib.read_map(folder / "embedding_map.jsonl")
    frontier_config = _named(knobs.read, run.config, folder / "config.json")
    section = frontier.section(frontier_config, run.curves, run.smoke is not None)
    drawn, captions = _figures(run, section, places), about_run.captions(run.groups) | about_run.map_captions(places)
    if section is not None:
        captions["frontier"] = section.caption
    rates = instruct_page.read(folder, run.rows)
    captions["pass_rates"] = instruct_page.CAPTION
    shown, cost = _tables(run, section), about_run.cost(run.rows, run.manifest)
    tables.save([*shown, cost, rates["rates"]], folder)
    html = page.render(
        TEMPLATE.replace("{{ INSTRUCT }}", instruct_page.TEMPLATE),
        folder=folder,
        style=STYLE + instruct_page.STYLE,
        title=TITLE if frontier_config is None else KNOBS_TITLE,
        note=note,
        preregistered=run.preregistered,
        finding=finding(run.groups, run.curves, run.standings),
        caveats=_data(run.config) + _caveats(run, section),
        findings=_findings(run),
        images=page.embed({name: figure for name, (figure, _) in drawn.items()}, folder),
        captions=captions,
        beside=beside,
        samples=samples_lib.side_by_side(samples),
        browsed=samples_lib.browsed(samples),
        charts={name: chart for name, (_, chart) in drawn.items()},
        interactive=bool(samples),
        instruct=rates,
        tables=shown,
        definitions=about_run.definitions(run.groups),
        missing=about_run.missing(run.rows, run.groups, samples) + frontier.missing(frontier_config, run.curves),
        cost=cost,
        config=about_run.settings(run.config),
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path


def result(folder: str | Path) -> list[str]:
    """A finished run in short: its preregistered comparison, its finding, and a table of at most four lines.

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
    first = [] if run.preregistered is None else [run.preregistered]
    return [*first, finding(run.groups, run.curves, run.standings), *text]


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


def _data(config: dict[str, Any]) -> list[str]:
    """Of a run on data: what p* is, and which model scores the samples."""
    data, judge = config.get("data"), config.get("p_star")
    if not (isinstance(data, dict) and isinstance(judge, dict) and data.get("source")):
        return []
    return [
        f"Here p* is the data {data['source']}. The judge, {judge.get('source')}, stands in for it wherever this page "
        "says “log p*”: it scores the samples for precision. Recall is measured on rows of the data that no model was "
        "trained on."
    ]


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
        comparison.cost_table(run.curves),
        comparison.too_precise(run.rows),
        *([] if section is None else section.tables),
        comparison.table(run.groups),
        *(_model_table(run.groups, *each) for each in TABLES),
        cooling.temperature_table(run.curves, run.standings),
        about_run.reencoded(run.rows),
    ]
    return [table for table in every if table.rows or (table.texts and table.name in ("above_p_star", "prices"))]


def _model_table(groups: list[Group], name: str, title: str, columns: Sequence[tuple], note: str) -> Table:
    """A table of estimates; a column that no group has a value for is left out."""
    # Older runs lack newer metrics.
    columns = [column for column in columns if any(g.estimates[column[0]].count for g in groups)]
    rows = []
    for group in groups:
        estimates = [group.estimates[metric] for metric, _ in columns]
        if any(estimate.count for estimate in estimates):
            size = max(estimate.count for estimate in group.estimates.values())
            rows.append([group.label, size, *(estimate.cell(size) for estimate in estimates)])
    return Table(
        name, title, ["model", "n", *(head for _, head in columns)], rows, f"{note} {about_run.errors(groups)}"
    )


def _named(read: Callable[[dict], T], config: dict, path: Path) -> T:
    """What `read` finds in a config; ValueError names the file too."""
    try:
        return read(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _figures(
    run: _Run, section: frontier.Section | None, places: list[dict]
) -> dict[str, tuple[Figure, dict[str, Any]]]:  # fmt: skip
    """Each figure with its interactive form; what the run has no values for is left out, so that a page can be made at
    any time."""
    groups, drawn = run.groups, {}
    if any(group.rows for group in groups):
        drawn["frontier"] = figures.frontier(groups, run.curves), interactive.frontier(groups, run.curves)
        drawn["curves"] = figures.curves(groups), interactive.against(groups, interactive.CURVES, entropy=True)
        divergences = figures.divergences(groups)
        if divergences is not None:
            drawn["divergences"] = (
                divergences, interactive.against(groups, interactive.DIVERGENCES, entropy=False)
            )  # fmt: skip
    if section is not None:
        drawn["frontier"] = section.figure, section.chart
    colours = figures.colours_of(groups)
    rates = instruct_page.figure(run.rows, {curve.label: colours.get(arm, "0.5") for arm, curve in run.curves.items()})
    if rates is not None:
        drawn["pass_rates"] = rates
    trainings = loss_curves.read(run.rows)
    if trainings is not None:
        drawn["training"] = loss_curves.figure(trainings), loss_curves.chart(trainings)
    maps = samples_lib.map_charts(places)
    return drawn | {name: (figures.embedding_map(places, *fields), maps[name])
                    for name, fields in samples_lib.maps(places).items()}  # fmt: skip
