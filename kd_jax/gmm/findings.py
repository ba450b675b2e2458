"""The rows of a mixture run as arrays, and what they say: slopes, and ways against the cooled direct student.

A student is named by its fields (`Who`), never by a string that would have to be taken apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_jax.gmm.specs import GmmSpec
from kd_jax.gmm.students import AXES, CHOICE, CONTROLS, COOLINGS, DIRECT, DISTILLED, PLAIN, Scores
from kd_jax.metrics.statistics import Interval, show, t_interval
from kd_jax.reporting import frontier_page, page, row_kinds, run_comparison
from kd_jax.reporting.prices import Curve, Match, matches
from kd_jax.runs.settings import freeze

SHARPENED = "sharpened teacher (beta)"
COOLED_PLAIN = "unsharpened teacher, student cooled"
BY_WEIGHTS = {DIRECT: "direct student, cooled by its weights", PLAIN: f"{COOLED_PLAIN} by its weights"}
RANDOM_CHOICE = "random choice between two students"
KINDS = (
    dict.fromkeys((*AXES, "beta", "share", "sample_temperature"), row_kinds.FINITE)
    | {"arm": row_kinds.TEXT, "cooling": row_kinds.TEXT, "seed": row_kinds.INTEGER}
    | dict.fromkeys(Scores._fields, row_kinds.NUMBER)
)


class Who(NamedTuple):
    """A student of every seed: what it was fitted to, and how it is sampled."""

    arm: str
    beta: float | None = None
    temperature: float = 1.0
    cooling: str | None = None
    share: float | None = None


Students = dict[Who, dict[str, np.ndarray]]  # metric -> [seed]


def load(folder: Path) -> dict[tuple, Students]:
    """Students by setting (the values of AXES), the run's own setting first; their metrics in the order of the seeds.

    Raises FileNotFoundError, ValueError or RunError, naming the file and row, fit to print.
    """
    groups: dict[tuple, dict[Who, list[dict]]] = {}
    for index, row in enumerate(page.read_rows(folder), start=1):
        where = f"{folder / 'metrics.jsonl'}, row {index}"
        missing = [key for key in (*AXES, "arm", "seed") if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: no {missing[0]}; not a mixture run's row")
        row_kinds.check(row, where, KINDS)
        # A row without a temperature is of a student sampled at 1.
        temperature = row.get("sample_temperature")
        who = Who(
            row["arm"], row.get("beta"), 1.0 if temperature is None else temperature, row.get("cooling"),
            row.get("share"),
        )  # fmt: skip
        groups.setdefault(tuple(row[axis] for axis in AXES), {}).setdefault(who, []).append(row)
    return {setting: {who: _columns(rows) for who, rows in own.items()} for setting, own in groups.items()}


def _columns(rows: list[dict]) -> dict[str, np.ndarray]:
    # Pairing is by position, so every student's values are in the same order of seeds.
    rows = sorted(rows, key=lambda row: row["seed"])
    names = [name for name in Scores._fields if name in rows[0]]
    return {name: np.array([page.number(row.get(name)) for row in rows]) for name in names}


def spec_of(folder: Path) -> GmmSpec:
    """The run's settings; ValueError names one that cannot be."""
    path = folder / "config.json"
    return freeze(GmmSpec, page.read_json(path), str(path))


def betas(students: Students) -> list[float]:
    """The betas of the distilled students, in order."""
    return sorted({who.beta for who in students if who.arm == DISTILLED})


def temperatures(students: Students, who: Who, cooling: str = COOLINGS[0]) -> list[Who]:
    """The student at each of its sampling temperatures, from the highest down, cooled by covariances or weights.

    Args:
        students: of one setting.
        who: the student at temperature 1.
        cooling: one of COOLINGS.
    """
    # A student and its cooled copies have arm and beta in common.
    own = [w for w in students if w[:2] == who[:2] and w.cooling in (None, cooling) and w.share is None]
    return sorted(own, key=lambda w: -w.temperature)


def curve(students: Students, whos: list[Who]) -> Curve:
    """Precision and recall [setting, seed]."""
    return Curve(*(np.stack([students[who][name] for who in whos]) for name in ("precision", "recall")))


def direct(students: Students) -> Curve:
    """The direct student's precision and recall [seed], from which gains are counted."""
    return Curve(students[Who(DIRECT)]["precision"], students[Who(DIRECT)]["recall"])


def ways(students: Students) -> dict[str, list[Who]]:
    """Each way of making a more precise student, as the settings of its curve. Empty for rows of other kinds."""
    distilled = [Who(DISTILLED, beta) for beta in betas(students)]
    curves = {SHARPENED: distilled}
    if Who(PLAIN) in students:
        curves[COOLED_PLAIN] = temperatures(students, Who(PLAIN))
        for who in distilled[1:]:
            curves[f"sharpened by {who.beta:.3g}, student cooled"] = temperatures(students, who)
        # students of several components alone
        for arm, name in BY_WEIGHTS.items():
            curves[name] = temperatures(students, Who(arm), COOLINGS[1])
        for arm in CONTROLS:
            curves[f"{arm} component, student cooled"] = temperatures(students, Who(arm))
    # From one end of the knob to the other: the plain student is a share of 0 and the most selective one of 1.
    choices = sorted((who for who in students if who.arm == CHOICE), key=lambda who: who.share)
    if choices:
        curves[RANDOM_CHOICE] = [Who(PLAIN), *choices, distilled[-1]]
    return {name: whos for name, whos in curves.items() if len(whos) > 1}


def compared(students: Students, spec: GmmSpec) -> list[Match]:
    """Every way against the cooled direct student, the preregistered contrast (of sharpening) first.

    Args:
        students: of the run's own setting.
        spec: has the gains.
    """
    control = temperatures(students, Who(DIRECT))
    # A run that was not cooled has no control to compare with.
    if len(control) < 2:
        return []
    curves = {name: curve(students, whos) for name, whos in ways(students).items()}
    # The preregistered gain is compared even where it is not among those of the table.
    gains = sorted({spec.contrast_gain, *spec.gains})
    listed = matches(
        curves, curve(students, control), direct(students), gains, preregistered=(SHARPENED, spec.contrast_gain)
    )
    return sorted(listed, key=lambda match: (match.way, match.gain) != (SHARPENED, spec.contrast_gain))


def contrast(listed: list[Match], spec: GmmSpec) -> str:
    """The preregistered contrast as a sentence; "" where there are no temperatures to compare with.

    Args:
        listed: as `compared` returns them.
        spec: has the preregistered gain.
    """
    return (
        frontier_page.contrast(listed, SHARPENED, "students of a sharpened teacher", spec.contrast_gain)
        if listed
        else ""
    )


def slope(students: Students, metric: str, low: float, high: float) -> Interval:
    """Change of a metric from one beta to another per decade of beta, paired by seed, nats.

    Args:
        metric: a field of Scores.
        low, high: betas.
    """
    if low == high:
        return Interval(*[np.nan] * 5)
    # Differences within a seed: what seeds share is no noise.
    change = students[Who(DISTILLED, high)][metric] - students[Who(DISTILLED, low)][metric]
    return t_interval(change / np.log10(high / low))


def decades(students: Students) -> list[tuple[float, float]]:
    """Pairs of betas a decade apart, from the smallest on; the last pair ends at the largest. Empty for one beta."""
    values = betas(students)
    nearest = lambda target: min(values, key=lambda beta: abs(np.log(beta / target)))  # noqa: E731
    # betas are log-spaced, so that a decade's ends are among them or close
    steps = int(round(np.log10(values[-1] / values[0])))
    marks = list(dict.fromkeys([*(nearest(values[0] * 10**step) for step in range(steps + 1)), values[-1]]))
    return list(zip(marks, marks[1:], strict=False))


def summary(folder: Path) -> list[str]:
    """What a finished run found, in lines for the end of its output."""
    spec, students = spec_of(folder), next(iter(load(folder).values()))
    last = Who(DISTILLED, betas(students)[-1])
    lines = []
    for name, who in (("direct student", Who(DIRECT)), (f"student of the teacher at beta {last.beta:g}", last)):
        values = [t_interval(students[who][metric]) for metric in ("precision", "recall")]
        precision, recall = (show(interval.mean, interval.error) for interval in values)
        lines.append(f"{name}: precision {precision}, recall {recall} nats")
    if spec.smoke:
        return [*lines, "a smoke run: no conclusions"]
    return [*lines, *filter(None, [contrast(compared(students, spec), spec)])]


def comparable(folder: Path) -> run_comparison.Run:
    """The students of the run's own setting, for a page of several runs.

    Raises: FileNotFoundError, ValueError or RunError, naming the file, for a run that cannot be read.
    """
    spec, students = spec_of(folder), next(iter(load(folder).values()))
    listed = [(Who(DIRECT), "direct", "direct"), (Who(PLAIN), "plain: teacher unchanged", "plain")]
    listed += [(Who(DISTILLED, beta), f"beta = {beta:.3g}", "distilled") for beta in betas(students)]
    listed += [(who, f"direct at {who.temperature:g}", "cooled") for who in temperatures(students, Who(DIRECT))]
    return run_comparison.of_mixtures(
        folder, [(label, kind, students[who]) for who, label, kind in listed if who in students],
        first_seed=spec.seed, smoke=spec.smoke,
    )  # fmt: skip
