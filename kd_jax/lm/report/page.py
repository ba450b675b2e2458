"""The report page of a language-model run: what came out, figures, tables, samples side by side, cost and config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from kd_jax.lm.experiment import knobs as frontier
from kd_jax.lm.report import comparison, figures, loss_curves, summary, tables
from kd_jax.lm.report import frontier as frontier_report
from kd_jax.lm.report import samples as texts
from kd_jax.lm.report.summary import Estimate, Group
from kd_jax.reporting import page
from kd_jax.reporting.page import Beside, show
from kd_jax.storage import files

TITLE = "Distilling a language model: precision against recall"
KNOBS_TITLE = "Knobs of selectivity for a language model: the price of precision"
TABLES = {
    "Per token": (
        ("precision", "precision", 3), ("recall", "recall", 3), ("entropy", "entropy", 3),
        ("kl_model_data", "KL(p″‖p*)", 3), ("kl_data_model", "KL(p*‖p″)", 3),
        ("teacher_entropy", "source's entropy", 3),
    ),
    "Per sequence": (
        ("precision_per_sequence", "precision", 2), ("recall_per_sequence", "recall", 2),
        ("entropy_per_sequence", "entropy", 2), ("kl_model_data_per_sequence", "KL(p″‖p*)", 2),
        ("kl_data_model_per_sequence", "KL(p*‖p″)", 2),
    ),
    "The text, and validation": (
        ("finished", "finished (share)", 3), ("length_mean", "mean length (tokens)", 1),
        ("distinct_2", "distinct-2", 4), ("repetition_4", "repetition-4", 4),
        ("validation_perplexity", "validation perplexity", 2),
    ),
}  # fmt: skip
UNITS = {
    "Per token": (
        "Nats per token. The source is what is learnt from: of text, what drew it (the teacher as it was sampled, or "
        "p*); else the teacher's distribution at the temperature in the loss, on held-out rows of its text."
    ),
    "Per sequence": "Nats per sequence.",
    "The text, and validation": (
        "Distinct-2: different pairs of tokens over all pairs, in all samples together; it falls with their number. "
        "Repetition-4: mean over sequences of the share of runs of four tokens that were there before. The validation "
        "perplexity is the chosen checkpoint's, padding not counted."
    ),
}
KINDS = {
    "evaluation": "evaluation (no frontier, no tables of likelihoods)",
    "validation": "validation during training (no curves of validation loss, no chosen checkpoints)",
    "training": "training losses",
    "stage": "stages (what they cost)",
}
VERDICTS = {"holds": "Holds", "fails": "Does not hold", "unclear": "Not shown", "untested": "Not tested"}

STYLE = """.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; } .beside > div { flex: 1 1 24rem; }
.findings li { margin: .25rem 0; }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.samples td > div { width: 17rem; max-height: 22rem; overflow-y: auto; } .samples td:first-child { min-width: 2rem; }
.samples th { text-align: left; }
.special { color: #2b5d8a; background: #e8eef5; border-radius: 3px; } .cut { color: #a32c3e; font-style: italic; }
summary { cursor: pointer; }
"""
TEMPLATE = (
    """{% if knobs %}{% for text in knobs.headlines %}<p><strong>{{ text }}</strong></p>{% endfor %}{% endif %}
{% if headline %}<p><strong>{{ headline }}</strong></p>{% endif %}
<ul class="findings">{% for verdict, text in findings %}<li><strong>{{ verdict }}.</strong> {{ text }}</li>
{% endfor %}</ul>
<p>{{ about }}</p>
<p class="note">{{ certainty }}</p>
{% if missing %}<h2>Not in this run yet</h2>
<ul>{% for text in missing %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{% if "frontier" in images or beside %}<h2>Precision–recall frontier</h2>
{% if beside %}<div class="beside"><div><h3>This run</h3>{{ figure("frontier", captions.frontier) }}</div>
{% for other in beside %}<div><h3>{{ other.title }}</h3>
<figure><img alt="frontier of {{ other.title }}" src="data:image/png;base64,{{ other.image }}"></figure>
{{ grid(["metric", "slope (" ~ other.note ~ ")"], other.slopes) }}</div>{% endfor %}</div>
{% else %}{{ figure("frontier", captions.frontier) }}{% endif %}{% endif %}
{% if knobs %}"""
    + frontier_report.TEMPLATE
    + """{% endif %}
{% if arms %}<h2>How students learn, and beside the direct one</h2>
{{ grid(arm_head, arms) }}
<p class="note">Differences in nats per token, ± standard error, paired by seed.</p>{% endif %}
{% for title, head, rows, unit in tables %}<h2>{{ title }}</h2>
{{ grid(head, rows) }}
<p class="note">{{ unit }} {% if loop.first %}{{ note }}{% endif %}</p>{% endfor %}
{% if "curves" in images %}<h2>Against {% if "divergences" in images %}tau and against {% endif -%}
the entropy of what is learnt from</h2>
{{ figure("curves", captions.curves) }}
{{ figure("divergences", captions.divergences) }}{% endif %}
{% if "training" in images %}<h2>Training</h2>
{{ figure("training", captions.training) }}{% endif %}
{% if samples.rows %}<h2>Samples side by side</h2>
<div class="scroll samples"><table>
<thead><tr>{% for h in samples.head %}<th>{{ h }}</th>{% endfor %}</tr></thead><tbody>
{% for index, cells in samples.rows %}<tr><td>{{ index }}</td>{% for cell in cells %}<td>{% if cell %}<div>
{%- for text, special in cell.pieces %}{% if special %}<span class="special">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}{% if cell.cut %}<span class="cut"> [{{ cell.cut }}]</span>{% endif -%}
</div>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">Each column is one model's, of the seed named; a row is one index. Special tokens are shaded; “cut”
marks a text that reached the longest length allowed before it ended.</p>{% endif %}
{% if cost.rows or cost.notes %}<h2>Where the time went</h2>
{% if cost.rows %}{{ grid(cost.head, cost.rows) }}{% endif %}
{% for text in cost.notes %}<p class="note">{{ text }}</p>{% endfor %}{% endif %}
{% if differences %}<h2>What differs from the base config</h2>
{{ grid(["setting", "base", "this run"], differences) }}{% endif %}
{% if config %}<h2>Config</h2>
<details><summary>{{ config | length }} settings</summary>{{ grid(["setting", "value"], config) }}</details>{% endif %}
"""
)


def _cell(estimate: Estimate, size: int, digits: int) -> str:
    """A table cell: mean ± standard error; what is missing or not finite is said with how many seeds it is of."""
    if not estimate.count:
        return "–"
    some = f" (n = {estimate.count})" if estimate.count < size else ""
    if estimate.bad:
        return f"{estimate.mean} ({estimate.bad} of {estimate.count} seeds)"
    return show(estimate.mean, estimate.error, digits) + some


def _tables(groups: list[Group]) -> list[tuple]:
    """Title, head, rows and unit of each table; a column that no group has a value for is left out."""
    out = []
    for title, columns in TABLES.items():
        columns = [column for column in columns if any(g.estimates[column[0]].count for g in groups)]
        rows = []
        for group in groups:
            estimates = [group.estimates[name] for name, _, _ in columns]
            if not any(estimate.count for estimate in estimates):
                continue
            size = max(estimate.count for estimate in group.estimates.values())
            cells = [_cell(e, size, digits) for e, (_, _, digits) in zip(estimates, columns, strict=True)]
            rows.append([group.label, size, *cells])
        if rows:
            out.append((title, ["model", "n", *(text for _, text, _ in columns)], rows, UNITS[title]))
    return out


def _errors(groups: list[Group]) -> str:
    """Over what the standard errors are, in words."""
    if max((len(g.rows) for g in groups if summary.is_student(g)), default=0) > 1:
        return "Mean ± standard error over n seeds (sd / √n); where n = 1, over the model's sequences, if known."
    return "There is one seed: the errors are over its sequences and say nothing of how other seeds would differ."


def _about(groups: list[Group]) -> str:
    """What was done, and what the words mean."""
    rows = [row for g in groups for row in g.rows if summary.is_student(g)]

    def sizes(name: str) -> str:
        found = sorted({row[name] for row in rows if row.get(name) is not None})
        return " to ".join(dict.fromkeys(f"{size:,}" for size in (found[:1] + found[-1:])))

    counts = [(sizes("num_samples"), "samples of each student"), (sizes("num_recall"), "validation samples of p*")]
    counted = " and ".join(f"{size} {what}" for size, what in counts if size)
    bound = next((row["data_log_prob"] for row in rows if row.get("data_log_prob") is not None), None)
    named = ", or as the table of arms says (the others)" if comparison.named(groups) else ""
    return (
        "Students learn from text that a teacher samples at sample_temperature tau (distilled), from the text of p* "
        f"(direct){named}. A teacher that is trained in the run learns from the text of p* too. Precision is the mean "
        "log-probability that p* gives a student's samples, recall the mean log-probability that the student gives "
        "validation samples of p*"
        + (f"; on {counted}." if counted else ".")
        + (f" p* gives these validation samples {bound:.3f} nats per token." if bound is not None else "")
    )


def _certainty(groups: list[Group]) -> str:
    """What counts as a difference, and how much that is worth."""
    count = max((len(g.rows) for g in groups if summary.is_student(g)), default=0)
    rate = summary.chance(count)
    if rate is None:
        text = "A difference counts where it is beyond two standard errors."
        text += " There is one seed, so these are over its sequences: other seeds may differ by more." if count else ""
    else:
        text = "A difference counts where it is beyond two standard errors of the differences paired by seed; with "
        text += f"{count} seeds chance alone passes that, in the direction expected, {rate:.1%} of the time."
    if len({row.get("seed") for g in groups for row in g.rows if g.arm == "teacher"}) == 1:
        text += " One teacher is behind all students: how another would differ is not in the errors."
    return text


def _captions(groups: list[Group]) -> dict[str, str]:
    over = "seeds" if any(len(g.rows) > 1 for g in groups) else "sequences (one seed)"
    gone = [
        f"{g.label} ({name})"
        for g in groups
        for name in ("precision", "recall")
        if summary.is_student(g) and g.rows and not math.isfinite(g.estimates[name].mean)
    ]
    absent = f" Not drawn, for want of a finite value: {', '.join(gone)}." if gone else ""
    named = ", and of each arm by name" if comparison.named(groups) else ""
    return {
        "frontier": f"Mean at each tau{named}; bars are standard errors over {over}." + absent,
        "curves": f"Bars and band are standard errors over {over}; the dashed line is the direct student." + absent,
        "divergences": f"Divergences between student (p″) and p*, per token; errors over {over}.",
        "training": "Mean over seeds, with a band of one standard error where there are several: cross-entropy of the "
        "text, of each arm's own text, also where a divergence is learnt. The axis leaves out the first fall.",
    }


def _missing(rows: list[dict], groups: list[Group], samples: list[dict]) -> list[str]:
    """What the run does not have (yet), in words."""
    found = [text for kind, text in KINDS.items() if not summary.of_kind(rows, kind)]
    if not samples:
        found.append("samples.jsonl (no samples side by side)")
    trained = {row["name"] for row in rows if row["kind"] in ("training", "validation")}
    evaluated = {row["name"] for row in summary.of_kind(rows, "evaluation")}
    if any(g.arm == "teacher" and g.rows for g in groups):
        # evaluated by tau, under other names
        evaluated |= {row.get("name") for row in rows if row.get("arm") == "teacher"}
    waiting = sorted(trained - evaluated)
    if evaluated and waiting:
        found.append(f"evaluation of: {', '.join(waiting)}")
    if evaluated and not any(g.arm == "direct" and g.rows for g in groups):
        found.append("the direct student's evaluation")
    return found


def _findings(groups: list[Group]) -> tuple[list[summary.Finding], str]:
    """What is expected of students by tau, and what became of it; of a run without any, of its arms by name."""
    if comparison.named(groups) and not any(group.arm == "distilled" for group in groups):
        return [], comparison.headline(groups)
    found = summary.findings(groups)
    return found, summary.headline(found)


def _knobs(config: dict, path: Path) -> frontier.Frontier | None:
    """What the config says of knobs; ValueError names the file too."""
    try:
        return frontier.read(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _drawn(rows: list[dict], groups: list[Group]) -> dict[str, Figure]:
    """The figures that the run has values for."""
    drawn = {"training": loss_curves.training(rows)}
    if any(group.rows for group in groups):
        drawn["frontier"], drawn["curves"] = figures.frontier(groups), figures.curves(groups)
        drawn["divergences"] = figures.divergences(groups)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write(folder: str | Path, beside: Sequence[Beside] = ()) -> Path:
    """Draws a run's figures into figures/ and writes its report.html; returns the report's path.

    What the run does not have yet is named on the page and the rest is shown. `beside` are other runs' frontiers to
    show next to this one's. Raises FileNotFoundError, ValueError or RunError, naming the file, for what cannot be read.
    """
    folder = Path(folder)
    rows = page.read_rows(folder)
    summary.check(rows, folder / "metrics.jsonl")
    samples = texts.read(folder / "samples.jsonl")
    config, manifest = page.read_json(folder / "config.json"), page.read_json(folder / "manifest.json")
    tables.check(manifest, folder / "manifest.json")
    groups = summary.summarise(rows)
    wanted = _knobs(config, folder / "config.json")
    knobs = frontier_report.section(wanted, rows)
    found, headline = _findings(groups)
    drawn = _drawn(rows, groups)
    captions = _captions(groups)
    if knobs is not None:
        drawn["frontier"], captions["frontier"] = knobs["figure"], knobs["caption"]
    html = page.render(
        TEMPLATE,
        folder=folder,
        style=STYLE,
        title=TITLE if wanted is None else KNOBS_TITLE,
        headline=headline,
        findings=[(VERDICTS[f.verdict], f.text) for f in found],
        about=_about(groups),
        certainty=_certainty(groups),
        missing=_missing(rows, groups, samples) + frontier_report.missing(wanted, rows),
        images=page.embed(drawn, folder),
        captions=captions,
        beside=beside,
        knobs=knobs,
        arm_head=comparison.HEAD,
        arms=comparison.table(groups),
        tables=_tables(groups),
        note=_errors(groups),
        samples=texts.side_by_side(samples),
        cost=tables.cost(rows, manifest),
        config=tables.settings(config),
        differences=tables.differences(manifest.get("config_differences")),
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path
