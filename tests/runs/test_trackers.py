"""Numbers go where they are asked to go; Weights & Biases is used offline."""

import subprocess
import sys

import pytest

from kd_jax.runs import trackers

WANDB = """
import os, sys
from pathlib import Path
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": sys.argv[1]}
from kd_jax.runs.trackers import Tracker
folder = Path(sys.argv[1])
first = [Tracker(("wandb",), folder / name) for name in ("student-0", "student-1")]  # together
for step in range(3):
    for tracker in first:
        tracker(step, {"training/loss": 2.0})
for tracker in first:
    tracker.finish()
second = Tracker(("wandb",), folder / "student-2")
second(0, {"training/loss": 1.0})
second.finish()
resumed = Tracker(("wandb",), folder / "student-2")
resumed(1, {"training/loss": 1.0})
resumed.finish()
"""


def test_no_tracker_takes_anything(tmp_path):
    tracker = trackers.Tracker((), tmp_path)
    tracker(1, {"training/loss": 2.0})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_training_of_a_process_has_a_run_of_its_own(tmp_path):
    pytest.importorskip("wandb")
    for name in ("student-0", "student-1", "student-2"):
        (tmp_path / name).mkdir()
    done = subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ids = [(tmp_path / f"student-{i}/wandb_id.txt").read_text() for i in range(3)]
    assert len(set(ids)) == 3
    files = {i: [path.name for path in tmp_path.rglob(f"run-{i}.wandb")] for i in ids}
    assert [len(files[i]) for i in ids] == [1, 1, 2]  # a resumed run has two files of one id


@pytest.mark.slow
def test_tensorboard_reads_what_was_logged(tmp_path):
    tracker = trackers.Tracker(("tensorboard",), tmp_path)
    tracker(1, {"training/loss": 2.0})
    tracker.finish()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert b"training/loss" in path.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_there_is_named(monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"'{name}' is not one of tensorboard .*wandb"):
        trackers.check((name,))
