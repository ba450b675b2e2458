"""The loss and its statistics on held-out batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.lm.corpus.batches import Batch
from kd_jax.lm.distill.loss import Loss
from kd_jax.lm.training.update import weighted_sum
from kd_jax.parallel import distributed


@functools.lru_cache(maxsize=8)
def make(loss: Loss) -> Callable[[Any, Iterable[Batch], Any], dict[str, float]]:
    """A function (params, batches, guide) -> the loss, as "loss", and its statistics by name.

    They are means over all tokens of all batches together, padding not counted; summed in float64. It is kept, so that
    a second training with the same loss compiles nothing.
    """

    @jax.jit
    def sums_of(params, batch: Batch, guide):
        def one(part):
            mean, statistics = loss(params, part, guide)
            return {"loss": weighted_sum(mean)} | {k: weighted_sum(v) for k, v in statistics.items()}, mean.count

        # Part by part, as in training, and with as little memory.
        sums, counts = jax.lax.map(one, batch)
        return jax.tree.map(jnp.sum, sums), counts.sum()

    def evaluate(params: Any, batches: Iterable[Batch], guide: Any = None) -> dict[str, float]:
        # fetched once at the end: fetching each batch would leave the device idle in between
        parts = distributed.fetch([sums_of(params, batch, guide) for batch in batches])
        # Python floats are float64: sums over a large corpus keep their digits.
        count = sum(float(part[1]) for part in parts)
        return {name: sum(float(part[0][name]) for part in parts) / count for name in parts[0][0]}

    return evaluate
