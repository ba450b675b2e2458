"""What every metric of points asks of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def checked(points: jax.Array, name: str) -> jax.Array:
    """Points [N, D] of any type in float32 or, where they have more digits, in float64.

    In uint8 a difference wraps around, and in float16 a square overflows: both would make distant points neighbours.

    Raises: ValueError for an array that is not [N, D], and for a row that is not finite, whose neighbours are unknown.
    """
    points = jnp.asarray(points)
    if points.ndim != 2:
        raise ValueError(f"{name} must be points [N, D], not an array of shape {points.shape}")
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    wrong = np.flatnonzero(~np.asarray(jnp.isfinite(points).all(axis=1)))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} of {name} is not finite ({len(wrong)} of {len(points)} rows are not)")
    return points
