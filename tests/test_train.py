"""The train door: a config frozen at it, its help, its errors, and the last lines of a run."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kd_jax import report, train
from kd_jax.runs import settings
from kd_jax.runs.settings import setting, spec

CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    if arg not in ("", "smoke"):
        raise ValueError(f"{arg!r} is not known; there is :smoke")
    return ConfigDict({"experiment": "gmm", "size": 2, "rate": 1, "inner": {"on": True}})
"""


@spec
class Inner:
    on: bool = setting(False, "whether")


@spec
class Spec:
    size: int = setting(1, "how large", at_least=1)
    rate: float = setting(0.5, "how fast", above=0.0)
    names: tuple[str, ...] = setting((), "names")
    inner: Inner = setting(Inner(), "inside")


@pytest.fixture
def door(tmp_path, monkeypatch):
    """The door with an experiment that notes what it is called with; returns (call, calls)."""
    calls = []

    def run(spec, folder):
        calls.append(spec)
        return {"note": 1}

    def validate(spec):
        if spec.size == 13:
            raise ValueError("config.size=13 is unlucky")

    module = SimpleNamespace(Spec=Spec, validate=validate, run=run, result=lambda folder: ["precision -1.0", "two"])
    monkeypatch.setattr(train.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")
    (tmp_path / "config.py").write_text(CONFIG)
    base = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]
    return lambda *words: train.main([*base, *words]), calls


def test_the_experiment_gets_its_settings_frozen(door, tmp_path, capsys):
    call, calls = door
    assert call("--config.names=a,b", "--noconfig.inner.on") == 0
    assert calls == [Spec(size=2, rate=1.0, names=("a", "b"), inner=Inner(on=False))]
    saved = json.loads((tmp_path / "w/config.json").read_text())
    assert saved == {"experiment": "gmm", **settings.to_dict(calls[0]), "names": ["a", "b"]}
    assert json.loads((tmp_path / "w/manifest.json").read_text())["note"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["precision -1.0", "two", f"report: {tmp_path / 'w/report.html'}"]
    # a finished run shows its result again and does nothing
    assert call("--config.names=a,b", "--noconfig.inner.on") == 0 and len(calls) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == lines[-3:]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("--config.size=0", "config.size=0 must be at least 1"),
        ("--config.rate=nan", "config.rate=nan must be finite"),
        ("--workdir=", "--workdir: the path is empty"),
        ("--workdir=~nobody_of_this_name/a", "--workdir: ~nobody_of_this_name/a: there is no such user"),
        ("--config.size=13", "config.size=13 is unlucky"),
        ("--config.szie=3", "did you mean --config.size?"),
        ("--config.size=2.0", "--config.size: '2.0' must be int"),
        ("--config.experiment=x", "config.experiment"),
        ("--stages=a", "--stages and --dry_run"),
        ("--mfu=0.3", "--mfu"),
        ("--device=8xH100", "--dry_run"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(door, tmp_path, capsys, word, text):
    call, calls = door
    assert call(word) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert not calls and not (tmp_path / "w").exists()


def test_an_unknown_variant_of_a_config_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    assert train.main(["train", f"--config={tmp_path / 'config.py'}:smok", "--workdir=w"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --config {tmp_path / 'config.py'}:smok: 'smok' is not known; there is :smoke\n"
    )


def test_help_lists_the_settings_of_the_config(door, capsys):
    with pytest.raises(SystemExit):
        door[0]("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config.size int how large (at least 1; default 2)" in shown and "--num_processes" in shown


@pytest.mark.long
def test_a_closed_pipe_and_a_narrow_encoding(tmp_path):
    command = [sys.executable, "-m", "kd_jax.train", "--config", "configs/gmm.py", "--help"]
    with open(os.devnull) as closed:  # open for reading alone: whatever is printed fails
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    reader = subprocess.run(
        " ".join(command) + " | head -1", shell=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert reader.stdout.startswith("usage:") and reader.stderr == ""
