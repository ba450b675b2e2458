"""Precision and recall of models against p*, with what goes with them: a row for each model and way of sampling it.

    precision = E_{x ~ model}[log p*(x)]    on samples of the model, drawn for this or given
    recall    = E_{x ~ p*}[log model(x)]    on the rows of a validation corpus

What is scored is what was generated: the tokens after the prompt, and the EOS where it came. A model sampled at a
temperature is another distribution: all numbers of a row are of softmax(logits / temperature), after truncation, recall
and KL(p* || model) too. (A truncated model gives most texts of p* probability 0: recall -inf, and the row says of how
many rows.)

    FOLDER/NAME/samples/             the model's samples, a corpus
    FOLDER/NAME/precision.npz        log p* of each sample
    FOLDER/NAME/recall.npz           log model of each validation row
    FOLDER/NAME/result.json          the row, and what it is a function of
    FOLDER/NAME/at/tau-0.8/...       the same at other temperatures than 1
    FOLDER/p_star.npz                log p* of each validation row, where the corpus does not have it
    FOLDER/p_star_ids.npz            p*'s likeliest id at each validation token, if agreement is asked for
    FOLDER/fingerprints.json         of the weights, by the content of their files

A finished result is not computed again, nor are its models loaded; a run that was killed resumes, with the same numbers
to the bit. (Other batch sizes or devices round differently. They are not in the key.)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm.corpus import Corpus, Rows, compatibility
from kd_jax.lm.decode import WHOLE, SamplerSpec, to_corpus
from kd_jax.lm.evaluation import metric_rows, preconditions, scores
from kd_jax.lm.evaluation.lazy_models import LazyModel
from kd_jax.lm.evaluation.preconditions import Entry, EvaluationSpec
from kd_jax.lm.evaluation.scores import Wanted
from kd_jax.lm.model import Compute, Model
from kd_jax.parallel import distributed
from kd_jax.storage.files import read_rows, write_rows

# A shard of samples: large beside a batch, since slots idle while the last samples of a shard are drawn.
_SHARD_ROWS, _SHARD_BATCHES = 1024, 16


class _Data(NamedTuple):
    """The validation rows.

    Attributes:
        settings: of their corpus.
        fingerprint: of the rows.
        from_p_star: drawn from p* itself; else data, which p* has to score.
    """

    rows: Rows
    settings: dict[str, Any]
    fingerprint: str
    from_p_star: bool


class Plan(NamedTuple):
    """An evaluation that has been checked; `models` are those of the entries, one for all entries of a source."""

    p_star: LazyModel
    data: _Data
    entries: dict[str, Entry]
    models: dict[str, LazyModel]
    spec: EvaluationSpec
    folder: Path
    run: dict[str, Any]


class _Task(NamedTuple):
    """A model, sampled in one way.

    Attributes:
        home: the folder of its results.
        drawn: the settings of its samples' corpus.
        key: what its numbers are a function of.
        row: what is known of its row: columns of metrics that were computed before.
        missing: the metrics to compute.
    """

    name: str
    entry: Entry
    sampler: SamplerSpec
    home: Path
    drawn: dict[str, Any]
    key: dict[str, Any]
    row: dict[str, Any]
    missing: tuple[str, ...]


def evaluate(
    p_star: str | os.PathLike | Model | LazyModel, models: Mapping[str, Entry], validation: Corpus,
    spec: EvaluationSpec, folder: str | os.PathLike, mesh: Mesh | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Evaluates models by name; returns their rows (kind "evaluation"), in that order and that of the temperatures.

    Args:
        p_star: what kd_jax.lm.weights.load takes, or the model itself.
        models: a row for each of spec.sample_temperatures; one row for an entry with samples, at theirs.
        validation: samples of p* itself, or data; prompts and lengths of the samples are as there.
        folder: all results are kept there.
        mesh: what models are laid out over.
    Raises: before any work, ValueError, FileNotFoundError or RunError for models that cannot be loaded or do not go
        together with p*, and for a corpus that cannot be read or is of something else.
    """
    return carry_out(plan(p_star, models, validation, spec, folder, mesh))


def plan(
    p_star: str | os.PathLike | Model | LazyModel, models: Mapping[str, Entry], validation: Corpus,
    spec: EvaluationSpec, folder: str | os.PathLike, mesh: Mesh | None = None,
) -> Plan:  # fmt: skip
    """The checks of `evaluate`, which come before any work, for `carry_out`; no results are written."""
    folder, settings = Path(folder), validation.manifest["settings"]
    if not isinstance(p_star, LazyModel):
        p_star = LazyModel(p_star, spec.dtype, mesh, folder)
    preconditions.check(p_star, models, spec, settings["max_length"])
    for name, entry in models.items():
        if entry.samples is not None:
            preconditions.check_samples(name, entry.samples, p_star.metadata, settings, spec.num_samples)
    data = _data(p_star, validation, spec)
    sources = {_source_key(entry): entry.source for entry in models.values()}
    lazy = {key: LazyModel(source, spec.dtype, mesh, folder) for key, source in sources.items()}
    run = {"compute": Compute(dtype=spec.dtype), "mesh": mesh}
    return Plan(p_star, data, dict(models), lazy, spec, folder, run)


def carry_out(plan: Plan) -> list[dict[str, Any]]:
    """The work of `evaluate`: what is not there yet."""
    plan.p_star.remember()
    rows = {}
    for key, model in plan.models.items():
        entries = {name: entry for name, entry in plan.entries.items() if _source_key(entry) == key}
        tasks = [
            _task(plan, name, entry, model, sampler)
            for name, entry in entries.items()
            for sampler in _samplers(entry, plan.spec)
        ]
        _work(plan, model, [task for task in tasks if task.missing])
        model.remember()
        for name in entries:
            rows[name] = [_row(task) for task in tasks if task.name == name]
    return [row for name in plan.entries for row in rows[name]]


def seconds(folder: str | os.PathLike, names: Iterable[str]) -> float:
    """How long the finished evaluations of these models took, each in the start that ended it."""
    paths = [path for name in names for path in (Path(folder) / name).rglob("result.json")]
    return round(sum(result["seconds"] for path in paths for result in read_rows(path, {"seconds": int | float})), 3)


def home(folder: str | os.PathLike, name: str, sampler: SamplerSpec = WHOLE) -> Path:
    """The folder of the results of a model that is sampled in this way."""
    return Path(folder) / name / ("" if sampler == WHOLE else f"at/{sampler.label}")


def sampling_settings(
    model: LazyModel, source: str, prompt_ids: list[int], max_length: int, num_samples: int, seed: int,
    sampler: SamplerSpec, spec: EvaluationSpec,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a corpus of samples of the model (see kd_jax.lm.corpus)."""
    return {
        "source": source, "model_fingerprint": model.fingerprint,
        "tokenizer_fingerprint": compatibility.tokenizer_fingerprint(model.metadata), "dtype": spec.dtype,
        "prompt": None, "prompt_ids": prompt_ids, "eos_ids": sorted(model.metadata.eos_ids), **sampler.knobs(),
        "seed": seed % 2**32, "max_length": max_length, "num_samples": num_samples,
        "shard_size": max(_SHARD_ROWS, _SHARD_BATCHES * spec.batch_size),
    }  # fmt: skip


# Before any work


def _data(p_star: LazyModel, validation: Corpus, spec: EvaluationSpec) -> _Data:
    settings, label = validation.manifest["settings"], f"the validation corpus {validation.folder}"
    count = validation.num_rows if spec.num_recall is None else spec.num_recall
    compatibility.check_corpus(label, validation, p_star.metadata, count)
    # of data nobody knows a model
    from_p_star = settings.get("model_fingerprint") is not None
    if from_p_star and SamplerSpec.of(settings) != WHOLE:
        raise ValueError(f"{label} was sampled at {SamplerSpec.of(settings).label}: those are not samples of p* itself")
    if from_p_star and settings["model_fingerprint"] != p_star.fingerprint:
        raise ValueError(f"{label} has samples of another model than p* (or p* was loaded as another dtype here)")
    rows = validation.rows(0, count)
    if rows.prompt_length.min() < 1:
        raise ValueError(f"{label} has rows without a prompt, whose first token no model can score")
    return _Data(rows, settings, _fingerprint(validation, count), from_p_star)


def _task(plan: Plan, name: str, entry: Entry, model: LazyModel, sampler: SamplerSpec) -> _Task:
    spec, data = plan.spec, plan.data
    if entry.samples is None:
        drawn = sampling_settings(
            model, _source(entry, name), data.settings["prompt_ids"], data.settings["max_length"], spec.num_samples,
            spec.seed + (entry.seed or 0), sampler, spec,
        )  # fmt: skip
        # neither changes what is drawn, but for rounding
        samples = {key: value for key, value in drawn.items() if key not in ("source", "shard_size")}
    else:
        drawn, samples = entry.samples.manifest["settings"], _fingerprint(entry.samples, spec.num_samples)
        if drawn["model_fingerprint"] != model.fingerprint:
            raise ValueError(
                f"{name}: the corpus {entry.samples.folder} has samples of another model (or the model was loaded as "
                "another dtype here)"
            )
    key = {
        "model": model.fingerprint, "p_star": plan.p_star.fingerprint, "validation": data.fingerprint,
        "samples": samples, "num_samples": spec.num_samples, "dtype": spec.dtype,
    }  # fmt: skip
    where = home(plan.folder, name, WHOLE if entry.samples is not None else sampler)
    row = distributed.once(lambda: _kept_row(where, key), f"reading {where}")
    versions = metric_rows.computable(_measurable(plan))
    missing = tuple(metric for metric, version in versions.items() if row["metrics"].get(metric) != version)
    return _Task(name, entry, sampler, where, drawn, key, row, missing)


def _measurable(plan: Plan) -> set[str]:
    """Which of metric_rows.MEASURED this evaluation has."""
    names = {"samples", "p_star_of_samples", "data", "model_of_data", "p_star_of_data", "calibration"}
    optional = {"own_data": plan.data.from_p_star, "agreement": plan.spec.agreement}
    return names | {name for name, there in optional.items() if there}


def _kept_row(where: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Columns and metric versions of a result with this key; none where there is no such result."""
    for result in read_rows(where / "result.json"):
        if result.get("key") == key:
            return {"columns": result["row"], "metrics": result["metrics"]}
    return {"columns": {}, "metrics": {}}


def _samplers(entry: Entry, spec: EvaluationSpec) -> list[SamplerSpec]:
    if entry.samples is not None:
        return [SamplerSpec.of(entry.samples.manifest["settings"])]
    return [SamplerSpec(sample_temperature=tau) for tau in spec.sample_temperatures]


def _source_key(entry: Entry) -> str:
    """Equal for entries of one model."""
    return f"given {id(entry.source)}" if isinstance(entry.source, Model) else str(entry.source)


def _source(entry: Entry, name: str) -> str:
    if isinstance(entry.source, Model):
        return name
    path = Path(entry.source).expanduser()
    return str(path.absolute()) if path.exists() else str(entry.source)


def _fingerprint(corpus: Corpus, count: int) -> str:
    """A hex digest of the first `count` rows and of how they are kept in files."""
    shards = [shard["sha256"] for shard in corpus.manifest["shards"] if shard["first"] < count]
    return hashlib.sha256(json.dumps([count, *shards]).encode()).hexdigest()


# The work


def _work(plan: Plan, model: LazyModel, tasks: list[_Task]) -> None:
    """Evaluates a model in several ways: it is loaded at most once, and let go before p* scores its samples."""
    if not tasks:
        return
    start = time.perf_counter()
    for task in tasks:
        task.home.mkdir(parents=True, exist_ok=True)
    corpora = [_samples(plan, model, task) for task in tasks]
    other = _p_star_ids(plan) if plan.spec.agreement else None
    wanted, label = [(task.home / "recall.npz", task.sampler) for task in tasks], f"{tasks[0].name}: recall"
    of_data = _scores(plan, model, wanted, plan.data, label, other)
    model.release()
    reference = _log_p_star_of_data(plan)
    for task, corpus, recall in zip(tasks, corpora, of_data, strict=True):
        count = plan.spec.num_samples
        samples = plan.data._replace(rows=corpus.rows(0, count), fingerprint=_fingerprint(corpus, count))
        path, label = task.home / "precision.npz", f"{task.name}: precision"
        (precision,) = _scores(plan, plan.p_star, [(path, WHOLE)], samples, label)
        measured = {
            "samples": samples.rows, "p_star_of_samples": precision.log_prob, "data": plan.data.rows,
            "model_of_data": recall.log_prob, "p_star_of_data": reference, "own_data": reference,
            "calibration": recall.calibration, "agreement": recall.agreement,
        }  # fmt: skip
        task.row["columns"] |= metric_rows.compute(task.missing, measured)
        task.row["metrics"] |= {metric: metric_rows.METRICS[metric].version for metric in task.missing}
    took = round((time.perf_counter() - start) / len(tasks), 3)
    for task in tasks if distributed.leads() else ():
        result = {"key": task.key, "row": _row(task), "metrics": task.row["metrics"], "seconds": took}
        write_rows(task.home / "result.json", [result])


def _samples(plan: Plan, model: LazyModel, task: _Task) -> Corpus:
    if task.entry.samples is not None:
        return task.entry.samples
    label = f"{task.name}: samples" + ("" if task.sampler == WHOLE else f" at {task.sampler.label}")
    return to_corpus.sample(
        model.load, task.home / "samples", task.drawn, command=f"evaluation of {task.name}", label=label,
        batch_size=plan.spec.batch_size, **plan.run,
    )  # fmt: skip


def _scores(
    plan: Plan, model: LazyModel, wanted: list[tuple[Path, SamplerSpec]], data: _Data, label: str,
    other: np.ndarray | None = None,
) -> list[scores.Scores]:  # fmt: skip
    key = _scores_key(plan, model, data) | ({} if other is None else {"other": plan.p_star.fingerprint})
    return scores.score_rows(
        [Wanted(path, key, sampler) for path, sampler in wanted], model.load, data.rows, label=label, other=other,
        batch_tokens=plan.spec.batch_tokens, **plan.run,
    )  # fmt: skip


def _scores_key(plan: Plan, model: LazyModel, data: _Data) -> dict[str, Any]:
    return {"model": model.fingerprint, "rows": data.fingerprint, "dtype": plan.spec.dtype}


def _p_star_ids(plan: Plan) -> np.ndarray:
    return scores.likeliest_ids(
        plan.folder / "p_star_ids.npz", _scores_key(plan, plan.p_star, plan.data), plan.p_star.load, plan.data.rows,
        label="p*: likeliest ids", batch_tokens=plan.spec.batch_tokens, **plan.run,
    )  # fmt: skip


def _log_p_star_of_data(plan: Plan) -> np.ndarray:
    if plan.data.from_p_star:
        return np.asarray(plan.data.rows.log_prob, np.float64)
    (reference,) = _scores(plan, plan.p_star, [(plan.folder / "p_star.npz", WHOLE)], plan.data, "p*: data")
    return reference.log_prob


def _row(task: _Task) -> dict[str, Any]:
    """The row of metrics.jsonl. What the model is called is no part of the key, so it is put in anew each time."""
    entry = task.entry
    return {
        "kind": "evaluation", "name": task.name, "arm": entry.arm, "tau": entry.tau, "seed": entry.seed,
        "source": _source(entry, task.name), "sample_temperature": task.sampler.sample_temperature,
        **metric_rows.row(task.row["columns"]), "teacher_entropy": None, "teacher_entropy_se": None,
    }  # fmt: skip
