"""The report page of a mixture distillation run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_jax.gmm.report import figures
from kd_jax.reporting import page, row_kinds
from kd_jax.reporting.page import mean_se, number, show
from kd_jax.storage import files
from kd_jax.storage.errors import RunError

TITLE = "Distilling a Gaussian mixture: precision against recall"
_MOST = 1e9  # of what a panel has on its axes
METRICS = (
    "precision", "precision_notebook", "recall", "recall_notebook", "kl_student_data", "kl_data_student",
    "student_entropy", "teacher_entropy", "weight_entropy",
)  # fmt: skip
COLUMNS = (
    ("precision", "precision"),
    ("precision_notebook", "precision (notebook)"),
    ("recall", "recall"),
    ("recall_notebook", "recall (notebook)"),
    ("kl_student_data", "KL(p″‖p*)"),
    ("kl_data_student", "KL(p*‖p″)"),
    ("student_entropy", "student entropy"),
)
NOTEBOOK = (
    "The published notebook's precision differs because there the name of p* had been overwritten: it scores student "
    "samples under the beta-sharpened teacher rather than p*, and its recall uses the training draws instead of fresh "
    "ones; both are shown as the notebook columns."
)

KINDS = (
    dict.fromkeys(figures.SETTING, row_kinds.FINITE)
    | {"arm": row_kinds.TEXT, "beta": row_kinds.FINITE, "seed": row_kinds.INTEGER}
    | dict.fromkeys(METRICS, row_kinds.NUMBER)
)

TEMPLATE = """<p>{{ lead }}</p>
<h2>Slope per decade of beta</h2>
{{ grid(["metric", "slope (nats per decade)"], slopes) }}
<p class="note">Ordinary least squares on log10(beta), fitted to each seed's distilled students; mean ± standard error
over seeds.</p>
<h2>Precision–recall frontier</h2>
{{ figure("frontier", "Mean over seeds at each beta; bars are standard errors over seeds. The star is the student "
 ~ "fitted directly on the data.") }}
<h2>Chosen values of beta</h2>
{{ grid(head, table) }}
<p class="note">Mean ± standard error over seeds, in nats. An entry such as “inf (1 of 5 seeds)” says how many seeds
gave a non-finite value. The direct student's notebook precision is under the most selective teacher.</p>
<p>{{ notebook }}</p>
<h2>Curves</h2>
{{ figure("curves", "Precision and recall against beta and against the sharpened teacher's entropy; the dashed line "
 ~ "and band are the direct student's mean and standard error.") }}
{% if "panels" in images %}<h2>Densities, first seed</h2>
{{ figure("panels", "Contours lie 0.5, 2 and 4.5 nats below each density's mode.") }}{% endif %}
{% if settings %}<h2>Settings</h2>
{{ figure("settings", "One panel per varied axis, one line per value; stars are the direct students.") }}
{{ grid(settings_head, settings) }}
<p class="note">Slopes are in nats per decade of beta.</p>{% endif %}
"""


def _setting(row: dict) -> tuple:
    """The tuple of fields that identifies a row's setting."""
    return tuple(row[key] for key in figures.SETTING)


def summarise(rows: list[dict]) -> list[dict]:
    """Group rows by (setting, arm, beta), in order of first appearance.

    Each result has `setting`, its fields, `arm`, `beta`, `n` (rows) and for every metric `<name>_mean`, `<name>_se`
    (standard error over seeds) and `<name>_bad` (how many values are not finite).
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((_setting(row), row["arm"], float(row["beta"])), []).append(row)
    out = []
    for (setting, arm, beta), members in groups.items():
        entry = {"setting": setting, **dict(zip(figures.SETTING, setting, strict=True))}
        entry |= {"arm": arm, "beta": beta, "n": len(members)}
        for name in METRICS:
            values = np.array([number(row.get(name)) for row in members])
            entry[f"{name}_mean"], entry[f"{name}_se"] = mean_se(values)
            entry[f"{name}_bad"] = int(np.sum(~np.isfinite(values)))
        out.append(entry)
    return out


def slope(rows: list[dict], metric: str) -> tuple[float, float]:
    """Least-squares slope of `metric` per decade of beta, per seed over the distilled rows: mean and standard error.

    The rows should share one setting. A seed with fewer than two distinct betas has no slope and is left out; a
    non-finite value makes its seed's slope, and so the mean, NaN.
    """
    seeds: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["arm"] == "distilled" and row["beta"] > 0:
            seeds.setdefault(row["seed"], []).append((np.log10(row["beta"]), number(row.get(metric))))
    slopes = []
    for points in seeds.values():
        x, y = np.array(points, float).T
        x = x - x.mean()
        if np.ptp(x) > 0:
            slopes.append(np.dot(x, y - y.mean()) / np.dot(x, x) if np.isfinite(y).all() else np.nan)
    return mean_se(np.array(slopes))


def _cell(entry: dict, name: str) -> str:
    """A table cell: mean ± SE, or the non-finite mean with how many of the seeds were not finite."""
    bad = entry[f"{name}_bad"]
    if bad:
        return f"{entry[f'{name}_mean']} ({bad} of {entry['n']} seeds)"
    return show(entry[f"{name}_mean"], entry[f"{name}_se"])


def _chosen(summary: list[dict]) -> list[dict]:
    """The distilled rows with beta nearest (in ratio) to 1, 10 and 100, without repeats, then the direct row."""
    distilled = [r for r in summary if r["arm"] == "distilled" and r["beta"] > 0]
    picked: dict[float, dict] = {}
    for target in (1.0, 10.0, 100.0):
        if distilled:
            row = min(distilled, key=lambda r: abs(np.log(r["beta"] / target)))
            picked[row["beta"]] = row
    return list(picked.values()) + [r for r in summary if r["arm"] == "direct"][:1]


def _trend(mean: float, error: float) -> str:
    """A verb for a slope: it is called a rise or a fall only beyond two standard errors."""
    if not np.isfinite(mean):
        return "has no finite slope"
    if np.isfinite(error) and abs(mean) <= 2 * error:
        return f"shows no clear trend ({show(mean, error)} nats per decade of beta)"
    return f"{'rises' if mean > 0 else 'falls'} by {show(abs(mean), error)} nats per decade of beta"


def _lead(rows: list[dict]) -> str:
    """The opening paragraph, with the directions taken from the slopes."""
    base = rows[0]
    seeds = len({row["seed"] for row in rows})
    return (
        f"A teacher mixture of {base['teacher_components']} Gaussians, fitted to {base['num_data']} draws of p* in "
        f"{base['dim']} dimensions, is sharpened by raising its weights to the power beta; students of "
        f"{base['student_components']} component(s) are fitted to its draws (distilled) or to the data (direct). "
        f"Over {seeds} seed(s), as the teacher is sharpened the distilled student's precision "
        f"{_trend(*slope(rows, 'precision'))} and its recall {_trend(*slope(rows, 'recall'))}. Precision is the mean "
        "of log p* over student samples, recall the mean of the student's log density over fresh draws of p*."
    )


def _read(folder: Path) -> list[dict]:
    """The rows of a mixture run; ValueError names the one that is of something else."""
    rows = page.read_rows(folder)
    for index, row in enumerate(rows, start=1):
        where = f"{folder / 'metrics.jsonl'}, row {index}"
        missing = [key for key in (*figures.SETTING, "arm", "beta", "seed") if row.get(key) is None]
        if missing:
            raise ValueError(f"{where}: no {missing[0]}; not a mixture run's row")
        row_kinds.check(row, where, KINDS)
    return rows


def _panels(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `figures.panels` draws; RunError, naming the file, for what it could not."""
    hint = "; remove it, and the page is written without its figure"
    found = files.read_arrays(path, hint=hint)
    wrong = [name for name in figures.PANELS if name not in found or found[name].dtype.kind not in "fiu"]
    if wrong:
        raise RunError(f"{path} is damaged: it has no numbers {wrong[0]}{hint}")
    found = {name: found[name].astype(float) for name in figures.PANELS}
    grid = found["grid_y"].size, found["grid_x"].size
    for name, values in found.items():
        if name.startswith("log_"):
            # -inf is where there is no density; the contours lie below the highest
            right = values.shape == grid and bool((np.isnan(values) | (values < _MOST)).all())
        else:
            shapes = {"beta": values.ndim == 0, "grid_x": values.ndim == 1, "grid_y": values.ndim == 1}
            right = shapes.get(name, values.ndim == 2 and values.shape[1] == 2) and bool((abs(values) < _MOST).all())
        if name.startswith("grid_"):
            right = right and values.size > 1 and bool((np.diff(values) > 1 / _MOST).all())
        if not right:
            raise RunError(f"{path} is damaged: {name}, of shape {values.shape}, cannot be drawn{hint}")
    return found


def _base(rows: list[dict]) -> list[dict]:
    """The rows of the run's first setting."""
    return [row for row in rows if _setting(row) == _setting(rows[0])]


def _slopes(rows: list[dict]) -> list[tuple[str, str]]:
    return [(name, show(*slope(rows, name))) for name in ("precision", "recall")]


def beside(folder: str | Path) -> page.Beside:
    """The run's frontier, drawn into its figures/, and its slopes, for another run's page."""
    folder = Path(folder)
    rows = _base(_read(folder))
    image = page.embed({"frontier": figures.frontier(summarise(rows))}, folder)["frontier"]
    return page.Beside(f"Gaussian mixture, {folder.resolve().name}", image, _slopes(rows), "nats per decade of beta")


def write(folder: str | Path) -> Path:
    """Draw a run's figures into figures/ and write its report.html; returns the report's path."""
    folder = Path(folder)
    rows = _read(folder)
    summary = summarise(rows)
    base_rows = _base(rows)
    base_summary = [row for row in summary if row["setting"] == _setting(rows[0])]
    drawn = {"frontier": figures.frontier(base_summary), "curves": figures.curves(base_summary)}
    arrays = folder / "checkpoints" / "panels.npz"
    if arrays.is_file():
        drawn["panels"] = figures.panels(_panels(arrays))
    compared = figures.comparison(summary)
    if compared is not None:
        drawn["settings"] = compared

    settings = list(dict.fromkeys(row["setting"] for row in summary))
    by_setting = []
    for setting in settings if len(settings) > 1 else []:
        members = [row for row in rows if _setting(row) == setting]
        by_setting.append([*setting, len({row["seed"] for row in members}), *(text for _, text in _slopes(members))])
    html = page.render(
        TEMPLATE,
        folder=folder,
        title=TITLE,
        lead=_lead(base_rows),
        slopes=_slopes(base_rows),
        head=["student", "seeds", *(label for _, label in COLUMNS)],
        table=[
            ["direct" if r["arm"] == "direct" else f"beta = {r['beta']:g}", r["n"], *(_cell(r, n) for n, _ in COLUMNS)]
            for r in _chosen(base_summary)
        ],
        notebook=NOTEBOOK,
        images=page.embed(drawn, folder),
        settings=by_setting,
        settings_head=[*figures.SETTING_NAMES.values(), "seeds", "precision slope", "recall slope"],
    )
    path = folder / "report.html"
    files.write_text(path, html)
    return path
