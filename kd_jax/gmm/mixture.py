"""Mixtures of Gaussians as pytrees: density, sampling, sharpening, cooling and truncation.

Every function takes one mixture; use `jax.vmap` for many. Shapes: K components, D dimensions, N points. Internally the
points lie along the last axis ([D, N], [K, N]), the axis that a CPU's vector units and a GPU's lanes run along.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

# Up to this dimension, sums over dimensions are unrolled and fuse into one loop over the points; above it they are
# matrix products.
SMALL_DIM = 4


class Mixture(NamedTuple):
    """A mixture of Gaussians.

    Attributes:
        log_weights: [K] log weights; -inf is a weight of zero. They need not be normalised: every function here
            normalises them.
        means: [K, D].
        covariances: [K, D] for diagonal covariance (the variances), [K, D, D] for full.
    """

    log_weights: jax.Array
    means: jax.Array
    covariances: jax.Array


def log_prob(mixture: Mixture, x: jax.Array) -> jax.Array:
    """Log density in nats. It can be positive: it is a density, not a probability.

    Differentiable to any order in all its arguments; a component of weight zero has derivatives of zero.

    Args:
        mixture: with diagonal or full covariances.
        x: [..., D].

    Returns: [...].

    Raises: ValueError: the last axis of `x` is not the mixture's dimension, or the mixture's shapes do not fit.
    """
    dim, x = _dim(mixture), jnp.asarray(x)
    if x.shape[-1:] != (dim,):
        raise ValueError(f"x has shape {x.shape}; this mixture needs [..., {dim}]")
    # [D, N]: every step below is then a loop over contiguous points
    points = x.reshape(-1, dim).T
    joint = log_joint(mixture, precision_factor(mixture.covariances), points)
    return _log_sum(joint).reshape(x.shape[:-1])


class Randomness(NamedTuple):
    """The random numbers of draws, before a mixture makes draws of them.

    Attributes:
        uniform: [n], chooses the components.
        noise: [D, n], standard normal.
    """

    uniform: jax.Array
    noise: jax.Array


def randomness(keys: jax.Array, dim: int, counts: Sequence[int], dtype: jnp.dtype = jnp.float32) -> list[Randomness]:
    """Random numbers for `place`: for each key [P] those of counts[p] draws in `dim` dimensions.

    One call of each generator makes all of them, since XLA compiles the generator anew for every call. The numbers of a
    key do not depend on the counts: fewer are the first of more.
    """
    most = max(counts)
    pairs = jax.vmap(jax.random.split)(keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (most,), dtype))(pairs[:, 0])
    noise = jax.vmap(lambda key: jax.random.normal(key, (dim * most,), dtype))(pairs[:, 1])
    return [Randomness(uniform[i, :n], noise[i, : dim * n].reshape(dim, n)) for i, n in enumerate(counts)]


def place(mixture: Mixture, numbers: Randomness) -> jax.Array:
    """The draws [n, D] that a mixture makes of random numbers; see `sample`."""
    cumulative = jnp.cumsum(jax.nn.softmax(mixture.log_weights))
    # Dividing by the last value keeps u < 1 from ever reaching a trailing component of weight zero.
    upper = cumulative / cumulative[-1]
    # Inverse of the cumulative weights: one uniform number a draw, where jax.random.categorical takes K.
    component = (numbers.uniform[None, :] >= upper[:-1, None]).sum(0)
    return (_take(mixture.means, component) + _colour(mixture, component, numbers.noise)).T


def sample(key: jax.Array, mixture: Mixture, n: int) -> jax.Array:
    """`n` independent draws [n, D], in random order: every draw picks its own component.

    Under `vmap` over mixtures with one key, all mixtures use the same random numbers, so that differences between them
    are less noisy. Map over keys as well for independent draws.

    Args:
        key: a key of jax.random.
        mixture: with diagonal or full covariances.
        n: number of draws.
    """
    (numbers,) = randomness(key[None], _dim(mixture), (n,), mixture.means.dtype)
    return place(mixture, numbers)


def sharpen(mixture: Mixture, beta: float | jax.Array) -> Mixture:
    """The mixture with weights proportional to w_k ** beta, beta >= 0 (Cha & Cho, section 3).

    0 gives equal weights to all components of non-zero weight, 1 changes nothing, and a large beta leaves the heaviest
    component(s). A weight of zero stays zero for every beta.
    """
    log_weights = mixture.log_weights
    absent = jnp.isneginf(log_weights)
    # Subtracting the largest before the power keeps beta = 1e6 from over- or underflowing to NaN.
    shifted = jnp.where(absent, 0.0, log_weights - log_weights.max())
    # finite, as inf * 0 would be NaN for the heaviest
    beta = jnp.minimum(jnp.asarray(beta, log_weights.dtype), jnp.finfo(log_weights.dtype).max)
    powered = jnp.where(absent, -jnp.inf, beta * shifted)
    return mixture._replace(log_weights=jax.nn.log_softmax(powered))


def cool(mixture: Mixture, temperature: float | jax.Array) -> Mixture:
    """The mixture with all covariances multiplied by `temperature` > 0: sampling nearer to the components' means.

    For one Gaussian this is its density to the power 1 / temperature, renormalised: the counterpart of a language
    model's sampling temperature. For a mixture, `sharpen(mixture, 1 / temperature)` is the other counterpart: it cools
    the choice of the component, and this the draw from it.
    """
    return mixture._replace(covariances=mixture.covariances * jnp.asarray(temperature, mixture.covariances.dtype))


def blend(share: float | jax.Array, one: Mixture, other: Mixture) -> Mixture:
    """The mixture that draws from `other` with probability `share` in [0, 1], else from `one`: K1 + K2 components."""
    share = jnp.asarray(share, one.means.dtype)
    # log1p(-1) and log 0 are -inf: a side without a share has weight 0.
    sides = zip((jnp.log1p(-share), jnp.log(share)), (one, other), strict=True)
    log_weights = jnp.concatenate([log_side + jax.nn.log_softmax(m.log_weights) for log_side, m in sides])
    join = lambda name: jnp.concatenate([getattr(one, name), getattr(other, name)])  # noqa: E731
    return Mixture(log_weights, join("means"), join("covariances"))


def top_k(mixture: Mixture, k: int | jax.Array) -> Mixture:
    """The mixture of its `k` >= 1 heaviest components, renormalised; unchanged where it has no more. `k` may be traced.

    The first of equally heavy components are kept. Dropped components keep their index, with weight zero.
    """
    return _keep(mixture, _rank(mixture) < k)


def top_p(mixture: Mixture, p: float | jax.Array) -> Mixture:
    """The mixture of the fewest heaviest components whose weights sum to at least `p` in (0, 1], renormalised.

    The component that crosses `p` is kept, as in nucleus sampling (Holtzman et al. 2020). `p` may be traced; 1 changes
    nothing. The first of equally heavy components are kept.
    """
    weights, rank = jax.nn.softmax(mixture.log_weights), _rank(mixture)
    # Summed over the heavier ones alone: the heaviest then has exactly 0 before it, and stays for every p.
    before = jnp.where(rank[None, :] < rank[:, None], weights[None, :], 0.0).sum(1)
    return _keep(mixture, (before < p) | (jnp.asarray(p) >= 1))


def _rank(mixture: Mixture) -> jax.Array:
    """[K] rank of each component by weight, 0 for the heaviest."""
    # The inverse of a permutation is its argsort: here, the place of each component in the order.
    return jnp.argsort(jnp.argsort(-mixture.log_weights, stable=True))


def _keep(mixture: Mixture, keep: jax.Array) -> Mixture:
    return mixture._replace(log_weights=jax.nn.log_softmax(jnp.where(keep, mixture.log_weights, -jnp.inf)))


def weight_entropy(mixture: Mixture) -> jax.Array:
    """Entropy of the component weights in nats: 0 for one component, ln K for K equal ones."""
    log_weights = jax.nn.log_softmax(mixture.log_weights)
    weights = jnp.exp(log_weights)
    # 0 log 0 is 0, and NaN in floating point
    return -jnp.where(weights > 0, weights * log_weights, 0.0).sum()


def precision_factor(covariances: jax.Array) -> jax.Array:
    """F with F.T @ F = inverse covariance: 1/sd [K, D], or the inverse Cholesky factor [K, D, D]."""
    if covariances.ndim == 2:
        return jax.lax.rsqrt(covariances)
    if covariances.shape[-1] <= SMALL_DIM:
        return _inverse_cholesky_small(covariances)
    eye = jnp.broadcast_to(jnp.eye(covariances.shape[-1], dtype=covariances.dtype), covariances.shape)
    return solve_triangular(jnp.linalg.cholesky(covariances), eye, lower=True)


def half_log_det(factor: jax.Array) -> jax.Array:
    """Half the log determinant of the inverse covariance, [K], from `precision_factor`."""
    # Both forms are triangular or diagonal, so the determinant is the product of the diagonal.
    diagonal = factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=-2, axis2=-1)
    return jnp.log(diagonal).sum(-1)


def log_joint(mixture: Mixture, factor: jax.Array, points: jax.Array) -> jax.Array:
    """log(w_k N(x_n | k)) as [K, N], for `points` [D, N] and `factor` from `precision_factor`.

    Args:
        mixture: with diagonal or full covariances.
    """
    dim = points.shape[0]
    distance = _squared_distance(mixture.means, factor, points)
    # All that does not depend on the point, added once for each component.
    constant = jax.nn.log_softmax(mixture.log_weights) + half_log_det(factor) - 0.5 * dim * math.log(2 * math.pi)
    return constant[:, None] - 0.5 * distance


@jax.custom_jvp
def _log_sum(joint: jax.Array) -> jax.Array:
    """logsumexp over the components of [K, N], as one reduction: one pass, one exponential each, nothing stored."""
    if joint.shape[0] == 1:
        return joint[0]

    def combine(a, b):
        (top_a, sum_a), (top_b, sum_b) = a, b
        # -inf twice: no density on either side, and -inf - -inf must not become NaN.
        nothing = jnp.isneginf(top_a) & jnp.isneginf(top_b)
        ratio = jnp.where(nothing, 0.0, jnp.exp(-jnp.abs(top_a - top_b)))
        total = jnp.where(top_a >= top_b, sum_a + ratio * sum_b, ratio * sum_a + sum_b)
        return jnp.maximum(top_a, top_b), total

    # (largest, sum of exponentials relative to it): the state of a log-sum-exp that is taken in one pass.
    start = (jnp.array(-jnp.inf, joint.dtype), jnp.array(0.0, joint.dtype))
    top, total = jax.lax.reduce((joint, jnp.ones_like(joint)), start, combine, (0,))
    return top + jnp.log(total)


@_log_sum.defjvp
def _log_sum_jvp(primals, tangents):
    # XLA does not differentiate a reduction of pairs. The derivative is the mean of the tangents under the
    # responsibilities; it calls _log_sum again, so that second derivatives come from this rule too.
    (joint,), (tangent,) = primals, tangents
    total = _log_sum(joint)
    absent = jnp.isneginf(joint)
    responsibilities = jnp.exp(jnp.where(absent, -jnp.inf, joint - jnp.where(jnp.isneginf(total), 0.0, total)))
    return total, jnp.where(absent, 0.0, responsibilities * tangent).sum(0)


def _squared_distance(means: jax.Array, factor: jax.Array, points: jax.Array) -> jax.Array:
    """Mahalanobis distance squared, [K, N]. From differences, never from |x|^2 - 2 x.m + |m|^2."""
    dim = points.shape[0]
    if factor.ndim == 2:
        # written out, so that XLA fuses it with what follows and no [K, D, N] is stored
        return sum(((points[d] - means[:, d, None]) * factor[:, d, None]) ** 2 for d in range(dim))
    if dim <= SMALL_DIM:
        difference = [points[d] - means[:, d, None] for d in range(dim)]
        rows = (sum(factor[:, i, j, None] * difference[j] for j in range(i + 1)) for i in range(dim))
        return sum(row**2 for row in rows)
    # The backend's default would round the factors to bfloat16 on a TPU and to TF32 on a GPU.
    white = jnp.einsum("kij,kjn->kin", factor, points - means[:, :, None], precision="highest")
    return (white**2).sum(1)


def _inverse_cholesky_small(covariances: jax.Array) -> jax.Array:
    """Inverse Cholesky factor [K, D, D], written out: a LAPACK call per tiny matrix costs more."""
    dim = covariances.shape[-1]
    low = [[None] * dim for _ in range(dim)]
    for i in range(dim):
        for j in range(i + 1):
            rest = covariances[:, i, j] - sum(low[i][m] * low[j][m] for m in range(j))
            low[i][j] = jnp.sqrt(rest) if i == j else rest / low[j][j]
    inverse = [[jnp.zeros_like(low[0][0])] * dim for _ in range(dim)]
    for i in range(dim):
        inverse[i][i] = 1 / low[i][i]
        for j in range(i):
            inverse[i][j] = -sum(low[i][m] * inverse[m][j] for m in range(j, i)) * inverse[i][i]
    return jnp.stack([jnp.stack(row, -1) for row in inverse], -2)


def _colour(mixture: Mixture, component: jax.Array, noise: jax.Array) -> jax.Array:
    """Standard normal `noise` [D, N] given the covariance of each point's component."""
    if mixture.covariances.ndim == 2:
        return _take(jnp.sqrt(mixture.covariances), component) * noise
    # Noise of covariance L L^T is L times standard normal noise.
    factors = jnp.linalg.cholesky(mixture.covariances)
    # elementwise and not a matrix product: each draw has the factor of its own component
    return jnp.stack([(_take(factors[:, i], component) * noise).sum(0) for i in range(noise.shape[0])])


def _take(rows: jax.Array, component: jax.Array) -> jax.Array:
    """rows[component] as [D, N], by selection: gathers do not vectorise on a CPU, and K is small."""
    taken = jnp.broadcast_to(rows[0][:, None], (rows.shape[1], component.shape[0]))
    for k in range(1, rows.shape[0]):
        taken = jnp.where(component == k, rows[k][:, None], taken)
    return taken


def _dim(mixture: Mixture) -> int:
    """D; ValueError where the three shapes do not fit together."""
    log_weights, means, covariances = mixture
    k, dim = means.shape
    if log_weights.shape != (k,) or covariances.shape not in {(k, dim), (k, dim, dim)}:
        raise ValueError(
            f"log_weights {log_weights.shape}, means {means.shape} and covariances {covariances.shape} do not"
            " fit: [K], [K, D] and [K, D] (diagonal) or [K, D, D] (full) are needed"
        )
    return dim
