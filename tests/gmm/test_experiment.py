"""The chain against exact values and against scikit-learn; the sweep's promises."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from benchmarks import notebook_chain
from configs import gmm, gmm_wide
from kd_jax.gmm import experiment, students
from kd_jax.gmm.mixture import Mixture, log_prob, sample
from kd_jax.gmm.specs import GmmSpec
from kd_jax.runs.settings import freeze

ROOT = Path(__file__).parents[2]
CONFIG = gmm.get_config()
CONFIG.num_betas = 3
SPEC = freeze(GmmSpec, CONFIG)
BASE = experiment.base_of(SPEC)
SMALL = BASE._replace(num_distill=200, num_precision=200, num_recall=200)
NUMBERS = experiment.numbers_of(SPEC)
DIRECT, PLAIN, FIRST, LAST, HEAVIEST, LIGHTEST = 0, 1, 2, 4, 5, 7  # students of a chain of three betas


@pytest.fixture(scope="module")
def made():
    return experiment.sweep(SMALL, np.arange(24), NUMBERS)


def monte_carlo(values):
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))


@pytest.mark.slow
def test_exact_precision_and_recall_of_one_mode_and_of_the_matched_gaussian():
    p_star = students.eight_modes(2)
    mode = Mixture(jnp.zeros(1), jnp.ones((1, 2)), jnp.full((1, 2), 0.025))
    matched = Mixture(jnp.zeros(1), jnp.zeros((1, 2)), jnp.full((1, 2), 0.775))
    fresh = sample(jax.random.key(0), p_star, 200_000)
    for judge, draws, exact in [
        (p_star, sample(jax.random.key(1), mode, 200_000), -1.22395),
        (mode, fresh, -69.14900),
        (matched, fresh, -2.58298),
        (p_star, fresh, -1.22394),
        (p_star, sample(jax.random.key(2), matched, 200_000), -7.444),
    ]:
        mean, error = monte_carlo(np.asarray(log_prob(judge, draws), np.float64))
        assert abs(mean - exact) < 4 * error + 1e-3
    # Without Monte Carlo: E|x|^2 is known, and so is the mean of a Gaussian's log density.
    second = 2 * 0.775
    np.testing.assert_allclose(-np.log(2 * np.pi * 0.775) - second / (2 * 0.775), -2.58298, atol=1e-5)
    # judged by the one-hot teacher that it copies, the mode would look far better (the published notebook's mistake)
    mean, error = monte_carlo(np.asarray(log_prob(mode, sample(jax.random.key(3), mode, 200_000)), np.float64))
    assert abs(mean - 0.85100) < 4 * error + 1e-3


def test_one_far_sample_leaves_recall_finite():
    student = Mixture(jnp.zeros(1), jnp.zeros((1, 1)), jnp.ones((1, 1)))
    scores = log_prob(student, jnp.array([[100.0]] + [[0.0]] * 9))
    np.testing.assert_allclose(scores[0], -5000.9189385, rtol=1e-6)
    np.testing.assert_allclose(scores.mean(), -500.9189385, rtol=1e-6)


def test_eight_modes_in_more_dimensions():
    p_star = students.eight_modes(8, 2.0)
    assert p_star.means.shape == (8, 8) and not p_star.means[:, 2:].any()
    distances = np.linalg.norm(p_star.means[:, None] - p_star.means[None], axis=-1)
    np.testing.assert_allclose(distances[distances > 0].min(), 2.0)
    with pytest.raises(ValueError, match="2 dimensions"):
        students.eight_modes(1)


@pytest.mark.slow
def test_means_over_seeds_equal_scikit_learns():
    seeds = 24
    peer = [notebook_chain.run_seed(seed, NUMBERS.betas) for seed in range(seeds)]
    scores = experiment.sweep(BASE, np.arange(seeds), NUMBERS).scores
    theirs = np.stack([p[0] for p in peer])[:, None], np.stack([p[1] for p in peer])
    for who, other in zip((slice(DIRECT, PLAIN), slice(FIRST, LAST + 1)), theirs, strict=True):
        for c, column in enumerate(("precision", "recall", "precision_notebook", "recall_notebook")):
            a, b = getattr(scores, column)[:, who], other[:, :, c]
            joint = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / seeds)
            assert (np.abs(a.mean(0) - b.mean(0)) < 4 * joint).all(), column


@pytest.mark.slow
def test_precision_rises_and_recall_falls_and_the_divergences_are_consistent(made):
    scores = made.scores
    ends = scores.precision[:, [FIRST, LAST]].mean(0), scores.recall[:, [FIRST, LAST]].mean(0)
    assert np.diff(ends[0]) > 1 and np.diff(ends[1]) < -5
    np.testing.assert_allclose(scores.kl_student_data, -scores.student_entropy - scores.precision, atol=1e-3)
    # H(p*) = 1.22394; its estimate on the fresh draws has an error of its own.
    np.testing.assert_allclose(scores.kl_data_student + scores.recall, -1.22394, atol=0.5)
    assert (scores.weight_entropy[:, PLAIN] <= np.log(4) + 1e-6).all()


def test_beta_one_is_the_plain_student_and_controls_have_one_component(made):
    np.testing.assert_allclose(made.scores.precision[:, FIRST], made.scores.precision[:, PLAIN], rtol=1e-4)
    np.testing.assert_allclose(made.scores.weight_entropy[:, HEAVIEST : LIGHTEST + 1], 0, atol=1e-6)
    # concentration alone raises precision: also on the lightest component
    means = made.scores.precision.mean(0)
    assert means[LIGHTEST] > means[DIRECT] + 2 and means[HEAVIEST] > means[DIRECT] + 2


@pytest.mark.slow
def test_cooled_gaussians_have_scipys_recall_and_the_draws_of_the_cooled_density(made):
    # E log N(x; m, T C) needs only the fresh draws, which the student's recall at T = 1 was measured on as well
    direct = Mixture(*(leaf[0, DIRECT] for leaf in made.students))
    for t, temperature in enumerate(NUMBERS.temperatures):
        fresh = sample(students.keys(0)[students.RECALL], students.eight_modes(2), SMALL.num_recall)
        peer = multivariate_normal(direct.means[0], np.diag(temperature * direct.covariances[0])).logpdf(fresh)
        np.testing.assert_allclose(made.curves.recall[0, t, 0, DIRECT], peer.mean(), rtol=1e-4)
    # means at temperatures .9, .8, .6: the entropy falls, and the draws come nearer to the mean
    assert (made.curves.precision[:, 0, 0, DIRECT] > made.scores.precision[:, DIRECT]).mean() > 0.9


@pytest.mark.slow
def test_a_student_of_several_components_is_cooled_by_its_weights_and_by_its_covariances():
    setting = SMALL._replace(student_components=3, num_precision=50_000)
    chain = jax.jit(lambda seed: experiment.chain(setting, seed, NUMBERS))(0)
    fresh = students.ground(setting, 0, NUMBERS.separation, NUMBERS.tol).fresh
    p_star = students.eight_modes(2)
    log_weights, means, covariances = (np.asarray(leaf[DIRECT], np.float64) for leaf in chain.students)
    modes = [multivariate_normal(mean, np.diag(covariance)) for mean, covariance in zip(*p_star[1:], strict=True)]
    for t, temperature in enumerate(NUMBERS.temperatures):
        for way in (0, 1):
            weights = np.exp(log_weights) if way == 0 else np.exp(log_weights / temperature)
            weights = weights / weights.sum()
            scaled = covariances * (temperature if way == 0 else 1)
            parts = [multivariate_normal(mean, scale) for mean, scale in zip(means, scaled, strict=True)]
            density = sum(weight * part.pdf(fresh) for weight, part in zip(weights, parts, strict=True))
            np.testing.assert_allclose(chain.curves.recall[t, way, DIRECT], np.log(density).mean(), rtol=1e-4)
            # Precision by draws of NumPy's: equal within what two samples of this size differ.
            draws = np.concatenate([
                part.rvs(count, random_state=7)
                for part, count in zip(parts, np.random.default_rng(7).multinomial(200_000, weights), strict=True)
                if count
            ])  # fmt: skip
            scores = np.log(sum(mode.pdf(draws) for mode in modes) / len(modes))
            error = scores.std() / np.sqrt(setting.num_precision)
            assert abs(chain.curves.precision[t, way, DIRECT] - scores.mean()) < 5 * error


@pytest.mark.slow
def test_random_choice_equals_monte_carlo():
    one = Mixture(jnp.zeros(1), jnp.zeros((1, 2)), jnp.full((1, 2), 0.775))
    other = Mixture(jnp.zeros(1), jnp.ones((1, 2)), jnp.full((1, 2), 0.05))
    p_star, key = students.eight_modes(2), jax.random.key(5)
    fresh = sample(jax.random.key(1), p_star, 100_000)
    shared = students.Ground(p_star, fresh, fresh, None, None, one, one)
    draws = {name: sample(key, m, 100_000) for name, m in (("one", one), ("other", other))}
    pair = [students.Simple(log_prob(p_star, x).mean(), log_prob(m, fresh).mean())
            for m, x in ((one, draws["one"]), (other, draws["other"]))]  # fmt: skip
    exact = students.random_choice(shared, jnp.array([0.3, 0.9]), one, other, pair)
    for i, share in enumerate((0.3, 0.9)):
        rng = np.random.default_rng(i)
        picked = np.where(rng.uniform(size=(100_000, 1)) < share, draws["other"], draws["one"])
        mean, error = monte_carlo(np.asarray(log_prob(p_star, picked)))
        assert abs(mean - exact.precision[i]) < 3 * np.sqrt(2) * error
        # the density of the choice by SciPy, on draws of their own
        x = np.asarray(sample(jax.random.key(7 + i), p_star, 100_000))
        density = (1 - share) * multivariate_normal([0, 0], 0.775).pdf(x)
        density += share * multivariate_normal([1, 1], 0.05).pdf(x)
        mean, error = monte_carlo(np.log(density))
        assert abs(mean - exact.recall[i]) < 3 * np.sqrt(2) * error
        assert exact.recall[i] > (1 - share) * pair[0].recall + share * pair[1].recall


@pytest.mark.long
def test_cells_of_the_full_size_are_the_base_setting():
    cell = experiment.Cell(*(getattr(SPEC, axis) for axis in experiment.AXES))._replace(num_distill=200)
    small = cell._replace(num_data=50, teacher_components=2)
    seeds = np.arange(12)
    got = experiment.cell_sweep(SMALL, seeds, (cell, small), NUMBERS.betas, SPEC.tol)
    whole = experiment.sweep(SMALL, seeds, NUMBERS).scores
    alone = SMALL._replace(num_data=50, teacher_components=2)
    part = experiment.sweep(alone, seeds, NUMBERS).scores
    for c, other in ((0, whole), (1, part)):
        theirs = other.precision[:, [DIRECT, FIRST, FIRST + 1, LAST]]
        if c == 0:
            np.testing.assert_allclose(got["precision"][:, c], theirs, rtol=1e-2, atol=2e-2)
        joint = np.sqrt((theirs.var(0, ddof=1) + got["precision"][:, c].var(0, ddof=1)) / 12)
        assert (abs(got["precision"][:, c].mean(0) - theirs.mean(0)) < 4 * joint).all()


@pytest.mark.slow
def test_one_compilation_for_all_betas_seeds_and_separations():
    counted = jax.jit(chex.assert_max_traces(experiment._chains, n=1), static_argnums=0)
    for seeds, beta, separation in ((0, 1.0, 1.0), (5, 50.0, 2.0)):
        numbers = NUMBERS._replace(betas=beta * NUMBERS.betas, separation=separation, tol=1e-3)
        numbers = jax.tree.map(np.float32, numbers)
        counted.lower(SMALL, jnp.arange(seeds, seeds + 2, dtype=jnp.uint32), numbers)


@pytest.mark.slow
def test_other_batches_give_the_same_numbers(made):
    again = experiment.sweep(SMALL, [4], NUMBERS)
    np.testing.assert_allclose(made.scores.precision[4], again.scores.precision[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made.curves.recall[4], again.curves.recall[0], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_eight_devices_give_the_same_numbers(tmp_path):
    script = (
        "import sys, numpy as np, jax\n"
        "from kd_jax.gmm import experiment\n"
        "from tests.gmm.test_experiment import NUMBERS, SMALL\n"
        "assert jax.device_count() == 8\n"
        "scores = experiment.sweep(SMALL, np.arange(11), NUMBERS).scores\n"
        "np.savez(sys.argv[1], precision=scores.precision, recall=scores.recall)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", script, str(tmp_path / "eight.npz")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    eight, one = np.load(tmp_path / "eight.npz"), experiment.sweep(SMALL, np.arange(11), NUMBERS).scores
    # Students of beta 100 and of one component are narrow: their recall divides by small variances, roundings with it.
    for part, rtol in ((slice(0, LAST), 1e-4), (slice(LAST, None), 1e-3)):
        for name in ("precision", "recall"):
            np.testing.assert_allclose(
                eight[name][:, part], getattr(one, name)[:, part], rtol=rtol, atol=1e-4
            )  # fmt: skip


def test_settings_vary_one_axis_at_a_time_and_the_grid_is_whole():
    cells = experiment.cells_of(freeze(GmmSpec, gmm_wide.get_config()))
    base = experiment.Cell(*(getattr(SPEC, axis) for axis in experiment.AXES))
    assert len(set(cells)) == len(cells) and base not in cells
    pairs = {(c.teacher_components, c.student_components) for c in [*cells, base]}
    assert {(t, s) for t in (1, 2, 4, 8) for s in (1, 2, 4, 8)} <= pairs


def train(folder, *flags, check=True):
    command = [sys.executable, "-m", "kd_jax.train", "--config", "configs/gmm.py:smoke", "--workdir", str(folder)]
    return subprocess.run([*command, *flags], cwd=ROOT, check=check, capture_output=True, text=True)


@pytest.mark.long
def test_a_run_resumes_exactly_and_a_finished_one_is_left_alone(tmp_path):
    # One seed a chunk: memory for less than one.
    train(tmp_path / "whole", "--config.memory_gib=1e-9")
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert len(rows.splitlines()) > 4 * (3 + 2)
    assert {"report.html", "figures", "manifest.json", "config.json"} <= {
        p.name for p in (tmp_path / "whole").iterdir()
    }

    # What a kill after two chunks, in the middle of writing a row and a checkpoint, leaves behind.
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    manifest = json.loads((killed / "manifest.json").read_text()) | {"status": "running"}
    (killed / "manifest.json").write_text(json.dumps(manifest))
    chunks = killed / "checkpoints" / "chunks"
    for path in chunks.iterdir():
        if path.name.isdigit() and int(path.name) >= 2:
            shutil.rmtree(path)
    (chunks / "2.orbax-checkpoint-tmp").mkdir()
    (killed / "metrics.jsonl").write_text(rows[: len(rows) // 2 + 7])
    resumed = train(killed, "--config.memory_gib=1e-9")
    assert "2 of" in resumed.stdout
    assert (killed / "metrics.jsonl").read_text() == rows

    before = (killed / "manifest.json").read_text()
    assert "nothing left to do" in train(killed, "--config.memory_gib=1e-9").stdout
    assert (killed / "manifest.json").read_text() == before
    other = train(killed, "--config.seeds=5", check=False)
    assert other.returncode != 0 and "seeds" in other.stderr


@pytest.mark.slow
def test_students_that_are_left_out_and_a_chunk_that_is_lost(tmp_path):
    """One run has no cooled students and no random choice; the rows of a first chunk that was lost keep their place."""
    train(tmp_path / "none", "--config.sample_temperatures=1.0", "--config.shares=()")
    assert not {"random_choice"} & {json.loads(row)["arm"] for row in (tmp_path / "none/metrics.jsonl").open()}
    train(tmp_path / "lost", "--config.memory_gib=1e-9")
    rows = (tmp_path / "lost" / "metrics.jsonl").read_text()
    manifest = json.loads((tmp_path / "lost" / "manifest.json").read_text()) | {"status": "running"}
    (tmp_path / "lost" / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "lost" / "checkpoints" / "chunks" / "0")
    train(tmp_path / "lost", "--config.memory_gib=1e-9")
    assert (tmp_path / "lost" / "metrics.jsonl").read_text() == rows


@pytest.mark.long
def test_a_killed_process_loses_nothing(tmp_path):
    flags = ("--config.memory_gib=1e-9", "--config.seeds=30")
    train(tmp_path / "whole", *flags)
    command = [sys.executable, "-m", "kd_jax.train", "--config", "configs/gmm.py:smoke", "--workdir"]
    rows = tmp_path / "killed" / "metrics.jsonl"
    for enough in (4 * 3, 4 * 11):
        with subprocess.Popen([*command, str(tmp_path / "killed"), *flags], cwd=ROOT) as process:
            while process.poll() is None and (not rows.exists() or len(rows.read_text().splitlines()) < enough):
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -9
    train(tmp_path / "killed", *flags)
    assert rows.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
