"""Folders that cannot be written to: said at once and by name, nothing is lost, and then it goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.gmm.report import page
from kd_jax.lm import corpus as corpus_lib
from kd_jax.runs import run
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage import errors
from tests.faults import disks, runs
from tests.gmm.report import test_page as gmm
from tests.lm.corpus import test_store as corpora
from tests.lm.training import test_loop as trainings


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "f").mkdir()
    return tmp_path / "f"


def refused(work, folder):
    with pytest.raises((OSError, errors.RunError)) as error:
        work()
    said = errors.explain(error.value)
    assert str(folder) in said and "written to" in said, said


def test_a_run_folder(folder):
    def open_run():
        return run.open_run(folder / "w", {"seed": 3}, argv=["train"])

    with disks.locked(folder):
        refused(open_run, folder)
        assert not list(folder.iterdir())
    open_run()
    with disks.locked(folder / "w"):
        refused(open_run, folder / "w")
    assert open_run().resumed


def test_a_corpus(folder, tmp_path):
    corpora.make(tmp_path / "whole")
    with disks.locked(folder):
        refused(lambda: corpora.make(folder / "c"), folder)
    with pytest.raises(KeyboardInterrupt):
        corpora.make(folder / "c", killed_after=2)
    rows = corpus_lib.open(folder / "c").num_rows
    with disks.locked(folder / "c"):
        refused(lambda: corpora.make(folder / "c"), folder / "c")
        assert corpus_lib.open(folder / "c").num_rows == rows > 0
    with disks.locked(folder / "c" / "data"):
        refused(lambda: corpora.make(folder / "c"), folder / "c" / "data")
    assert corpora.make(folder / "c").finished and corpora.digests(folder / "c") == corpora.digests(tmp_path / "whole")


def test_a_checkpoint(folder):
    trees = {"x": {"a": jnp.arange(6.0)}}

    def save(step):
        with Checkpoints(folder / "c", background=True) as saved:
            saved.save(step, trees)

    with disks.locked(folder):
        refused(lambda: save(1), folder)
    save(1)
    with disks.locked(folder / "c"):
        refused(lambda: save(2), folder / "c")
    with Checkpoints(folder / "c") as saved:
        assert saved.steps() == [1]
        np.testing.assert_array_equal(saved.load(1, trees)["x"]["a"], jax.device_get(trees["x"]["a"]))
    save(2)


@pytest.mark.slow
def test_a_training(folder, tmp_path):
    corpus = trainings.make_corpus(tmp_path / "c")
    straight = trainings.train(tmp_path / "straight", corpus)
    with pytest.raises(KeyboardInterrupt):
        trainings.train(folder / "t", corpus, stop=trainings.StopAt(folder / "t", 5))
    for within in (".", "checkpoints"):
        with disks.locked(folder / "t" / within):
            refused(lambda: trainings.train(folder / "t", corpus), folder / "t")
    assert trainings.train(folder / "t", corpus)["fingerprint"] == straight["fingerprint"]
    assert trainings.numbers(folder / "t") == trainings.numbers(tmp_path / "straight")


@pytest.mark.slow
def test_a_report(folder):
    gmm.make_run(folder, gmm.make_rows(), with_panels=False)
    (folder / "figures").mkdir()
    for within in (folder, folder / "figures"):
        with disks.locked(within):
            refused(lambda: page.write(folder), folder)
    assert page.write(folder).exists()


@pytest.mark.cluster
def test_commands(folder, tmp_path):
    words = runs.command(folder / "run", "configs/gmm.py:smoke")
    with disks.locked(folder):
        said = runs.run(words, code=2)
        assert str(folder) in said and "let it be" in said and "the same command resumes" in said
    cache = tmp_path / "cache"
    cache.mkdir()
    with disks.locked(cache):  # of compiled programs: only slower
        runs.run(words, env=runs.environment(JAX_COMPILATION_CACHE_DIR=str(cache)))
    runs.check_whole(folder / "run")
    with disks.locked(folder / "run"):
        said = runs.run([*words[:2], "kd_jax.report", folder / "run"], code=2)
        assert str(folder / "run") in said and "let it be written to" in said
