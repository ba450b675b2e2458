"""What an evaluation has to do: the validation rows, the models, and for each what is there already."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.lm.corpus import Corpus, Rows, compatibility, prompt_files
from kd_jax.lm.decode import WHOLE, SamplerSpec
from kd_jax.lm.evaluation import metric_rows
from kd_jax.lm.evaluation.lazy_models import LazyModel
from kd_jax.lm.evaluation.preconditions import TEACHERS_APART, Entry, EvaluationSpec
from kd_jax.lm.model import Model
from kd_jax.parallel import distributed
from kd_jax.storage import files
from kd_jax.storage.files import read_rows

# A shard of samples: large beside a batch, since slots idle while the last samples of a shard are drawn.
_SHARD_ROWS, _SHARD_BATCHES = 1024, 16


class Data(NamedTuple):
    """The validation rows.

    Attributes:
        settings: of their corpus.
        fingerprint: of the rows.
        from_p_star: drawn from p* itself; else data, which p* has to score.
        prompts: different prompts of the rows, where they have their own; samples answer these.
    """

    rows: Rows
    settings: dict[str, Any]
    fingerprint: str
    from_p_star: bool
    prompts: list[list[int]] | None = None


class Plan(NamedTuple):
    """An evaluation that has been checked.

    Attributes:
        models: those of the entries, one for all entries of a source.
        embedder: the embedding model, if there is one.
        run: how models are run, as arguments.
    """

    p_star: LazyModel
    data: Data
    entries: dict[str, Entry]
    models: dict[str, LazyModel]
    embedder: LazyModel | None
    spec: EvaluationSpec
    folder: Path
    run: dict[str, Any]


class Task(NamedTuple):
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


def home(folder: str | os.PathLike, name: str, sampler: SamplerSpec = WHOLE) -> Path:
    """The folder of the results of a model that is sampled in this way."""
    return Path(folder) / name / ("" if sampler == WHOLE else f"at/{sampler.label}")


def sampling_settings(
    model: LazyModel, source: str, prompt_ids: list[int], max_length: int, num_samples: int, seed: int,
    sampler: SamplerSpec, spec: EvaluationSpec, prompts: list[list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a corpus of samples of the model (see kd_jax.lm.corpus).

    Args:
        model: that is sampled.
        source: its name, for the manifest.
        prompt_ids: what all samples begin with, where there are no prompts.
        max_length: ids of the longest sample.
        num_samples: rows of the corpus.
        seed: of the samples, any integer.
        sampler: how tokens are drawn.
        spec: has the dtype and the batch size, and how many samples each of the prompts has.
        prompts: that differ.
    """
    own = {} if prompts is None else prompt_files.settings(prompts, spec.samples_per_prompt)
    return {
        "source": source, "model_fingerprint": model.fingerprint,
        "tokenizer_fingerprint": compatibility.tokenizer_fingerprint(model.metadata), "dtype": spec.dtype,
        "prompt": None, "prompt_ids": prompt_ids, "eos_ids": sorted(model.metadata.eos_ids), **sampler.knobs(),
        # Seeds of samples are 32 bits wide.
        "seed": seed % 2**32, "max_length": max_length, "num_samples": num_samples,
        "shard_size": max(_SHARD_ROWS, _SHARD_BATCHES * spec.batch_size), **own,
    }  # fmt: skip


def read_data(p_star: LazyModel, validation: Corpus, spec: EvaluationSpec) -> Data:
    """The validation rows, checked against p*.

    Args:
        validation: samples of p* itself, or data.
    Raises: ValueError where they are samples of another model or at another temperature, or have no prompt; RunError
        for a damaged corpus.
    """
    settings, label = validation.manifest["settings"], f"the validation corpus {validation.folder}"
    count = validation.num_rows if spec.num_recall is None else spec.num_recall
    compatibility.check_corpus(label, validation, p_star.metadata, count)
    # rows made from data have no model
    from_p_star = settings.get("model_fingerprint") is not None
    # Samples at another temperature are of another distribution: recall on them would be of something else.
    if from_p_star and SamplerSpec.of(settings) != WHOLE:
        raise ValueError(f"{label} was sampled at {SamplerSpec.of(settings).label}: those are not samples of p* itself")
    if from_p_star and settings["model_fingerprint"] != p_star.fingerprint:
        raise ValueError(f"{label} has samples of another model than p* (or p* was loaded as another dtype here)")
    rows = validation.rows(0, count)
    if rows.prompt_length.min() < 1:
        raise ValueError(f"{label} has rows without a prompt, whose first token no model can score")
    prompts = None
    if compatibility.has_own_prompts(validation):
        prompts = different_prompts(label, rows, spec.num_samples, spec.samples_per_prompt)
    elif spec.samples_per_prompt != 1:
        raise ValueError(f"{label} has one prompt for all rows: samples_per_prompt has no effect")
    return Data(rows, settings, fingerprint(validation, count), from_p_star, prompts)


def different_prompts(label: str, rows: Rows, num_samples: int, samples_per_prompt: int) -> list[list[int]]:
    """The prompts of the validation rows, each once.

    Raises: ValueError, naming the corpus by its label, where they are too few for the samples.
    """
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, prompt_files.of_rows(rows)))]
    if num_samples > len(prompts) * samples_per_prompt:
        raise ValueError(
            f"{label} has {len(prompts)} prompts: num_samples={num_samples} needs a larger samples_per_prompt"
        )
    return prompts


def find_task(plan: Plan, name: str, entry: Entry, model: LazyModel, sampler: SamplerSpec) -> Task:
    """What is still to do for a model that is sampled in one way.

    Args:
        name: of the entry.
        model: the entry's.
    Raises: ValueError for given samples that are of another model.
    """
    spec, data = plan.spec, plan.data
    if entry.samples is None:
        drawn = sampling_settings(
            model, _source(entry, name), data.settings["prompt_ids"], data.settings["max_length"], spec.num_samples,
            spec.seed + (entry.seed or 0) + TEACHERS_APART * (entry.teacher or 0), sampler, spec, data.prompts,
        )  # fmt: skip
        # samples are cut where the validation rows were
        if data.settings.get("max_new_tokens"):
            drawn["max_new_tokens"] = data.settings["max_new_tokens"]
        # where the model is from and how rows lie in files change what is drawn by rounding only
        samples = {key: value for key, value in drawn.items() if key not in ("source", "shard_size")}
    else:
        drawn, samples = entry.samples.manifest["settings"], fingerprint(entry.samples, spec.num_samples)
        if drawn["model_fingerprint"] != model.fingerprint:
            raise ValueError(
                f"{name}: the corpus {entry.samples.folder} has samples of another model (or the model was loaded as "
                "another dtype here)"
            )
    # All that the numbers depend on. Batch sizes and devices are left out, since they only round differently.
    key = {
        "model": model.fingerprint, "p_star": plan.p_star.fingerprint, "validation": data.fingerprint,
        "samples": samples, "num_samples": spec.num_samples, "dtype": spec.dtype,
    }  # fmt: skip
    if plan.embedder is not None:
        key |= {"embedding_model": plan.embedder.fingerprint, "num_points": spec.num_points, "points_seed": spec.seed}
    # Given samples are of one temperature, and need no folder for it.
    where = home(plan.folder, name, WHOLE if entry.samples is not None else sampler)
    row = distributed.once(lambda: _kept_row(where, key), f"reading {where}")
    # What an old run lacks, because the metric is new or defined anew, is computed from the scores that it kept.
    versions = metric_rows.computable(_measurable(plan))
    missing = tuple(metric for metric, version in versions.items() if row["metrics"].get(metric) != version)
    return Task(name, entry, sampler, where, drawn, key, row, missing)


def _measurable(plan: Plan) -> set[str]:
    """Which of metric_rows.MEASURED this evaluation has."""
    names = {"samples", "p_star_of_samples", "data", "model_of_data", "p_star_of_data", "calibration"}
    optional = {
        "own_data": plan.data.from_p_star, "agreement": plan.spec.agreement, "points": plan.embedder is not None,
    }  # fmt: skip
    return names | {name for name, there in optional.items() if there}


def _kept_row(where: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Columns and metric versions of a result with this key; none where there is no such result."""
    for result in read_rows(where / "result.json"):
        if result.get("key") == key:
            return {"columns": result["row"], "metrics": result["metrics"]}
    return {"columns": {}, "metrics": {}}


def samplers(entry: Entry, spec: EvaluationSpec) -> list[SamplerSpec]:
    """The ways of sampling an entry: each temperature of the spec, or how its given samples were drawn."""
    if entry.samples is not None:
        return [SamplerSpec.of(entry.samples.manifest["settings"])]
    return [SamplerSpec(sample_temperature=tau) for tau in entry.sample_temperatures or spec.sample_temperatures]


def source_key(entry: Entry) -> str:
    """Equal for entries of one model."""
    return f"given {id(entry.source)}" if isinstance(entry.source, Model) else str(entry.source)


def _source(entry: Entry, name: str) -> str:
    if isinstance(entry.source, Model):
        return name
    return files.absolute(entry.source)


def fingerprint(corpus: Corpus, count: int) -> str:
    """A hex digest of the first `count` rows; other shard sizes give another one.

    Args:
        corpus: given, or sampled for the evaluation.
        count: rows that are used.
    """
    shards = [shard["sha256"] for shard in corpus.manifest["shards"] if shard["first"] < count]
    return hashlib.sha256(json.dumps([count, *shards]).encode()).hexdigest()


def row_of(task: Task) -> dict[str, Any]:
    """The row of metrics.jsonl. The model's name is not part of the key, so it is put in each time."""
    entry = task.entry
    return {
        "kind": "evaluation", "name": task.name, "arm": entry.arm, "tau": entry.tau, "teacher": entry.teacher,
        "seed": entry.seed, "source": _source(entry, task.name),
        "sample_temperature": task.sampler.sample_temperature,
        **metric_rows.row(task.row["columns"]), "teacher_entropy": None, "teacher_entropy_se": None,
    }  # fmt: skip
