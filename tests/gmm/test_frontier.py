"""The sweep over the knobs: what has to agree with the experiment and with itself, and a run from config to page."""

import csv
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs import gmm, gmm_frontier
from kd_jax import train
from kd_jax.gmm import experiment, frontier, students
from kd_jax.gmm.report import frontier as frontier_report
from kd_jax.gmm.specs import GmmFrontierSpec, GmmSpec
from kd_jax.runs.settings import freeze


def small(**changes):
    config = gmm_frontier.get_config("smoke")
    config.knobs.beta = (1.0, 10.0, 100.0, 1e6)
    config.update({"seeds": 3} | changes)
    return freeze(GmmFrontierSpec, config)


def scores(config, seeds):
    """Every student's scores [seed], by knob and value."""
    found = frontier.sweep(frontier.program_of(config), seeds, frontier.numbers_of(config))
    listed = frontier.students(config)
    return {
        (knob, value): {name: column[(slice(None), *index)] for name, column in found[part].items()}
        for knob, value, part, index in listed
    }


@pytest.fixture(scope="module")
def found():
    return scores(small(), np.arange(3))


def same(one, other, tolerance=1e-4):
    for name in sorted({"precision", "recall", "teacher_entropy", "kl_student_data"} & {*one} & {*other}):
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_knobs_at_their_neutral_values_are_the_plain_student(found):
    plain = found["plain", None]
    for neutral in (("beta", 1.0), ("top_k", 4), ("top_p", 1.0)):
        same(found[neutral], plain)
    # by gradient in place of EM, whose variances have a floor of 1e-6 added
    for forward in (("jensen_shannon", 0.0), ("skew_forward_kl", 0.0)):
        same(found[forward], plain, 2e-3)
    same(found["jensen_shannon", 1.0], found["skew_reverse_kl", 0.0])


@pytest.mark.slow
def test_without_beta_there_is_no_random_choice():
    config = gmm_frontier.get_config("smoke")
    config.knobs.beta, config.seeds = (), 1
    without = scores(freeze(GmmFrontierSpec, config), np.arange(1))
    assert ("plain", None) in without and frontier.CHOICE not in {knob for knob, _ in without}


@pytest.mark.slow
def test_students_of_the_experiment_are_the_same(found):
    spec = freeze(GmmSpec, gmm.get_config("smoke"))
    made = experiment.sweep(experiment.base_of(spec), np.arange(3), experiment.numbers_of(spec))
    others = [("direct", None), ("plain", None), *(("beta", beta) for beta in (1.0, 10.0, 100.0))]
    for i, other in enumerate(others):
        for name in ("precision", "recall", "kl_student_data", "teacher_entropy", "weight_entropy"):
            theirs = getattr(made.scores, name)[:, i]
            np.testing.assert_allclose(found[other][name], theirs, rtol=1e-3, atol=1e-3, err_msg=str(other))


@pytest.mark.slow
def test_one_component_left_is_beta_without_end(found):
    same(found["top_k", 1], found["top_p", 0.2])
    same(found["top_k", 1], found["beta", 1e6])


@pytest.mark.slow
def test_reverse_kl_is_more_precise_and_covers_less(found):
    forward, reverse = found["jensen_shannon", 0.0], found["jensen_shannon", 1.0]
    assert (reverse["precision"] > forward["precision"] + 1).all() and (reverse["recall"] < forward["recall"] - 1).all()
    assert (forward["start"] == 0).all()
    assert max(scores["gradient_norm"].max() for scores in found.values() if "gradient_norm" in scores) < 0.05


@pytest.mark.slow
def test_seeds_stand_alone(found):
    others = scores(small(), [7, 2, 9])
    for student, all_scores in found.items():
        for name, column in all_scores.items():
            np.testing.assert_allclose(others[student][name][1], column[2], rtol=1e-4, atol=1e-4, err_msg=str(student))


@pytest.mark.slow
def test_other_values_of_the_knobs_are_not_traced_again(found, monkeypatch):
    traced, ground = [], students.ground

    def counted(*arguments):
        traced.append(arguments)
        return ground(*arguments)

    monkeypatch.setattr(students, "ground", counted)
    knobs = {"beta": (2.0, 3.0, 4.0, 5.0), "top_k": (1, 2, 3, 4), "jensen_shannon": (0.0, 0.3, 1.0)}
    config = small(learning_rate=0.01, separation=2.0, tol=1e-2, knobs=knobs)
    changed = scores(config, np.arange(3))
    assert not traced
    assert not np.allclose(changed["jensen_shannon", 0.3]["recall"], found["jensen_shannon", 0.5]["recall"])
    numbers = frontier.numbers_of(config)
    jax.eval_shape(
        lambda seeds: frontier._sweep(frontier.program_of(config), seeds, numbers), np.arange(5, dtype=np.uint32)
    )
    assert len(traced) == 1  # that is how a trace would show


@pytest.mark.slow
def test_a_run_from_its_config_to_its_page_and_on_after_a_kill(tmp_path):
    config, folder = small(), tmp_path / "run"
    # two chunks of as many seeds as the other tests have, whose program is then there already
    size = experiment.chunk_size(frontier.program_of(config).setting, 14, 1.0)
    command = ["train", "--config", "configs/gmm_frontier.py:smoke", "--workdir", str(folder)]
    command += [f"--config.memory_gib={3.5 / size}", "--config.seeds=5", "--config.knobs.beta=(1.0,10.0,100.0,1e6)"]
    assert train.main(command) == 0
    rows = (folder / "metrics.jsonl").read_text()
    everyone = frontier.students(config)
    assert len(rows.splitlines()) == 5 * len(everyone)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?://", html)
    for knob, value, _, _ in everyone:
        assert frontier_report.NAMES[knob] + (f" = {value:g}" if value is not None else "") in html
    for name in ("frontier.png", "frontier.pdf"):
        assert (folder / "figures" / name).stat().st_size > 5000

    # what a kill after the first chunk leaves
    manifest = json.loads((folder / "manifest.json").read_text()) | {"status": "running"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text(rows[: len(rows) // 2 + 7])
    shutil.rmtree(folder / "checkpoints" / "chunks" / "1")
    assert train.main(command) == 0
    assert (folder / "metrics.jsonl").read_text() == rows


def make_run(folder, seeds=4, change=lambda row: row):
    """A run folder of rows with known prices: beta loses 2 nats per nat gained, Jensen-Shannon 3."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        precision, recall = -7 + rng.normal(0, 0.1), -2.6 + rng.normal(0, 0.01)
        base = {"seed": seed, "teacher_entropy": 1.8, "student_entropy": 2.5, "kl_student_data": 5.0}
        base |= {"kl_data_student": 1.4}
        fit = {"divergence": 0.5, "objective": 0.4, "gradient_norm": 1e-5, "start": float(seed % 2)}
        students = [("direct", None, 0, 0, {}), ("plain", None, 0, 0, {})]
        students += [("beta", v, g, 2 * g, {}) for v, g in ((1.0, 0), (10.0, 2), (100.0, 4))]
        students += [("jensen_shannon", v, g, 3 * g, fit) for v, g in ((0.0, 0), (1.0, 3))]
        for knob, value, gain, loss, more in students:
            own = {"knob": knob, "value": value, "precision": precision + gain, "recall": recall - loss}
            rows.append(change(base | own | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row))
    (folder / "manifest.json").write_text('{"command": "python -m kd_jax.train <x>"}')
    (folder / "config.json").write_text('{"experiment": "gmm_frontier", "gains": [1.0, 3.5, 9.0]}')
    return folder


def test_page_says_what_is_cheapest_and_by_how_much(tmp_path):
    html = frontier_report.write(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for sentence in (
        "At every gain compared, the knob that buys precision most cheaply in recall is sharpening (beta).",
        "Gain 1: sharpening (beta) costs 2.000 ± 0 nats of recall per nat; all others cost more, "
        "Jensen-Shannon (beta) next by 1.000 ± 0.",
        "Gain 3.5: sharpening (beta) costs 2.000 ± 0 nats of recall per nat; not reached by Jensen-Shannon (beta).",
        "No knob reaches a gain of 9 nats.",
        "The largest gradient norm of 8 fits is 1.0e-05.",
    ):
        assert sentence in html
    assert "kd_jax.train &lt;x&gt;" in html
    assert re.search(
        r"<td>Jensen-Shannon \(beta\) = 1</td><td>0.500 ± 0</td><td>0.400 ± 0</td><td>1.0e-05</td><td>50%", html
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: row | {"knob": "gamma"}, "row 1: knob 'gamma'"),
        (lambda row: {k: v for k, v in row.items() if k != "recall"}, "row 1: no recall"),
        (lambda row: row if (row["knob"], row["seed"]) != ("beta", 2) else None, "beta 1.0 does not have the seeds"),
        (lambda row: row if row["knob"] != "plain" else None, "no student of the unchanged teacher"),
    ],
)
def test_rows_of_something_else_are_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        frontier_report.write(make_run(tmp_path / "run", change=change))


@pytest.mark.slow
def test_curves_are_read_between_neighbours_in_whatever_order_the_values_are_listed(tmp_path):
    # At a gain of g sampling at temperature 1 - g / 5 loses g * g / 4 of recall, and sharpening 2 g.
    def tables(name, temperatures, shares):
        folder = make_run(tmp_path / name)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in [row for row in rows if row["knob"] in ("direct", "plain")]:
            at = [(f"cooled_{row['knob']}", t, 5 * (1 - t)) for t in temperatures]
            at += [("random_choice", s, 4 * s) for s in shares if row["knob"] == "plain"]
            for knob, value, gain in at:
                scores = {"precision": row["precision"] + gain, "recall": row["recall"] - gain**2 / 4}
                rows.append({"knob": knob, "value": value, "seed": row["seed"]} | scores)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.json").write_text('{"experiment": "gmm_frontier", "gains": [0.5]}')
        frontier_report.write(folder)
        return [(folder / "figures" / f"{table}.csv").read_text() for table in ("against_cooled_direct", "prices")]

    against, prices = tables("down", (1.2, 0.8, 0.6, 0.4), (0.25, 0.5, 0.75))
    assert [against, prices] == tables("mixed", (0.4, 0.6, 0.8, 1.2), (0.75, 0.25, 0.5))
    found = {row["way"]: row for row in csv.DictReader(io.StringIO(against))}
    # the direct student between 1 and 0.8 has lost half of 0.25
    assert float(found[frontier_report.NAMES["beta"]]["gain 0.5"]) == pytest.approx(0.125 - 1)
    assert float(found[frontier_report.NAMES["random_choice"]]["gain 0.5"]) == pytest.approx(0)
    assert float(found[frontier_report.NAMES["cooled_plain"]]["gain 1"]) == pytest.approx(0)
