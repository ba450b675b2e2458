"""Expectation-maximisation for one mixture of Gaussians: a pure function, meant for `jax.vmap`.

Most of the time goes into sums over the points. In few dimensions all sufficient statistics come from one variadic
`lax.reduce`: XLA then reads each responsibility once and stores no products. In more dimensions they are matrix
products.

Second moments are taken about the component's previous mean, never as E[x^2] - mean^2, which in float32 loses the
variance of data far from the origin, or of a tight component far from the others. Sums run in blocks: a float32 that
ones are added to stops at 2^24.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import kmeans
from kd_jax.gmm.mixture import SMALL_DIM, Mixture, half_log_det, log_joint, precision_factor
from kd_jax.gmm.sums import dot, padding, together, total

INITS = ("kmeans", "k-means++", "random")
COVARIANCE_TYPES = ("diag", "full")


class Fit(NamedTuple):
    """Result of `fit`.

    Attributes:
        mixture: the fitted mixture; its parameters are NaN where the data held a NaN.
        log_likelihood: [max_iter] mean log-likelihood per point (weighted, where weights were given) before each
            update; after the fit has stopped, its last value. NaN flags a failed fit.
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
    num_active: jax.Array | int | None = None,
) -> Fit:
    """Fits a mixture to `x` by maximum likelihood (Dempster, Laird & Rubin 1977).

    `covariance_floor` is added to every variance, like scikit-learn's `reg_covar`. Where adding it would lower the
    likelihood, the component keeps its old covariance, so the trace never falls beyond rounding. Rounding grows with
    the condition number of a full covariance: up to 3e-3 nats were seen in float32 at 1e6; use x64 there.

    A fit stops when its mean log-likelihood changes by less than `tol`. Under `vmap` a fit that has stopped is frozen
    while the others go on, and a NaN in one data set does not reach the others.

    Args:
        key: random key of the start(s).
        x: [N, D] points, float.
        num_components: K, static.
        covariance_type: "diag" or "full".
        init: "kmeans" (k-means++ then Lloyd's iterations), "k-means++" (seeding alone) or "random" points.
        num_starts: number of starts; the one with the highest final log-likelihood is kept.
        max_iter: largest number of EM updates.
        tol: change of mean log-likelihood per point, in nats, that ends the fit.
        covariance_floor: variance, in squared units of x.
        sample_weights: [N] non-negative weights, or None for all ones. Points of weight 0 are ignored, NaN included.
        start: a mixture to start from, instead of `init`.
        num_active: how many of the K components are used, from 1 to K, may be traced; the others get weight zero.
            None for all. One program then fits mixtures of several sizes. Not for init="random" or with `start`.

    Returns: a Fit. A negative or NaN weight that is traced, and cannot be named, makes the fit NaN.

    Raises:
        ValueError: a wrong shape or option, or a sample weight that is negative or not finite (the first is named).
    """
    x = jnp.asarray(x)
    _check(x, num_components, covariance_type, init, num_starts, max_iter, sample_weights)
    if start is not None:
        _check_start(start, num_components, x.shape[1], covariance_type, num_starts)
    weights = jnp.ones(x.shape[0], x.dtype) if sample_weights is None else _checked_weights(sample_weights, x.dtype)
    # Whole blocks: further points of weight zero.
    extra = padding(len(x))
    x, weights = jnp.pad(x, ((0, extra), (0, 0))), jnp.pad(weights, (0, extra))
    # True for a NaN weight, which is to spoil the fit.
    used = ~(weights == 0)
    x = jnp.where(used[:, None], x, 0.0)
    # Centring keeps distances and means at the scale of the spread, whatever the offset.
    centre = total(weights[:, None] * x, axis=0) / total(weights)
    points = (x - centre).T
    points = jnp.where(used, points, 0.0)
    run = partial(_iterate, points, weights, max_iter=max_iter, tol=tol, floor=covariance_floor)
    if start is None and num_components == 1:
        # No iterations, and no k-means to compile.
        result = _fit_one(points, weights, covariance_type, covariance_floor, max_iter)
    elif start is not None:
        result = run(start._replace(means=start.means - centre))
    else:
        begin = partial(_start, points, weights, num_components, covariance_type, init, covariance_floor, num_active)
        if num_starts == 1:
            result = run(begin(key))
        else:
            # All starts in one program: one that has converged is frozen while the others go on.
            results = jax.vmap(lambda k: run(begin(k)))(jax.random.split(key, num_starts))
            # a start that failed is NaN, and argmax would choose it
            score = results.log_likelihood[:, -1]
            best = jnp.argmax(jnp.where(jnp.isnan(score), -jnp.inf, score))
            result = jax.tree.map(lambda leaf: leaf[best], results)
    # Back from the centre to the data's own origin.
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


def _check_start(start: Mixture, num_components: int, dim: int, covariance_type: str, num_starts: int):
    if num_starts > 1:
        raise ValueError(f"num_starts={num_starts} has no effect with start, which is the only one")
    if start.means.shape != (num_components, dim):
        raise ValueError(f"the means of start have shape {start.means.shape}, not {(num_components, dim)}")
    if start.covariances.ndim != (3 if covariance_type == "full" else 2):
        raise ValueError(f"the covariances of start, {start.covariances.shape}, are not {covariance_type!r}")


def _checked_weights(weights, dtype) -> jax.Array:
    """The weights [N]; ValueError naming the first bad one, or NaN in its place where they are traced."""
    if not isinstance(weights, jax.core.Tracer):
        bad = np.flatnonzero(~((np.asarray(weights) >= 0) & np.isfinite(weights)))
        if bad.size:
            raise ValueError(f"sample_weights[{bad[0]}] is {weights[bad[0]]}; a weight must be finite and not negative")
    weights = jnp.asarray(weights, dtype)
    return jnp.where(weights >= 0, weights, jnp.nan)


def _iterate(points, weights, start: Mixture, *, max_iter, tol, floor) -> Fit:
    """EM from `start` until it has converged, failed, or run out of iterations."""
    dtype = points.dtype

    def going(state: _State):
        # A NaN never meets the tolerance; without this a broken fit would keep its whole batch going to max_iter.
        failed = (state.step > 0) & ~jnp.isfinite(state.last)
        return (state.step < max_iter) & ~state.converged & ~failed

    def update(state: _State):
        mixture, log_likelihood = _em_step(points, weights, state.mixture, floor)
        # The first step has no change to look at.
        converged = (state.step > 0) & (jnp.abs(log_likelihood - state.last) < tol)
        trace = state.trace.at[state.step].set(log_likelihood)
        return _State(state.step + 1, mixture, trace, log_likelihood, converged)

    # The carry of a loop must keep its types, with x64 too.
    mixture = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), start)
    nothing = jnp.zeros((), dtype)
    state = _State(jnp.int32(0), mixture, jnp.zeros(max_iter, dtype), nothing, jnp.bool_(False))
    state = jax.lax.while_loop(going, update, state)
    # After the stop the trace repeats its last value, so that its last entry is the final likelihood of any fit.
    trace = jnp.where(jnp.arange(max_iter) < state.step, state.trace, state.last)
    failed = ~jnp.isfinite(state.last)
    mixture = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), state.mixture)
    return Fit(mixture, trace, state.converged & ~failed)


def _fit_one(points, weights, covariance_type, floor, max_iter) -> Fit:
    """One component: the moments of the data are the maximum, without iterations."""
    # The points were centred, so the origin is near the mean.
    origin = jnp.zeros((1, points.shape[0]), points.dtype)
    _, means, scatter = _moments(points, weights[None], origin, covariance_type == "full")
    mixture = Mixture(jnp.zeros(1, points.dtype), means, _regularise(scatter, floor))
    joint = log_joint(mixture, precision_factor(mixture.covariances), points)[0]
    log_likelihood = total(weights * joint) / total(weights)
    failed = ~jnp.isfinite(log_likelihood)
    mixture = jax.tree.map(lambda leaf: jnp.where(failed, jnp.nan, leaf), mixture)
    return Fit(mixture, jnp.full(max_iter, log_likelihood), ~failed)


def _em_step(points, weights, mixture: Mixture, floor):
    """One update; returns the new mixture and the mean log-likelihood under the old one."""
    factor = precision_factor(mixture.covariances)
    joint = log_joint(mixture, factor, points)
    # Responsibilities and likelihood from one exponential, about the largest term so that none overflows.
    largest = joint.max(0)
    scaled = jnp.exp(joint - largest)
    density = scaled.sum(0)
    log_likelihood = total(weights * (largest + jnp.log(density))) / total(weights)
    # The points' weights enter here, once, and with them all sums below.
    responsibilities = scaled * (weights / density)
    mass, means, scatter = _moments(points, responsibilities, mixture.means, mixture.covariances.ndim == 3)
    covariances = _regularise(scatter, floor)
    # Keep the old covariance where the new one, with its floor, explains the points worse.
    # Without this the floor could lower the likelihood, and EM's guarantee would be lost.
    keep = _misfit(precision_factor(covariances), scatter) > _misfit(factor, scatter)
    if keep.ndim < covariances.ndim:
        keep = keep[:, None, None]
    covariances = jnp.where(keep, mixture.covariances, covariances)
    # A component that has lost all its points stays in place, with weight 0.
    alive = mass > 0
    shape = (-1,) + (1,) * (covariances.ndim - 1)
    covariances = jnp.where(alive.reshape(shape), covariances, mixture.covariances)
    # A mass of 0 becomes a log weight of -inf, which is a weight of 0.
    return Mixture(jnp.log(mass / mass.sum()), means, covariances), log_likelihood


def _moments(points, responsibilities, shift, full: bool):
    """Mass [K], means [K, D] and covariances of the points of each component, summed about `shift` [K, D]."""
    dim = points.shape[0]
    if dim <= SMALL_DIM:
        return _moments_small(points, responsibilities, shift, full)
    # Two passes, means first: E[x^2] - mean^2 would cancel, and a matrix product cannot subtract the mean as it goes.
    mass = total(responsibilities)
    divisor = jnp.where(mass > 0, mass, 1.0)[:, None]
    means = dot("kn,dn->kd", responsibilities, points) / divisor
    means = jnp.where(mass[:, None] > 0, means, shift)
    difference = points - means[:, :, None]
    if not full:
        return mass, means, dot("kn,kdn->kd", responsibilities, difference**2) / divisor
    weighted = responsibilities[:, None, :] * difference
    scatter = dot("kin,kjn->kij", weighted, difference) / divisor[:, :, None]
    return mass, means, scatter


def _moments_small(points, responsibilities, shift, full: bool):
    dim = points.shape[0]
    difference = [points[d] - shift[:, d, None] for d in range(dim)]
    # Covariances are symmetric: one triangle is enough.
    pairs = [(i, j) for i in range(dim) for j in (range(i + 1) if full else (i,))]
    terms = [responsibilities]
    terms += [responsibilities * difference[d] for d in range(dim)]
    terms += [responsibilities * difference[i] * difference[j] for i, j in pairs]
    sums = together(terms)
    mass = sums[0]
    # About `shift`, which is near the mean: little is subtracted from the second moments, and little is lost.
    divisor = jnp.where(mass > 0, mass, 1.0)
    moved = [s / divisor for s in sums[1 : 1 + dim]]
    second = {(i, j): s / divisor - moved[i] * moved[j] for (i, j), s in zip(pairs, sums[1 + dim :], strict=True)}
    means = shift + jnp.stack(moved, -1)
    if not full:
        # Rounding can leave a variance just below zero.
        return mass, means, jnp.maximum(jnp.stack([second[i, i] for i in range(dim)], -1), 0.0)
    rows = [jnp.stack([second[max(i, j), min(i, j)] for j in range(dim)], -1) for i in range(dim)]
    return mass, means, jnp.stack(rows, -2)


def _regularise(scatter, floor):
    return scatter + (floor if scatter.ndim == 2 else floor * jnp.eye(scatter.shape[-1], dtype=scatter.dtype))


def _misfit(factor, scatter):
    """ln|C| + tr(C^-1 S), per dimension [K, D] for diagonal C, [K] for full: what an M-step makes small."""
    if factor.ndim == 2:
        return factor**2 * scatter - 2 * jnp.log(factor)
    # HIGHEST: the backend's default would round the factors to bfloat16 on a TPU and to TF32 on a GPU.
    return jnp.einsum("kij,kjl,kil->k", factor, scatter, factor, precision="highest") - 2 * half_log_det(factor)


def _start(points, weights, num_components, covariance_type, init, floor, num_active, key) -> Mixture:
    """The first mixture: from the clusters of k-means, or from random points with the spread of all data."""
    if init == "random":
        # The largest of log weight plus Gumbel noise are a weighted draw without replacement (Kool et al. 2019, arXiv
        # 1903.06059).
        scores = jnp.log(weights) + jax.random.gumbel(key, weights.shape, points.dtype)
        means = points[:, jax.lax.top_k(scores, num_components)[1]].T
        everything = jnp.broadcast_to(weights, (num_components, weights.shape[0]))
        _, _, spread = _moments(points, everything, jnp.zeros_like(means), covariance_type == "full")
        uniform = jnp.full(num_components, -math.log(num_components), points.dtype)
        return Mixture(uniform, means, _regularise(spread, floor))
    centres = kmeans.seed(key, points, weights, num_components)
    if num_active is not None:
        # No point is nearest to a centre at infinity: it stays without points, and its component without weight.
        centres = jnp.where(jnp.arange(num_components)[:, None] < num_active, centres, jnp.inf)
    if init == "kmeans":
        centres = kmeans.lloyd(points, weights, centres)
    # Hard assignments: there is no mixture yet to compute responsibilities with.
    owner = kmeans.nearest(points, centres)
    hard = jnp.where(owner == jnp.arange(num_components)[:, None], weights, 0.0)
    centres = jnp.where(jnp.isfinite(centres), centres, 0.0)
    mass, means, scatter = _moments(points, hard, centres, covariance_type == "full")
    return Mixture(jnp.log(mass / mass.sum()), means, _regularise(scatter, floor))
