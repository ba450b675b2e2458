"""Sampling and scoring that can be killed at any moment, and then end with the numbers they would have had.

Samples are made a shard at a time and rows are scored in batches that depend on their lengths alone. What ran beside a
sample or a row, which enters its numbers through the rounding of floats, is therefore the same after a restart.

Of several processes, all draw and score, each on its own devices, and process 0 writes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kd_jax import distributed
from kd_jax import mesh as mesh_lib
from kd_jax.files import read_arrays, remove, replacing
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import decode, score
from kd_jax.lm.corpus import Corpus, Rows
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.run import RunError

# What has been scored is saved about this often.
_SAVE_SECONDS = 10.0


def sample(
    model: Model, folder: str | os.PathLike, settings: dict[str, Any], *, command: str, label: str,
    batch_size: int = 64, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> Corpus:  # fmt: skip
    """The corpus of these settings (kd_jax.lm.corpus.SETTINGS), sampled as far as it is not there yet.

    A corpus of other settings in that folder is removed first. Fewer samples are gone on from, and another `source` is
    another name of the same weights. Raises RunError for a folder of other things. `label` is that of the progress bar.
    """
    folder = Path(folder)
    held = Corpus(folder, distributed.once(lambda: _open(folder, settings, command), f"opening {folder}"))
    if held.finished:
        return held
    wanted = held.manifest["settings"]

    def stream() -> Iterator[decode.Samples]:
        for first in range(held.num_rows, wanted["num_samples"], wanted["shard_size"]):
            yield from decode.stream(
                model, wanted["prompt_ids"], min(first + wanted["shard_size"], wanted["num_samples"]),
                first=first, max_length=wanted["max_length"], sample_temperature=wanted["sample_temperature"],
                top_k=wanted["top_k"], top_p=wanted["top_p"], seed=wanted["seed"], batch_size=batch_size,
                compute=compute, mesh=mesh,
            )  # fmt: skip

    with _sampling_bar(label, held.num_rows, wanted["num_samples"]) as progress:
        if distributed.leads():
            corpus_lib.write(held, stream(), progress)
        else:
            collections.deque(stream(), maxlen=0)
    distributed.wait(f"{folder} is written")
    return corpus_lib.open(folder)


def _open(folder: Path, settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The manifest of the corpus folder, made or opened again."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)  # from a run that was killed
    if (folder / "manifest.json").exists():
        there = corpus_lib.open(folder).manifest["settings"]
        names = set(settings) - {"source", "num_samples"}
        if all(there[name] == settings[name] for name in names) and there["num_samples"] <= settings["num_samples"]:
            settings = {**settings, "source": there["source"]}
        else:
            # first out of the way: half removed, it would be neither a corpus nor an empty folder
            os.replace(folder, old)
            remove(old)
    return corpus_lib.create_or_resume(folder, settings, command=command).manifest


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
    with _bar(label, int(generated[~np.isnan(sums)].sum()), int(generated.sum()), "token") as bar:
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


def _bar(label: str, first: int, total: int, unit: str) -> tqdm:
    """A progress bar on stderr, with the rate and the time that is left."""
    # into a log file, a line's worth now and then
    often = 0.1 if sys.stderr.isatty() else 30
    scale = unit == "token"
    return tqdm(
        desc=label, initial=first, total=total, unit=unit, unit_scale=scale, mininterval=often, dynamic_ncols=True,
        disable=not distributed.leads(),
    )  # fmt: skip


@contextlib.contextmanager
def _sampling_bar(label: str, first: int, total: int) -> Iterator[Callable[[int, int], None]]:
    start, made = time.perf_counter(), 0
    with _bar(label, first, total, "sample") as bar:

        def progress(samples: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            bar.set_postfix_str(f"{made / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
            bar.update(samples)

        yield progress
