"""The section of a language-model run's page that prices knobs of selectivity."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from kd_jax.lm.experiment.knobs import Frontier
from kd_jax.lm.report import comparison, figures, interactive
from kd_jax.lm.report.cooling import Curve
from kd_jax.metrics import statistics
from kd_jax.reporting import frontier_page, units
from kd_jax.reporting.tables import Number, Table
from kd_jax.reporting.units import Student

UNIT = "nats per token"
COLUMNS = ("precision", "recall", "kl_model_data", "kl_data_model", "entropy", "teacher_entropy")
HEAD = (
    "students", "arm", "precision", "recall", "KL(p″‖p*)", "KL(p*‖p″)", "entropy", "teacher's entropy", "measured on",
)  # fmt: skip


class Section(NamedTuple):
    """What the page shows of a run's knobs: the figure, its interactive form, their caption, sentences and tables."""

    figure: Figure
    chart: dict[str, Any]
    caption: str
    headlines: list[str]
    tables: list[Table]


class KnobStudents(NamedTuple):
    """The students of a run's knobs, sampled at 1, all of the same teachers and seeds.

    A unit is what errors are over: a teacher, whose seeds are averaged, or with one teacher a seed.

    Attributes:
        knobs: as frontier_page draws them; a setting without students is left out.
        own: the same knobs, precision and recall counted from each one's own unchanged setting.
        reference, direct: knobs of one setting; `direct` is None where there are no direct students.
        also: the other references.
        arms: arm -> metrics [unit], by COLUMNS; the reference first, "direct" among them.
        students: teacher and seed of each student of an arm.
    """

    knobs: list[frontier_page.Knob]
    own: list[frontier_page.Knob]
    reference: frontier_page.Knob
    direct: frontier_page.Knob | None
    also: list[frontier_page.Knob]
    arms: dict[str, dict[str, np.ndarray]]
    students: list[Student]


def section(frontier: Frontier | None, curves: dict[str, Curve], smoke: bool) -> Section | None:
    """The knobs' part of the page; None where a run has no knobs, or no students of the reference yet.

    Args:
        frontier: of the run's config.
        curves: students by arm, as `cooling.curves` returns them.
        smoke: whether the run is too small for conclusions, so that only numbers are shown.
    """
    students = None if frontier is None else knob_students(frontier, curves)
    if students is None:
        return None
    tables = [_at_equal_precision(frontier, students), _from_own(frontier, students)]
    # A smoke run keeps its numbers and loses its sentences.
    headlines = [] if smoke else [table.texts[0] for table in tables[:1]]
    if smoke:
        tables = [table._replace(texts=()) for table in tables]
    tables.append(_all_settings(frontier, students, curves))
    chart = frontier_page.chart(
        students.knobs, students.reference, students.direct, also=students.also, unit=UNIT,
        more=interactive.cooled(curves),
    )  # fmt: skip
    return Section(figure(students, curves), chart, _caption(frontier, students), headlines, tables)


def missing(frontier: Frontier | None, curves: dict[str, Curve]) -> list[str]:
    """What the comparison of knobs lacks, in words.

    Args:
        frontier: of the run's config.
        curves: students by arm.
    """
    gone = [] if frontier is None else [arm for arm in frontier.arms if arm not in curves]
    return [f"students of the arms: {', '.join(gone)} (settings of knobs on the frontier)"] if gone else []


def knob_students(frontier: Frontier, curves: dict[str, Curve]) -> KnobStudents | None:
    """The knobs' students, of the teachers and seeds that all arms have.

    Args:
        frontier: of the run's config.
        curves: students by arm, as `cooling.curves` returns them.
    Returns: the students, or None where the reference has none of these.
    """
    # Students of one teacher and seed share their start and the order of the data: only common ones can be paired.
    present = [arm for arm in [*frontier.arms, "direct"] if arm in curves and 1.0 in curves[arm].rows]
    common = sorted(set.intersection(*(set(curves[arm].rows[1.0]) for arm in present))) if present else []
    if not common or frontier.reference not in present:
        return None
    arms = {}
    for arm in present:
        at_one = curves[arm]._replace(temperatures=[1.0])
        arms[arm] = {name: units.per_unit(common, at_one.values(name, common)[0]) for name in COLUMNS}

    def stacked(name: str, settings: list[tuple[str, str]]) -> frontier_page.Knob:
        metrics = {column: np.stack([arms[arm][column] for _, arm in settings]) for column in COLUMNS}
        return frontier_page.Knob(name, tuple(value for value, _ in settings), metrics)

    knobs, own = [], []
    for knob in frontier.knobs:
        settings = [(value, arm) for value, arm in knob.settings if arm in arms]
        if not settings:
            continue
        knobs.append(stacked(knob.name, settings))
        neutral = arms.get(frontier.neutral(knob.name))
        if neutral is not None:
            with np.errstate(invalid="ignore"):  # of two infinite values; a setting that is not finite has no price
                less = {name: knobs[-1].metrics[name] - neutral[name] for name in ("precision", "recall")}
            own.append(knobs[-1]._replace(metrics=knobs[-1].metrics | less))
    first, *others = frontier.references
    reference = stacked(f"reference: {first}", [("", first)])
    also = [stacked(f"unchanged too: {arm}", [("", arm)]) for arm in others if arm in arms]
    direct = stacked("direct: p*'s text, no teacher", [("", "direct")]) if "direct" in arms else None
    return KnobStudents(knobs, own, reference, direct, also, arms, common)


def _at_equal_precision(frontier: Frontier, students: KnobStudents) -> Table:
    """Prices of all knobs counted from the reference, with the verdict."""
    reference = {name: students.reference.metrics[name][0] for name in ("precision", "recall")}
    verdict, head, rows = _priced(students.knobs, reference, frontier.gains)
    # A price is not defined where nothing is paid.
    both = _more_of_both(frontier, students)
    if both:
        verdict.append(f"Clearly more precision and more recall than {frontier.reference}: {', '.join(both)}.")
    note = (
        f"Gain: nats per token of precision above {frontier.reference}. Price: nats of recall lost per nat of "
        f"precision gained, ± standard error over {units.words(students.students)}, paired by them; below 0, recall is "
        "gained as well. Prices between settings are not attained by any measured student: they are read "
        "off the straight line between two neighbouring settings, and are only comparable with each other. A knob is "
        "absent where no two neighbours enclose the gain."
    )
    return Table("prices", "Which knob buys precision most cheaply?", head, rows, note, verdict)


def _more_of_both(frontier: Frontier, students: KnobStudents) -> list[str]:
    """The arms whose precision and recall are both above the reference's, with 95 % t intervals over units."""
    reference, better = students.arms[frontier.reference], []
    for arm in frontier.arms:
        if arm in students.arms:
            with np.errstate(invalid="ignore"):  # of two infinite values; what is not finite is not better
                apart = [students.arms[arm][name] - reference[name] for name in ("precision", "recall")]
            better += [arm] if all(statistics.t_interval(values).low > 0 for values in apart) else []
    return better


def _from_own(frontier: Frontier, students: KnobStudents) -> Table:
    """The same with each knob counted from its own unchanged setting."""
    # The neutral setting has been subtracted already, so gains are counted from 0.
    nothing = {name: np.zeros(students.reference.metrics["recall"].shape[1]) for name in ("precision", "recall")}
    verdict, head, rows = _priced(students.own, nothing, frontier.gains)
    neutral = {knob.name: frontier.neutral(knob.name) for knob in frontier.knobs}
    counted = "; ".join(
        f"{', '.join(name for name in neutral if neutral[name] == arm)} from {arm}"
        for arm in dict.fromkeys(neutral.values())
    )
    note = (
        "As in the table before, without what a knob's unchanged setting itself gains or loses beside the reference. "
        f"Counted: {counted}."
    )
    # the reference is 0, so the column of precision repeats the gain
    rows = [[row[0], *row[2:]] for row in rows]
    title = "Prices from each knob's own unchanged setting"
    return Table("prices_from_own", title, [head[0], *head[2:]], rows, note, verdict)


def _priced(knobs, reference: dict[str, np.ndarray], gains) -> tuple[list[str], list[str], list[list[str]]]:
    """Verdict, and head and rows of the table of prices."""
    if not all(np.isfinite(values).all() for values in reference.values()):
        verdict = ["Knobs have no prices: the reference's precision or recall is not finite."]
        return verdict, *frontier_page.price_table([])
    prices = frontier_page.prices_of(knobs, reference, gains)
    return frontier_page.verdict(prices, knobs, gains), *frontier_page.price_table(prices)


def figure(students: KnobStudents, curves: dict[str, Curve]) -> Figure:
    """All knobs on one recall-precision figure, with the direct student's curve over its sample temperatures.

    Args:
        students: of the run's knobs.
        curves: students by arm, over their sample temperatures.
    """
    drawn = frontier_page.figure(
        students.knobs, students.reference, students.direct, also=students.also, unit=UNIT,
        entropy_label=f"teacher's entropy  ({UNIT})", values=True,
    )  # fmt: skip
    figures.draw_curves(drawn.axes[0], curves, {})
    return drawn


def _caption(frontier: Frontier, students: KnobStudents) -> str:
    return (
        f"Every setting of every knob, mean over {units.words(students.students)}; bars are standard errors over them, "
        f"lines join a knob's settings in order. The ring is the reference, {frontier.reference}, from which all are "
        "counted; a hexagon or rounded square is another student of the unchanged teacher; the star is the direct "
        "student. Dashed: students over their own sample temperatures, the direct one's with numbers, where they were "
        "evaluated. In the still figure colour is the teacher's entropy, of its sampled text or of its distribution at "
        "the temperature in the loss; a knob that leaves it where it is has a colour of its own."
    )


def _all_settings(frontier: Frontier, students: KnobStudents, curves: dict[str, Curve]) -> Table:
    """A line for each arm."""
    lines = []
    for arm, metrics in students.arms.items():
        cells = [Number(*statistics.t_interval(metrics[name])[:2]) for name in COLUMNS]
        # The settings are the same for all students of an arm.
        row = curves[arm].rows[1.0][students.students[0]]
        label = "no teacher" if arm == "direct" else frontier.label(arm)
        lines.append([label, arm, *cells, measured_on(row)])
    note = (
        f"Mean ± standard error over {units.words(students.students)}, nats per token. Teacher's entropy: where "
        "students learn text, the mean of -log of the probability with which each token was drawn (tau, top-k and "
        "top-p included); where they learn the teacher's distributions, the mean entropy of these at the temperature "
        "in the loss, on held-out rows of the text named. The same teacher has another entropy on its own text than on "
        "p*'s"
    )
    both = _unchanged(frontier, students, curves)
    note += f": unchanged, {both[0]:.3f} on its own and {both[1]:.3f} on p*'s." if both else "."
    return Table("knobs", "Every setting of every knob", HEAD, lines, note)


def measured_on(row: dict) -> str:
    """Which text the teacher's entropy is a mean over."""
    settings = row.get("distill") or {}
    if settings.get("policy", "sequence") != "sequence":
        return comparison.TEXTS.get(settings.get("data", "p_star"), "–")
    return comparison.TEXTS["p_star" if row["arm"] == "direct" else "samples"]


def _unchanged(
    frontier: Frontier, students: KnobStudents, curves: dict[str, Curve]
) -> tuple[float, float] | None:  # fmt: skip
    """The unchanged teacher's entropy on its own text and on p*'s, where both were measured."""
    own = students.arms[frontier.reference]["teacher_entropy"].mean()
    for arm, metrics in students.arms.items():
        settings = curves[arm].rows[1.0][students.students[0]].get("distill") or {}
        temperatures = [settings.get(name) for name in ("loss_temperature", "teacher_temperature")]
        on_p_star = settings.get("policy") in ("online", "on_policy") and settings.get("data") == "p_star"
        # A loss at temperature 1 and no other temperature for the teacher: its distribution as it is.
        if on_p_star and temperatures == [1.0, None]:
            return float(own), float(metrics["teacher_entropy"].mean())
    return None
