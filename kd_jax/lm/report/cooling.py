"""The control of distillation: a direct student that is merely sampled at a lower temperature.

A student sampled at temperature T < 1 has more precision and less recall than at 1, without any teacher. So every way
of distilling is compared with the cooled direct student at equal precision: what it has more or less of recall (or of
any other metric) there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kd_jax.lm.report import expectations, summary
from kd_jax.metrics.statistics import Interval
from kd_jax.reporting import units
from kd_jax.reporting.page import number
from kd_jax.reporting.tables import Number, Table
from kd_jax.reporting.units import Student

ABOVE, BELOW, ALIKE, UNTESTED = 1, -1, 0, None


class Curve(NamedTuple):
    """Students of one arm over their own sample temperatures.

    Attributes:
        arm: name of the arm.
        label: how the page names it.
        temperatures: at which its students were evaluated, the highest first.
        rows: temperature -> student (teacher and seed) -> evaluation row.
    """

    arm: str
    label: str
    temperatures: list[float]
    rows: dict[float, dict[Student, dict]]

    @property
    def students(self) -> list[Student]:
        """The students that have every temperature."""
        # Means over other students at each temperature would bend the curve.
        return sorted(set.intersection(*(set(self.rows[t]) for t in self.temperatures)))

    def values(self, metric: str, students: list[Student]) -> np.ndarray:
        """A metric [temperature, student]; NaN where it is not known.

        Args:
            metric: a field of evaluation rows.
            students: which, in order.
        """
        return np.array([[number(self.rows[t][s].get(metric)) for s in students] for t in self.temperatures])

    def by_sequence(self, metric: str, temperature: float, students: list[Student]) -> np.ndarray | None:
        """A metric [student, sequence], where it is known for each sequence."""
        return units.by_sequence([self.rows[temperature][s] for s in students], metric)


class Match(NamedTuple):
    """A student beside the cooled direct student of equal precision.

    Attributes:
        interval: of the metric's difference, student - cooled direct student, paired by teacher and seed.
        between: the direct student's two sample temperatures between which the precision lies.
    """

    interval: Interval
    between: tuple[float, float]


class Apart(NamedTuple):
    """The differences behind the mean in `Match.interval`.

    Attributes:
        students: teacher and seed of each pair.
        values: [pair].
        by_sequence: [pair, sequence], for recall where it is known.
        between: as in Match.
    """

    students: list[Student]
    values: np.ndarray
    by_sequence: np.ndarray | None
    between: tuple[float, float]


class Standing(NamedTuple):
    """Where an arm's curve lies relative to the cooled direct student's.

    Attributes:
        matches: by the arm's sample temperatures; None where the direct student does not reach its precision.
        sides: by the same temperatures, whether recall is clearly ABOVE or BELOW, or ALIKE; UNTESTED where there is no
            error, as of one student or an infinite recall. Of those matched.
        verdict: in words.
    """

    matches: dict[float, Match | None]
    sides: dict[float, int | None]
    verdict: str


def curves(rows: list[dict]) -> dict[str, Curve]:
    """The students of a run by arm."""
    rows_of: dict[str, dict[float, dict[Student, dict]]] = {}
    for row in summary.of_kind(rows, "evaluation"):
        if summary.is_student_row(row):
            arm = rows_of.setdefault(units.arm(row), {})
            arm.setdefault(summary.sample_temperature(row), {})[units.student(row)] = row
    made = {}
    for arm, by_temperature in rows_of.items():
        first = next(iter(next(iter(by_temperature.values())).values()))
        label = summary.label(*summary.group_key(first))
        made[arm] = Curve(arm, label, sorted(by_temperature, reverse=True), by_temperature)
    return made


def match(student: Curve, temperature: float, direct: Curve, metric: str) -> Match | None:
    """A metric of a student at one sample temperature, beside the direct student at the same mean precision.

    Args: as of `differences`.
    Returns: the difference with its interval, or None where the direct student's curve does not reach that precision.
    """
    apart = differences(student, temperature, direct, metric)
    if apart is None:
        return None
    return Match(units.interval(apart.students, apart.values, apart.by_sequence), apart.between)


def differences(student: Curve, temperature: float, direct: Curve, metric: str) -> Apart | None:
    """What a student has more of a metric than the direct student at the same mean precision, for each pair of them.

    The direct student's curve is linear between neighbouring measured temperatures; beyond them nothing is known and
    None is returned. Where it passes the precision more than once, the temperature nearest to the highest counts, not
    the best value. On the segment with slope m = d metric / d precision, the difference for a pair is

        (metric - m * precision) of the student - (metric - m * precision) of the direct student on the segment

    whose mean is the vertical distance of the mean curves. Errors in m and in the place on the segment vanish to first
    order, so the interval of these values is that of the distance (delta method).

    Args:
        student: any arm.
        temperature: one of the student's.
        direct: the direct student's curve.
        metric: a field of evaluation rows.
    """
    # Only students of one teacher and seed can be paired.
    students = sorted(set(student.students) & set(direct.students))
    if not students:
        return None
    at = student.temperatures.index(temperature)
    precision, value = (student.values(name, students)[at] for name in ("precision", metric))
    x, y = (direct.values(name, students) for name in ("precision", metric))
    target = precision.mean()
    for a in range(len(direct.temperatures) - 1):
        with np.errstate(invalid="ignore"):  # a recall of -inf has no difference
            (start, end), (first, last) = x[a : a + 2].mean(1), y[a : a + 2].mean(1)
            # Where precision does not change along the segment, no temperature on it can be chosen by precision.
            if not min(start, end) <= target <= max(start, end) or start == end:
                continue
            share, slope = (target - start) / (end - start), (last - first) / (end - start)
            x_here, y_here = ((1 - share) * values[a] + share * values[a + 1] for values in (x, y))
            # Each pair's values are moved along the segment to where the means are equal.
            moved = slope * (x_here - precision)
            between = tuple(direct.temperatures[a : a + 2])
            parts = [student.by_sequence(metric, temperature, students)]
            parts += [direct.by_sequence(metric, t, students) for t in between]
            by_sequence = None
            if all(part is not None for part in parts):
                # The same combination for each sequence: its mean over sequences is the pair's value.
                by_sequence = parts[0] - (1 - share) * parts[1] - share * parts[2] + moved[:, None]
            return Apart(students, value - y_here + moved, by_sequence, between)
    return None


def standings(students: dict[str, Curve], preregistered: str | None = None) -> dict[str, Standing]:
    """Every distilled arm against the cooled direct student.

    Args:
        students: by arm, as `curves` returns them.
        preregistered: the arm whose comparison, sampled at 1, was named before the run: it alone is not corrected.
    Returns: by arm; {} where the direct student was evaluated at fewer than two sample temperatures.
    """
    direct = students.get("direct")
    # A line needs two points.
    if direct is None or len(direct.temperatures) < 2:
        return {}
    matches = {
        arm: {t: match(curve, t, direct, "recall") for t in curve.temperatures}
        for arm, curve in students.items() if arm != "direct"
    }  # fmt: skip
    # All comparisons but the preregistered one are corrected together: none is chosen after looking.
    places = [(arm, t) for arm, by_t in matches.items() for t, one in by_t.items() if one is not None]
    others = [place for place in places if place != (preregistered, 1.0)]
    p_values = {(arm, t): matches[arm][t].interval.p_value for arm, t in places}
    p_values |= dict(zip(others, expectations.adjusted([p_values[place] for place in others]), strict=True))
    sides: dict[str, dict[float, int | None]] = {arm: {} for arm in matches}
    for arm, t in places:
        interval, p_value = matches[arm][t].interval, p_values[arm, t]
        if p_value < expectations.LEVEL:
            sides[arm][t] = ABOVE if interval.mean > 0 else BELOW
        else:
            sides[arm][t] = UNTESTED if math.isnan(interval.error) else ALIKE
    return {arm: Standing(matches[arm], sides[arm], _verdict(list(sides[arm].values()))) for arm in matches}


def _verdict(sides: list[int | None]) -> str:
    above, below, count = sides.count(ABOVE), sides.count(BELOW), len(sides)
    if not count:
        return "no equal precision measured"
    if sides.count(UNTESTED) == count:
        return "not tested"
    if above and below:
        return "crosses"
    # A verdict needs all points: one without a clear difference is enough against it.
    if count in (above, below):
        return "dominates" if above else "is dominated"
    if above or below:
        return f"{'more' if above else 'less'} recall at {above or below} of {count}, else no clear difference"
    return "no clear difference"


def headline(students: dict[str, Curve], by_arm: dict[str, Standing]) -> str | None:
    """Recall at matched precision in one sentence, of students sampled at 1.

    Args:
        students: by arm, as `curves` returns them.
        by_arm: as `standings` returns them.
    Returns: the sentence, or None where no student is matched.
    """
    at_one = {arm: standing.sides[1.0] for arm, standing in by_arm.items() if 1.0 in standing.sides}
    if not at_one:
        return None
    words = {
        ABOVE: "more recall", BELOW: "less recall", ALIKE: "no clear difference in recall",
        UNTESTED: "no tested difference (one student, or infinite recall)",
    }  # fmt: skip
    parts = []
    for side, word in words.items():
        labels = [students[arm].label for arm, own in at_one.items() if own == side]
        parts += [f"{_listed(labels)} {'has' if len(labels) == 1 else 'have'} {word}"] if labels else []
    control = "the direct student merely sampled at a lower temperature"
    return f"At equal precision, compared with {control}: {'; '.join(parts)}."


def _listed(labels: list[str], most: int = 4) -> str:
    if len(labels) > most:
        return f"{len(labels)} ways of distilling"
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


def table(students: dict[str, Curve], by_arm: dict[str, Standing], smoke: bool) -> Table:
    """Each arm's recall at matched precision, and its verdict.

    Args:
        students: by arm, as `curves` returns them.
        by_arm: as `standings` returns them.
        smoke: leaves out the verdicts.
    Returns: the table; without rows where there are no standings.
    """
    rows = []
    for arm, standing in by_arm.items():
        # Students sampled at 1; their other temperatures have a table of their own.
        curve, matched = students[arm], standing.matches.get(1.0)
        own = [_mean(curve, 1.0, name) for name in ("precision", "recall")] if 1.0 in curve.rows else ["–"] * 2
        apart, between = (Number(math.nan), "not reached") if matched is None else (
            Number(*matched.interval[:2]), "{:g} to {:g}".format(*matched.between))  # fmt: skip
        points = f"{len(standing.sides)} of {len(standing.matches)}"
        rows.append([curve.label, *own, between, apart, points, "–" if smoke else standing.verdict])
    head = ("students", "precision", "recall", "direct sampled at", "recall − cooled direct's", "points matched",
            "beside the cooled direct student")  # fmt: skip
    texts = (
        "Sampling the direct student at a lower temperature also buys precision with recall, without a teacher. What "
        "distillation adds is the recall that a student has beyond the cooled direct student of the same precision.",
    )
    note = (
        "Nats per token, ± standard error, differences paired by teacher and seed, and recall by sequence. The direct "
        "student's curve is read "
        "linearly between two measured temperatures and not at all beyond them. An arm dominates if it has clearly "
        "more recall (p < 0.05, Holm's correction over all comparisons but the preregistered one) at each of "
        "its own sample temperatures that can be matched, is dominated if clearly less at each, crosses if both occur."
    )
    return Table("matched_precision", "Distillation or temperature? Recall at equal precision", head, rows, note, texts)


def temperature_table(students: dict[str, Curve], by_arm: dict[str, Standing]) -> Table:
    """Every student at every sample temperature; no rows where all were sampled at one alone.

    Args:
        students: by arm, as `curves` returns them.
        by_arm: as `standings` returns them.
    """
    rows = []
    for arm, curve in students.items() if any(len(c.temperatures) > 1 for c in students.values()) else ():
        for t in curve.temperatures:
            matched = by_arm[arm].matches[t] if arm in by_arm else None
            apart = Number(*matched.interval[:2]) if matched else Number(math.nan)
            metrics = [_mean(curve, t, name) for name in ("precision", "recall", "entropy")]
            rows.append([curve.label, f"{t:g}", *metrics, apart])
    head = ("students", "sampled at", "precision", "recall", "entropy", "recall − cooled direct's")
    note = "Nats per token, ± standard error. Recall and entropy are of the student at that temperature."
    return Table("sample_temperatures", "Every student at every sample temperature", head, rows, note)


def _mean(curve: Curve, temperature: float, metric: str) -> Number:
    rows = list(curve.rows[temperature].values())
    values = np.array([number(row.get(metric)) for row in rows])
    interval = units.interval([units.student(row) for row in rows], values, units.by_sequence(rows, metric))
    return Number(*interval[:2])
