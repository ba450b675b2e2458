"""Stages: what is done is not done again, and a change redoes exactly what depends on it."""

import json

import pytest

from kd_jax.runs import stages
from kd_jax.runs.stages import Stage
from kd_jax.storage import lock
from kd_jax.storage.errors import RunError


def chain(calls, a=1, c=1, fail=()):
    """a -> b -> d/1, d/2; c -> d/2"""

    def work(name):
        def run(folder, inputs):
            calls.append(name)
            if name in fail:
                raise ValueError(f"{name} fails")
            (folder / "made").write_text(name)
            assert all((path / "made").exists() for path in inputs.values())
            return {"inputs": sorted(inputs)}

        return run

    return [
        Stage("a", {"x": a}, (), work("a")),
        Stage("b", {}, ("a",), work("b")),
        Stage("c", {"x": c}, (), work("c")),
        Stage("d/1", {}, ("b",), work("d/1")),
        Stage("d/2", {}, ("b", "c"), work("d/2")),
    ]


def test_all_in_order_and_never_twice(tmp_path):
    calls = []
    stages.run(tmp_path, chain(calls))
    assert calls == ["a", "b", "c", "d/1", "d/2"]
    stages.run(tmp_path, chain(calls))
    assert len(calls) == 5
    where = stages.folders(tmp_path, chain([]))
    said = json.loads((where["d/2"] / "stage.json").read_text())
    assert (said["status"], said["result"], said["starts"]) == ("finished", {"inputs": ["b", "c"]}, 1)


def test_a_change_redoes_what_depends_on_it_and_back_again_nothing(tmp_path):
    calls = []
    stages.run(tmp_path, chain(calls))
    calls.clear()
    stages.run(tmp_path, chain(calls, c=2))
    assert calls == ["c", "d/2"]
    calls.clear()
    stages.run(tmp_path, chain(calls, a=2))
    assert calls == ["a", "b", "d/1", "d/2"]
    calls.clear()
    stages.run(tmp_path, chain(calls))
    assert calls == []


def test_a_part_of_them(tmp_path):
    calls = []
    with pytest.raises(RunError, match="d/1 needs b.*--stages b"):
        stages.run(tmp_path, chain(calls), ["d"])
    with pytest.raises(ValueError, match="'e' is not one of a, b, c, d"):
        stages.run(tmp_path, chain(calls), ["e"])
    assert calls == [] and not (tmp_path / "stages").exists()
    stages.run(tmp_path, chain(calls), ["a", "b"])
    stages.run(tmp_path, chain(calls), ["c", "d"])
    assert calls == ["a", "b", "c", "d/1", "d/2"]


def test_a_stage_that_fails_is_begun_again(tmp_path):
    calls = []
    with pytest.raises(ValueError, match="b fails"):
        stages.run(tmp_path, chain(calls, fail=("b",)))
    where = stages.folders(tmp_path, chain([]))
    assert stages.finished(where["a"]) and not stages.finished(where["b"])
    stages.run(tmp_path, chain(calls))
    assert calls == ["a", "b", "b", "c", "d/1", "d/2"]
    assert stages.record(where["b"])["starts"] == 2


def test_a_stage_that_runs_share_has_one_writer(tmp_path):
    """The runs of a sweep have their stages in one folder, and each holds the folder of its own alone."""
    calls = []
    for name in ("a", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "stages").symlink_to("../shared", target_is_directory=True)
    where = stages.folders(tmp_path / "a", chain([]))
    with lock.held(where["b"], "another run"), pytest.raises(RunError, match=r"b-\w+ is in use.*another run"):
        stages.run(tmp_path / "a", chain(calls))
    assert calls == ["a"]
    stages.run(tmp_path / "a", chain(calls))
    assert calls == ["a", "b", "c", "d/1", "d/2"]
    assert not list((tmp_path / "shared").rglob(f"{lock.NAME}*"))
