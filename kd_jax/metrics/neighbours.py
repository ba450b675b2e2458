"""Precision, recall, density and coverage of samples by nearest neighbours, and their clipped forms.

The ball of a point reaches to the k-th nearest of the *other* points of its set, that point included. So identical sets
get 1 even where points coincide; the radii are then 0, and a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.metrics.points import centred, checked

CHUNK = 256  # rows whose distances to all points of the other set are held at a time


class Neighbours(NamedTuple):
    """How far samples lie where data lie, and the other way round.

    Attributes:
        precision: share of the fake points in the ball of some real point (Kynkäänniemi et al. 2019, arXiv 1904.06991).
        recall: share of the real points in the ball of some fake point (the same).
        density: number of real balls that a fake point lies in, on average, divided by k; may be above 1 (Naeem et al.
            2020, arXiv 2002.09797).
        coverage: share of the real balls with a fake point in them (the same).
    """

    precision: float
    recall: float
    density: float
    coverage: float


class ClippedNeighbours(NamedTuple):
    """Density and coverage, both from 0 to 1 and calibrated: s if a share s of the fake points is as good as real ones.

    Salvy, Talbot & Thirion 2025, arXiv 2507.01761.
    """

    density: float
    coverage: float


def knn_precision_recall(real: jax.Array, fake: jax.Array, k: int, *, chunk: int = CHUNK) -> Neighbours:
    """Precision, recall, density and coverage of fake points against real ones.

    Args:
        real: [N, D].
        fake: [M, D].
        k: which neighbour a ball reaches to.
        chunk: rows whose distances are held at a time; the result does not depend on it.
    Raises: ValueError for shapes that do not go together, or a set of k or fewer points.
    """
    real, fake = _checked(real, fake, k)
    # Radii are squared, to be compared with squared distances: a root would be one more rounding.
    real_radii, fake_radii = _radii(real, k, chunk), _radii(fake, k, chunk)
    zero = int((real_radii == 0).sum() + (fake_radii == 0).sum())
    if zero:
        warnings.warn(f"{zero} points have {k} or more others in the same place: their balls are points", stacklevel=2)
    balls_of_fake, balls_of_real = _num_balls(fake, real, real_radii, chunk), _num_balls(real, fake, fake_radii, chunk)
    return Neighbours(
        precision=float((balls_of_fake > 0).mean()),
        recall=float((balls_of_real > 0).mean()),
        density=float(balls_of_fake.sum() / (k * len(fake))),
        coverage=float((_num_inside(fake, real, real_radii, chunk) > 0).mean()),
    )


def clipped_density_coverage(real: jax.Array, fake: jax.Array, k: int, *, chunk: int = CHUNK) -> ClippedNeighbours:
    """Clipped density and clipped coverage of fake points against real ones (see `ClippedNeighbours`).

    Density: no real ball is larger than the median one, a fake point in more than k balls counts as one in k, and the
    result is divided by what the real points themselves get. Coverage: a real ball with more than k fake points counts
    as one with k, and the result is put through the inverse of its expectation (see `expected_coverage`). The authors'
    program rounds this inverse to a multiple of 1 / (M + 1) and counts only points strictly inside; here it is
    interpolated, and the border belongs to the ball.

    Args:
        real: [N, D].
        fake: [M, D].
        k: which neighbour a ball reaches to; the paper takes 5.
        chunk: rows whose distances are held at a time; the result does not depend on it.
    Raises: ValueError for shapes that do not go together, or a set of k or fewer points.
    """
    real, fake = _checked(real, fake, k)
    radii = _radii(real, k, chunk)
    # The median of distances, not of their squares: for an even number of points it is a mean of two.
    clipped_radii = np.minimum(radii, np.median(np.sqrt(radii)) ** 2)
    density = np.minimum(_num_balls(fake, real, clipped_radii, chunk) / k, 1).mean()
    itself = 1  # every real point lies in its own ball
    # What samples that are as good as real points would get.
    density_of_real = np.minimum((_num_balls(real, real, clipped_radii, chunk) - itself) / k, 1).mean()
    coverage = np.minimum(_num_inside(fake, real, radii, chunk) / k, 1).mean()
    expected = expected_coverage(len(real), len(fake), k)
    return ClippedNeighbours(
        density=float(min(density / density_of_real, 1.0)),
        # The inverse of a rising function, by interpolation with the axes exchanged.
        coverage=float(np.interp(coverage, expected, np.arange(len(expected)) / len(fake))),
    )


def expected_coverage(num_real: int, num_fake: int, k: int) -> np.ndarray:
    """The expected uncalibrated clipped coverage by m draws of the data's own distribution, [m = 0 ... num_fake].

    Such a draw falls into a ball that reaches to the k-th of num_real - 1 others with a probability that is itself
    Beta(k, num_real - k) distributed, whatever the density. So the number J of draws in it is beta-binomial, and this
    is E[min(J, k)] / k.

    Args:
        num_real, num_fake: points of each set.
        k: which neighbour a ball reaches to.
    """
    from scipy import stats  # half a second, which every command would pay

    draws, inside = np.arange(num_fake + 1)[:, None], np.arange(k)
    probability = stats.betabinom.pmf(inside, draws, k, num_real - k)
    return 1 - ((k - inside) * probability).sum(axis=1) / k


def _checked(real, fake, k):
    shapes = checked(real, "the real points").shape, checked(fake, "the fake points").shape
    if shapes[0][1] != shapes[1][1]:
        raise ValueError(f"need points of one dimension, not {shapes[0]} and {shapes[1]}")
    if not 1 <= k < min(shapes[0][0], shapes[1][0]):
        raise ValueError(f"k={k} must be at least 1 and below the number of points ({shapes[0][0]} and {shapes[1][0]})")
    return centred(real, fake)


def _squares(point: jax.Array, points: jax.Array) -> jax.Array:
    """Squared distances [point]."""
    # Of differences: |a|^2 + |b|^2 - 2ab would round equal points apart, and more so at a matrix unit's precision.
    return ((points - point) ** 2).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _squared_radii(points, k, chunk):
    def radius(row):
        point, index = row
        # A point is not its own neighbour.
        squares = jnp.where(jnp.arange(len(points)) == index, jnp.inf, _squares(point, points))
        return -jax.lax.top_k(-squares, k)[0][-1]

    return jax.lax.map(radius, (points, jnp.arange(len(points))), batch_size=chunk)


@functools.partial(jax.jit, static_argnums=3)
def _count_balls(points, centres, squared_radii, chunk):
    return jax.lax.map(lambda point: (_squares(point, centres) <= squared_radii).sum(), points, batch_size=chunk)


@functools.partial(jax.jit, static_argnums=3)
def _count_inside(points, centres, squared_radii, chunk):
    def count(ball):
        centre, squared_radius = ball
        return (_squares(centre, points) <= squared_radius).sum()

    return jax.lax.map(count, (centres, squared_radii), batch_size=chunk)


# Counts are added up in NumPy: their sum may be beyond int32, and a mean in float32 would stop at 2^24.


def _radii(points, k, chunk) -> np.ndarray:
    """Squared radius of each point's ball."""
    return np.asarray(_squared_radii(points, k, chunk))


def _num_balls(points, centres, squared_radii, chunk) -> np.ndarray:
    """Number of balls that each point lies in."""
    return np.asarray(_count_balls(points, centres, squared_radii, chunk), np.int64)


def _num_inside(points, centres, squared_radii, chunk) -> np.ndarray:
    """Number of points in each ball."""
    return np.asarray(_count_inside(points, centres, squared_radii, chunk), np.int64)
