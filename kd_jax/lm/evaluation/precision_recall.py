"""Precision, recall and further metrics of models against p*: a row for each model and way of sampling it.

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
    FOLDER/embeddings.npz, FOLDER/NAME/embeddings.npz    texts as points, if an embedding model is given
    FOLDER/fingerprints.json         of the weights, by the content of their files

A finished result is not computed again, nor are its models loaded; a run that was killed resumes, with the same numbers
to the bit. (Other batch sizes or devices round differently. They are not in the key.)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from kd_jax.lm.corpus import Corpus
from kd_jax.lm.evaluation import preconditions, work
from kd_jax.lm.evaluation.lazy_models import LazyModel
from kd_jax.lm.evaluation.preconditions import Entry, EvaluationSpec
from kd_jax.lm.evaluation.tasks import Plan, find_task, read_data, row_of, samplers, source_key
from kd_jax.lm.model import Compute, Model
from kd_jax.storage.files import read_rows


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
    """The checks of `evaluate`, before any work; no results are written.

    Args and Raises are those of `evaluate`.
    Returns: what `carry_out` takes.
    """
    folder, settings = Path(folder), validation.manifest["settings"]
    if not isinstance(p_star, LazyModel):
        p_star = LazyModel(p_star, spec.dtype, mesh, folder)
    preconditions.check(p_star, models, spec, settings["max_length"])
    for name, entry in models.items():
        # Given samples are checked before anything is loaded or drawn.
        if entry.samples is not None:
            preconditions.check_samples(name, entry.samples, p_star.metadata, settings, spec.num_samples)
    data = read_data(p_star, validation, spec)
    # Entries of one source share a model, which is loaded once.
    sources = {source_key(entry): entry.source for entry in models.values()}
    lazy = {key: LazyModel(source, spec.dtype, mesh, folder) for key, source in sources.items()}
    run = {"compute": Compute(dtype=spec.dtype), "mesh": mesh}
    embedder = LazyModel(spec.embedding_model, spec.dtype, mesh, folder) if spec.embedding_model else None
    return Plan(p_star, data, dict(models), lazy, embedder, spec, folder, run)


def carry_out(plan: Plan) -> list[dict[str, Any]]:
    """The work of `evaluate` that is still to do.

    Args:
        plan: from `plan`.
    Returns: the rows, as `evaluate` does.
    """
    plan.p_star.remember()
    # Cached: the bias depends on the validation rows alone, so it is the same for all models.
    rows, bias = {}, functools.cache(functools.partial(work.bias_of, plan))
    for key, model in plan.models.items():
        # All that one model has to do comes together, and its weights go before the next one is loaded.
        entries = {name: entry for name, entry in plan.entries.items() if source_key(entry) == key}
        tasks = [
            find_task(plan, name, entry, model, sampler)
            for name, entry in entries.items()
            for sampler in samplers(entry, plan.spec)
        ]
        work.work(plan, model, [task for task in tasks if task.missing], bias)
        model.remember()
        model.release()
        for name in entries:
            rows[name] = [row_of(task) for task in tasks if task.name == name]
    return [row for name in plan.entries for row in rows[name]]


def seconds(folder: str | os.PathLike, names: Iterable[str]) -> float:
    """How long the finished evaluations of these models took, each in the start that ended it.

    Args:
        folder: of the evaluation.
        names: of models.
    """
    paths = [path for name in names for path in (Path(folder) / name).rglob("result.json")]
    return round(sum(result["seconds"] for path in paths for result in read_rows(path, {"seconds": int | float})), 3)
