"""The mixture's report: its statistics against numpy, and its files on synthetic runs."""

import base64
import json

import numpy as np
import pytest

from kd_jax.gmm.report import page

BETAS = (1.0, 10.0, 100.0)
BASE = {"dim": 2, "num_data": 100, "teacher_components": 4, "student_components": 1, "separation": 3.0}


def make_rows(seeds=5, betas=BETAS, **changes):
    """Rows with precision rising by 2 and recall falling by 1 nat per decade of beta, plus noise."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for arm, beta in [("distilled", b) for b in betas] + [("direct", max(betas))]:
            decade = np.log10(beta) if arm == "distilled" else -0.4
            noise = rng.normal(0, 0.1, 9)
            values = {
                "precision": -8 + 2 * decade, "recall": -4 - decade, "precision_notebook": -5 + decade,
                "recall_notebook": -4.1 - decade, "weight_entropy": 1.3 - 0.5 * decade,
                "teacher_entropy": 4 - 0.6 * decade, "student_entropy": 4.2 - 0.6 * decade,
                "kl_student_data": 5 - 2 * decade, "kl_data_student": 1 + decade,
            }  # fmt: skip
            values = {k: v + n for (k, v), n in zip(values.items(), noise, strict=True)}
            rows.append(BASE | changes | values | {"arm": arm, "beta": beta, "seed": seed})
    return rows


def make_panels(path, grid=60, count=300):
    """Write a panels.npz with the right names and shapes."""
    rng = np.random.default_rng(1)
    axis = np.linspace(-6, 6, grid)
    x, y = np.meshgrid(axis, axis)
    angles = np.arange(8) * np.pi / 4
    centres = 3 * np.stack([np.cos(angles), np.sin(angles)], 1)

    def log_density(means, scale):
        squares = [((x - a) ** 2 + (y - b) ** 2) / (2 * scale**2) for a, b in means]
        return np.logaddexp.reduce([-s - np.log(2 * np.pi * scale**2 * len(means)) for s in squares])

    def draw(means, scale, n=count):
        return np.asarray(means)[rng.integers(len(means), size=n)] + rng.normal(0, scale, (n, 2))

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, grid_x=axis, grid_y=axis, beta=100.0, data=draw(centres, 0.5, 100),
        log_p_star=log_density(centres, 0.5), log_teacher=log_density(centres[::2], 0.9),
        log_direct=log_density([(0, 0)], 2.2), log_distilled=log_density(centres[:1], 0.9),
        samples_p_star=draw(centres, 0.5), samples_teacher=draw(centres[:1], 0.9),
        samples_direct=draw([(0, 0)], 2.2), samples_distilled=draw(centres[:1], 0.9),
    )  # fmt: skip


def make_run(folder, rows, with_panels=True):
    """A run folder holding the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"command": "python -m kd_jax.gmm <x>", "versions": {"jax": "0.0"}, "device": "cpu", "seed": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text('{"experiment": "gmm"}')
    if with_panels:
        make_panels(folder / "checkpoints" / "panels.npz")
    return folder


def test_slope_matches_polyfit_per_seed():
    rows = make_rows()
    for metric, truth in (("precision", 2.0), ("recall", -1.0)):
        fits = []
        for seed in range(5):
            own = [r for r in rows if r["seed"] == seed and r["arm"] == "distilled"]
            fits.append(np.polyfit(np.log10([r["beta"] for r in own]), [r[metric] for r in own], 1)[0])
        mean, error = page.slope(rows, metric)
        assert mean == pytest.approx(np.mean(fits))
        assert error == pytest.approx(np.std(fits, ddof=1) / np.sqrt(5))
        assert mean == pytest.approx(truth, abs=0.2)


def test_summarise_matches_numpy():
    rows = make_rows() + make_rows(num_data=400)
    summary = page.summarise(rows)
    assert len(summary) == 2 * (len(BETAS) + 1)
    entry = next(r for r in summary if r["arm"] == "distilled" and r["beta"] == 10 and r["num_data"] == 400)
    own = [r["recall"] for r in rows if r["arm"] == "distilled" and r["beta"] == 10 and r["num_data"] == 400]
    assert entry["n"] == 5 and entry["recall_bad"] == 0
    assert entry["recall_mean"] == pytest.approx(np.mean(own))
    assert entry["recall_se"] == pytest.approx(np.std(own, ddof=1) / np.sqrt(5))


def test_report_holds_values_and_figures(tmp_path):
    rows = make_rows() + make_rows(num_data=400)
    path = page.write(make_run(tmp_path / "run", rows))
    html = path.read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html
    for entry in page.summarise(make_rows()):
        assert f"{entry['precision_mean']:.3f} ± {entry['precision_se']:.3f}" in html
        assert f"{entry['kl_data_student_mean']:.3f} ± {entry['kl_data_student_se']:.3f}" in html
    assert "{:.3f} ± {:.3f}".format(*page.slope(make_rows(), "precision")) in html
    assert "kd_jax.gmm &lt;x&gt;" in html and "jax 0.0" in html
    assert "published notebook" in html
    for name in ("frontier", "curves", "panels", "settings"):
        assert (path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (path.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in path.parent.glob("*report*")) == ["report.html"]


def test_non_finite_values_are_counted_and_panels_are_optional(tmp_path):
    rows = make_rows()
    rows[0]["kl_student_data"] = float("inf")
    path = page.write(make_run(tmp_path / "run", rows, with_panels=False))
    assert "inf (1 of 5 seeds)" in path.read_text(encoding="utf-8")
    assert not (path.parent / "figures" / "panels.png").exists()
    assert not (path.parent / "figures" / "settings.png").exists()


def test_one_seed_has_no_standard_error(tmp_path):
    rows = make_rows(seeds=1)
    assert np.isnan(page.slope(rows, "precision")[1])
    assert "nan" not in page.write(make_run(tmp_path / "run", rows)).read_text(encoding="utf-8").split("<img")[0]


def test_row_of_something_else_is_named(tmp_path):
    rows = make_rows(seeds=1)
    del rows[2]["beta"]
    with pytest.raises(ValueError, match="metrics.jsonl, row 3: no beta"):
        page.write(make_run(tmp_path / "run", rows))
    assert not (tmp_path / "run" / "report.html").exists()


def test_beside_is_the_frontier_and_the_slopes_of_the_first_setting(tmp_path):
    folder = make_run(tmp_path / "run", make_rows() + make_rows(num_data=400), with_panels=False)
    short = page.beside(folder)
    assert base64.b64decode(short.image) == (folder / "figures" / "frontier.png").read_bytes()
    assert short.slopes == [
        (name, "{:.3f} ± {:.3f}".format(*page.slope(make_rows(), name))) for name in ("precision", "recall")
    ]
