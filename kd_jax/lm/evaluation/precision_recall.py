"""Precision and recall of models against p*, and what goes with them: one row of numbers for each model.

    precision = E_{x ~ model}[log p*(x)]    on samples of the model, drawn for this or there already
    recall    = E_{x ~ p*}[log model(x)]    on the rows of a validation corpus

What is scored is what was generated: the tokens after the prompt, and the EOS where it came. Samples that were drawn at
another temperature stand for that other distribution: precision, entropy and KL(model || p*) are its own, while recall
and KL(p* || model), for which the model would have to be scored at that temperature, are absent.

    FOLDER/NAME/samples/         the model's samples, a corpus
    FOLDER/NAME/precision.npz    log p* of each sample
    FOLDER/NAME/recall.npz       log model of each validation row
    FOLDER/NAME/result.json      the row, and the key: all that it is a function of
    FOLDER/p_star.npz            log p* of each validation row, where the corpus does not say it

A model whose result has the same key is not evaluated again, and a run that was killed goes on where it was; the
numbers are the same to the bit. (Another batch size, or other devices, would round differently. Neither is in the key.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import weights
from kd_jax.lm.corpus import Corpus, Rows, compatibility
from kd_jax.lm.decode import SamplerSpec, to_corpus
from kd_jax.lm.evaluation import estimates, scores
from kd_jax.lm.model import Compute, Model
from kd_jax.parallel import distributed
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_rows, write_rows

# Of a result; one of another format is made again.
FORMAT = 1
_NAME = re.compile(r"[\w.@+-]+(/[\w.@+-]+)*")
# what a result.json has, beside the numbers
_RESULT = {"key": dict, "row": dict, "seconds": int | float}
# A shard of samples: large beside a batch, since slots idle while the last samples of a shard are drawn.
_SHARD_ROWS, _SHARD_BATCHES = 1024, 16


class Entry(NamedTuple):
    """A model to evaluate.

    Attributes:
        source: what kd_jax.lm.weights.load takes, or the model itself.
        arm: "direct", "distilled", "teacher" or "model". Like `tau`, it only says in the row what this is.
        tau: the sample temperature of the teacher, in the samples the model learnt from or in its own here.
        seed: of the model's training. Models of one seed are sampled with the same random numbers, which makes the
            differences between them less noisy; those of other seeds with others.
        samples: samples of the model that are there already, of which the first num_samples are taken.
    """

    source: str | os.PathLike | Model
    arm: str = "model"
    tau: float | None = None
    seed: int | None = None
    samples: Corpus | None = None


class Settings(NamedTuple):
    """How models are evaluated. num_recall=None takes all of the validation corpus."""

    num_samples: int
    num_recall: int | None = None
    seed: int = 0
    sample_temperature: float = 1.0
    dtype: str = "float32"
    batch_size: int = 64
    batch_tokens: int = 4096
    mesh: Mesh | None = None

    @property
    def run(self) -> dict[str, Any]:
        """How a model is run, as arguments."""
        return {"compute": Compute(dtype=self.dtype), "mesh": self.mesh}


class Found(NamedTuple):
    """A model without its weights, and their fingerprint."""

    model: Model
    fingerprint: str


class _Data(NamedTuple):
    """The validation rows."""

    rows: Rows
    settings: dict[str, Any]  # of their corpus
    fingerprint: str
    p_star: str  # the fingerprint of p*
    from_p_star: bool  # drawn from p* itself; else it is data that p* has to score
    log_prob: np.ndarray  # under p*, float64 [n]; NaN where it is not known yet


class _Task(NamedTuple):
    """A model as it was found before any work."""

    name: str
    entry: Entry
    home: Path
    drawn: dict[str, Any]  # the settings of its samples' corpus
    key: dict[str, Any]


class Plan(NamedTuple):
    """An evaluation that has been checked."""

    p_star: Model
    data: _Data
    tasks: tuple[_Task, ...]
    settings: Settings
    folder: Path


def evaluate(
    p_star: Model, models: dict[str, Entry], validation: Corpus, settings: Settings, folder: str | os.PathLike
) -> list[dict[str, Any]]:
    """Evaluates models by name and returns their rows (kind "evaluation") in that order.

    Beside p*, one model's weights are held at a time. Samples get the prompt and the length of the validation corpus,
    which holds samples of p* itself, or data that p* then scores. A name may have slashes: folders in folders.

    Raises ValueError, FileNotFoundError or RunError, before any work, for a model or a corpus that cannot be read, has
    another vocabulary or EOS than p*, or is not what it has to be.
    """
    return carry_out(plan(p_star, models, validation, settings, folder))


def plan(
    p_star: Model, models: dict[str, Entry], validation: Corpus, settings: Settings, folder: str | os.PathLike
) -> Plan:
    """What `evaluate` does before any work, for `carry_out`; nothing is written."""
    data = _data(p_star, validation, settings)
    found = check(p_star, models, data.settings["max_length"], settings)
    folder = Path(folder)
    tasks = [_task(name, entry, found[name], p_star, data, settings, folder) for name, entry in models.items()]
    return Plan(p_star, data, tuple(tasks), settings, folder)


def carry_out(plan: Plan) -> list[dict[str, Any]]:
    """The rest of `evaluate`."""
    p_star, data, tasks, settings, folder = plan
    rows = distributed.once(lambda: [_finished_row(task) for task in tasks], "what is evaluated")
    if None in rows and not data.from_p_star:
        data = data._replace(log_prob=_score(folder / "p_star.npz", p_star, data.p_star, data, settings, "p*: data"))
    return [row or _evaluate(p_star, task, data, settings) for row, task in zip(rows, tasks, strict=True)]


def seconds(folder: str | os.PathLike, names: Iterable[str]) -> float:
    """What the finished evaluations of these models took, each in the start that ended it."""
    found = [result for name in names for result in read_rows(Path(folder) / name / "result.json", _RESULT)]
    return round(sum(result["seconds"] for result in found), 3)


def check(p_star: Model, models: dict[str, Entry], max_length: int, settings: Settings) -> dict[str, Found]:
    """Loads each model that is needed and lets it go again: what it is like, by name.

    Raises ValueError, FileNotFoundError or RunError for one that cannot be loaded, does not go together with p*, or
    has fewer than max_length positions, and ValueError for a name that cannot be a folder.
    """
    for name in models:
        if not _NAME.fullmatch(name) or {"samples", ".", ".."} & set(name.split("/")):
            raise ValueError(
                f"{name!r} cannot name a model: use letters, digits and . _ @ + - with / between, and no part 'samples'"
            )
    if settings.num_samples < 1:
        raise ValueError(f"num_samples={settings.num_samples} must be at least 1")
    compatibility.check_model("p*", p_star, p_star, max_length)
    found = {}
    for name, entry in models.items():
        if _is_needed(entry):
            model = _load(entry, settings)
            compatibility.check_model(name, model, p_star, max_length)
            found[name] = Found(model._replace(params={}), weights.fingerprint(model.params))
        else:
            found[name] = Found(p_star._replace(params={}), entry.samples.manifest["settings"]["model_fingerprint"])
    return found


def sampling_settings(
    found: Found, source: str, prompt_ids: list[int], max_length: int, num_samples: int, seed: int, settings: Settings
) -> dict[str, Any]:
    """The settings of a corpus of samples of the model (see kd_jax.lm.corpus)."""
    return {
        "source": source, "model_fingerprint": found.fingerprint,
        "tokenizer_fingerprint": compatibility.tokenizer_fingerprint(found.model),
        "dtype": settings.dtype, "prompt": None,
        "prompt_ids": prompt_ids, "eos_ids": sorted(found.model.eos_ids),
        **SamplerSpec(sample_temperature=settings.sample_temperature).knobs(), "seed": seed % 2**32,
        "max_length": max_length, "num_samples": num_samples,
        "shard_size": max(_SHARD_ROWS, _SHARD_BATCHES * settings.batch_size),
    }  # fmt: skip


# Before any work


def _data(p_star: Model, validation: Corpus, settings: Settings) -> _Data:
    about, label = validation.manifest["settings"], f"the validation corpus {validation.folder}"
    fingerprint = weights.fingerprint(p_star.params)
    count = validation.num_rows if settings.num_recall is None else settings.num_recall
    compatibility.check_corpus(label, validation, p_star, count)
    # of data nobody knows a model
    from_p_star = about.get("model_fingerprint") is not None
    if from_p_star and about["model_fingerprint"] != fingerprint:
        raise ValueError(f"{label} has samples of another model than p* (or p* was loaded as another dtype here)")
    if from_p_star and SamplerSpec.of(about) != SamplerSpec():
        raise ValueError(f"{label} was sampled at {SamplerSpec.of(about).label}: those are not samples of p* itself")
    rows = validation.rows(0, count)
    if rows.prompt_length.min() < 1:
        raise ValueError(f"{label} has rows without a prompt, whose first token no model can score")
    log_prob = np.array(rows.log_prob, np.float64) if from_p_star else np.full(count, np.nan)
    return _Data(rows, about, _fingerprint(validation, count), fingerprint, from_p_star, log_prob)


def _task(name: str, entry: Entry, found: Found, p_star: Model, data: _Data, settings: Settings, folder: Path) -> _Task:
    about, count = data.settings, settings.num_samples
    if entry.samples is None:
        seed = settings.seed + (entry.seed or 0)
        source, prompt_ids, max_length = _source(entry, name), about["prompt_ids"], about["max_length"]
        drawn = sampling_settings(found, source, prompt_ids, max_length, count, seed, settings)
        # neither changes what is drawn, but by rounding
        samples = {key: value for key, value in drawn.items() if key not in ("source", "shard_size")}
    else:
        drawn = _check_samples(name, entry.samples, p_star, data, found.fingerprint, count)
        samples = _fingerprint(entry.samples, count)
    key = {
        "format": FORMAT, "model": found.fingerprint, "p_star": data.p_star, "validation": data.fingerprint,
        "samples": samples, "num_samples": count, "dtype": settings.dtype,
    }  # fmt: skip
    return _Task(name, entry, folder / name, drawn, key)


def _check_samples(
    name: str, held: Corpus, p_star: Model, data: _Data, fingerprint: str, num_samples: int
) -> dict[str, Any]:
    """The settings of samples that are there; ValueError unless they are the model's and like the validation rows."""
    about, label = held.manifest["settings"], f"{name}: the corpus {held.folder}"
    compatibility.check_corpus(label, held, p_star, num_samples)
    if about["model_fingerprint"] != fingerprint:
        raise ValueError(f"{label} has samples of another model (or the model was loaded as another dtype here)")
    for key in ("prompt_ids", "max_length"):
        if about[key] != data.settings[key]:
            raise ValueError(f"{label} has {key} {about[key]}, the validation corpus {data.settings[key]}")
    return about


def _is_needed(entry: Entry) -> bool:
    """Whether the model itself is needed, or its samples are enough."""
    return entry.samples is None or SamplerSpec.of(entry.samples.manifest["settings"]) == SamplerSpec()


def _load(entry: Entry, settings: Settings) -> Model:
    if isinstance(entry.source, Model):
        return entry.source
    return weights.load(entry.source, dtype=settings.dtype, mesh=settings.mesh)


def _source(entry: Entry, name: str) -> str:
    if isinstance(entry.source, Model):
        return name
    path = Path(entry.source).expanduser()
    return str(path.absolute()) if path.exists() else str(entry.source)


def _fingerprint(held: Corpus, count: int) -> str:
    """A hex digest of the first `count` rows and of how they are kept in files."""
    shards = [shard["sha256"] for shard in held.manifest["shards"] if shard["first"] < count]
    return hashlib.sha256(json.dumps([count, *shards]).encode()).hexdigest()


# The work


def _finished_row(task: _Task) -> dict[str, Any] | None:
    for result in read_rows(task.home / "result.json", _RESULT):
        if result["key"] == task.key:
            # what the model is called is no part of the key
            return {**result["row"], **_names(task)}
    return None


def _evaluate(p_star: Model, task: _Task, data: _Data, settings: Settings) -> dict[str, Any]:
    name, held, recall, start = task.name, task.entry.samples, None, time.perf_counter()
    task.home.mkdir(parents=True, exist_ok=True)
    if _is_needed(task.entry):
        model = _load(task.entry, settings)
        # a training that goes on has a newer checkpoint by now
        if weights.fingerprint(model.params) != task.key["model"]:
            raise RunError(f"the weights of {name} ({_source(task.entry, name)}) have changed since this began")
        if held is None:
            held = to_corpus.sample(
                model, task.home / "samples", task.drawn, command=f"evaluation of {name}", label=f"{name}: samples",
                batch_size=settings.batch_size, **settings.run,
            )  # fmt: skip
        if SamplerSpec.of(task.drawn) == SamplerSpec():
            path, label = task.home / "recall.npz", f"{name}: recall"
            recall = _score(path, model, task.key["model"], data, settings, label)
        del model
    samples = data._replace(
        rows=held.rows(0, settings.num_samples), fingerprint=_fingerprint(held, settings.num_samples)
    )
    path, label = task.home / "precision.npz", f"{name}: precision"
    precision = _score(path, p_star, data.p_star, samples, settings, label)
    recall_tokens = data.rows.length - data.rows.prompt_length
    numbers = estimates.numbers(samples.rows, precision, recall_tokens, recall, data.log_prob, data.from_p_star)
    row = {**_names(task), **numbers, "teacher_entropy": None, "teacher_entropy_se": None}
    result = {"key": task.key, "row": row, "seconds": round(time.perf_counter() - start, 3)}
    if distributed.leads():
        write_rows(task.home / "result.json", [result])
    return row


def _score(path: Path, model: Model, fingerprint: str, data: _Data, settings: Settings, label: str) -> np.ndarray:
    key = {"model": fingerprint, "rows": data.fingerprint, "dtype": settings.dtype}
    return scores.log_probs(
        path, key, model, data.rows, label=label, batch_tokens=settings.batch_tokens, **settings.run
    )


def _names(task: _Task) -> dict[str, Any]:
    entry = task.entry
    return {
        "kind": "evaluation", "name": task.name, "arm": entry.arm, "tau": entry.tau, "seed": entry.seed,
        "source": _source(entry, task.name), "sample_temperature": task.drawn["sample_temperature"],
    }  # fmt: skip
