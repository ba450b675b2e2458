"""The mixture's report: its statistics against NumPy, and its files on synthetic runs."""

import base64
import json
import re

import numpy as np
import pytest

from kd_jax.gmm import findings
from kd_jax.gmm.findings import Who
from kd_jax.gmm.mixture import Mixture
from kd_jax.gmm.report import figures, page
from kd_jax.gmm.students import CONTROLS

BETAS = (1.0, 10.0, 100.0)
BASE = {
    "dim": 2, "num_data": 100, "teacher_components": 4, "student_components": 1, "num_distill": 1000, "separation": 1.0,
}  # fmt: skip


def make_rows(seeds=5, betas=BETAS, cooled=False, **changes):
    """Rows with precision rising by 2 and recall falling by 1 nat per decade of beta, plus noise.

    With `cooled`, the direct student gains 1.5 nats of precision at temperature 0.5 and loses 0.15 of recall.
    """
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        shared = rng.normal(0, 0.1, 2)
        for arm, beta in [("direct", None)] + [("distilled", b) for b in betas]:
            decade = np.log10(beta) if beta else 0.0
            values = {
                "precision": -8 + 2 * decade + shared[0], "recall": -4 - decade + shared[1],
                "precision_notebook": -5 + decade, "recall_notebook": -4.1 - decade, "weight_entropy": 1.3,
                "teacher_entropy": 4 - 0.6 * decade, "student_entropy": 4.2 - 0.6 * decade,
                "kl_student_data": 5 - 2 * decade, "kl_data_student": 1 + decade,
            }  # fmt: skip
            values = {k: v + n for (k, v), n in zip(values.items(), rng.normal(0, 0.01, 9), strict=True)}
            rows.append(BASE | changes | values | {"arm": arm, "beta": beta, "seed": seed, "sample_temperature": 1.0})
        if cooled:
            direct = {"precision": -6.5 + shared[0], "recall": -4.15 + shared[1]}
            at = {"seed": seed, "sample_temperature": 0.5, "cooling": "covariances"}
            rows.append(BASE | changes | direct | at | {"arm": "direct", "beta": None})
            for arm in ("plain", *CONTROLS):
                scores = {"precision": -8 + shared[0], "recall": -4 + shared[1], "teacher_entropy": 1.0}
                rows.append(BASE | changes | scores | {"arm": arm, "beta": None, "seed": seed})
            rows.append(BASE | changes | direct | at | {"arm": "plain", "beta": None})
            choice = {"arm": "random_choice", "beta": None, "share": 0.5, "seed": seed, "sample_temperature": 1.0}
            rows.append(BASE | changes | choice | {"precision": -6 + shared[0], "recall": -4.2 + shared[1]})
    return rows


def make_panels(path):
    """Writes a panels.npz with the right names and shapes."""
    rng = np.random.default_rng(1)
    arrays = {"data": rng.normal(size=(100, 2)), "beta": 100.0}
    for name, k in zip(figures.MIXTURES, (8, 4, 4, 1, 1), strict=True):
        full = name == "teacher"
        covariances = np.tile(0.1 * np.eye(2), (k, 1, 1)) if full else np.full((k, 2), 0.1)
        log_weights = np.full(k, -np.log(k)) if name != "sharpened" else np.array([0.0] + [-np.inf] * (k - 1))
        mixture = Mixture(log_weights, rng.normal(size=(k, 2)), covariances)
        arrays |= {f"{name}_{field}": value for field, value in mixture._asdict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def make_run(folder, rows, with_panels=True, **config):
    """A run folder holding the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"command": "python -m kd_jax.gmm <x>", "versions": {"jax": "0.0"}, "device": "cpu", "seed": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"experiment": "gmm"} | config))
    if with_panels:
        make_panels(folder / "checkpoints" / "panels.npz")
    return folder


def students_of(tmp_path, rows):
    return next(iter(findings.load(make_run(tmp_path / "read", rows)).values()))


def test_slopes_of_each_decade_are_paired_differences(tmp_path):
    rows = make_rows()
    students = students_of(tmp_path, rows)
    assert findings.decades(students) == [(1.0, 10.0), (10.0, 100.0)]
    for metric, truth in (("precision", 2.0), ("recall", -1.0)):
        pick = lambda beta: np.array([r[metric] for r in rows if r["beta"] == beta])  # noqa: B023, E731
        change = pick(100.0) - pick(10.0)
        got = findings.slope(students, metric, 10.0, 100.0)
        np.testing.assert_allclose((got.mean, got.error), (change.mean(), change.std(ddof=1) / np.sqrt(5)))
        assert got.mean == pytest.approx(truth, abs=0.05)


def test_curves_in_two_steps_of_beta_have_one_slope(tmp_path):
    students = students_of(tmp_path, make_rows(betas=(1.0, 3.0)))
    assert findings.decades(students) == [(1.0, 3.0)]


def test_the_last_step_ends_at_the_largest_beta(tmp_path):
    students = students_of(tmp_path, make_rows(betas=(1.0, 10.0, 30.0)))
    assert findings.decades(students) == [(1.0, 10.0), (10.0, 30.0)]


def test_report_holds_values_and_figures(tmp_path):
    rows = make_rows(cooled=True) + make_rows(num_data=400) + make_rows(teacher_components=1)
    path = page.write(make_run(tmp_path / "run", rows, vary={"grid": [1, 4]}))
    # what scripts fetch (nothing) is seen in tests/reporting/test_browser.py
    html = re.sub(r"<script.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "http:" not in html and "https:" not in html
    precision = np.array([r["precision"] for r in make_rows(cooled=True) if r["beta"] == 10.0])
    assert f"{precision.mean():.3f} ± {precision.std(ddof=1) / np.sqrt(5):.3f}" in html
    assert "kd_jax.gmm &lt;x&gt;" in html and "jax 0.0" in html
    assert "published notebook" in html and "draws of p*" in html and "± 0.00<" not in html
    for name in ("frontier", "curves", "panels", "capacity"):
        assert (path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (path.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_headline_is_recall_at_equal_precision_against_the_cooled_direct_student(tmp_path):
    # at 1 nat of precision: sharpening has lost 0.5 of recall, the cooled direct student 0.1, the random choice 0.1
    folder = make_run(tmp_path / "run", make_rows(seeds=9, cooled=True))
    students = next(iter(findings.load(folder).values()))
    found = findings.compared(students, findings.spec_of(folder))
    assert (found[0].way, found[0].gain) == (findings.SHARPENED, 1.0)
    assert found[0].difference.mean == pytest.approx(-0.4, abs=0.02) and found[0].difference.dof == 8
    choice = next(m for m in found if m.way == findings.RANDOM_CHOICE and m.gain == 1.0)
    assert choice.difference.mean == pytest.approx(0.0, abs=0.02)
    html = page.write(folder).read_text(encoding="utf-8")
    first = html.index("<strong>")
    assert first < html.index("<img") < html.index("<table>")
    assert "has more recall" in html[first : html.index("<img")] and "nats less recall than the direct student" in html
    assert "is dominated" in html


@pytest.mark.slow
def test_a_smoke_run_says_so_and_draws_no_conclusion(tmp_path):
    folder = make_run(tmp_path / "run", make_rows(cooled=True), smoke=True)
    html = page.write(folder).read_text(encoding="utf-8")
    assert "smoke run of 5 seeds" in html and "The preregistered contrast:" not in html
    assert findings.summary(folder)[-1] == "a smoke run: no conclusions"


def test_summary_says_the_result(tmp_path):
    lines = findings.summary(make_run(tmp_path / "run", make_rows(cooled=True)))
    assert lines[0].startswith("direct student: precision -") and "95 % interval" in lines[-1]


@pytest.mark.slow
def test_non_finite_values_are_counted_and_panels_are_optional(tmp_path):
    rows = make_rows()
    rows[0]["kl_student_data"] = float("inf")
    path = page.write(make_run(tmp_path / "run", rows, with_panels=False))
    assert "inf (1 of 5 seeds)" in path.read_text(encoding="utf-8")
    assert not (path.parent / "figures" / "panels.png").exists()


@pytest.mark.slow
def test_one_seed_has_no_standard_error(tmp_path):
    text = page.write(make_run(tmp_path / "run", make_rows(seeds=1))).read_text(encoding="utf-8")
    assert "nan" not in text.split("<img")[0]


def test_row_of_something_else_is_named(tmp_path):
    rows = make_rows(seeds=1)
    del rows[2]["arm"]
    with pytest.raises(ValueError, match="metrics.jsonl, row 3: no arm"):
        page.write(make_run(tmp_path / "run", rows))
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_beside_is_the_frontier_and_the_slopes_of_the_first_setting(tmp_path):
    folder = make_run(tmp_path / "run", make_rows() + make_rows(num_data=400), with_panels=False)
    short = page.beside(folder)
    assert base64.b64decode(short.image) == (folder / "figures" / "frontier.svg").read_bytes()
    students = next(iter(findings.load(folder).values()))
    first = findings.slope(students, "precision", 1.0, 10.0)
    assert short.slopes[0][0] == "precision, beta 1 to 10" and short.slopes[0][1].startswith(f"{first.mean:.3f}")


def test_who_is_read_from_fields(tmp_path):
    students = students_of(tmp_path, make_rows(cooled=True))
    assert [who.temperature for who in findings.temperatures(students, Who("direct"))] == [1.0, 0.5]


def test_modes_that_a_density_has_dropped_are_marked(tmp_path):
    make_panels(tmp_path / "panels.npz")
    arrays = dict(np.load(tmp_path / "panels.npz"))
    modes = np.array([[x, y] for x in (-1.0, 0, 1) for y in (-1.0, 0, 1) if x or y])
    # At one mode, of variance 0.025: the next is 1 / 0.025 / 2 = 20 nats below it, and the lowest contour 4.5.
    own = {"log_weights": np.zeros(1), "means": modes[-1:], "covariances": np.full((1, 2), 0.025)}
    arrays |= {"p_star_means": modes, **{f"distilled_{name}": value for name, value in own.items()}}
    # This one reaches all modes: 2 / 2.25 / 2 = 0.4 nats at the corners.
    wide = {"log_weights": np.zeros(1), "means": np.zeros((1, 2)), "covariances": np.full((1, 2), 2.25)}
    arrays |= {f"direct_{name}": value for name, value in wide.items()}
    axes = figures.panels(arrays).axes
    dots = [[c for c in one.collections if hasattr(c, "get_sizes")] for one in (axes[1], axes[4])]
    crosses = [next(c for c in own if c.get_sizes() == [90]) for own in dots]
    assert [len(each.get_offsets()) for each in crosses] == [0, 7]


def test_the_direct_student_is_the_one_at_1_where_others_are_hotter(tmp_path):
    rows = make_rows(cooled=True)
    cooled = [row for row in rows if row["arm"] == "direct" and row["sample_temperature"] == 0.5]
    rows += [row | {"sample_temperature": 2.0, "precision": -13.0, "recall": -9.0} for row in cooled]
    students = students_of(tmp_path, rows)
    own = [[r["recall"], r["precision"]] for r in rows if r["arm"] == "direct" and r["sample_temperature"] == 1]
    drawn, made = (draw(students, findings.ways(students)) for draw in (figures.frontier, figures.chart))
    for axes in drawn.axes[:2]:
        (star,) = [one.lines[0] for one in axes.containers if one.lines[0].get_marker() == "*"]
        np.testing.assert_allclose(star.get_xydata(), [np.mean(own, 0)])
    (near,) = made["views"]
    assert near["x"][0] < np.mean(own, 0)[0] < near["x"][1] and near["y"][0] < np.mean(own, 0)[1] < near["y"][1]
