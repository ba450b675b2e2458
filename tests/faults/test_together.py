"""Many starts of one run in one folder at random moments, some of them killed: one works, the others are refused."""

import json
import random
import signal
import subprocess
import time

import pytest

from kd_jax.storage import lock
from tests.faults import runs, soak

# a chunk for each of twelve seeds
GMM = ("configs/gmm.py:smoke", "--config.memory_gib=1e-9", "--config.seeds=12")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return soak.Subject(tmp_path_factory.mktemp("together"), GMM)


def start(subject, workdir):
    return subprocess.Popen(
        runs.command(workdir, *subject.words), cwd=runs.ROOT, env=runs.environment(**subject.environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def holder(workdir):
    """The number of the process that holds the folder; None where there is none."""
    try:
        return json.loads((workdir / lock.NAME).read_text())["process"]
    except (FileNotFoundError, ValueError):
        return None


def crowd(subject, workdir, *, starts, kills, seed):
    """Starts the run so often, and kills the holder of its folder so often; returns the exit codes."""
    rng, going, ended = random.Random(seed), [], []
    while starts or going:
        if starts and len(going) < 3:
            going.append(start(subject, workdir))
            starts -= 1
        time.sleep(rng.uniform(0, 1.5))
        if kills and starts and holder(workdir) in [one.pid for one in going] and rng.random() < 0.5:
            victim = next((one for one in going if one.pid == holder(workdir)), None)
            if victim is not None:
                victim.kill()
                kills -= 1
        for one in [one for one in going if one.poll() is not None]:
            going.remove(one)
            said = one.communicate()
            ended.append(one.returncode)
            assert one.returncode in (0, 2, -signal.SIGKILL), said
            assert one.returncode != 2 or "is in use: process" in said[1] and "Traceback" not in said[1], said
    return ended


def check(subject, workdir, ended):
    if 0 not in ended:  # the last start was refused while a killed one still held the folder
        runs.run(runs.command(workdir, *subject.words), env=runs.environment(**subject.environment))
    runs.check_whole(workdir)
    assert runs.numbers(workdir) == subject.straight[0]


@pytest.mark.long
def test_a_few_starts_in_one_folder(subject, tmp_path):
    check(subject, tmp_path / "run", crowd(subject, tmp_path / "run", starts=6, kills=1, seed=0))


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(5))
def test_many_starts_and_kills_in_one_folder(subject, tmp_path, seed):
    check(subject, tmp_path / "run", crowd(subject, tmp_path / "run", starts=20, kills=5, seed=seed))
