"""Numbers go where they are asked to go; Weights & Biases is stood in for, as it wants an account."""

import sys
from types import SimpleNamespace

import pytest

from kd_jax.runs import trackers


def test_no_tracker_takes_anything(tmp_path):
    trackers.start((), tmp_path)(1, {"training/loss": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_wandb_gets_a_run_named_as_the_folder(monkeypatch, tmp_path):
    seen = []

    def init(**options):
        seen.append(options)
        return SimpleNamespace(log=lambda values, step: seen.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    trackers.start(("wandb",), tmp_path / "teacher-12ab")(7, {"training/loss": 2.0})
    assert (seen[0]["id"], seen[0]["resume"]) == ("teacher-12ab", "allow")
    assert seen[1] == (7, {"training/loss": 2.0})


def test_a_package_that_is_missing_is_named():
    if trackers.importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match="'wandb' needs the package wandb"):
        trackers.check(("wandb",))
