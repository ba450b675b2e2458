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

from benchmarks import notebook_chain
from configs import gmm, gmm_wide
from kd_jax.gmm import experiment
from kd_jax.gmm.mixture import Mixture, log_prob, sample

ROOT = Path(__file__).parents[2]
BASE = experiment.settings(gmm.get_config())[0][0]
SMALL = BASE._replace(num_distill=200, num_precision=200, num_recall=200)


def monte_carlo(values):
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))


def test_exact_precision_and_recall_of_one_mode_and_of_the_matched_gaussian():
    p_star = experiment.ring(2)
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


def test_ring_in_more_dimensions():
    p_star = experiment.ring(8, 2.0)
    assert p_star.means.shape == (8, 8) and not p_star.means[:, 2:].any()
    distances = np.linalg.norm(p_star.means[:, None] - p_star.means[None], axis=-1)
    np.testing.assert_allclose(distances[distances > 0].min(), 2.0)
    with pytest.raises(ValueError, match="2 dimensions"):
        experiment.ring(1)


@pytest.mark.slow
def test_means_over_seeds_equal_scikit_learns():
    betas, seeds = np.array([1.0, 10.0, 100.0]), 24
    peer = [notebook_chain.run_seed(seed, betas) for seed in range(seeds)]
    arms = experiment.sweep(BASE, np.arange(seeds), betas)
    theirs = np.stack([p[0] for p in peer])[:, None], np.stack([p[1] for p in peer])
    for mine, other in zip(arms, theirs, strict=True):
        for c, column in enumerate(("precision", "recall", "precision_notebook", "recall_notebook")):
            a, b = getattr(mine, column).reshape(seeds, -1), other[:, :, c]
            joint = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / seeds)
            assert (np.abs(a.mean(0) - b.mean(0)) < 4 * joint).all(), column


def test_precision_rises_and_recall_falls_and_the_divergences_are_consistent():
    _, scores = experiment.sweep(BASE, np.arange(32), np.array([1.0, 10.0, 100.0]))
    assert (np.diff(scores.precision.mean(0)) > 0).all()
    assert (np.diff(scores.recall.mean(0)) < 0).all()
    np.testing.assert_allclose(scores.kl_student_data, -scores.student_entropy - scores.precision, atol=1e-3)
    # H(p*) = 1.22394; its estimate on the fresh draws has an error of its own.
    np.testing.assert_allclose(scores.kl_data_student + scores.recall, -1.22394, atol=0.15)
    assert (scores.weight_entropy[:, 0] <= np.log(4) + 1e-6).all() and (scores.weight_entropy[:, 2] >= 0).all()


def test_one_compilation_for_all_betas_seeds_and_separations():
    counted = jax.jit(chex.assert_max_traces(experiment._scores, n=1), static_argnums=0)
    for seeds, beta, separation in ((0, 1.0, 1.0), (5, 50.0, 2.0)):
        betas = jnp.array([beta, 2 * beta], jnp.float32)
        counted(SMALL, jnp.arange(seeds, seeds + 2, dtype=jnp.uint32), betas, jnp.float32(separation), 1e-3)


@pytest.mark.slow
def test_other_batches_give_the_same_numbers():
    betas = np.array([1.0, 10.0, 100.0])
    direct, distilled = experiment.sweep(SMALL, np.arange(6), betas)
    again, part = experiment.sweep(SMALL, [4], betas[1:])
    np.testing.assert_allclose(distilled.precision[4, 1:], part.precision[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(direct.recall[4], again.recall[0], rtol=1e-4)


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers(tmp_path):
    script = (
        "import sys, numpy as np, jax\n"
        "from kd_jax.gmm import experiment\n"
        "from tests.gmm.test_experiment import SMALL\n"
        "assert jax.device_count() == 8\n"
        "d, x = experiment.sweep(SMALL, np.arange(11), np.array([1.0, 100.0]))\n"
        "np.savez(sys.argv[1], direct=d.recall, precision=x.precision, recall=x.recall)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", script, str(tmp_path / "eight.npz")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    eight = np.load(tmp_path / "eight.npz")
    direct, distilled = experiment.sweep(SMALL, np.arange(11), np.array([1.0, 100.0]))
    for name, one in (("direct", direct.recall), ("precision", distilled.precision), ("recall", distilled.recall)):
        assert eight[name].shape == one.shape
        np.testing.assert_allclose(eight[name], one, rtol=1e-4, atol=1e-4)


def test_wide_settings_vary_one_axis_at_a_time():
    found = experiment.settings(gmm_wide.get_config())
    assert found[0] == (BASE, 1.0) and len(set(found)) == len(found) == 11


@pytest.mark.parametrize(
    "change, word",
    [({"seeds": 0}, "seeds"), ({"beta_min": 0.0}, "beta_min"), ({"dim": 1}, "dim"), ({"covariance_type": "x"}, "x"),
     ({"student_components": 300}, "num_data"), ({"memory_gib": 0.0}, "memory_gib"), ({"tol": float("nan")}, "tol"),
     ({"seed": -1}, "seed"), ({"seed": 2**32 - 1}, "seed"), ({"beta_max": float("inf")}, "beta_max"),
     ({"separation": float("nan")}, "separation"), ({"vary": {"teacher_components": (0,)}}, "teacher_components"),
     ({"vary": {"num_data": (99.5,)}}, "num_data"), ({"memory_gib": float("inf")}, "memory_gib")],
)  # fmt: skip
def test_values_that_cannot_work_are_named(change, word):
    config = gmm.get_config()
    config.update(change)
    with pytest.raises(ValueError, match=word):
        experiment.validate(config)


def train(folder, *flags, check=True):
    command = [sys.executable, "-m", "kd_jax.train", "--config", "configs/gmm.py:smoke", "--workdir", str(folder)]
    return subprocess.run([*command, *flags], cwd=ROOT, check=check, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_resumes_exactly_and_a_finished_one_is_left_alone(tmp_path):
    # One seed a chunk: memory for less than one.
    train(tmp_path / "whole", "--config.memory_gib=1e-9")
    rows = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert len(rows.splitlines()) == 4 * (3 + 1)
    assert {"report.html", "figures", "manifest.json", "config.json"} <= {
        p.name for p in (tmp_path / "whole").iterdir()
    }

    # What a kill after two chunks, in the middle of writing a row and a checkpoint, leaves behind.
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    manifest = json.loads((killed / "manifest.json").read_text()) | {"status": "running"}
    (killed / "manifest.json").write_text(json.dumps(manifest))
    chunks = killed / "checkpoints" / "chunks"
    for step in (2, 3):
        subprocess.run(["rm", "-r", str(chunks / str(step))], check=True)
    (chunks / "2.orbax-checkpoint-tmp").mkdir()
    (killed / "metrics.jsonl").write_text(rows[: len(rows) // 2 + 7])
    resumed = train(killed, "--config.memory_gib=1e-9")
    assert "2 of 4" in resumed.stdout
    assert (killed / "metrics.jsonl").read_text() == rows

    before = (killed / "manifest.json").read_text()
    assert "nothing left to do" in train(killed, "--config.memory_gib=1e-9").stdout
    assert (killed / "manifest.json").read_text() == before
    other = train(killed, "--config.seeds=5", check=False)
    assert other.returncode != 0 and "seeds" in other.stderr


@pytest.mark.slow
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
