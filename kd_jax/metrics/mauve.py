"""MAUVE: how close sets of points are to a reference, by the divergence frontier of their histograms.

Pillutla et al. 2021 (arXiv 2102.01454). A score depends on the number of points and of buckets and, through the
clustering, on the seed. These are kept with it: only scores that have them in common can be compared.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.metrics.points import centred, checked

# Values of the mixture weight; the area is a trapezoid sum over them.
_GRID = 1001
_HIGHEST = jax.lax.Precision.HIGHEST  # distances keep float32's digits on every device


class Mauve(NamedTuple):
    """A score, above 0 and at most 1, and what it depends on beside the points."""

    score: float
    num_points: int
    num_buckets: int
    seed: int
    scaling: float


def compare(
    real: jax.Array, fakes: dict[str, jax.Array], *, num_buckets: int | None = None, seed: int = 0, scaling: float = 5.0
) -> dict[str, Mauve]:
    """MAUVE scores of sets of points against as many real ones.

    Args:
        real: [N, D].
        fakes: [N, D] each, by name.
        num_buckets: buckets of the histograms, which are clusters of the real and the fake points together; N / 10 by
            default.
        seed: of the clustering.
        scaling: c of `area`.
    Returns: the scores by name.
    Raises: ValueError for sets that differ in N or D, whose scores could not be compared, and for a number of buckets
        below 2 or above N.
    """
    shape = checked(real, "the real points").shape
    for name, fake in fakes.items():
        if checked(fake, f"the points of {name}").shape != shape:
            raise ValueError(
                f"{name} has shape {np.shape(fake)} and the real points {shape}: only sets of the same number of "
                "points [N, D] have scores that can be compared"
            )
    real, *shifted = centred(real, *fakes.values())
    fakes = dict(zip(fakes, shifted, strict=True))
    # N / 10, as in the paper's own program.
    buckets = max(2, len(real) // 10) if num_buckets is None else num_buckets
    if not 2 <= buckets <= len(real):
        raise ValueError(f"num_buckets={buckets} must be from 2 to the number of points, {len(real)}")
    scores = {}
    for name, fake in fakes.items():
        points = jnp.concatenate([real, fake]).astype(jnp.float32)
        # Real and fake points are clustered together, and the same start is used for every set.
        cluster = np.asarray(_clusters(jax.random.key(seed), points, buckets))
        p, q = (np.bincount(part, minlength=buckets) / len(real) for part in np.split(cluster, 2))
        scores[name] = Mauve(area(p, q, scaling), len(real), buckets, seed, scaling)
    return scores


def area(p: np.ndarray, q: np.ndarray, scaling: float = 5.0) -> float:
    """The area under the divergence frontier of two histograms, above 0 and at most 1.

    The frontier is (exp(-c KL(q || r)), exp(-c KL(p || r))) for r = w p + (1 - w) q, w from 0 to 1. The area is 1 where
    p = q. Sets without overlap still share the mixture r, so for them it is c B(c + 1, c), not 0: 1 / 252 for c = 5.

    Args:
        p, q: [bucket], each of sum 1.
        scaling: c, above 0.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    weights = np.linspace(0, 1, _GRID)[:, None]
    mixture = weights * p + (1 - weights) * q
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of 0 has a term of 0
        x, y = (np.exp(-scaling * np.where(h > 0, h * np.log(h / mixture), 0).sum(axis=1)) for h in (q, p))
    # The frontier is continued to both axes.
    x, y = (np.concatenate(ends) for ends in (([1.0], x, [0.0]), ([0.0], y, [1.0])))
    # x falls along the frontier, hence the sign.
    return float(-np.trapezoid(y, x))


@functools.partial(jax.jit, static_argnums=2)
def _clusters(key: jax.Array, points: jax.Array, count: int, starts: int = 8, rounds: int = 50) -> jax.Array:
    """The cluster of each point: the best of Lloyd's algorithm from k-means++ starts (Arthur & Vassilvitskii 2007)."""
    # One start after another, so that the distances of one exist at a time.
    clusters, spread = jax.lax.map(lambda key: _lloyd(key, points, count, rounds), jax.random.split(key, starts))
    return clusters[spread.argmin()]


def _lloyd(key, points, count, rounds):
    """The cluster of each point, and the sum of squared distances to their centres."""
    norms = (points**2).sum(axis=1)

    def distances(centres):
        # As a matrix product, which is fast: clusters hardly depend on the last digits, and below 0 is cut off.
        products = jnp.matmul(2 * points, centres.T, precision=_HIGHEST)
        return jnp.maximum(norms[:, None] - products + (centres**2).sum(axis=1), 0)

    # k-means++: each next centre is a point drawn with a probability in proportion to its squared distance.
    def choose(nearest, key):
        # Where every point lies on a centre already, any will do.
        chosen = jax.random.categorical(key, jnp.log(jnp.where(nearest.max() > 0, nearest, 1)))
        return jnp.minimum(nearest, distances(points[chosen][None])[:, 0]), points[chosen]

    # The first centre is drawn from all points with equal probability: their distances are equal.
    _, centres = jax.lax.scan(choose, jnp.full(len(points), jnp.finfo(jnp.float32).max), jax.random.split(key, count))

    def improve(_, centres):
        member = jax.nn.one_hot(distances(centres).argmin(axis=1), count, dtype=points.dtype)
        sizes = member.sum(axis=0)[:, None]
        sums = jnp.matmul(member.T, points, precision=_HIGHEST)
        # A cluster that has lost all its points keeps its centre.
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centres)

    squares = distances(jax.lax.fori_loop(0, rounds, improve, centres))
    return squares.argmin(axis=1), squares.min(axis=1).sum()
