"""Precision, recall, density and coverage of samples by nearest neighbours."""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Neighbours(NamedTuple):
    """Shares by k-nearest-neighbour balls: how far samples lie where data lie, and the other way round."""

    precision: jax.Array  # of the fake points, those in the ball of some real point (Kynkäänniemi et al. 2019)
    recall: jax.Array  # of the real points, those in the ball of some fake point
    density: jax.Array  # real balls a fake point is in, on average, divided by k (Naeem et al. 2020); can be above 1
    coverage: jax.Array  # of the real balls, those with a fake point in them


def knn_precision_recall(real: jax.Array, fake: jax.Array, k: int, *, chunk: int = 256) -> Neighbours:
    """Precision, recall, density and coverage of points `fake` [M, D] against points `real` [N, D].

    The ball of a point reaches to the k-th nearest of the *other* points of its own set, that point included: so
    identical sets get 1 even where points coincide. Then radii are 0, and a warning says so.

    Args:
        chunk: rows whose distances to all of the other set are held at a time; it does not change the result.
    Raises: ValueError for shapes that do not go together, or a set of k or fewer points.
    """
    real, fake = jnp.asarray(real), jnp.asarray(fake)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"need points [N, D] and [M, D], not {real.shape} and {fake.shape}")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k={k} must be at least 1 and below the number of points ({len(real)} and {len(fake)})")
    real_radius, fake_radius = _radii(real, k, chunk), _radii(fake, k, chunk)
    zero = int((real_radius == 0).sum() + (fake_radius == 0).sum())
    if zero:
        warnings.warn(f"{zero} points have {k} or more others in the same place: their balls are points", stacklevel=2)
    in_real, nearest_fake = _inside(fake, real, real_radius, chunk)
    in_fake, _ = _inside(real, fake, fake_radius, chunk)
    return Neighbours(
        (in_real > 0).mean(),
        (in_fake > 0).mean(),
        in_real.sum() / (k * len(fake)),
        (nearest_fake <= real_radius).mean(),
    )


def _squares(rows: jax.Array, points: jax.Array) -> jax.Array:
    """Squared distances [rows, points]; of differences, since |a|^2 + |b|^2 - 2ab is not 0 for equal points."""
    return ((rows[:, None] - points) ** 2).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _radii(points: jax.Array, k: int, chunk: int) -> jax.Array:
    """Squared distance of each point to the k-th nearest of the others."""

    def one(row):
        point, index = row
        squares = jnp.where(jnp.arange(len(points)) == index, jnp.inf, _squares(point[None], points)[0])
        return -jax.lax.top_k(-squares, k)[0][-1]

    return jax.lax.map(one, (points, jnp.arange(len(points))), batch_size=chunk)


@functools.partial(jax.jit, static_argnums=3)
def _inside(rows: jax.Array, points: jax.Array, radius: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """For each row, in how many balls of `points` it is; for each point, the squared distance of the nearest row."""

    def one(row):
        return (_squares(row[None], points)[0] <= radius).sum()

    def nearest(point):
        return _squares(point[None], rows)[0].min()

    return jax.lax.map(one, rows, batch_size=chunk), jax.lax.map(nearest, points, batch_size=chunk)
