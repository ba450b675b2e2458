"""Floating-point operations of a model, and how many of them this device does in a second."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from kd_jax.lm.model.architecture import Architecture
from kd_jax.losses import head


def forward_flops(architecture: Architecture, length: int) -> float:
    """Operations (a multiplication and an addition are two) for a token of a sequence of `length`, on average.

    Weights count twice, the head as well, the embedding (a lookup) not; attention sees half of the sequence.
    """
    a = architecture
    lookups = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
    attention = 2 * a.num_hidden_layers * a.num_attention_heads * a.head_dim * length
    return 2.0 * (a.num_parameters - lookups) + attention


def training_flops(architecture: Architecture, length: int) -> float:
    """The same for an update: forward, and twice that backward."""
    return 3.0 * forward_flops(architecture, length)


@functools.cache
def ceiling(dtype: str) -> float:
    """Operations per second of large matrix products, measured here (a fraction of a second), all devices together."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: head.dot(a, b, (1, 1), out_dtype=dtype))
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # the devices of a CPU share its cores
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return 2.0 * size**3 / best * devices
