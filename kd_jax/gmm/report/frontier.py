"""The report page of a run over the knobs of selectivity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_jax.gmm.frontier import CHOICE, COOLED, DIRECT, PLAIN, TEACHERS
from kd_jax.gmm.report.page import AGAINST, SMOKE
from kd_jax.gmm.specs import DIVERGENCES, GmmFrontierSpec
from kd_jax.metrics.statistics import t_interval
from kd_jax.reporting import frontier_page, page, row_kinds, run_comparison, tables
from kd_jax.reporting.frontier_page import Knob
from kd_jax.reporting.page import number
from kd_jax.reporting.prices import Curve, Match, matches
from kd_jax.reporting.tables import Number, Table
from kd_jax.runs.settings import freeze
from kd_jax.storage import files

TITLE = "Knobs of selectivity for a Gaussian mixture: the price of precision"
NAMES = {
    "beta": "sharpening (beta)",
    "top_k": "top-k",
    "top_p": "top-p",
    "jensen_shannon": "Jensen-Shannon (beta)",
    "skew_forward_kl": "skew forward KL (alpha)",
    "skew_reverse_kl": "skew reverse KL (alpha)",
    PLAIN: "plain: EM, teacher unchanged",
    DIRECT: "direct: EM on the data, no teacher",
    COOLED[DIRECT]: "direct, cooled (temperature)",
    COOLED[PLAIN]: "plain, cooled (temperature)",
    CHOICE: "random choice, plain or last beta (share)",
}
ZOOM = (6.0, 1.6)  # nats of recall and precision about the plain student, where most settings are
COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "kl_student_data": "KL(p″‖p*)",
    "kl_data_student": "KL(p*‖p″)",
    "teacher_entropy": "teacher entropy",
    "student_entropy": "student entropy",
}
METRICS = (*COLUMNS, "divergence", "objective", "gradient_norm", "start")
KINDS = {"knob": row_kinds.TEXT, "value": row_kinds.FINITE, "seed": row_kinds.INTEGER} | dict.fromkeys(
    METRICS, row_kinds.NUMBER
)

PRICES = (
    "Gain: nats of precision above the plain student of the same seed. Price: nats of recall lost per nat of precision "
    "gained, ± standard error over seeds; the last column is paired by seed. Knobs are interpolated linearly between "
    "neighbouring settings, which top-k does not have: its prices between them are not attained. The random choice is "
    "exact: its density is the weighted sum of the two students', and between its shares the line is a lower bound of "
    "its recall. It needs two students' worth of components, and is the baseline that a knob should beat. A knob is "
    "absent where no setting reaches the gain. A difference is clear where it holds with Holm's correction for all "
    "pairs of knobs."
)
STUDENTS = (
    "Mean ± standard error over seeds, in nats. Precision is the mean of log p* over the student's samples, recall "
    "that of the student's log density over fresh draws of p*. Jensen-Shannon beta 0 and skew forward alpha 0 are "
    "forward KL, Jensen-Shannon beta 1 and skew reverse alpha 0 reverse KL. Teacher entropy is that of what the "
    "student was fitted to, on those draws."
)
FITS = (
    "Divergence on fresh draws, and on those of the fit: a gap is what the fit took from its own draws. Gradient norm: "
    "the largest over seeds, in nats per unit of log weight, mean and log variance. Starts: EM's student, and each of "
    "the teacher's components."
)
FIT_HEAD = ("divergence", "on fresh draws", "on the fit's", "largest gradient norm", "best from EM's start")

TEMPLATE = """<p class="lead"><strong>{{ finding }}</strong></p>
<nav></nav>
<h2>The frontier of every knob</h2>
{{ figure("frontier", "Mean over seeds at each setting of each knob; bars are standard errors over seeds. In the "
 ~ "still figure colour is the entropy of the teacher's own samples under it; a knob of the loss, which leaves it "
 ~ "where it is, has a colour of its own.") }}
<p>{{ lead }}</p>
{% for table in tables %}{{ section(table) }}
{% endfor %}
"""


def write(folder: str | Path, note: str = "") -> Path:
    """Draws a run's figure into figures/ and writes its report.html, which begins with `note`; returns its path."""
    folder = Path(folder)
    students = _read(folder)
    plain, direct = students[PLAIN], students.get(DIRECT)
    knobs = [students[name] for name in (*TEACHERS, *DIVERGENCES) if name in students]
    config = folder / "config.json"
    spec = freeze(GmmFrontierSpec, page.read_json(config), str(config))
    gains = spec.gains
    reference = {name: plain.metrics[name][0] for name in ("precision", "recall")}
    # Ways that need no knob of the teacher or the loss: what the knobs have to beat.
    free = [students[name] for name in (COOLED[PLAIN], CHOICE) if name in students]
    # The plain student is one of their settings: temperature 1 of the first, a share of 0 of the second.
    from_plain = [_joined(plain, knob, 0.0 if knob.name == NAMES[CHOICE] else 1.0) for knob in free]
    prices = frontier_page.prices_of([*knobs, *from_plain], reference, gains)
    # A smoke run shows its numbers and draws no conclusions from them.
    against = [] if spec.smoke else _against(students, [*knobs, *from_plain], spec)
    cooled = [students[COOLED[DIRECT]]] if COOLED[DIRECT] in students else []
    verdict = [] if spec.smoke else frontier_page.verdict(prices, [*knobs, *from_plain], gains)
    seeds = len(reference["recall"])
    all_students = [row for knob in [direct, plain, *knobs, *cooled, *free] if knob for row in _rows(knob)]
    fits = [row for name in DIVERGENCES if name in students for row in _fits(students[name])]
    shown = [
        frontier_page.match_table(against, AGAINST),
        Table("prices", "Which knob buys precision most cheaply?", *frontier_page.price_table(prices), PRICES, verdict),
        Table("students", "All students", ("student", *COLUMNS.values()), all_students, STUDENTS),
        Table("fits", "Did the fits by gradient converge?", FIT_HEAD, fits, FITS, [_check(students)]),
    ]
    shown = [table for table in shown if table.rows or table.texts]
    tables.save(shown, folder)
    html = page.render(
        TEMPLATE,
        folder=folder,
        title=TITLE,
        note=note,
        finding=_finding(against, spec, seeds),
        lead=_lead(seeds),
        tables=shown,
        images=page.embed(
            {"frontier": frontier_page.figure([*knobs, *cooled, *free], plain, direct, zoom=ZOOM)}, folder
        ),
        charts={"frontier": frontier_page.chart([*knobs, *cooled, *free], plain, direct, zoom=ZOOM)},
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path


def _lead(seeds: int) -> str:
    return (
        "A student can be made selective through its teacher (weights to the power beta, or the lightest components "
        "dropped: top-k, top-p) or through its loss (a divergence between forward and reverse KL). All of these trade "
        f"recall for precision. Over {seeds} {'seed' if seeds == 1 else 'seeds'}, each with its own data and teacher, "
        "this page puts them on one frontier and compares what they cost at the same precision."
    )


def _rows(knob: Knob) -> list[list[str | Number]]:
    """A line of the table per setting."""
    names = [f"{knob.name} = {value}" if value else knob.name for value in knob.values]
    cells = [[Number(*t_interval(knob.metrics[column][s])[:2]) for column in COLUMNS] for s in range(len(names))]
    return [[name, *row] for name, row in zip(names, cells, strict=True)]


def _fits(knob: Knob) -> list[list[str | Number]]:
    """A line per setting on how its fits ended."""
    lines = []
    for s, value in enumerate(knob.values):
        fresh, own, norm, start = (
            knob.metrics[name][s] for name in ("divergence", "objective", "gradient_norm", "start")
        )
        # The largest norm: a single fit that did not converge would not show in a mean.
        means = [Number(*t_interval(values)[:2]) for values in (fresh, own)]
        row = [f"{knob.name} = {value}", *means, f"{norm.max():.1e}"]
        # Start 0 is EM's student.
        lines.append([*row, f"{np.mean(start == 0):.0%}"])
    return lines


def _joined(first: Knob, rest: Knob, at: float) -> Knob:
    """The settings of `rest` in order of their values, with the one of `first` at the value `at`."""
    order = np.argsort([at, *map(float, rest.values)])
    metrics = {name: np.concatenate([first.metrics[name], rest.metrics[name]])[order] for name in METRICS}
    values = (*first.values, *rest.values)
    return Knob(rest.name, tuple(values[i] for i in order), metrics)


def _against(students: dict[str, Knob], knobs: list[Knob], spec: GmmFrontierSpec) -> list[Match]:
    """Every way against the cooled direct student; nothing where it was not sampled at other temperatures."""
    if DIRECT not in students or COOLED[DIRECT] not in students:
        return []
    # The direct student itself is temperature 1 of its cooled curve.
    control = _joined(students[DIRECT], students[COOLED[DIRECT]], 1.0)
    *curves, control, direct = (
        Curve(knob.metrics["precision"], knob.metrics["recall"]) for knob in (*knobs, control, students[DIRECT])
    )
    curves = dict(zip((knob.name for knob in knobs), curves, strict=True))
    gains = sorted({spec.contrast_gain, *spec.gains})
    preregistered = (NAMES["beta"], spec.contrast_gain)
    return matches(curves, control, Curve(direct.precision[0], direct.recall[0]), gains, preregistered)


def _finding(against: list[Match], spec: GmmFrontierSpec, seeds: int) -> str:
    if spec.smoke:
        return SMOKE.format(seeds=seeds)
    return frontier_page.contrast(against, NAMES["beta"], "students of a sharpened teacher", spec.contrast_gain)


def _check(students: dict[str, Knob]) -> str:
    """What the fits by gradient have to show: small gradients, and EM's own answer where there is one."""
    fits = [students[name].metrics["gradient_norm"].ravel() for name in DIVERGENCES if name in students]
    if not fits:
        return "There are no fits by gradient."
    norms = np.concatenate(fits)
    text = f"The largest gradient norm of {norms.size} fits is {norms.max():.1e}."
    forward = students.get("jensen_shannon")
    if forward is None or "0" not in forward.values:
        return text
    index = forward.values.index("0")
    # Over all seeds: one fit that is off would not show in a mean.
    gaps = [
        np.abs(forward.metrics[name][index] - students[PLAIN].metrics[name][0]).max()
        for name in ("precision", "recall")
    ]
    return (
        f"{text} Forward KL by gradient and EM maximise the same likelihood, which has one maximum for students of one "
        f"component: over all seeds their precision and recall differ by at most {gaps[0]:.1e} and {gaps[1]:.1e} nats."
    )


def _read(folder: Path) -> dict[str, Knob]:
    """Students by knob, metrics [setting, seed], the same seeds for all; ValueError names what is not such a run's."""
    path, cells = folder / "metrics.jsonl", {}
    for index, row in enumerate(page.read_rows(folder), start=1):
        row_kinds.check(row, f"{path}, row {index}", KINDS)
        missing = [key for key in ("knob", "seed", "precision", "recall") if row.get(key) is None]
        if missing or row["knob"] not in NAMES:
            wrong = f"no {missing[0]}" if missing else f"knob {row['knob']!r}"
            raise ValueError(f"{path}, row {index}: {wrong}; not a row of a mixture frontier")
        cells.setdefault(row["knob"], {}).setdefault(row.get("value"), {})[row["seed"]] = row
    for name in (PLAIN, DIRECT):
        if name in cells and [*cells[name]] != [None]:
            raise ValueError(f"{path}: {name} is not a knob, and must not have a value")
    # All gains are counted from this student.
    if PLAIN not in cells:
        raise ValueError(f"{path}: no student of the unchanged teacher ({PLAIN})")
    seeds = sorted(cells[PLAIN][None])
    students = {name: _knob(path, name, settings, seeds) for name, settings in cells.items()}
    if not all(np.isfinite(students[PLAIN].metrics[name]).all() for name in ("precision", "recall")):
        raise ValueError(f"{path}: precision or recall of {PLAIN} is not finite, and all gains are counted from it")
    return students


def _knob(path: Path, name: str, settings: dict, seeds: list[int]) -> Knob:
    # Prices are paired by seed.
    for value, rows in settings.items():
        if sorted(rows) != seeds:
            raise ValueError(f"{path}: {name} {value} does not have the seeds that {PLAIN} has")
    settings = _in_order(settings)
    metrics = {
        column: np.array([[number(rows[seed].get(column)) for seed in seeds] for rows in settings.values()])
        for column in METRICS
    }
    return Knob(NAMES[name], tuple("" if value is None else f"{value:g}" for value in settings), metrics)


def _in_order(settings: dict) -> dict:
    """Settings by value, up or down as the first and the last are listed: curves are read between neighbours."""
    values = [*settings]
    if None in values:
        return settings
    return {value: settings[value] for value in sorted(values, reverse=values[0] > values[-1])}


def comparable(folder: Path) -> run_comparison.Run:
    """The students of the run, for a page of several runs.

    Raises: FileNotFoundError, ValueError or RunError, naming the file, for a run that cannot be read.
    """
    config, knobs = folder / "config.json", _read(folder)
    spec = freeze(GmmFrontierSpec, page.read_json(config), str(config))
    kinds, listed = {DIRECT: "direct", COOLED[DIRECT]: "cooled"}, []
    for name in sorted(knobs, key=lambda name: name != DIRECT):
        for index, value in enumerate(knobs[name].values):
            # A knob's values are settings; the others have none.
            label = f"{knobs[name].name} = {value}" if value else knobs[name].name
            metrics = {metric: values[index] for metric, values in knobs[name].metrics.items()}
            listed.append((label, kinds.get(name, name), metrics))
    return run_comparison.of_mixtures(folder, listed, first_seed=spec.seed, smoke=spec.smoke)
