"""What work costs in floating-point operations and time, and how many operations a second this device can do."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from kd_jax.lm.experiment import arms
from kd_jax.lm.model import Architecture
from kd_jax.lm.model import flops as flops_lib
from kd_jax.runs.checkpoint import Checkpoints

# Shares of the measured ceiling that the parts of a run reach, for the times of --dry_run.
SHARES = {"training": 0.4, "sampling": 0.2, "scoring": 0.4}


@functools.cache
def writing_rate() -> float:
    """Bytes per second that checkpoints are written with, measured here in two seconds, where temporary files go."""
    # half a GiB: a few MiB would be quicker than what is to come, as disks and caches take the first of it at once
    tree = {str(i): jax.random.normal(jax.random.key(i), (1 << 24,)) for i in range(8)}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as saved:
        saved.save(0, {"weights": jax.tree.map(lambda leaf: leaf[:1], tree)})  # there is something to compile
        began = time.perf_counter()
        saved.save(1, {"weights": tree})
        saved.wait()
        return sum(leaf.nbytes for leaf in tree.values()) / (time.perf_counter() - began)


# The stages of an experiment. What is written on disk is in bytes; a count of tokens is the most there can be.


def sampling(config, shape: Architecture | None, num_samples: int) -> dict[str, Any]:
    tokens = num_samples * config.sampling.max_length
    # ids as int32, a few numbers a row; Parquet packs them somewhat
    return _cost("sampling", shape, tokens, 1, config, 4 * tokens + 40 * num_samples)


def training(
    config, shape: Architecture | None, count: int, teacher: Architecture | None = None, rollouts: float = 0.0
) -> dict[str, Any]:
    """Of `count` models; with a teacher that is run on all that is learnt, and a share of updates that sample first.

    Validation counts as operations, not as tokens.
    """
    tokens = count * config.num_train * config.sampling.max_length * config.train.epochs
    validated = count * config.num_validation * config.sampling.max_length * config.train.validations
    held = count * (4 + 12 * (config.train.keep + 1) * config.train.keep_checkpoints)
    # a rollout runs the student forward once more, at the pace of sampling
    passes = 3 + rollouts * SHARES["training"] / SHARES["sampling"]
    found = _cost("training", shape, tokens, passes, config, 0 if shape is None else held * shape.num_parameters)
    updates = config.num_train * config.train.epochs // config.train.batch_size
    saves = config.train.validations + (updates // config.train.save_every if config.train.save_every else 0)
    # weights and two moments each time, and at the end the weights once more
    written = 0 if shape is None else count * (12 * saves + 4) * shape.num_parameters
    found |= {"count": count, "teacher": teacher, "written": written}
    if shape is not None:
        found["flops"] += flops_lib.forward_flops(shape, config.sampling.max_length) * validated
    if shape is not None and teacher is not None:
        found["flops"] += flops_lib.forward_flops(teacher, config.sampling.max_length) * (tokens + validated)
    return found


def scoring(config, shape: Architecture | None, top_k: int) -> dict[str, Any]:
    """Of a corpus, its teacher's top_k ids recorded at each position."""
    tokens = (config.num_train + config.num_validation) * config.sampling.max_length
    return _cost("scoring", shape, tokens, 1, config, 4 * tokens * (1 + top_k)) | {"top_k": top_k}


def _cost(kind: str, shape: Architecture | None, tokens: int, passes: int, config, disk: float) -> dict[str, Any]:
    if shape is None:
        return {"kind": kind, "tokens": tokens, "shape": None}
    flops = passes * flops_lib.forward_flops(shape, config.sampling.max_length) * tokens
    about = {"kind": kind, "parameters": shape.num_parameters, "tokens": tokens, "flops": flops, "disk": disk}
    return about | {"shape": shape}


def evaluation(config, shape: Architecture | None) -> dict[str, Any]:
    """Samples of every model scored under p*, which is by far the most of it; `shape` is that of p*."""
    found = arms.arms(config)
    models = config.seeds * len(found) + len({arm.samples for arm in found if arm.samples is not None})
    tokens = models * config.num_samples * config.sampling.max_length
    return _cost("scoring", shape, tokens, 1, config, 8 * tokens)


def show(dtype: str, costs: dict[str, dict[str, Any]], finished: Callable[[str], bool]) -> None:
    """Prints the costs of stages by name: what is done, and what the others take at most."""
    rate, total = flops_lib.ceiling(dtype), 0.0
    print(f"{'stage':24} {'parameters':>13} {'tokens':>14} {'FLOPs':>9} {'disk MB':>9} {'minutes':>10}  state")
    for name, c in costs.items():
        seconds = c["flops"] / (rate * SHARES[c["kind"]]) if "flops" in c else math.nan
        total += 0 if finished(name) else seconds
        print(
            f"{name:24} {c.get('parameters', math.nan):13,} {c['tokens']:14,} {c.get('flops', math.nan):9.2e} "
            f"{c.get('disk', math.nan) / 1e6:9.0f} {seconds / 60:10.1f}  {'finished' if finished(name) else 'to do'}"
        )
    print(
        f"at most {total / 60:.0f} minutes are left on {jax.device_count()} x {jax.devices()[0].device_kind}, which "
        f"does {rate / 1e9:.0f} GFLOP/s in large products; of that sampling is taken to reach "
        f"{SHARES['sampling']:.0%}, training {SHARES['training']:.0%}, scoring {SHARES['scoring']:.0%}"
    )
