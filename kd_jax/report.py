"""A self-contained HTML report of a mixture distillation run: `python -m kd_jax.report runs/gmm`."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np
from jinja2 import Environment

from kd_jax import figures, run

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

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, footer, .note { font-size: .88rem; color: #555; }
footer { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: .8rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; overflow-wrap: anywhere; }
</style></head><body>
{% macro grid(head, rows) %}<div class="scroll"><table><thead><tr>{% for h in head %}<th>{{ h }}</th>{% endfor %}</tr>
</thead><tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% macro figure(name, caption) %}{% if name in images %}<figure><img alt="{{ caption }}"
 src="data:image/png;base64,{{ images[name] }}"><figcaption>{{ caption }}</figcaption></figure>{% endif %}{% endmacro %}
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
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
<footer><h2>Reproduction</h2><dl>{% for key, value in footer %}<dt>{{ key }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl></footer>
</body></html>
"""


def _number(value) -> float:
    """A metric as a float; a missing or null one is NaN."""
    return float("nan") if value is None else float(value)


def _setting(row: dict) -> tuple:
    """The tuple of fields that identifies a row's setting."""
    return tuple(row[key] for key in figures.SETTING)


def _mean_se(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error (NaN for fewer than two values)."""
    values = np.asarray(values, float)
    if not values.size or not np.isfinite(values).all():
        return (float(np.mean(values)) if values.size else float("nan")), float("nan")
    error = float(np.std(values, ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")
    return float(np.mean(values)), error


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
            values = np.array([_number(row.get(name)) for row in members])
            entry[f"{name}_mean"], entry[f"{name}_se"] = _mean_se(values)
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
            seeds.setdefault(row["seed"], []).append((np.log10(row["beta"]), _number(row.get(metric))))
    slopes = []
    for points in seeds.values():
        x, y = np.array(points, float).T
        x = x - x.mean()
        if np.ptp(x) > 0:
            slopes.append(np.dot(x, y - y.mean()) / np.dot(x, x) if np.isfinite(y).all() else np.nan)
    return _mean_se(np.array(slopes))


def _show(mean: float, error: float, digits: int = 3) -> str:
    """A mean with its standard error, as text."""
    if not np.isfinite(mean):
        return "not available"
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if np.isfinite(error) else "")


def _cell(entry: dict, name: str) -> str:
    """A table cell: mean ± SE, or the non-finite mean with how many of the seeds were not finite."""
    bad = entry[f"{name}_bad"]
    if bad:
        return f"{entry[f'{name}_mean']} ({bad} of {entry['n']} seeds)"
    return _show(entry[f"{name}_mean"], entry[f"{name}_se"])


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
        return f"shows no clear trend ({_show(mean, error)} nats per decade of beta)"
    return f"{'rises' if mean > 0 else 'falls'} by {_show(abs(mean), error)} nats per decade of beta"


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


def _footer(folder: Path) -> list[tuple[str, str]]:
    """The reproduction entries, as the manifest has them."""

    def text(value) -> str:
        return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = [(key, manifest[key]) for key in ("command", "versions", "device", "seed", "git_commit") if key in manifest]
    entries = [(key.replace("_", " "), text(value)) for key, value in found if value is not None]
    return [*entries, ("report", f"python -m kd_jax.report {folder}")]


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; raises FileNotFoundError, ValueError or RunError, fit to print."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run folder: {folder}")
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {folder}")
    rows = run.read_rows(path)
    if not rows:
        raise ValueError(f"metrics.jsonl in {folder} is empty")
    return rows


def write(folder: str | Path) -> Path:
    """Draw a run's figures into figures/ and write its report.html; returns the report's path."""
    folder = Path(folder)
    rows = read_rows(folder)
    summary = summarise(rows)
    base = _setting(rows[0])
    base_rows = [row for row in rows if _setting(row) == base]
    base_summary = [row for row in summary if row["setting"] == base]
    drawn = {"frontier": figures.frontier(base_summary), "curves": figures.curves(base_summary)}
    arrays = folder / "checkpoints" / "panels.npz"
    if arrays.is_file():
        with np.load(arrays) as loaded:
            drawn["panels"] = figures.panels(dict(loaded))
    compared = figures.comparison(summary)
    if compared is not None:
        drawn["settings"] = compared
    images = {}
    for name, figure in drawn.items():
        images[name] = base64.b64encode(figures.save(figure, folder / "figures", name).read_bytes()).decode("ascii")

    settings = list(dict.fromkeys(row["setting"] for row in summary))
    by_setting = []
    for setting in settings if len(settings) > 1 else []:
        members = [row for row in rows if _setting(row) == setting]
        slopes = [_show(*slope(members, name)) for name in ("precision", "recall")]
        by_setting.append([*setting, len({row["seed"] for row in members}), *slopes])
    html = Environment(autoescape=True).from_string(TEMPLATE).render(
        title="Distilling a Gaussian mixture: precision against recall",
        lead=_lead(base_rows),
        slopes=[(name, _show(*slope(base_rows, name))) for name in ("precision", "recall")],
        head=["student", "seeds", *(label for _, label in COLUMNS)],
        table=[
            ["direct" if r["arm"] == "direct" else f"beta = {r['beta']:g}", r["n"], *(_cell(r, n) for n, _ in COLUMNS)]
            for r in _chosen(base_summary)
        ],
        notebook=NOTEBOOK,
        images=images,
        settings=by_setting,
        settings_head=[*figures.SETTING_NAMES.values(), "seeds", "precision slope", "recall slope"],
        footer=_footer(folder),
    )  # fmt: skip
    path = folder / "report.html"
    run.write_text(path, html)
    return path


def main(argv: list[str] | None = None) -> int:
    """Command line: write the report of each run folder; 2 if one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m kd_jax.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders holding metrics.jsonl")
    for folder in parser.parse_args(argv).folders:
        try:
            print(write(folder))
        except (FileNotFoundError, ValueError, run.RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
