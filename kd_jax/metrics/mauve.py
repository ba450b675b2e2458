"""MAUVE: how close sets of points are to a reference, by the divergence frontier of their histograms.

Pillutla et al. 2021 (arXiv 2102.01454). A score depends on how many points and buckets it was made of and, through the
clustering, on the seed: these are kept with it, and only scores of equal ones can be compared.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# points of the mixture weight; the area is a trapezoid sum over them
_GRID = 1001


class Mauve(NamedTuple):
    """A score, above 0 and up to 1, and what it depends on beside the points."""

    score: float
    num_points: int
    num_buckets: int
    seed: int
    scaling: float


def compare(
    real: jax.Array, fakes: dict[str, jax.Array], *, num_buckets: int | None = None, seed: int = 0, scaling: float = 5.0
) -> dict[str, Mauve]:
    """Scores of sets of points [N, D] against as many real ones.

    Args:
        num_buckets: of the histograms: clusters of the real and the fake points together; N / 10 by default.
        scaling: c of `area`.
    Raises: ValueError for sets that are not of the same N and D, since their scores could not be compared, or for
    numbers that cannot work.
    """
    real = jnp.asarray(real, jnp.float32)
    for name, fake in fakes.items():
        if np.shape(fake) != real.shape or real.ndim != 2:
            raise ValueError(
                f"{name} has shape {np.shape(fake)} and the real points {real.shape}: only sets of the same number of "
                "points [N, D] have scores that can be compared"
            )
    buckets = max(2, len(real) // 10) if num_buckets is None else num_buckets
    if not 2 <= buckets <= len(real):
        raise ValueError(f"num_buckets={buckets} must be from 2 to the number of points, {len(real)}")
    if not scaling > 0:
        raise ValueError(f"scaling={scaling} must be above 0")
    found = {}
    for name, fake in fakes.items():
        points = jnp.concatenate([real, jnp.asarray(fake, jnp.float32)])
        cluster = np.asarray(_clusters(jax.random.key(seed), points, buckets))
        p, q = (np.bincount(part, minlength=buckets) / len(real) for part in np.split(cluster, 2))
        found[name] = Mauve(area(p, q, scaling), len(real), buckets, seed, scaling)
    return found


def area(p: np.ndarray, q: np.ndarray, scaling: float = 5.0) -> float:
    """The area under the divergence frontier of two histograms [bucket], each of sum 1.

    The frontier is (exp(-c KL(q || r)), exp(-c KL(p || r))) for r = w p + (1 - w) q, w from 0 to 1. It is 1 where p = q
    and, since even sets without overlap share the mixture, c B(c + 1, c) there, not 0: 1 / 252 for c = 5.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if p.shape != q.shape or not np.allclose([p.sum(), q.sum()], 1) or (p < 0).any() or (q < 0).any():
        raise ValueError(f"need two histograms of one shape, each of sum 1, not {p.shape} and {q.shape}")
    weights = np.linspace(0, 1, _GRID)[:, None]
    mixture = weights * p + (1 - weights) * q
    with np.errstate(divide="ignore", invalid="ignore"):  # where a share is 0, its term is left out
        x, y = (np.exp(-scaling * np.where(h > 0, h * np.log(h / mixture), 0).sum(axis=1)) for h in (q, p))
    # the frontier runs on to both axes
    x, y = (np.concatenate(ends) for ends in (([1.0], x, [0.0]), ([0.0], y, [1.0])))
    return float(-np.trapezoid(y, x))


@functools.partial(jax.jit, static_argnums=2)
def _clusters(key: jax.Array, points: jax.Array, count: int, starts: int = 8, rounds: int = 50) -> jax.Array:
    """The cluster of each point: Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007), the best."""
    found, spread = jax.lax.map(lambda key: _lloyd(key, points, count, rounds), jax.random.split(key, starts))
    return found[spread.argmin()]


def _lloyd(key, points, count, rounds):
    """The cluster of each point, and the sum of squared distances to their centres."""
    norms = (points**2).sum(axis=1)

    def distances(centres):
        squares = norms[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
        return jnp.maximum(squares, 0)

    def choose(nearest, key):
        # where all points are taken already, any will do
        chosen = jax.random.categorical(key, jnp.log(jnp.where(nearest.max() > 0, nearest, 1)))
        return jnp.minimum(nearest, distances(points[chosen][None])[:, 0]), points[chosen]

    # the first one is drawn from all alike
    _, centres = jax.lax.scan(choose, jnp.full(len(points), jnp.finfo(jnp.float32).max), jax.random.split(key, count))

    def improve(_, centres):
        member = jax.nn.one_hot(distances(centres).argmin(axis=1), count)
        sizes = member.sum(axis=0)[:, None]
        return jnp.where(sizes > 0, member.T @ points / jnp.maximum(sizes, 1), centres)

    squares = distances(jax.lax.fori_loop(0, rounds, improve, centres))
    return squares.argmin(axis=1), squares.min(axis=1).sum()
