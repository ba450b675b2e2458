import json
import math
import subprocess
import sys

import numpy as np
import pytest

from kd_jax.runs import run as run_lib
from kd_jax.storage import errors, files

ARGV = ["kd_jax/train.py", "--config", "configs/a b.py", "--workdir=run"]


def make(**fields):
    return {"seed": 3, "sizes": (1, 2), "student": {"components": 5}, **fields}


def open_run(folder, config=None, overwrite=False):
    return run_lib.open_run(folder, config or make(), argv=ARGV, overwrite=overwrite)


def test_new_run_then_resumed_then_finished(tmp_path):
    run = open_run(tmp_path / "deep" / "run")
    assert not run.resumed and not run.finished
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["command"] == "python -m kd_jax.train --config 'configs/a b.py' --workdir=run"
    assert manifest["status"] == "running" and manifest["seed"] == 3 and manifest["device"]["count"] >= 1
    assert set(manifest["versions"]) == {"python", "jax", "jaxlib", "numpy", "kd_jax"}
    assert json.loads((run.folder / "config.json").read_text())["sizes"] == [1, 2]

    again = open_run(run.folder)
    assert again.resumed and not again.finished
    run_lib.finish(again, fit=1.5)
    done = json.loads((run.folder / "manifest.json").read_text())
    assert done["status"] == "finished" and done["fit"] == 1.5 and done["started"] == manifest["started"]
    assert open_run(run.folder).finished
    assert not list(run.folder.glob("*.tmp"))


def test_a_folder_whose_checkpoints_could_not_be_read_back(tmp_path):
    with pytest.raises(errors.RunError, match=r"exp\[1\]: checkpoints cannot be read back .* choose another folder"):
        open_run(tmp_path / "deep" / "exp[1]")
    assert not list(tmp_path.iterdir())


def test_killed_before_the_manifest_carries_on(tmp_path):
    run = open_run(tmp_path / "run")
    (run.folder / "manifest.json").unlink()
    assert open_run(run.folder).resumed and (run.folder / "manifest.json").exists()


def test_other_config_is_refused_naming_the_fields(tmp_path):
    run = open_run(tmp_path / "run")
    before = (run.folder / "config.json").read_text()
    with pytest.raises(errors.RunError) as error:
        open_run(run.folder, make(student={"components": 7}))
    text = str(error.value)
    assert "student.components: 5 -> 7" in text and "seed" not in text
    assert "--workdir" in text and "--overwrite" in text
    assert (run.folder / "config.json").read_text() == before


def test_killed_while_the_config_changes_a_run_is_not_finished(tmp_path, monkeypatch):
    run = run_lib.open_run(tmp_path / "run", make(), argv=ARGV, staged=True)
    run_lib.finish(run)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "remove", kill)
    with pytest.raises(KeyboardInterrupt):
        run_lib.open_run(run.folder, make(seed=4), argv=ARGV, staged=True)
    monkeypatch.undo()
    assert not run_lib.open_run(run.folder, make(seed=4), argv=ARGV, staged=True).finished
    assert json.loads((run.folder / "config.json").read_text())["seed"] == 4


def test_results_of_another_config_are_gone(tmp_path):
    # An export would put the new settings on the card of a model of the old ones.
    run = run_lib.open_run(tmp_path / "run", make(), argv=ARGV, staged=True)
    for name in ("metrics.jsonl", "answers.jsonl"):
        (run.folder / name).write_text("{}\n")
    run_lib.open_run(run.folder, make(), argv=ARGV, staged=True)
    assert (run.folder / "metrics.jsonl").exists()
    run_lib.open_run(run.folder, make(seed=4), argv=ARGV, staged=True)
    assert not (run.folder / "metrics.jsonl").exists() and not (run.folder / "answers.jsonl").exists()


def test_a_run_of_another_experiment_is_refused_without_its_settings(tmp_path):
    run = open_run(tmp_path / "run", make(experiment="gmm"))
    for staged in (False, True):
        with pytest.raises(errors.RunError, match="holds a run of gmm, not of lm; .*--workdir.*--overwrite") as error:
            run_lib.open_run(run.folder, {"experiment": "lm", "seed": 4}, argv=ARGV, staged=staged)
        assert "seed" not in str(error.value)


def test_folder_that_is_no_run_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "figures").mkdir()
    for overwrite in (False, True):
        with pytest.raises(errors.RunError, match="holds no run"):
            open_run(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def test_overwrite_keeps_foreign_files(tmp_path):
    run = open_run(tmp_path / "run")
    run_lib.finish(run)
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / "checkpoints" / "1").mkdir(parents=True)
    fresh = open_run(run.folder, make(seed=4), overwrite=True)
    assert not fresh.resumed and not fresh.finished
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "manifest.json", "notes.txt"]
    assert json.loads((run.folder / "config.json").read_text())["seed"] == 4


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_rows(path) == []
    files.write_rows(path, [{"loss": np.float32(0.5), "steps": np.int64(3), "sizes": np.arange(2)}])
    files.append_rows(path, [{"loss": math.nan, "low": -math.inf, "high": math.inf}])
    first, second = files.read_rows(path)
    assert first == {"loss": 0.5, "steps": 3, "sizes": [0, 1]}
    assert math.isnan(second["loss"]) and second["low"] == -math.inf and second["high"] == math.inf

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_broken_row_is_named_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(errors.RunError, match="line 2"):
        files.read_rows(path)


def test_object_in_a_file_comes_back_or_the_file_is_named(tmp_path):
    path = tmp_path / "about.json"
    files.write_json(path, {"steps": [1, 2]})
    assert files.read_json(path) == {"steps": [1, 2]}
    for text, message in ('{"steps": ', "about.json is not JSON .*; do this"), ("[1]", "is not a JSON object; do this"):
        path.write_text(text)
        for error in (errors.RunError, ValueError):
            with pytest.raises(error, match=message):
                files.read_json(path, error, hint="; do this")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.RunError, match="config.json is not JSON.*--overwrite starts the run again"):
        open_run(tmp_path)


@pytest.mark.slow
def test_door_exits_2_and_writes_nothing(tmp_path):
    (tmp_path / "config.py").write_text(
        "import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({'experiment': 'gmm'})\n"
    )
    command = [sys.executable, "-m", "kd_jax.train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path}/run"]
    done = subprocess.run([*command, "--config.experimnt=x"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "did you mean --config.experiment?" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_the_commit_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    (tmp_path / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(run_lib.kd_jax, "__file__", str(tmp_path / "__init__.py"))
    assert run_lib._git_commit() is None
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "one")
    git("tag", "v1")
    commit = run_lib._git_commit()
    assert len(commit) == 40 and int(commit, 16)
    (tmp_path / "__init__.py").write_text("a = 2\n")
    assert run_lib._git_commit() == f"{commit}-dirty"
