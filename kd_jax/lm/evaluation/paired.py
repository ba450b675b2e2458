"""Differences between evaluated models, paired by seed and, where both score the same rows, by sequence.

Results keep a value for each sequence. In a paired difference, what two models share (hard rows, a teacher's corpus,
the random numbers of samples) cancels and does not count as noise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.lm.corpus import Rows
from kd_jax.lm.decode import WHOLE, SamplerSpec
from kd_jax.lm.evaluation import estimates
from kd_jax.lm.evaluation.tasks import home
from kd_jax.metrics import statistics
from kd_jax.metrics.statistics import Interval
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_arrays, replacing


def sequence_values(folder: str | os.PathLike, name: str, quantity: str, sampler: SamplerSpec = WHOLE) -> np.ndarray:
    """A value for each sequence, nats, float64 [n].

    Args:
        folder: of the evaluation.
        name: of the model.
        quantity: "recall" (log model of each validation row) or "precision" (log p* of each of its samples).
        sampler: how the model was sampled.
    Raises: RunError where there is no such result.
    """
    return read_arrays(_file(folder, name, quantity, sampler))["log_prob"]


def _file(folder: str | os.PathLike, name: str, quantity: str, sampler: SamplerSpec) -> Path:
    path = home(Path(folder), name, sampler) / f"{quantity}.npz"
    if not path.exists():
        raise RunError(f"{path} is missing: {name} is not evaluated at {sampler.label}")
    return path


def keep(path: Path, folder: Path, rows: Sequence[dict[str, Any]], data: Rows) -> None:
    """Writes what each validation row adds to the metrics that are measured on it, for each student.

    Errors are computed from it (kd_jax.reporting.units). Arrays: tokens int [sequence]; name and sample_temperature
    [model]; log_prob float32 [model, sequence], log model in nats. Some runs have more: agreement float32 [model,
    sequence], in tokens; p_star float32 [sequence], log p* in nats, where p* drew the rows; prompt int [sequence], the
    number of its prompt, where prompts repeat.

    Args:
        path: the file.
        folder: of the evaluation.
        rows: of the evaluation.
        data: the validation rows.
    """
    rows = [row for row in rows if row["seed"] is not None]
    samplers = [SamplerSpec(sample_temperature=row["sample_temperature"]) for row in rows]
    arrays = [read_arrays(_file(folder, row["name"], "recall", s)) for row, s in zip(rows, samplers, strict=True)]
    more = {}
    if any(row["kl_data_model"] is not None for row in rows):
        more["p_star"] = np.asarray(data.log_prob, np.float32)
    if any(row["agreement"] is not None for row in rows):
        more["agreement"] = np.array([kept["agreement"] for kept in arrays], np.float32)
    if (prompts := estimates.clusters(data)) is not None:
        more["prompt"] = prompts
    with replacing(path) as file:
        np.savez(
            # Of a conversation only the assistant's tokens are scored.
            file, tokens=data.num_learnt, name=np.array([row["name"] for row in rows]),
            sample_temperature=np.array([row["sample_temperature"] for row in rows]),
            log_prob=np.array([kept["log_prob"] for kept in arrays], np.float32),
            **more,
        )  # fmt: skip


def difference(
    folder: str | os.PathLike, one: Sequence[str], other: Sequence[str], quantity: str, *,
    samplers: tuple[SamplerSpec, SamplerSpec] = (WHOLE, WHOLE), prompts: np.ndarray | None = None,
    confidence: float = 0.95,
) -> Interval:  # fmt: skip
    """How much more of a quantity models have than others, in nats per sequence.

    Recall is measured on the same rows for all models: both seeds and sequences are random, the two-way case.
    Samples are each model's own: a seed's mean is one value.

    Args:
        one, other: names of models, in the order of their seeds; pairs share a seed.
        quantity: as in `sequence_values`.
        samplers: how `one` and `other` were sampled.
        prompts: int [n], the number of each sequence's prompt, where prompts repeat: errors are then over prompts.
    Returns: the interval of the mean of one - other. With one seed it is over sequences alone.
    """
    pairs = zip(one, other, strict=True)
    differences = np.stack([
        sequence_values(folder, a, quantity, samplers[0]) - sequence_values(folder, b, quantity, samplers[1])
        for a, b in pairs
    ])  # fmt: skip
    if prompts is not None:
        differences = statistics.of_clusters(differences, prompts)
    if len(differences) == 1:
        return statistics.t_interval(differences[0], confidence)
    # The same rows for all models: rows and seeds are both random, and neither may be taken for the other's
    # repetition.
    if quantity == "recall":
        return statistics.two_way(differences, confidence)
    # Samples differ between models, so there is one value a seed; t, because seeds are few.
    return statistics.t_interval(differences.mean(axis=1), confidence)
