"""k-means for the start of EM: greedy k-means++ and Lloyd's iterations. Points lie along the last axis, [D, N]."""

import math

import jax
import jax.numpy as jnp

from kd_jax.gmm.sums import dot, total


def distances(points, centres):
    """Squared distances [K, N] of points [D, N] from centres [K, D]."""
    # Of differences: |x|^2 - 2 x.m + |m|^2 would cancel far from the origin.
    return sum((points[d] - centres[:, d, None]) ** 2 for d in range(points.shape[0]))


def nearest(points, centres):
    """Index of the nearest centre, [N]; the first of several.

    Args:
        points: [D, N].
        centres: [K, D].
    """
    return jnp.argmin(distances(points, centres), 0)


def seed(key, points, weights, num_components):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007), with 2 + ln K candidates a round as scikit-learn has.

    Args:
        key: a key of jax.random.
        points: [D, N].
        weights: [N], from 0.
        num_components: how many centres.
    Returns: centres [K, D].
    """
    candidates = 2 + int(math.log(num_components))
    first_key, key = jax.random.split(key)
    first = draw(first_key, weights, 1)[0]
    centres = jnp.broadcast_to(points[:, first], (num_components, points.shape[0]))
    closest = distances(points, centres[:1])[0]

    def add(k, carry):
        centres, closest = carry
        potential = weights * closest
        # Where every point coincides with a centre, any of them will do.
        potential = jnp.where(total(potential) > 0, potential, weights)
        # A key for each k: the draws for a centre do not depend on how many centres follow.
        picks = draw(jax.random.fold_in(key, k), potential, candidates)
        after = jnp.minimum(closest, distances(points, points[:, picks].T))
        # Greedy: of the candidates, the one that leaves the smallest sum of squared distances.
        best = jnp.argmin(total(weights * after))
        return centres.at[k].set(points[:, picks[best]]), after[best]

    return jax.lax.fori_loop(1, num_components, add, (centres, closest))[0]


def draw(key, mass, count):
    """`count` indices, drawn with probability proportional to `mass` [N]."""
    cumulative = jnp.cumsum(mass)
    uniform = jax.random.uniform(key, (count, 1), mass.dtype) * cumulative[-1]
    # Rounding can bring a uniform number up to the total; the last point with any mass is then the one.
    return jnp.minimum((uniform >= cumulative).sum(1), (cumulative < cumulative[-1]).sum())


def lloyd(points, weights, centres, max_iter: int = 300):
    """Lloyd's iterations until no point changes its cluster; an empty cluster stays where it is.

    Args:
        points: [D, N].
        weights: [N], from 0.
        centres: [K, D] to start from.
        max_iter: largest number of iterations.
    Returns: centres [K, D].
    """

    def going(carry):
        step, _, moved = carry
        return (step < max_iter) & moved

    def update(carry):
        step, centres, _ = carry
        owner = nearest(points, centres)
        hard = jnp.where(owner == jnp.arange(centres.shape[0])[:, None], weights, 0.0)
        mass = total(hard)[:, None]
        sums = dot("kn,dn->kd", hard, points)
        means = jnp.where(mass > 0, sums / jnp.where(mass > 0, mass, 1.0), centres)
        return step + 1, means, jnp.any(means != centres)

    return jax.lax.while_loop(going, update, (jnp.int32(0), centres, jnp.bool_(True)))[1]
