"""The report page of a mixture distillation run: the finding, the frontier, then the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_jax.gmm import findings
from kd_jax.gmm.findings import SHARPENED, Students, Who
from kd_jax.gmm.report import capacity, figures
from kd_jax.gmm.specs import GmmSpec
from kd_jax.gmm.students import CONTROLS, DIRECT, DISTILLED, PLAIN
from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import frontier_page, page, tables
from kd_jax.reporting.prices import Match, standing
from kd_jax.reporting.tables import Number, Table
from kd_jax.storage import files
from kd_jax.storage.errors import RunError

TITLE = "Distilling a Gaussian mixture: precision against recall"
COLUMNS = {
    "precision": "precision",
    "precision_notebook": "precision (notebook)",
    "recall": "recall",
    "recall_notebook": "recall (notebook)",
    "kl_student_data": "KL(p″‖p*)",
    "kl_data_student": "KL(p*‖p″)",
    "teacher_entropy": "teacher entropy",
    "student_entropy": "student entropy",
}
NOTEBOOK = (
    "The published notebook's precision differs because there the name of p* had been overwritten: it scores student "
    "samples under the beta-sharpened teacher rather than p*, and its recall uses the training draws instead of fresh "
    "ones; both are shown as the notebook columns. The direct student's notebook precision is under the most selective "
    "teacher."
)
SMOKE = (
    "This is a smoke run of {seeds} seeds: it shows that the program works. Its numbers are too noisy for conclusions, "
    "and none are drawn."
)

SLOPES = "Nats per decade, paired by seed; mean ± standard error over seeds."
AGAINST = (
    "Recall minus that of the direct student, sampled at a lower temperature, at equal precision; mean ± standard "
    "error over seeds, paired by seed, in nats. Gain: precision above the direct student's, in nats. An asterisk: "
    "t test, p < 5 % with Holm's correction for all cells but the preregistered one. Between neighbouring settings "
    "curves are interpolated linearly. Where “control ends below”, no temperature takes the direct student that far; "
    "where “exceeded”, every setting of the way gains more."
)
CHOSEN = (
    "Mean ± standard error over seeds, in nats. Teacher entropy is that of what the student was fitted to, measured on "
    "those draws. The heaviest, a random and the lightest component of the teacher have the same entropy of weights, "
    "zero: if only the choice of likely regions raised precision, the lightest would not."
)
SPREAD = "Median and quantiles over seeds, in nats. Recall is skewed: a few seeds lose far more than the others."

TEMPLATE = """<p class="lead"><strong>{{ finding }}</strong></p>
{% if contrast %}<p>{{ contrast }}</p>{% endif %}
<nav></nav>
<h2>What distillation did</h2>
{{ figure("panels", "The first seed. Contours lie 0.5, 2 and 4.5 nats below each density's mode. A cross marks a mode "
 ~ "of p* that the density has dropped: it lies outside the lowest contour.") }}
{{ figure("frontier", "Precision and recall, means over seeds, with 95 % intervals: all of it, and what lies near the "
 ~ "direct student. The red line is the student that was fitted to the data and is merely sampled at lower "
 ~ "temperatures; a way of distilling is worth its price where it lies above that line.") }}
<p>{{ setup }}</p>
{% for table in tables %}{{ section(table) }}
{% endfor %}<h2>Precision and recall against beta and teacher entropy</h2>
{{ figure("curves", "Distilled students; the dashed line is the direct student's mean, with its 95 % interval. "
 ~ "Triangles: students of a single teacher component.") }}
{% if "capacity" in images %}<h2>Capacity of teacher and student</h2>
{{ figure("capacity", "What the largest beta changes, compared with the smallest; blue is a gain, red a loss.") }}
{% endif %}{% for table in others %}{{ section(table) }}
{% endfor %}
"""


def write(folder: str | Path, note: str = "") -> Path:
    """Draws a run's figures into figures/ and writes its report.html, which begins with `note`; returns its path."""
    folder = Path(folder)
    spec, runs = findings.spec_of(folder), findings.load(folder)
    base_setting, students = next(iter(runs.items()))
    # Of a few seeds of a smoke run, no comparison is worth a reader's time.
    compared = [] if spec.smoke else findings.compared(students, spec)
    seeds = len(students[Who(DIRECT)]["recall"])
    drawn = {
        "frontier": figures.frontier(students, findings.ways(students)),
        "curves": figures.curves(students),
    }
    arrays = folder / "checkpoints" / "panels.npz"
    # Contours need two dimensions: runs in more have no panels.
    if arrays.is_file():
        try:
            drawn["panels"] = figures.panels(_panels(arrays))
        except (TypeError, ValueError) as error:  # NumPy's and SciPy's, of shapes that are no mixture's
            raise RunError(f"{arrays} is damaged: {error}") from error
    grid = capacity.grid(runs, spec, base_setting)
    if grid:
        drawn["capacity"] = capacity.figure(grid)
    betas = findings.betas(students)
    finding = SMOKE.format(seeds=seeds) if spec.smoke else _finding(compared, students)
    shown = [frontier_page.match_table(compared, AGAINST), *_tables(students)]
    others = [*capacity.grid_tables(grid, (betas[0], betas[-1])), capacity.varied(runs, base_setting)]
    # Some runs have no other temperatures or settings.
    shown, others = ([table for table in listed if table.rows] for listed in (shown, others))
    tables.save([*shown, *others], folder)
    html = page.render(
        TEMPLATE,
        folder=folder,
        title=TITLE,
        note=note,
        finding=finding,
        contrast=findings.contrast(compared, spec),
        setup=_setup(spec, seeds),
        tables=shown,
        others=others,
        images=page.embed(drawn, folder),
        charts={"frontier": figures.chart(students, findings.ways(students)), "curves": figures.curve_chart(students)},
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path


def beside(folder: str | Path) -> page.Beside:
    """The run's frontier, drawn into its figures/, and its slopes, for another run's page."""
    folder = Path(folder)
    students = next(iter(findings.load(folder).values()))
    drawn = {"frontier": figures.frontier(students, findings.ways(students))}
    image = page.embed(drawn, folder)["frontier"]
    slopes = [(f"{name}, beta {row[0]}", str(row[1 + i])) for row in _slopes(students) for i, name in enumerate(_TWO)]
    return page.Beside(f"Gaussian mixture, {folder.resolve().name}", image, slopes, "nats per decade of beta")


_TWO = ("precision", "recall")


def _finding(compared: list[Match], students: Students) -> str:
    """One plain sentence: what sharpening the teacher does, and whether cooling the direct student does it better."""
    betas = findings.betas(students)
    # Paired by seed: both students learn from the same teacher, once sharpened and once not.
    rise = {
        name: t_interval(students[Who(DISTILLED, betas[-1])][name] - students[Who(DISTILLED, betas[0])][name])
        for name in _TWO
    }
    trade = (
        f"Sharpening the teacher moves its student by {show(rise['precision'].mean, rise['precision'].error)} nats of "
        f"precision and {show(rise['recall'].mean, rise['recall'].error)} nats of recall"
    )
    verdict = {
        "dominates": "and it beats the direct student that is merely sampled at a lower temperature",
        "is dominated": "but at every precision compared, the direct student that is merely sampled at a lower "
        "temperature has more recall",
        "crosses": "and whether it beats the direct student that is merely sampled at a lower temperature depends on "
        "the precision",
        "no clear difference": "and it does not differ clearly from the direct student that is merely sampled at a "
        "lower temperature",
    }
    # Sharpening alone: the run has other ways, which do not belong in its one sentence.
    own = [match for match in compared if match.way == SHARPENED]
    found = standing(own)
    if found in verdict:
        return f"{trade}, {verdict[found]}."
    if all(match.difference is None for match in own):
        return f"{trade}."
    return f"{trade}; beside the direct student that is merely sampled at a lower temperature, it has {found}."


def _setup(spec: GmmSpec, seeds: int) -> str:
    components = f"{spec.student_components} component{'s' * (spec.student_components != 1)}"
    return (
        f"p* is 8 Gaussians in {spec.dim} dimensions. A teacher of {spec.teacher_components} components is fitted "
        f"to {spec.num_data} draws of p* and sharpened by raising its weights to the power beta; students of "
        f"{components} are fitted to {spec.num_distill} draws of it (distilled) or to the "
        f"data (direct). {seeds} seeds, each with data and a teacher of its own. Precision is the mean of log p* over "
        "a student's samples, recall the mean of the student's log density over fresh draws of p*."
    )


def _tables(students: Students) -> list[Table]:
    """Slopes, the chosen students and their spread over seeds."""
    chosen = {_name(who): students[who] for who in _chosen(students)}
    quantiles = ("median", "5 %", "95 %")
    return [
        Table("slopes", "Slope of each decade of beta", ("beta", *(f"{name} per decade" for name in _TWO)),
              _slopes(students), SLOPES),
        Table("students", "Chosen students", ("student", *COLUMNS.values()),
              [[name, *_cells(metrics)] for name, metrics in chosen.items()], f"{CHOSEN} {NOTEBOOK}"),
        Table("spread", "Medians and spread over seeds",
              ("student", *(f"{name}: {quantile}" for name in _TWO for quantile in quantiles)),
              [[name, *_spread(metrics)] for name, metrics in chosen.items()], SPREAD),
    ]  # fmt: skip


def _slopes(students: Students) -> list[list[str | Number]]:
    rows = []
    for low, high in findings.decades(students):
        slopes = [findings.slope(students, name, low, high) for name in _TWO]
        rows.append([f"{low:g} to {high:g}", *(Number(*slope[:2]) for slope in slopes)])
    return rows


def _chosen(students: Students) -> list[Who]:
    """Direct, plain, the betas that begin and end a decade, and the controls; those that exist."""
    marks = dict.fromkeys(beta for pair in findings.decades(students) for beta in pair)
    wanted = [Who(DIRECT), Who(PLAIN), *(Who(DISTILLED, beta) for beta in marks), *(Who(arm) for arm in CONTROLS)]
    return [who for who in wanted if who in students]


def _name(who: Who) -> str:
    if who.arm == DISTILLED:
        return f"beta = {who.beta:.3g}"
    return {DIRECT: "direct", PLAIN: "unsharpened teacher"}.get(who.arm, f"{who.arm} component")


def _cells(metrics: dict[str, np.ndarray]) -> list[Number]:
    """Mean ± standard error of each column, or how many seeds are not finite."""
    cells = []
    for name in COLUMNS:
        values = metrics.get(name, np.array([np.nan]))
        # A single -inf makes the mean -inf: how many there are says more than the mean.
        bad = int((~np.isfinite(values)).sum())
        remark = f" ({bad} of {values.size} seeds)" if bad else ""
        cells.append(Number(*t_interval(values)[:2]) if not bad else Number(values.mean(), np.nan, remark))
    return cells


def _spread(metrics: dict[str, np.ndarray]) -> list[Number]:
    # Quantiles: recall is skewed, and a mean of it hides what most seeds do.
    return [Number(float(np.quantile(metrics[name], level))) for name in _TWO for level in (0.5, 0.05, 0.95)]


def _panels(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `figures.panels` draws; RunError, naming the file, where one is missing."""
    hint = "; remove it, and the page is written without its figure"
    arrays = files.read_arrays(path, hint=hint)
    wrong = [name for name in figures.PANELS if name not in arrays or not np.isfinite(arrays[name].astype(float)).any()]
    if wrong:
        raise RunError(f"{path} is damaged: it has no numbers {wrong[0]}{hint}")
    return arrays
