"""Runs that are killed again and again: in short form, and fifty rounds; and a small disk under the whole chain."""

import sys

import pytest

from tests.faults import disks, everywhere, runs, soak

LM = "configs/lm_laptop.py:smoke"
# a chunk for each of twelve seeds
GMM = ("configs/gmm.py:smoke", "--config.memory_gib=1e-9", "--config.seeds=12")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return soak.Subject(tmp_path_factory.mktemp("lm"), [LM])


@pytest.fixture(scope="module")
def gmm(tmp_path_factory):
    return soak.Subject(tmp_path_factory.mktemp("gmm"), GMM)


@pytest.mark.cluster
def test_mixtures_in_short(gmm):
    assert soak.soak(gmm, 3, seed=0, clocks=True) >= 1
    assert soak.soak(gmm, 2, seed=1, moments=("term",)) >= 1


@pytest.mark.long
def test_the_chain_in_short(lm):
    assert soak.soak(lm, 3, seed=0, moments=("cpu", "rename", "term")) >= 1


@pytest.mark.cluster
def test_instructions_in_short(tmp_path):
    # more of the teacher's text, too, whose prompts repeat
    more = "--config.arms={'more': {'policy': 'sequence', 'text_rows': 96, 'sampler': {'sample_temperature': 0.8}}}"
    subject = soak.Subject(tmp_path, ["configs/lm_instruct_laptop.py:smoke", more, "--config.instruct.arm=more"])
    assert soak.soak(subject, 6, seed=0, moments=("cpu", "rename", "term")) >= 1


@pytest.mark.cluster
def test_the_chain_on_a_full_disk(lm, tmp_path):
    wanted = lm.straight[0]
    with disks.small(tmp_path / "disk", "16m") as disk:
        folder = disk.folder / "run"
        for room in (20_000, 200_000, 1_000_000):
            disk.fill(room)
            said = runs.run(runs.command(folder, LM), code=2, env=runs.environment(**lm.environment))
            assert str(disk.folder) in said and "make room there, and the same command resumes" in said
            disk.free()
            before = runs.finished_stages(folder)
        runs.run(runs.command(folder, LM), env=runs.environment(**lm.environment))
        runs.check_whole(folder)
        assert before.items() <= runs.finished_stages(folder).items()
        assert runs.numbers(folder) == wanted


@pytest.mark.cluster
def test_fifty_rounds_of_the_chain(lm):
    soak.soak(lm, 50, seed=0)


@pytest.mark.cluster
def test_fifty_rounds_of_a_sweep(gmm):
    soak.soak(gmm, 50, seed=0, clocks=True)


@pytest.mark.long
@pytest.mark.parametrize("name, stride", [("sweep", 7), ("chain", 3), ("page", 5)])
def test_killed_at_places_of(name, stride, tmp_path):
    words = [sys.executable, "-m", "tests.faults.everywhere", name, "--stride", stride]
    assert f"{name}: killed at " in runs.run(words)


@pytest.mark.cluster
@pytest.mark.parametrize("name", everywhere.PIECES)
def test_killed_at_every_place_of(name):
    assert f"{name}: killed at " in runs.run([sys.executable, "-m", "tests.faults.everywhere", name])
