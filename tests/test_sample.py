import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers

import kd_jax.lm
from kd_jax import evaluate, sample
from kd_jax.lm import corpus, decode, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import prompt_files
from kd_jax.lm.decode import sampler as sampler_lib
from kd_jax.lm.experiment.specs import LmSpec, PStarSpec
from kd_jax.lm.instruct import prompts as run_prompts
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import cache

BOS, EOS = 1, 2
WORDS = {"unknown": 0, "<s>": BOS, "</s>": EOS, "The": 3, "cat": 4, **{f"w{i}": i for i in range(5, 320)}}


def tokenizer(**parts):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="unknown"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    for name, part in parts.items():
        setattr(backend, name, part)
    return Tokenizer(backend, bos_id=BOS, eos_id=EOS)


def ids_of(i, prompt, max_length):
    """What the scripted sampler makes as sample i: every third is cut, the others end sooner, with EOS."""
    ids = [*prompt, *((11 * i + j) % 300 + 5 for j in range(max_length - len(prompt)))]
    return ids if i % 3 == 0 else [*ids[: len(prompt) + i % 2], EOS]


class Sampler:
    """Stands in for kd_jax.lm.decode: notes how it is called and yields samples backwards within a block of four."""

    def __init__(self):
        self.calls, self.killed_after = [], None

    def stream(self, model, prompt, num_samples, *, first, max_length, **options):
        self.calls.append(
            {"prompt": prompt, "num_samples": num_samples, "first": first, "max_length": max_length, **options}
        )
        jax.monitoring.record_event("/jax/compilation_cache/cache_misses")
        for count, start in enumerate(range(first, num_samples, 4)):
            if count == self.killed_after:
                raise KeyboardInterrupt
            yield self._samples(range(start, min(start + 4, num_samples)), prompt, max_length)

    def _samples(self, indices, prompt, max_length):
        indices = list(reversed(indices))
        rows = [ids_of(i, prompt, max_length) for i in indices]
        tokens = np.zeros((len(rows), max_length), np.int32)
        log_probs = np.zeros((len(rows), max_length), np.float32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
            log_probs[row, len(prompt) : len(ids)] = -0.25
        return SimpleNamespace(
            index=np.array(indices),
            tokens=tokens,
            lengths=np.array([len(ids) for ids in rows], np.int32),
            prompt_lengths=np.full(len(rows), len(prompt), np.int32),
            finished=np.array([ids[-1] == EOS for ids in rows]),
            log_probs=log_probs,
            sample_log_probs=2 * log_probs,
            utilisation=0.5,
            steps=3,
        )


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    tokenizer().save(folder)
    return folder


@pytest.fixture
def sampler(source, monkeypatch):
    """A door that loads a model without weights, and draws from the scripted sampler."""
    params = {"embedding": np.ones((3, 2), np.float32), "layers": ()}
    model = model_lib.Model(model_lib.PRESETS["tiny"], params, (EOS,), BOS, tokenizer=tokenizer())
    fake = Sampler()
    fake.model = model
    monkeypatch.setattr(kd_jax.lm, "decode", fake, raising=False)
    monkeypatch.setattr(weights, "load", lambda source, **_: fake.model)
    return fake


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    # it is a setting of the whole process
    monkeypatch.setattr(cache, "enable_compilation_cache", lambda: None)


def run(*words):
    return sample.main(["kd_jax/sample.py", *map(str, words)])


def sampling(source, out, *words):
    return run("--model", source, "--num_samples", 10, "--shard_size", 4, "--max_length", 7, "--out", out, *words)


def error_of(capsys, code):
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


GOOD = {"--model": "m", "--num_samples": "3", "--out": "corpus"}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--model": None}, ["--model is missing"]),
        ({"--num_samples": None}, ["--num_samples is missing"]),
        ({"--out": None}, ["--out is missing"]),
        ({"--num_samples": "0"}, ["--num_samples: 0"]),
        ({"--num_samples": "1e3"}, ["--num_samples", "1e3"]),
        ({"--sample_temperature": "-0.1"}, ["--sample_temperature=-0.1"]),
        ({"--sample_temperature": "nan"}, ["--sample_temperature=nan"]),
        ({"--sample_temperature": "inf"}, ["--sample_temperature=inf"]),
        ({"--sample_temperature": "warm"}, ["--sample_temperature", "warm"]),
        ({"--temperature": "1"}, ["--temperature"]),
        ({"--sample_temp": "1"}, ["--sample_temp"]),
        ({"--top_p": "0"}, ["--top_p=0.0"]),
        ({"--top_p": "1.01"}, ["--top_p=1.01"]),
        ({"--top_p": "nan"}, ["--top_p=nan"]),
        ({"--top_k": "-1"}, ["--top_k=-1"]),
        ({"--min_p": "1.5"}, ["--min_p=1.5"]),
        ({"--top_k": "2.5"}, ["--top_k", "2.5"]),
        ({"--seed": "-1"}, ["--seed: -1"]),
        ({"--seed": str(2**32)}, ["--seed", "below 4294967296"]),
        ({"--batch_size": "0"}, ["--batch_size: 0"]),
        ({"--shard_size": "0"}, ["--shard_size: 0"]),
        ({"--max_length": "1"}, ["--max_length: 1"]),
        ({"--max_new_tokens": "0"}, ["--max_new_tokens: 0"]),
        ({"--max_length": "9", "--max_new_tokens": "9"}, ["--max_length", "--max_new_tokens"]),
        ({"--prompt_ids": "1,2,3", "--max_length": "3"}, ["--max_length 3", "3 ids"]),
        ({"--prompt": "a", "--prompt_ids": "1"}, ["--prompt_ids", "not allowed with argument --prompt"]),
        ({"--prompt": ""}, ["prompt is empty", "--bos"]),
        ({"--prompts": "p.txt"}, ["--num_samples does not go with --prompts"]),
        ({"--prompts": "p.txt", "--num_samples": None, "--prompt": "a"}, ["--prompt does not go with --prompts"]),
        ({"--samples_per_prompt": "2"}, ["--samples_per_prompt go with --prompts"]),
        ({"--log_prob_format": "float32"}, ["--log_prob_format goes with --record_top_k"]),
        ({"--prompt_ids": ""}, ["prompt is empty", "--bos"]),
        ({"--prompt_ids": "1,x"}, ["--prompt_ids", "'1,x'"]),
        ({"--dtype": "int8"}, ["--dtype", "int8"]),
        ({"--mesh": "data"}, ["--mesh", "'data'"]),
        ({"--first": "1"}, ["--first", "--read"]),
        ({"--text_out": "t.jsonl"}, ["--text_out", "--read"]),
        ({"stray": ""}, ["stray"]),
        ({"--read": "corpus"}, ["--out", "--read"]),
    ],
)
def test_bad_arguments_are_named_before_anything_is_done(tmp_path, monkeypatch, capsys, changes, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    words = [word for flag, value in {**GOOD, **changes}.items() if value is not None for word in (flag, value)]
    text = error_of(capsys, run(*words))
    assert all(part in text for part in parts), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--mesh", "rows=2"], ["--mesh", "'rows'", "data, fsdp, tensor"]),
        (["--mesh", "data=4099"], ["mesh data=4099", "does not fit"]),
        (["--out", "thesis"], ["thesis holds mine.txt and no corpus"]),
        (["--out", "thesis/mine.txt"], ["mine.txt is a file"]),
    ],
)
def test_bad_folder_or_mesh_is_named_before_the_model_is_loaded(sampler, tmp_path, monkeypatch, capsys, words, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "mine.txt").write_text("x")
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    text = error_of(capsys, run(*(word for pair in GOOD.items() for word in pair), *words))
    assert all(part in text for part in parts), text
    assert not (tmp_path / "corpus").exists() and len(list((tmp_path / "thesis").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "changes", "parts"),
    [
        (["--prompt_ids", "3,320"], {}, ["--prompt_ids", "320"]),
        (["--prompt_ids", "4,-1"], {}, ["--prompt_ids", "-1"]),
        (["--prompt", "The cat The cat The cat w9"], {}, ["--max_length 7", "7 ids"]),
        (["--prompt", " "], {}, ["--prompt ' '", "--bos"]),
        (["--max_length", "513"], {}, ["--max_length", "513", "512"]),
        ([], {"tokenizer": None}, ["no tokenizer", "--prompt_ids"]),
        (["--bos"], {"bos_id": None}, ["--bos"]),
        (["--bos", "--prompt_ids", "3,4,5,6,7,8"], {}, ["--max_length 7", "7 ids"]),
    ],
)
def test_what_the_model_cannot_take_is_named_and_nothing_written(
    sampler, source, tmp_path, capsys, words, changes, parts
):
    sampler.model = sampler.model._replace(**changes)
    text = error_of(capsys, sampling(source, tmp_path / "c", *words))
    assert all(part in text for part in parts), text
    assert not (tmp_path / "c").exists() and not sampler.calls


@pytest.mark.parametrize(
    ("words", "prompt", "max_length"),
    [
        ([], [3], 512),
        (["--prompt", "The cat"], [3, 4], 512),
        (["--prompt", "The cat", "--bos"], [BOS, 3, 4], 512),
        (["--prompt", "<s> cat", "--bos"], [BOS, 4], 512),
        (["--prompt", "", "--bos"], [BOS], 512),
        (["--prompt_ids", "9, 8"], [9, 8], 512),
        (["--prompt_ids", "9,8", "--bos", "--max_new_tokens", "5"], [BOS, 9, 8], 8),
        (["--max_length", "5"], [3], 5),
    ],
)
def test_prompt_and_longest_sample(sampler, source, tmp_path, words, prompt, max_length):
    assert run("--model", source, "--num_samples", 2, "--out", tmp_path / "c", *words) == 0
    assert (sampler.calls[0]["prompt"], sampler.calls[0]["max_length"]) == (prompt, max_length)
    held = corpus.open(tmp_path / "c")
    assert [ids.tolist() for ids in held.rows().tokens] == [ids_of(i, prompt, max_length) for i in range(2)]
    settings = held.manifest["settings"]
    assert (settings["prompt_ids"], settings["max_length"]) == (prompt, max_length)
    assert settings["prompt"] == (None if "--prompt_ids" in words else words[1] if "--prompt" in words else "The")


@pytest.mark.parametrize("starts", [True, False])
def test_a_text_prompt_is_the_same_ids_at_every_door(starts):
    """After BOS where the tokenizer's post-processor puts it; ids stay as they are."""
    start = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)]) if starts else None
    model = model_lib.Model(model_lib.PRESETS["tiny"], {}, (EOS,), BOS, tokenizer=tokenizer(post_processor=start))
    wanted = [BOS, 3] if starts else [3]

    def flags(**changes):
        return SimpleNamespace(model="m", p_star="m", bos=False, max_length=8, **{"prompt_ids": None, **changes})

    assert sample._prompt_ids(flags(prompt="The"), model) == wanted
    assert evaluate._prompt(flags(prompt=None), model) == (wanted, 8)
    assert sampler_lib._check(model, ["The", [4]], 1, 8, None, 0, 1, 0) == [wanted, [4]]
    assert prompt_files.encode("The", model.tokenizer) == wanted
    spec = LmSpec(p_star=PStarSpec(architecture="tiny"))
    assert run_prompts.of_corpus(spec, model.tokenizer, 0, 1) == ({"prompt": "The", "prompt_ids": wanted}, None)
    for given in (
        sample._prompt_ids(flags(prompt=None, prompt_ids=[3]), model),
        evaluate._prompt(flags(prompt_ids=[3]), model)[0],
    ):
        assert given == [3]
    forced = flags(prompt="The")
    forced.bos = True
    assert sample._prompt_ids(forced, model) == [BOS, 3]
    # a chat template writes BOS itself
    chat = dataclasses.replace(model.tokenizer, chat_template="{{ bos_token }} {{ messages[0]['content'] }}")
    assert prompt_files.encode("The", chat) == [BOS, 3]


def test_options_reach_the_sampler_and_the_manifest(sampler, source, tmp_path):
    words = "--sample_temperature 0.8 --top_k 9 --top_p 0.95 --seed 5 --batch_size 16 --dtype bfloat16".split()
    assert sampling(source, tmp_path / "c", *words) == 0
    drawn = {"sample_temperature": 0.8, "top_k": 9, "top_p": 0.95, "seed": 5}
    assert sampler.calls == [
        {
            "prompt": [3],
            "num_samples": 10,
            "first": 0,
            "max_length": 7,
            "max_new_tokens": None,
            "batch_size": 16,
            "mesh": None,
            "sampler": decode.SamplerSpec.of(drawn),
            "seed": 5,
            "compute": model_lib.Compute(dtype="bfloat16"),
        }
    ]
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["settings"] == {
        "source": str(source), "model_fingerprint": weights.fingerprint(sampler.model.params),
        "tokenizer_fingerprint": tokenizer().fingerprint, "dtype": "bfloat16", "prompt": "The", "prompt_ids": [3],
        "eos_ids": [EOS], "max_length": 7, "num_samples": 10, "shard_size": 4, **drawn,
    }  # fmt: skip
    assert shlex.split(manifest["command"])[:5] == ["python", "-m", "kd_jax.sample", "--model", str(source)]


def test_summary(sampler, source, tmp_path, capsys):
    assert sampling(source, tmp_path / "c") == 0
    text = capsys.readouterr().out
    lengths = [len(ids_of(i, [3], 7)) for i in range(10)]
    assert f"10 samples, {sum(lengths)} tokens: mean length {sum(lengths) / 10:.1f}, 60.0% finished" in text
    assert "tokens/s, utilisation 50.0%" in text and "programs: 1 compiled, 0 from the cache" in text
    assert f"python -m kd_jax.sample --read {tmp_path / 'c'}" in text


def test_interrupted_run_goes_on_with_the_same_command(sampler, source, tmp_path, capsys):
    sampler.killed_after = 2
    assert sampling(source, tmp_path / "c") == 130
    assert "the same command resumes" in capsys.readouterr().err
    sampler.killed_after = None
    assert sampling(source, tmp_path / "c") == 0
    assert "8 of 10 samples are there, resuming" in capsys.readouterr().out
    assert [call["first"] for call in sampler.calls] == [0, 8]
    assert sampling(source, tmp_path / "c") == 0
    assert "10 of 10 samples are there, nothing left" in capsys.readouterr().out and len(sampler.calls) == 2
    rows = corpus.open(tmp_path / "c").rows()
    assert [ids.tolist() for ids in rows.tokens] == [ids_of(i, [3], 7) for i in range(10)]


def test_other_settings_are_refused_before_the_model_is_loaded(sampler, source, tmp_path, monkeypatch, capsys):
    assert sampling(source, tmp_path / "c") == 0
    capsys.readouterr()
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    text = error_of(capsys, sampling(source, tmp_path / "c", "--seed", 1, "--sample_temperature", 0.9))
    assert "seed: 0 -> 1" in text and "sample_temperature: 1.0 -> 0.9" in text
    assert "10 -> 9" in error_of(capsys, sampling(source, tmp_path / "c", "--num_samples", 9))
    monkeypatch.setattr(weights, "load", load)
    sampler.model = sampler.model._replace(params={"embedding": np.zeros((3, 2), np.float32), "layers": ()})
    assert "model_fingerprint" in error_of(capsys, sampling(source, tmp_path / "c"))


def test_read_prints_samples(sampler, source, tmp_path, capsys):
    sampling(source, tmp_path / "c")
    capsys.readouterr()
    assert run("--read", tmp_path / "c", "--first", 3, "--num_samples", 2) == 0
    words = {i: word for word, i in WORDS.items()}
    text = [" ".join(words[i] for i in ids_of(row, [3], 7)) for row in (3, 4)]
    assert capsys.readouterr().out == (
        f"[3] length 7, cut, log_prob -1.5000\n{text[0]}\n\n[4] length 2, finished, log_prob -0.2500\nThe </s>\n\n"
        "2 of 10 samples; 0 with text that encodes to other ids\n"
    )
    assert run("--read", tmp_path / "c") == 0
    assert "5 of 10 samples" in capsys.readouterr().out
    assert run("--read", tmp_path / "c", "--first", 9) == 0
    assert "1 of 10 samples" in capsys.readouterr().out


def test_read_writes_json_lines(sampler, source, tmp_path, capsys):
    sampling(source, tmp_path / "c")
    capsys.readouterr()
    assert run("--read", tmp_path / "c", "--num_samples", 99, "--text_out", tmp_path / "t.jsonl") == 0
    assert f"10 of 10 samples in {tmp_path / 't.jsonl'}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [ids_of(i, [3], 7) for i in range(10)]
    assert rows[4] == {
        "index": 4, "length": 2, "finished": True, "log_prob": -0.25, "text": "The </s>", "tokens": [3, EOS],
    }  # fmt: skip


def test_read_of_a_corpus_without_tokenizer_shows_ids(sampler, source, tmp_path, capsys):
    sampler.model = sampler.model._replace(tokenizer=None)
    sampling(source, tmp_path / "c", "--prompt_ids", "3")
    capsys.readouterr()
    assert run("--read", tmp_path / "c", "--first", 4, "--num_samples", 1) == 0
    assert "\n[3, 2]\n" in capsys.readouterr().out
    assert run("--read", tmp_path / "c", "--first", 4, "--num_samples", 1, "--model", source) == 0
    assert "\nThe </s>\n" in capsys.readouterr().out


def test_read_errors(sampler, source, tmp_path, capsys):
    sampling(source, tmp_path / "c")
    capsys.readouterr()
    assert "holds no corpus" in error_of(capsys, run("--read", tmp_path / "nothing"))
    assert "--first 10" in error_of(capsys, run("--read", tmp_path / "c", "--first", 10))
    assert "--num_samples: 0" in error_of(capsys, run("--read", tmp_path / "c", "--num_samples", 0))
    assert "--seed" in error_of(capsys, run("--read", tmp_path / "c", "--seed", 1))
    (tmp_path / "file").touch()
    assert "file" in error_of(capsys, run("--read", tmp_path / "c", "--text_out", tmp_path / "file" / "t.jsonl"))
    assert run("--read", tmp_path / "c", "--text_out", tmp_path / "new" / "t.jsonl") == 0
    assert (tmp_path / "new" / "t.jsonl").exists()
    assert not (tmp_path / "no").exists()

    other = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    other.save(tmp_path / "other")
    assert "--model" in error_of(capsys, run("--read", tmp_path / "c", "--model", tmp_path / "other"))
    (source / "tokenizer.json").unlink()
    assert "--model" in error_of(capsys, run("--read", tmp_path / "c"))


def test_read_of_an_unfinished_corpus_says_so(sampler, source, tmp_path, capsys):
    sampler.killed_after = 1
    sampling(source, tmp_path / "c")
    capsys.readouterr()
    assert run("--read", tmp_path / "c") == 0
    assert "4 of 4 samples there so far (10 wanted)" in capsys.readouterr().out


def export_tiny(folder):
    architecture = model_lib.PRESETS["tiny"]
    params = model_lib.init(jax.random.key(0), architecture)
    weights.export(model_lib.Model(architecture, params, (EOS,), BOS, tokenizer=tokenizer()), folder)


def test_a_corpus_from_a_tiny_model(tmp_path, capsys):
    export_tiny(tmp_path / "model")
    words = ["--sample_temperature", "0.7", "--batch_size", "4", "--max_length", "12", "--prompt", "The cat"]
    words = ["--model", tmp_path / "model", "--num_samples", 10, "--shard_size", 4, "--out", tmp_path / "c", *words]
    assert run(*words) == 0
    rows = corpus.open(tmp_path / "c").rows()
    assert rows.index.tolist() == list(range(10)) and rows.prompt_length.tolist() == [2] * 10
    for ids, finished in zip(rows.tokens, rows.finished, strict=True):
        assert ids[:2].tolist() == [3, 4] and len(ids) <= 12
        assert finished == (ids[-1] == EOS) and EOS not in ids[:-1] and (finished or len(ids) == 12)
    assert (rows.log_prob < 0).all() and len({tuple(ids) for ids in rows.tokens}) == 10
    capsys.readouterr()
    assert run("--read", tmp_path / "c", "--num_samples", 10, "--text_out", tmp_path / "t.jsonl") == 0
    names = {i: word for word, i in WORDS.items()}
    for line, ids in zip((tmp_path / "t.jsonl").read_text().splitlines(), rows.tokens, strict=True):
        assert json.loads(line)["text"] == " ".join(names[i] for i in ids.tolist())


@pytest.mark.long
def test_prompts_of_a_file_with_several_samples_each(tmp_path, capsys):
    export_tiny(tmp_path / "model")
    lines = ["The cat", "w7", "w9 w8 The cat The cat"]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n")
    words = ["--model", tmp_path / "model", "--prompts", tmp_path / "p.txt", "--batch_size", 4, "--shard_size", 4]
    words += ["--samples_per_prompt", 2, "--record_top_k", 5, "--max_new_tokens", 8]
    assert run(*words, "--out", tmp_path / "c") == 0
    made = corpus.open(tmp_path / "c")
    rows, settings = made.rows(), made.manifest["settings"]
    assert rows.prompt_length.tolist() == [2, 2, 1, 1, 6, 6] and settings["max_length"] == 6 + 8
    assert [ids[:n].tolist() for ids, n in zip(rows.tokens, rows.prompt_length, strict=True)] == [
        ids for line in lines for ids in [[WORDS[word] for word in line.split()]] * 2
    ]
    assert len({tuple(ids) for ids in rows.tokens}) == 6
    assert (rows.length - rows.prompt_length).max() <= 8 and settings["max_new_tokens"] == 8
    # other prompts beside them change nothing, nor does a start in the middle
    (tmp_path / "p.txt").write_text("\n".join([*lines[:2], "cat"]) + "\n")
    assert run(*words, "--out", tmp_path / "d") == 0
    other = corpus.open(tmp_path / "d").rows()
    for i in range(4):
        n = min(len(rows.tokens[i]), len(other.tokens[i]))
        np.testing.assert_array_equal(rows.tokens[i][:n], other.tokens[i][:n])
    capsys.readouterr()
    assert "prompts_fingerprint" in error_of(capsys, run(*words, "--out", tmp_path / "c"))


@pytest.mark.long
def test_a_killed_process_goes_on_and_another_run_compiles_nothing(tmp_path):
    export_tiny(tmp_path / "model")
    environment = {**os.environ, "KD_JAX_CACHE": str(tmp_path / "cache")}

    def command(out, *words):
        words = ["--model", tmp_path / "model", "--out", tmp_path / out, "--max_length", 60, *words]
        return [sys.executable, "-m", "kd_jax.sample", "--batch_size", "8", "--shard_size", "50", *map(str, words)]

    def finish(out, *words):
        done = subprocess.run(command(out, *words), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    wanted = ("--num_samples", 3000)
    process = subprocess.Popen(command("killed", *wanted), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/data/shard-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not corpus.open(tmp_path / "killed").finished

    assert "resuming" in finish("killed", *wanted)
    finish("whole", *wanted)
    one, other = (corpus.open(tmp_path / name).rows() for name in ("killed", "whole"))
    assert len(one.tokens) == 3000
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert np.array_equal(one.finished, other.finished)
    # where a sample ran differs, and with it how floats were rounded
    np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-3)

    printed = finish("other", "--num_samples", 70, "--sample_temperature", 0.7, "--seed", 5)
    assert "programs: 0 compiled" in printed
