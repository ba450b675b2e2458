"""Log-probabilities of rows under a model, kept in a file and resumed from it.

Rows are scored in batches that depend on their lengths alone. What ran beside a row changes how its numbers are
rounded, so the same batches give the same numbers after a restart. With several processes all of them score, each on
its own devices, and process 0 writes.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import score
from kd_jax.lm.corpus import Rows
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import progress
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_arrays, replacing

# What has been scored is saved about this often.
_SAVE_SECONDS = 10.0


def log_probs(
    path: str | os.PathLike, key: dict[str, Any], model: Model, rows: Rows, *, label: str,
    batch_tokens: int = 4096, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> np.ndarray:  # fmt: skip
    """log model(row) in nats, summed over what was generated (the EOS included), float64 [n]; kept in `path`, an .npz.

    Those in the file already are not worked out again, if they are of the same `key`: whatever says which model and
    which rows these are. Raises RunError where a row's log-probability is NaN, or the file is damaged.
    """
    path = Path(path)
    # several processes read the same: process 0 does not write before all have scored a batch with it
    sums = _read(path, key, len(rows.index))
    tokens, lengths = corpus_lib.padded(rows)
    generated = lengths - rows.prompt_length
    saved = time.monotonic()
    with progress.bar(label, int(generated[~np.isnan(sums)].sum()), int(generated.sum()), "token") as bar:
        for chosen, _ in score.batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
            missing = chosen[np.isnan(sums[chosen])]
            if not len(missing):
                continue
            scored, _ = score.log_prob(
                model, tokens[chosen], lengths[chosen], batch_tokens=batch_tokens, compute=compute, mesh=mesh
            )
            sums[chosen] = _sums(scored, rows.prompt_length[chosen], lengths[chosen])
            if np.isnan(sums[chosen]).any():
                row = rows.index[chosen[np.isnan(sums[chosen]).argmax()]]
                raise RunError(f"{label}: the model gives NaN for row {row}; are all of its weights finite?")
            bar.update(int(generated[missing].sum()))
            if time.monotonic() - saved >= _SAVE_SECONDS:
                _write(path, key, sums)
                saved = time.monotonic()
    _write(path, key, sums)
    return sums


def _sums(log_probs: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of each row's tokens after its prompt; entry j of log_probs is of token j + 1. Exactly rounded, in float64."""
    spans = zip(log_probs, prompt_lengths, lengths, strict=True)
    return np.array([math.fsum(row[max(start, 1) - 1 : end - 1].tolist()) for row, start, end in spans])


def _read(path: Path, key: dict[str, Any], count: int) -> np.ndarray:
    """The sums that are in the file, NaN for others."""
    if path.exists():
        hint = "; remove it, and the same command makes it again"
        arrays = read_arrays(path, hint=hint)
        if arrays.keys() != {"key", "log_prob"}:
            raise RunError(f"{path} does not hold what is kept in it{hint}")
        if str(arrays["key"]) == _dump(key):
            sums = arrays["log_prob"]
            if (sums.shape, sums.dtype) != ((count,), np.float64):
                raise RunError(f"{path} is damaged: it has {sums.dtype} {sums.shape}, not {count} float64{hint}")
            return sums.copy()  # a view of what was read cannot be written to
    return np.full(count, np.nan)


def _write(path: Path, key: dict[str, Any], sums: np.ndarray) -> None:
    """Writes the file whole or not at all."""
    if not distributed.leads():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez(file, key=np.array(_dump(key)), log_prob=sums)


def _dump(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, allow_nan=False)
