"""Floating-point operations of a model, and the rate at which this machine does them."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from kd_jax.lm.model.architecture import Architecture
from kd_jax.losses import head


def forward_flops(architecture: Architecture, length: int) -> float:
    """Floating-point operations per token of the forward pass, a multiplication and an addition counted as two.

    Each weight counts twice, the output head too, the embedding (a lookup) not. A position attends to half of the
    sequence on average, or in a layer with a sliding window to at most the window.

    Args:
        length: tokens of a sequence; the result is the average over its positions.
    """
    a = architecture
    lookups = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
    # the keys that all positions see together are length^2 / 2, less those that lie before their windows
    windows = (min(length, kind.window or length) for kind in a.layer_kinds)
    keys = sum(length - (length - window) ** 2 / length for window in windows)
    # Scores and weighted sum are 2 FLOPs each for a key and dimension; `keys` is twice the average number of keys.
    return 2.0 * (a.num_parameters - lookups) + 2 * a.num_attention_heads * a.head_dim * keys


def training_flops(architecture: Architecture, length: int) -> float:
    """Floating-point operations per token of an update: the forward pass, and twice that for the backward pass.

    Args:
        architecture, length: as of `forward_flops`.
    """
    return 3.0 * forward_flops(architecture, length)


@functools.cache
def ceiling(dtype: str) -> float:
    """FLOPs per second of large matrix products on all devices together, measured in a fraction of a second.

    Args:
        dtype: of the factors and the product.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: head.dot(a, b, (1, 1), out_dtype=dtype))
    # The first call compiles. Then the best of five: other programs on the machine only ever slow a product down.
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # the devices of a CPU share its cores
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return 2.0 * size**3 / best * devices
