"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scalings for longer contexts.

A head's dimension i is paired with dimension i + half, as in Hugging Face's checkpoints. Phases are float32: in
bfloat16 the angle of position 1000 would be off by up to 2 radians.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How the rotary frequencies are changed for contexts beyond those of pretraining; names as in config.json.

    Attributes:
        rope_type: "linear" (all frequencies divided by `factor`; Chen et al. 2023, arXiv 2306.15595), "llama3" (only
            the slow ones, with a smooth transition; Llama 3.1) or "yarn" (Peng et al. 2023, arXiv 2309.00071).
        factor: how many times longer the context becomes.
        original_max_position_embeddings: the context of pretraining, in tokens (llama3, yarn).
        low_freq_factor, high_freq_factor: the transition's ends, in turns within the original context (llama3).
        beta_fast, beta_slow: the same (yarn).
        truncate: whether the transition's ends are rounded to whole dimensions (yarn).
        attention_factor: multiplies cos and sin (yarn).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def frequencies(theta: float, dim: int, scaling: Scaling | None = None) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64 [dim / 2].

    Args:
        theta: base of the geometric progression of wavelengths.
        dim: how many dimensions of a head are rotated.
        scaling: for a longer context; None leaves the frequencies as they are.
    """
    half = dim // 2
    # float64 on the host, rounded to float32 only in the end: an error of a frequency grows with the position.
    plain = theta ** (-np.arange(half, dtype=np.float64) / half)
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # `keep` is 1 for pairs that turn often within the original context, which stay, and 0 for slow ones, which
        # slow down.
        keep = np.clip((turns - low) / (high - low), 0, 1)
    else:
        # the (fractional) pair that makes this many turns within the original context
        def pair(turns):
            ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(theta))

        first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        # 0.001: the ramp is a step where both ends are one pair
        keep = 1 - np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
    return plain * (keep + (1 - keep) / scaling.factor)


def phases(positions: jax.Array, theta: float, dim: int, scaling: Scaling | None) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [row, position, 1, dim / 2], for positions [row, position]; see `frequencies`.

    Args:
        positions: int [row, position].
        theta, dim, scaling: as of `frequencies`.
    """
    # Positions are whole numbers, exact in float32 up to 2**24.
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies(theta, dim, scaling), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.attention_factor != 1:
        # Queries and keys are both rotated, so the scores are multiplied by its square (YaRN, equation 21).
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Queries or keys [row, position, head, head_dim], rotated in their first 2 * cos.shape[-1] dimensions.

    Args:
        x: of any float dtype; the result has the same.
        cos, sin: float32, as `phases` gives them.
    """
    rotated, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    # In float32, rounded once to the dtype of the activations.
    a, b = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return rotated if not rest.shape[-1] else jnp.concatenate([rotated, rest], axis=-1)
