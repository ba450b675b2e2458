"""A grid of runs: which values a command line lists, the runs' names, shared stages, kills, and runs that diverge."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kd_jax import compare, report, sweep, train
from kd_jax.runs.settings import setting, spec
from kd_jax.storage.files import read_rows

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"experiment": "lm", "train": {}, "teacher": {}})
"""


@spec
class Train:
    rate: float = setting(0.5, "how fast", above=0.0)
    frozen: tuple[str, ...] = setting((), "names")


@spec
class Spec:
    seed: int = setting(0, "first")
    taus: tuple[float, ...] = setting((1.0,), "temperatures")
    prompt: str = setting("The", "a text")
    on: bool = setting(False, "whether")
    train: Train = setting(Train(), "students")
    teacher: Train = setting(Train(), "teacher")


@pytest.mark.parametrize(
    ("text", "hint", "values"),
    [
        ("1e-3", float, ["1e-3"]),
        ("1e-3, 3e-3", float, ["1e-3", "3e-3"]),
        ("true,false", bool, ["true", "false"]),
        ("", str, [""]),
        ("The,A", str, ["The", "A"]),
        ("'Hello, world',A", str, ["Hello, world", "A"]),
        ('"Once upon a time, there"', str, ["Once upon a time, there"]),
        ("The dogs',A 'cat'", str, ["The dogs'", "A 'cat'"]),
        ("\"It's 'x'\"", str, ["It's 'x'"]),
        ("The,", str, ["The,"]),
        ("none,0.5", float | None, ["none", "0.5"]),
        ("0.8,1.0", tuple[float, ...], ["0.8,1.0"]),
        ("(0.8,1.0)", tuple[float, ...], ["(0.8,1.0)"]),
        ("(0.8,1.0),(1.0,)", tuple[float, ...], ["[0.8,1.0]", "[1.0,]"]),
        ("[0.8],[]", tuple[float, ...], ["[0.8]", "[]"]),
        ("[direct,tau-1],[direct]", tuple[str, ...], ["direct,tau-1", "direct"]),
        ("embedding,layers.0", tuple[str, ...] | None, ["embedding,layers.0"]),
        ("[embedding,norm],[norm]", tuple[str, ...] | None, ["embedding,norm", "norm"]),
        ("((a,1),(b,2)),((a,3),)", tuple[Any, ...], ["[(a,1),(b,2)]", "[(a,3),]"]),
    ],
)
def test_values_of_a_setting(text, hint, values):
    assert sweep.split_values(text, hint) == values


@pytest.fixture
def door(tmp_path, monkeypatch):
    """The door with an experiment in stages that notes its runs; returns (call, specs, comparisons)."""
    specs, pages = [], []

    def run(spec, folder, only=()):
        specs.append(spec)
        if spec.train.rate > 100:
            raise FloatingPointError("the loss of update 3\nis nan")
        (folder / "stages" / f"seed-{spec.seed}").mkdir(exist_ok=True)
        return {}

    def validate(spec):
        if spec.seed == 13:
            raise ValueError("config.seed=13 is unlucky")

    module = SimpleNamespace(Spec=Spec, validate=validate, run=run, result=lambda folder: [])
    monkeypatch.setattr(train.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")
    monkeypatch.setattr(
        compare, "write", lambda folders, out, *, names: pages.append((folders, out, names)) or ["page"]
    )
    (tmp_path / "config.py").write_text(CONFIG)
    base = ["sweep", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]
    return lambda *words: sweep.main([*base, *words]), specs, pages


def test_every_combination_is_a_run_and_stages_are_shared(door, tmp_path, capsys):
    call, specs, pages = door
    words = ["--config.seed", "0,1", "--config.train.rate=1e-1,0.2", "--config.teacher.frozen=a,b", "--config.on"]
    assert call(*words) == 0
    assert [(one.seed, one.train.rate) for one in specs] == [(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)]
    assert {(one.teacher.frozen, one.on) for one in specs} == {(("a", "b"), True)}
    names = ["seed=0,rate=0.1", "seed=0,rate=0.2", "seed=1,rate=0.1", "seed=1,rate=0.2"]
    folders = [tmp_path / "w/runs" / name for name in names]
    assert pages == [(folders, tmp_path / "w", names)]
    assert {path.name for path in (tmp_path / "w/stages").iterdir()} == {"seed-0", "seed-1"}
    assert {(folder / "stages").resolve() for folder in folders} == {tmp_path / "w/stages"}
    shown = capsys.readouterr().out
    assert "run 3 of 4: seed=1,rate=0.1" in shown and shown.endswith("page\n")
    # each run's manifest has the command that makes this run alone
    command = json.loads((folders[1] / "manifest.json").read_text())["command"]
    assert "kd_jax.train" in command and command.endswith(f"--config.train.rate=0.2 --workdir {folders[1]}")
    # finished runs are not made again; further values add runs
    words[1] = "0,1,2"
    assert call(*words) == 0 and len(specs) == 6 and len(pages[1][0]) == 6
    assert call(*words, "--overwrite") == 0 and len(specs) == 12


def test_a_run_that_diverges_does_not_end_the_others(door, capsys):
    call, specs, pages = door
    assert call("--config.train.rate=1,1e3,2") == 2 and len(specs) == 3
    assert pages[0][2] == ["rate=1.0", "rate=2.0"]
    ended = capsys.readouterr()
    assert "1 of 3 runs did not finish:\n  rate=1000.0: the loss of update 3 is nan" in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no setting has several values"),
        (["--config.taus=0.8,1.0"], "no setting has several values"),
        (["--config.train.rate=1,fast"], "--config.train.rate: 'fast' must be float"),
        (["--config.train.rate=1,1.0"], "two runs of the sweep are the same: rate=1.0"),
        (["--config.train.rat=1,2"], "did you mean --config.train.rate?"),
        (["--config.seed=1,13"], "seed=13: config.seed=13 is unlucky"),
    ],
)
def test_faults_before_any_work(door, tmp_path, capsys, words, said):
    call, specs, _ = door
    assert call(*words) == 2 and said in capsys.readouterr().err
    assert not specs and not (tmp_path / "w").exists()


def test_dry_run_lists_the_runs(door, tmp_path, capsys):
    call, specs, _ = door
    assert call("--config.taus=[0.8],[0.8,1.0]", "--config.train.rate=1,2", "--config.prompt=a/b,a b", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 8 and not specs and not (tmp_path / "w").exists()
    assert lines[0].startswith(f"run 1 of 8: {tmp_path / 'w/runs/taus=0.8,rate=1.0,prompt=a-b-'}")
    assert "taus=0.8+1.0," in lines[-1]


def test_two_settings_of_one_name_are_called_by_more_of_their_keys():
    assert sweep._labels(["student.train.rate", "teacher.train.rate", "seed"]) == {
        "student.train.rate": "student.train.rate", "teacher.train.rate": "teacher.train.rate", "seed": "seed",
    }  # fmt: skip


@pytest.mark.long
def test_a_killed_sweep_of_language_models_ends_with_the_numbers_of_single_runs(tmp_path):
    small = ["--config", "lm_laptop:smoke", "--config.seeds=1", "--config.taus=(1.0,)"]
    command = [sys.executable, "-m", "kd_jax.sweep", *small, f"--workdir={tmp_path / 'w'}",
               "--config.student.train.learning_rate=1e-3,1e-2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("run 2 of 2"):
                process.kill()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "run 1 of 2" in done.stdout and (tmp_path / "w/compare.html").exists()
    # the teacher and all corpora were made once
    assert len(list((tmp_path / "w/stages").glob("teacher-*"))) == 1
    assert len(list((tmp_path / "w/stages").glob("direct/seed-0-*"))) == 2
    alone = [sys.executable, "-m", "kd_jax.train", *small, f"--workdir={tmp_path / 'alone'}",
             "--config.student.train.learning_rate=1e-2"]  # fmt: skip
    subprocess.run(alone, capture_output=True, check=True)
    rows = [
        [(row["name"], row["precision"], row["recall"]) for row in read_rows(folder / "metrics.jsonl")
         if row["kind"] == "evaluation"]
        for folder in (tmp_path / "alone", tmp_path / "w/runs/learning_rate=0.01")
    ]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.long
def test_a_sweep_of_mixtures_ends_with_a_page(tmp_path, capsys):
    words = ["--config", "gmm:smoke", f"--workdir={tmp_path}", "--config.num_distill=100,200"]
    assert sweep.main(["sweep", *words]) == 0
    assert "paired by 4 seeds" in capsys.readouterr().out and (tmp_path / "compare.html").exists()
