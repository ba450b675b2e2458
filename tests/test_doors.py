"""The doors that write a folder: two starts in one folder, and the same work in several processes."""

import sys

import jax
import pytest

from kd_jax.lm import corpus, weights
from kd_jax.lm import model as model_lib
from kd_jax.storage import lock
from kd_jax.storage.files import read_rows
from tests import processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    architecture = model_lib.PRESETS["tiny"]
    params = model_lib.init(jax.random.key(0), architecture)
    params["embedding"] = params["embedding"].at[2].multiply(4)  # an EOS that is likely: samples end
    folder = tmp_path_factory.mktemp("models") / "model"
    weights.save(model_lib.Model(architecture, params, (2,)), folder)
    return folder


def commands(model, out, samples):
    sizes = ["--max_length", "8", "--prompt_ids", "1", "--batch_size", "8"]
    sample = ["kd_jax.sample", "--model", model, "--num_samples", "24", "--shard_size", "8", *sizes, "--seed", "3"]
    evaluate = ["kd_jax.evaluate", "--p_star", model, "--model", f"m={model}", "--num_samples", "16", *sizes]
    return {
        "sample": [*sample, "--out", out / "corpus"],
        "teacher": ["kd_jax.teacher", "--corpus", samples, "--model", model, "--top_k", "4", "--out", out / "scored"],
        "evaluate": [*evaluate, "--out", out / "evaluation"],
    }


def start(words, *, count=1, devices=1):
    """The command in `count` processes."""
    flags = [[]] if count == 1 else [
        ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", count, "--process_id", i]
        for port in [processes.free_port()] for i in range(count)
    ]  # fmt: skip
    return [processes.spawn([sys.executable, "-m", *words, *more], devices) for more in flags]


def end(started):
    ended = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), ended
    # the library that carries collectives between CPUs says that it is connected
    return [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended]


@pytest.mark.long
def test_sample_teacher_and_evaluate_in_two_processes(model, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("sample", "teacher", "evaluate"):
        alone = end(start(commands(model, one, one / "corpus")[name]))
        both = end(start(commands(model, two, one / "corpus")[name], count=2))
        assert [bool(out) for out in both] == [True, False]  # one of them speaks
        assert len(both[0]) == len(alone[0])
    a, b = (corpus.open(folder / "corpus").rows() for folder in (one, two))
    for mine, other in zip(a.tokens, b.tokens, strict=True):
        assert mine.tolist() == other.tolist()
    assert b.log_prob == pytest.approx(a.log_prob, abs=1e-5)
    scored = [corpus.open(folder / "scored") for folder in (one, two)]
    assert [held.num_rows for held in scored] == [24, 24]
    (mine,), (other,) = (read_rows(folder / "evaluation/metrics.jsonl") for folder in (one, two))
    for key in ("precision", "recall", "entropy"):
        assert other[key] == pytest.approx(mine[key], abs=1e-5)


@pytest.mark.parametrize("door", ["train", "sample", "teacher", "evaluate"])
def test_a_folder_in_use_is_refused_before_any_work(model, tmp_path, door, capsys):
    import importlib

    name = {"sample": "corpus", "teacher": "scored", "evaluate": "evaluation", "train": "run"}[door]
    with lock.held(tmp_path / name, "python -m kd_jax.other"):
        words = commands(model, tmp_path, tmp_path / "no-corpus").get(
            door, ["", "--config", "configs/gmm.py:smoke", "--workdir", tmp_path / "run"]
        )
        assert importlib.import_module(f"kd_jax.{door}").main([f"kd_jax/{door}.py", *map(str, words[1:])]) == 2
        assert lock.contents(tmp_path / name) == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name} is in use: process ") and "(python -m kd_jax.other)" in error
    assert not (tmp_path / name).exists()
