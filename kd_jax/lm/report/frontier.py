"""The part of a language-model run's page that puts every knob of selectivity on one frontier, and prices them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kd_jax.lm.experiment.knobs import Frontier
from kd_jax.lm.report import comparison, summary
from kd_jax.reporting import frontier_page
from kd_jax.reporting.page import mean_se, number, show

UNIT = "nats per token"
ENTROPY = f"entropy of what is learnt from  ({UNIT})"
HEAD = (
    "students", "arm", "precision", "recall", "KL(p″‖p*)", "KL(p*‖p″)", "entropy", "entropy of what is learnt from",
    "measured on",
)  # fmt: skip

TEMPLATE = """{% for title, verdict, head, rows, note in knobs.comparisons %}<h2>{{ title }}</h2>
<p><strong>{{ verdict[0] }}</strong></p>
<ul>{% for sentence in verdict[1:] %}<li>{{ sentence }}</li>{% endfor %}</ul>
{{ grid(head, rows) }}
<p class="note">{{ note }}</p>{% endfor %}
<h2>Every setting of every knob</h2>
{{ grid(knobs.head, knobs.table) }}
<p class="note">{{ knobs.note }}</p>
"""


def section(found: Frontier | None, rows: list[dict]) -> dict[str, Any] | None:
    """What TEMPLATE shows as `knobs`, the caption of the figure and the figure; None where a run has no knobs yet."""
    curves = None if found is None else read_curves(found, rows)
    if curves is None:
        return None
    comparisons = [_at_equal_precision(found, curves), _from_own(found, curves)]
    return {
        "figure": figure(curves),
        "caption": _caption(found, curves),
        "headlines": [verdict[0] for _, verdict, *_ in comparisons],
        "comparisons": comparisons,
        "head": HEAD,
        "table": _table(found, curves, rows),
        "note": _note(found, curves, rows),
    }


def _at_equal_precision(found: Frontier, curves: Curves) -> tuple:
    """Title, verdict, head and rows of prices, and note: all knobs counted from the reference."""
    reference = {name: curves.reference.metrics[name][0] for name in ("precision", "recall")}
    verdict, head, rows = _priced(curves.knobs, reference, found.gains)
    both = _more_of_both(found, curves)
    if both:
        verdict.append(f"Clearly more precision and more recall than {found.reference} have: {', '.join(both)}.")
    return "Which knob buys precision most cheaply?", verdict, head, rows, _price_note(found, curves)


def _more_of_both(found: Frontier, curves: Curves) -> list[str]:
    """The arms that beat the reference in precision and in recall by more than two standard errors, paired by seed."""
    reference, better = curves.arms[found.reference], []
    for arm in found.arms:
        if arm in curves.arms:
            with np.errstate(invalid="ignore"):  # of two infinite values; what is not finite is not better
                apart = [mean_se(curves.arms[arm][name] - reference[name]) for name in ("precision", "recall")]
            better += [arm] if all(mean > 2 * error for mean, error in apart) else []
    return better


def _from_own(found: Frontier, curves: Curves) -> tuple:
    """The same with each knob counted from its own unchanged setting."""
    nothing = {name: np.zeros(len(curves.seeds)) for name in ("precision", "recall")}
    verdict, head, rows = _priced(curves.own, nothing, found.gains)
    neutral = {knob.name: found.neutral(knob.name) for knob in found.knobs}
    counted = "; ".join(
        f"{', '.join(name for name in neutral if neutral[name] == arm)} from {arm}"
        for arm in dict.fromkeys(neutral.values())
    )
    note = f"As above, without what a knob's unchanged setting itself gains or loses. Counted are {counted}."
    verdict[0] = f"Counted from each knob's own unchanged setting: {verdict[0][:1].lower()}{verdict[0][1:]}"
    # the reference is 0, so the precision is the gain
    rows = [[row[0], *row[2:]] for row in rows]
    return "And from its own unchanged setting?", verdict, [head[0], *head[2:]], rows, note


def _priced(knobs, reference: dict[str, np.ndarray], gains) -> tuple[list[str], list[str], list[list[str]]]:
    """Verdict, and head and rows of the table of prices."""
    if not all(np.isfinite(values).all() for values in reference.values()):
        verdict = ["Knobs have no prices: the reference's precision or recall is not finite."]
        return verdict, *frontier_page.price_table([])
    prices = frontier_page.prices_of(knobs, reference, gains)
    return frontier_page.verdict(prices, knobs, gains), *frontier_page.price_table(prices)


def missing(found: Frontier | None, rows: list[dict]) -> list[str]:
    """What the comparison of knobs lacks, in words."""
    there = students_of(rows)
    gone = [] if found is None else [arm for arm in found.arms if arm not in there]
    return [f"students of the arms: {', '.join(gone)} (settings of knobs on the frontier)"] if gone else []


def figure(curves: Curves) -> Figure:
    """All knobs on one recall-precision figure."""
    return frontier_page.figure(
        curves.knobs, curves.reference, curves.direct, also=curves.also, unit=UNIT, entropy_label=ENTROPY, values=True
    )


def _caption(found: Frontier, curves: Curves) -> str:
    return (
        f"Every setting of every knob, mean over {len(curves.seeds)} seed(s); bars are standard errors over seeds, "
        f"lines join a knob's settings in order. The ring is the reference, {found.reference}, from which all are "
        "counted; a hexagon another student for which no knob is turned; the star the direct student. Colour is the "
        "entropy of what is learnt from: of the sampled text, or of the teacher's distribution at the temperature in "
        "the loss (the table says which)."
    )


def _price_note(found: Frontier, curves: Curves) -> str:
    return (
        f"Gain: nats per token of precision above {found.reference}, of the same seed. Price: nats of recall lost per "
        f"nat of precision gained, ± standard error over {len(curves.seeds)} seed(s); below 0, recall is gained as "
        "well. The last column is paired by seed. A knob is interpolated linearly between neighbouring settings, which "
        "a generator that takes one of two students at random at least attains (but for their lengths); it is absent "
        "where no two neighbours enclose the gain."
    )


def _table(found: Frontier, curves: Curves, rows: list[dict]) -> list[list[str]]:
    """A line for each arm."""
    students = students_of(rows)
    lines = []
    for arm, metrics in curves.arms.items():
        cells = [show(*mean_se(metrics[name])) for name in COLUMNS]
        row = students[arm][curves.seeds[0]]
        label = "no teacher" if arm == "direct" else found.label(arm)
        lines.append([label, arm, *cells, measured_on(row)])
    return lines


def measured_on(row: dict) -> str:
    """Which text the entropy of what a student learnt from is a mean over."""
    how = row.get("distill") or {}
    if how.get("policy", "sequence") != "sequence":
        return comparison.TEXTS[how.get("data", "p_star")]
    return comparison.TEXTS["p_star" if row["arm"] == "direct" else "samples"]


def _note(found: Frontier, curves: Curves, rows: list[dict]) -> str:
    text = (
        "Mean ± standard error over seeds, nats per token. Entropy of what is learnt from: where students learn text, "
        "the mean of -log of the probability with which each token was drawn (tau, top-k and top-p included); where "
        "they learn the teacher's distributions, the mean entropy of these at the temperature in the loss, on held-out "
        "rows of the text named. One is a mean over what the teacher writes, the other over what p* writes, so they "
        "differ for one and the same teacher"
    )
    same = _unchanged(found, curves, rows)
    return text + (f": unchanged, it has {same[0]:.3f} on its own text and {same[1]:.3f} on p*'s." if same else ".")


def _unchanged(found: Frontier, curves: Curves, rows: list[dict]) -> tuple[float, float] | None:
    """The unchanged teacher's entropy on its own text and on p*'s, where both were measured."""
    students = students_of(rows)
    own = curves.arms[found.reference]["teacher_entropy"].mean()
    for arm, metrics in curves.arms.items():
        how = students[arm][curves.seeds[0]].get("distill") or {}
        temperatures = [how.get(name) for name in ("loss_temperature", "teacher_temperature")]
        if how.get("policy") in ("online", "on_policy") and how.get("data") == "p_star" and temperatures == [1.0, None]:
            return float(own), float(metrics["teacher_entropy"].mean())
    return None


COLUMNS = ("precision", "recall", "kl_model_data", "kl_data_model", "entropy", "teacher_entropy")


class Curves(NamedTuple):
    """The students of a run's knobs, all of the same seeds.

    Attributes:
        knobs: as frontier_page draws them; a setting without students is left out.
        reference, direct: their one setting; `direct` is None where there are no direct students.
        also: the other references.
        own: the same knobs, their precision and recall counted from each one's own unchanged setting.
        arms: arm -> metrics [seed], by COLUMNS; the reference first, "direct" among them.
        seeds: which.
    """

    knobs: list[frontier_page.Knob]
    own: list[frontier_page.Knob]
    reference: frontier_page.Knob
    direct: frontier_page.Knob | None
    also: list[frontier_page.Knob]
    arms: dict[str, dict[str, np.ndarray]]
    seeds: list[int]


def students_of(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """The evaluation rows of students: arm -> seed -> row."""
    students: dict[str, dict[int, dict]] = {}
    for row in summary.evaluations(rows):
        if row.get("seed") is not None:
            students.setdefault(summary.arm_name(row), {})[row["seed"]] = row
    return students


def read_curves(frontier: Frontier, rows: list[dict]) -> Curves | None:
    """The knobs' students, of the seeds that all arms have; None where there is none that the reference has."""
    found = students_of(rows)
    there = [arm for arm in [*frontier.arms, "direct"] if arm in found]
    seeds = sorted(set.intersection(*(set(found[arm]) for arm in there))) if frontier.reference in there else []
    if not seeds:
        return None
    arms = {
        arm: {name: np.array([number(found[arm][seed].get(name)) for seed in seeds]) for name in COLUMNS}
        for arm in there
    }

    def stacked(name: str, settings: list[tuple[str, str]]) -> frontier_page.Knob:
        metrics = {column: np.stack([arms[arm][column] for _, arm in settings]) for column in COLUMNS}
        return frontier_page.Knob(name, tuple(value for value, _ in settings), metrics)

    knobs, own = [], []
    for knob in frontier.knobs:
        settings = [(value, arm) for value, arm in knob.settings if arm in arms]
        knobs += [stacked(knob.name, settings)] if settings else []
        neutral = arms.get(frontier.neutral(knob.name))
        if settings and neutral is not None:
            with np.errstate(invalid="ignore"):  # of two infinite values; a setting that is not finite has no price
                less = {name: knobs[-1].metrics[name] - neutral[name] for name in ("precision", "recall")}
            own.append(knobs[-1]._replace(metrics=knobs[-1].metrics | less))
    first, *others = frontier.references
    reference = stacked(f"reference: {first}", [("", first)])
    also = [stacked(f"unchanged too: {arm}", [("", arm)]) for arm in others if arm in arms]
    direct = stacked("direct: p*'s text, no teacher", [("", "direct")]) if "direct" in arms else None
    return Curves(knobs, own, reference, direct, also, arms, seeds)
