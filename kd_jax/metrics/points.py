"""What every metric of points asks of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def checked(points: jax.Array, name: str) -> jax.Array:
    """Points [N, D] of any type as float32; as float64 where they have more digits and JAX is set to keep them.

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


def centred(real: jax.Array, *others: jax.Array) -> list[jax.Array]:
    """Sets of points [N, D] with the median of the real ones as their origin, in the types of `checked`.

    Far from the origin float32 has no digits left for the differences between points.
    """
    # A median and not a mean: differences from it are exact for integers, so that equal distances stay equal.
    origin = np.median(np.asarray(real, np.float64), axis=0)
    sets = map(np.asarray, (real, *others))
    return [jnp.asarray((p.astype(np.float64) - origin).astype(np.promote_types(p.dtype, np.float32))) for p in sets]
