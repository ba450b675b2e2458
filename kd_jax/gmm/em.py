"""Expectation-maximisation for one mixture of Gaussians: a pure function, meant for `jax.vmap`.

Sums over the points are where the time goes. In few dimensions all sufficient statistics come out of
ONE variadic `lax.reduce`: XLA then reads each responsibility once and never stores a product. In more
dimensions they are matrix products.

Second moments are taken about the component's previous mean, never as E[x^2] - mean^2: data far from the
origin, or a tight component far from the others, keep their variance in float32.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.gmm.mixture import SMALL_DIM, Mixture, half_log_det, log_joint, precision_factor

INITS = ("kmeans", "k-means++", "random")
COVARIANCE_TYPES = ("diag", "full")


class Fit(NamedTuple):
    """Result of `fit`.

    Attributes:
        mixture: the fitted mixture; its parameters are NaN where the data held a NaN.
        log_likelihood: [max_iter] mean log-likelihood per point (weighted, where weights were given) before
            each update; after the fit has stopped, its last value. NaN flags a fit that failed.
        converged: bool, whether the last change was below `tol`.
    """

    mixture: Mixture
    log_likelihood: jax.Array
    converged: jax.Array


class _State(NamedTuple):
    step: jax.Array
    mixture: Mixture
    trace: jax.Array
    last: jax.Array
    converged: jax.Array


def fit(
    key: jax.Array,
    x: jax.Array,
    num_components: int,
    *,
    covariance_type: str = "diag",
    init: str = "kmeans",
    num_starts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    covariance_floor: float = 1e-6,
    sample_weights: jax.Array | None = None,
    start: Mixture | None = None,
) -> Fit:
    """Fit a mixture to `x` [N, D] by maximum likelihood (Dempster, Laird & Rubin 1977).

    `covariance_floor` is added to every variance, as scikit-learn's `reg_covar`; where that addition would lower the
    likelihood, the component keeps the covariance it had, so the trace never falls beyond rounding. Rounding grows with
    the condition number of a full covariance: up to 3e-3 nats seen in float32 at 1e6; switch x64 on there.
    A fit stops when its mean log-likelihood changes by less than `tol`. Under `vmap` each fit stops by itself: it
    is frozen while others go on, and a NaN in one data set reaches no other.

    Args:
        key: random key of the start(s).
        x: [N, D] points, float.
        num_components: K, static.
        covariance_type: "diag" or "full".
        init: "kmeans" (k-means++ then Lloyd's iterations), "k-means++" (seeding alone) or "random" points.
        num_starts: starts to try; the one with the highest final log-likelihood is kept.
        max_iter: most EM updates.
        tol: change of mean log-likelihood per point, in nats, that ends the fit.
        covariance_floor: variance, in squared units of x.
        sample_weights: [N] non-negative weights, or None for all ones. A point of weight 0 is never looked at.
        start: a mixture to start from, in place of `init`.

    Raises:
        ValueError: a wrong shape or option.
    """
    x = jnp.asarray(x)
    _check(x, num_components, covariance_type, init, num_starts, max_iter, sample_weights)
    weights = jnp.ones(x.shape[0], x.dtype) if sample_weights is None else jnp.asarray(sample_weights, x.dtype)
    x = jnp.where(weights[:, None] > 0, x, 0.0)
    # Centred data: distances and means are then computed at the scale of the spread, whatever the offset.
    centre = (weights[:, None] * x).sum(0) / weights.sum()
    points = (x - centre).T
    points = jnp.where(weights > 0, points, 0.0)
    run = partial(_iterate, points, weights, max_iter=max_iter, tol=tol, floor=covariance_floor)
    if start is None and num_components == 1:
        result = _fit_one(points, weights, covariance_type, covariance_floor, max_iter)
    elif start is not None:
        result = run(start._replace(means=start.means - centre))
    else:
        begin = partial(_start, points, weights, num_components, covariance_type, init, covariance_floor)
        if num_starts == 1:
            result = run(begin(key))
        else:
            results = jax.vmap(lambda k: run(begin(k)))(jax.random.split(key, num_starts))
            score = results.log_likelihood[:, -1]
            best = jnp.argmax(jnp.where(jnp.isnan(score), -jnp.inf, score))
            result = jax.tree.map(lambda leaf: leaf[best], results)
    return result._replace(mixture=result.mixture._replace(means=result.mixture.means + centre))


def _check(x, num_components, covariance_type, init, num_starts, max_iter, sample_weights):
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a float array [N, D], not {x.dtype} {x.shape}")
    if not 1 <= num_components <= x.shape[0]:
        raise ValueError(f"num_components={num_components} must be between 1 and the number of points, {x.shape[0]}")
    if covariance_type not in COVARIANCE_TYPES:
        raise ValueError(f"covariance_type={covariance_type!r} is not one of {COVARIANCE_TYPES}")
    if init not in INITS:
        raise ValueError(f"init={init!r} is not one of {INITS}")
    if num_starts < 1 or max_iter < 1:
        raise ValueError(f"num_starts={num_starts} and max_iter={max_iter} must be at least 1")
    if sample_weights is not None and jnp.shape(sample_weights) != (x.shape[0],):
        raise ValueError(f"sample_weights {jnp.shape(sample_weights)} must be [{x.shape[0]}]")


def _iterate(points, weights, start: Mixture, *, max_iter, tol, floor) -> Fit:
    """EM from `start`, until converged, failed, or out of iterations."""
    dtype = points.dtype

    def going(state: _State):
        failed = (state.step > 0) & ~jnp.isfinite(state.last)
        return (state.step < max_iter) & ~state.converged & ~failed

    def update(state: _State):
        mixture, log_likelihood = _em_step(points, weights, state.mixture, floor)
        converged = (state.step > 0) & (jnp.abs(log_likelihood - state.last) < tol)
        trace = state.trace.at[state.step].set(log_likelihood)
        return _State(state.step + 1, mixture, trace, log_likelihood, converged)

    mixture = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), start)
    nothing = jnp.zeros((), dtype)
    state = _State(jnp.int32(0), mixture, jnp.zeros(max_iter, dtype), nothing, jnp.bool_(False))
    state = jax.lax.while_loop(going, update, state)
    trace = jnp.where(jnp.arange(max_iter) < state.step, state.trace, state.last)
    failed = ~jnp.isfinite(state.last)
    mixture = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), state.mixture)
    return Fit(mixture, trace, state.converged & ~failed)


def _fit_one(points, weights, covariance_type, floor, max_iter) -> Fit:
    """One component: the moments of the data, which are centred, are the maximum already."""
    origin = jnp.zeros((1, points.shape[0]), points.dtype)
    _, means, scatter = _moments(points, weights[None], origin, covariance_type == "full")
    mixture = Mixture(jnp.zeros(1, points.dtype), means, _regularise(scatter, floor))
    joint = log_joint(mixture, precision_factor(mixture.covariances), points)[0]
    log_likelihood = (weights * joint).sum() / weights.sum()
    failed = ~jnp.isfinite(log_likelihood)
    mixture = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), mixture)
    return Fit(mixture, jnp.full(max_iter, log_likelihood), ~failed)


def _em_step(points, weights, mixture: Mixture, floor):
    """One update; returns the new mixture and the mean log-likelihood under the old one."""
    factor = precision_factor(mixture.covariances)
    joint = log_joint(mixture, factor, points)
    largest = joint.max(0)
    scaled = jnp.exp(joint - largest)
    total = scaled.sum(0)
    log_likelihood = (weights * (largest + jnp.log(total))).sum() / weights.sum()
    responsibilities = scaled * (weights / total)
    mass, means, scatter = _moments(points, responsibilities, mixture.means, mixture.covariances.ndim == 3)
    covariances = _regularise(scatter, floor)
    # Where adding the floor would make the component explain its points worse, keep the old covariance.
    keep = _misfit(precision_factor(covariances), scatter) > _misfit(factor, scatter)
    if keep.ndim < covariances.ndim:
        keep = keep[:, None, None]
    covariances = jnp.where(keep, mixture.covariances, covariances)
    # A component that lost all its points stays where it was, with weight 0.
    alive = mass > 0
    shape = (-1,) + (1,) * (covariances.ndim - 1)
    covariances = jnp.where(alive.reshape(shape), covariances, mixture.covariances)
    return Mixture(jnp.log(mass / mass.sum()), means, covariances), log_likelihood


def _moments(points, responsibilities, shift, full: bool):
    """Mass [K], means [K, D] and covariances of the points of each component, summed about `shift` [K, D]."""
    dim = points.shape[0]
    if dim <= SMALL_DIM:
        return _moments_small(points, responsibilities, shift, full)
    mass = responsibilities.sum(1)
    divisor = jnp.where(mass > 0, mass, 1.0)[:, None]
    means = jnp.einsum("kn,dn->kd", responsibilities, points, precision="highest") / divisor
    means = jnp.where(mass[:, None] > 0, means, shift)
    difference = points - means[:, :, None]
    if not full:
        return mass, means, jnp.einsum("kn,kdn->kd", responsibilities, difference**2, precision="highest") / divisor
    weighted = responsibilities[:, None, :] * difference
    scatter = jnp.einsum("kin,kjn->kij", weighted, difference, precision="highest") / divisor[:, :, None]
    return mass, means, scatter


def _moments_small(points, responsibilities, shift, full: bool):
    dim = points.shape[0]
    difference = [points[d] - shift[:, d, None] for d in range(dim)]
    pairs = [(i, j) for i in range(dim) for j in (range(i + 1) if full else (i,))]
    terms = [responsibilities]
    terms += [responsibilities * difference[d] for d in range(dim)]
    terms += [responsibilities * difference[i] * difference[j] for i, j in pairs]
    zeros = tuple(jnp.zeros((), points.dtype) for _ in terms)
    sums = jax.lax.reduce(tuple(terms), zeros, lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True)), (1,))
    mass = sums[0]
    divisor = jnp.where(mass > 0, mass, 1.0)
    moved = [s / divisor for s in sums[1 : 1 + dim]]
    second = {(i, j): s / divisor - moved[i] * moved[j] for (i, j), s in zip(pairs, sums[1 + dim :], strict=True)}
    means = shift + jnp.stack(moved, -1)
    if not full:
        # Rounding may leave a hair below zero.
        return mass, means, jnp.maximum(jnp.stack([second[i, i] for i in range(dim)], -1), 0.0)
    rows = [jnp.stack([second[max(i, j), min(i, j)] for j in range(dim)], -1) for i in range(dim)]
    return mass, means, jnp.stack(rows, -2)


def _regularise(scatter, floor):
    return scatter + (floor if scatter.ndim == 2 else floor * jnp.eye(scatter.shape[-1], dtype=scatter.dtype))


def _misfit(factor, scatter):
    """ln|C| + tr(C^-1 S), per dimension [K, D] for diagonal C, [K] for full: what an M-step makes small."""
    if factor.ndim == 2:
        return factor**2 * scatter - 2 * jnp.log(factor)
    return jnp.einsum("kij,kjl,kil->k", factor, scatter, factor, precision="highest") - 2 * half_log_det(factor)


def _start(points, weights, num_components, covariance_type, init, floor, key) -> Mixture:
    """A first mixture: from the clusters of k-means, or from random points with the spread of all data."""
    if init == "random":
        scores = jnp.log(weights) + jax.random.gumbel(key, weights.shape, points.dtype)
        means = points[:, jax.lax.top_k(scores, num_components)[1]].T
        everything = jnp.broadcast_to(weights, (num_components, weights.shape[0]))
        _, _, spread = _moments(points, everything, jnp.zeros_like(means), covariance_type == "full")
        uniform = jnp.full(num_components, -math.log(num_components), points.dtype)
        return Mixture(uniform, means, _regularise(spread, floor))
    centres = _seed(key, points, weights, num_components)
    if init == "kmeans":
        centres = _lloyd(points, weights, centres)
    owner = _nearest(points, centres)
    hard = jnp.where(owner == jnp.arange(num_components)[:, None], weights, 0.0)
    mass, means, scatter = _moments(points, hard, centres, covariance_type == "full")
    return Mixture(jnp.log(mass / mass.sum()), means, _regularise(scatter, floor))


def _distances(points, centres):
    """Squared distances [K, N]."""
    return sum((points[d] - centres[:, d, None]) ** 2 for d in range(points.shape[0]))


def _nearest(points, centres):
    return jnp.argmin(_distances(points, centres), 0)


def _seed(key, points, weights, num_components):
    """Greedy k-means++ (Arthur & Vassilvitskii 2007), with 2 + ln K candidates a round as scikit-learn has."""
    candidates = 2 + int(math.log(num_components))
    first_key, key = jax.random.split(key)
    first = _draw(first_key, weights, 1)[0]
    centres = jnp.broadcast_to(points[:, first], (num_components, points.shape[0]))
    closest = _distances(points, centres[:1])[0]

    def add(k, carry):
        centres, closest = carry
        potential = weights * closest
        # All points may coincide with a centre: any of them is then as good.
        potential = jnp.where(potential.sum() > 0, potential, weights)
        picks = _draw(jax.random.fold_in(key, k), potential, candidates)
        after = jnp.minimum(closest, _distances(points, points[:, picks].T))
        best = jnp.argmin((weights * after).sum(1))
        return centres.at[k].set(points[:, picks[best]]), after[best]

    return jax.lax.fori_loop(1, num_components, add, (centres, closest))[0]


def _draw(key, mass, count):
    """`count` indices with probability proportional to `mass` [N]."""
    cumulative = jnp.cumsum(mass)
    uniform = jax.random.uniform(key, (count, 1), mass.dtype) * cumulative[-1]
    return jnp.minimum((uniform >= cumulative).sum(1), mass.shape[0] - 1)


def _lloyd(points, weights, centres, max_iter: int = 300):
    """Lloyd's iterations until no point changes its cluster; an empty cluster stays where it is."""

    def going(carry):
        step, _, moved = carry
        return (step < max_iter) & moved

    def update(carry):
        step, centres, _ = carry
        owner = _nearest(points, centres)
        hard = jnp.where(owner == jnp.arange(centres.shape[0])[:, None], weights, 0.0)
        mass = hard.sum(1, keepdims=True)
        sums = jnp.einsum("kn,dn->kd", hard, points, precision="highest")
        means = jnp.where(mass > 0, sums / jnp.where(mass > 0, mass, 1.0), centres)
        return step + 1, means, jnp.any(means != centres)

    return jax.lax.while_loop(going, update, (jnp.int32(0), centres, jnp.bool_(True)))[1]
