"""A sweep over seeds in chunks: spread over devices, saved one by one, and resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.parallel import distributed, mesh
from kd_jax.runs import cache, progress
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage.files import append_rows, write_rows


def run(
    folder: Path, count: int, compute: Callable[[int], Any], rows: Callable[[int, Any], list[dict]],
    like: Callable[[int], Any],
) -> None:  # fmt: skip
    """Computes chunks 0 to count - 1 into the run folder's metrics.jsonl, resuming after the chunks that were saved.

    Args:
        folder: the run folder.
        count: number of chunks.
        compute: chunk -> a dict of dicts of arrays, which is saved.
        rows: chunk, and its arrays -> its rows, in the order of the file.
        like: chunk -> arrays of the shapes and types that `compute` returns, for reading them back.
    """
    cache.enable_compilation_cache()
    rows_path = folder / "metrics.jsonl"
    with Checkpoints(folder / "checkpoints" / "chunks") as saved:
        done = saved.steps()
        # Rewritten from the checkpoints: a kill may have left half a row, or rows of a chunk that was not saved.
        saved_rows = {}
        for c in done:
            shapes = like(c)
            saved_rows[c] = rows(c, _filled(saved.load(c, _kept(shapes)), shapes))
        if distributed.leads():
            write_rows(rows_path, _chain(saved_rows.values()))
        if done and distributed.leads():
            print(f"resuming: {len(done)} of {count} chunks are done")
        with progress.bar("sweep", len(done), count, "chunk") as bar:
            for c in sorted(set(range(count)) - set(done)):
                arrays = compute(c)
                # before its rows: rows can be made again from a checkpoint
                saved.save(c, _kept(arrays))
                if distributed.leads() and c > max(done, default=-1):
                    append_rows(rows_path, rows(c, arrays))
                elif distributed.leads():
                    # A chunk whose checkpoint was lost: its rows have their place before those of later ones.
                    saved_rows[c] = rows(c, arrays)
                    write_rows(rows_path, _chain(saved_rows[c] for c in sorted(saved_rows)))
                bar.update(1)


def _kept(arrays: dict) -> dict:
    """Without arrays of size 0, of students that the config leaves out: a checkpoint cannot hold them."""
    kept = {name: _kept(leaf) if isinstance(leaf, dict) else leaf for name, leaf in arrays.items()}
    return {name: leaf for name, leaf in kept.items() if (leaf if isinstance(leaf, dict) else leaf.size)}


def _filled(kept: dict, like: dict) -> dict:
    """The arrays that `_kept` took these from; `like` has their names and shapes."""
    return {
        name: _filled(kept.get(name, {}), leaf) if isinstance(leaf, dict) else kept.get(name, leaf)
        for name, leaf in like.items()
    }


def _chain(parts: Iterable[list[dict]]) -> list[dict]:
    return [row for part in parts for row in part]


def over_seeds(program: Callable[..., Any], seeds, numbers: Any, devices=None) -> Any:
    """program(seeds, numbers) with the seeds spread over all `devices` (default: every one there is), as NumPy arrays.

    Args:
        program: jitted; all its results have the seeds as their first axis.
        seeds: integers [S].
        numbers: a tree of numbers, the same on every device; float32.
        devices: None for all.

    Returns: the results [S, ...] as NumPy arrays.
    """
    # uint32, as in a JAX key's seed: 2^32 seeds, and no float in between.
    seeds = np.asarray(seeds, np.uint32)
    seed_mesh = mesh.one_axis("seeds", devices)
    # The devices need equal shares: the last seed is repeated, and its copies dropped.
    padded = np.concatenate([seeds, np.full(-len(seeds) % seed_mesh.size, seeds[-1], np.uint32)])
    spread = NamedSharding(seed_mesh, PartitionSpec("seeds"))
    whole = NamedSharding(seed_mesh, PartitionSpec())
    numbers = jax.tree.map(lambda value: distributed.spread(np.asarray(value, np.float32), whole), numbers)
    arrays = distributed.fetch(program(distributed.spread(padded, spread), numbers))
    return jax.tree.map(lambda leaf: leaf[: len(seeds)], arrays)
