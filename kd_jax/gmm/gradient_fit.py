"""Students fitted to a teacher mixture by gradient, under the divergences that language models are distilled with.

All divergences are one family of four numbers (`Divergence`), which can be traced: a sweep over divergences and their
parameters is one program. Throughout, p is the teacher and q the student.

Expectations under p use the teacher's draws. Expectations under q use the student's own, E_q[f] = sum_k w_k E_{q_k}[f]:
the same number of draws from every component k, reparameterised as mean_k + sd_k * noise, and differentiable weights
w_k. This is stratified sampling of a mixture (Roeder, Wu & Duvenaud 2017, arXiv 1703.09194; Morningstar et al. 2021,
arXiv 2003.01687): no gradient passes through the choice of a component, and neither the estimate nor its gradient is
biased.

The noise is drawn once per fit, like the teacher's draws. The objective is then a deterministic function, whose
gradient goes to zero where the fit has converged (Giordano, Ingram & Broderick 2024), and starts compare without noise.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.gmm.mixture import Mixture, log_joint, precision_factor, sample


class Divergence(NamedTuple):
    """forward_weight KL(p || u p + (1-u) q) + reverse_weight KL(q || (1-v) p + v q), in nats.

    u = forward_skew and v = reverse_skew are in [0, 1). Floats or arrays; a leading axis on all four is a sweep.
    """

    forward_weight: float | jax.Array
    forward_skew: float | jax.Array
    reverse_weight: float | jax.Array
    reverse_skew: float | jax.Array


def forward_kl() -> Divergence:
    """KL(p || q)."""
    return Divergence(1.0, 0.0, 0.0, 0.0)


def reverse_kl() -> Divergence:
    """KL(q || p)."""
    return Divergence(0.0, 0.0, 1.0, 0.0)


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q (Agarwal et al. 2024, GKD).

    beta = 0 is forward KL and beta = 1 reverse KL: the limits of the sum divided by beta and by 1-beta, factors that do
    not move the minimum. Raises ValueError outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} of a Jensen-Shannon divergence must be from 0 to 1")
    if beta == 0 or beta == 1:
        return reverse_kl() if beta else forward_kl()
    return Divergence(beta, beta, 1.0 - beta, 1.0 - beta)


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(p || alpha p + (1-alpha) q) (Ko et al. 2024, DistiLLM); 0 is forward KL. ValueError outside [0, 1)."""
    return Divergence(1.0, _skew(alpha), 0.0, 0.0)


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(q || alpha q + (1-alpha) p) (Ko et al. 2024, DistiLLM); 0 is reverse KL. ValueError outside [0, 1)."""
    return Divergence(0.0, 0.0, 1.0, _skew(alpha))


def _skew(alpha: float) -> float:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} of a skew divergence must be from 0 and below 1")
    return alpha


class Fit(NamedTuple):
    """Result of `fit`.

    Attributes:
        mixture: the student.
        objective: [num_updates] the estimated divergence before each update, nats.
        gradient_norm: norm of the objective's gradient at the student, over log weights, means and log variances, nats.
            Near zero where the fit has converged.
        start: index of the start that was kept; the first of those that end within 1e-5 nats of the lowest.
    """

    mixture: Mixture
    objective: jax.Array
    gradient_norm: jax.Array
    start: jax.Array


class _Params(NamedTuple):
    """A diagonal mixture without constraints."""

    logits: jax.Array  # [K]
    means: jax.Array  # [K, D]
    log_variances: jax.Array  # [K, D]


def fit(
    key: jax.Array, divergence: Divergence, teacher: Mixture, x: jax.Array, starts: Mixture, *,
    num_draws: int = 512, num_updates: int = 200, learning_rate: float | jax.Array = 0.1,
) -> Fit:  # fmt: skip
    """The student nearest to `teacher` under `divergence`: Adam (Kingma & Ba 2015) with cosine decay to zero.

    The gradient norm and the trace show whether there were enough updates. Under `vmap` fits are independent.

    Args:
        key: random key of the student's noise.
        divergence: what is minimised; traced.
        teacher: any mixture, sharpened or truncated as the caller wishes.
        x: [N, D] draws of the teacher, for the expectations under p.
        starts: diagonal students to start from, [R, K], [R, K, D], [R, K, D]; the one that ends lowest is kept.
        num_draws: draws from each of the student's components, for the expectations under q.
        num_updates: static.
        learning_rate: initial one, for unconstrained parameters; traced.

    Returns: a Fit.

    Raises:
        ValueError: a wrong shape.
    """
    x = jnp.asarray(x)
    shapes = tuple(leaf.shape for leaf in starts)
    if starts.means.ndim != 3 or shapes != (shapes[1][:2], shapes[1], shapes[1]):
        raise ValueError(f"starts {shapes} are not students [R, K], [R, K, D], [R, K, D] with diagonal covariances")
    if x.ndim != 2 or x.shape[1] != shapes[1][2] or teacher.means.shape[-1] != shapes[1][2]:
        raise ValueError(f"x {x.shape} and the teacher's means {teacher.means.shape} need the starts' D={shapes[1][2]}")
    noise = quasi_normal(key, shapes[1][1], shapes[1][2], num_draws, x.dtype)
    points = x.T
    # the teacher's density at its own draws does not change during the fit
    log_p = log_density(teacher, points)

    def objective(params: _Params) -> jax.Array:
        return estimate(divergence, teacher, _mixture(params), points, log_p, noise)

    # b2 = 0.95, not 0.999: the first gradients are often far larger than later ones and should be forgotten soon.
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, num_updates), b2=0.95)

    def update(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(objective)(params)
        change, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, change), state), value

    def run(start: Mixture):
        # log variances: positive whatever the step, and steps are relative
        params = _Params(jax.nn.log_softmax(start.log_weights), start.means, jnp.log(start.covariances))
        # A fixed number of updates, so that all fits of a sweep run in step.
        (params, _), trace = jax.lax.scan(update, (params, optimiser.init(params)), length=num_updates)
        # At the final student, where the gradient shows whether there were enough updates.
        last, gradient = jax.value_and_grad(objective)(params)
        return last, Fit(_mixture(params), trace, optax.tree.norm(gradient), jnp.int32(0))

    last, fits = jax.vmap(run)(starts)
    # Several starts often end at the same minimum; take the first, whatever their last digits.
    best = jnp.argmax(last <= jnp.nanmin(last) + 1e-5)
    return jax.tree.map(lambda leaf: leaf[best], fits)._replace(start=best)


def estimate(divergence: Divergence, teacher: Mixture, student: Mixture, points, log_p, noise) -> jax.Array:
    """The divergence between two mixtures from samples, nats; differentiable in the student, which is diagonal.

    Args:
        points: [D, N] draws of the teacher, along the last axis.
        log_p: [N] the teacher's log density at `points`.
        noise: [K, D, M] standard normal noise of the student's draws, M from each component.
    """
    components, dim, count = noise.shape
    # Under p: the teacher's draws stay where they are while the student moves.
    forward = (log_p - _log_mix(log_density(student, points), log_p, divergence.forward_skew)).mean()
    # Draws of q as functions of its parameters, so that gradients pass through them.
    draws = student.means[:, :, None] + jnp.sqrt(student.covariances)[:, :, None] * noise
    # The draws of a component are neighbours, so that a reshape separates them again.
    draws = draws.transpose(1, 0, 2).reshape(dim, components * count)
    log_q = log_density(student, draws)
    ratio = log_q - _log_mix(log_density(teacher, draws), log_q, divergence.reverse_skew)
    reverse = (jax.nn.softmax(student.log_weights) * ratio.reshape(components, count).mean(1)).sum()

    return divergence.forward_weight * forward + divergence.reverse_weight * reverse


def held_out(key: jax.Array, divergence: Divergence, teacher: Mixture, student: Mixture, n: int) -> jax.Array:
    """`estimate` on `n` fresh draws of the teacher and of each of the student's components.

    Args:
        key: a key of jax.random.
        teacher, student: mixtures; the student is diagonal.
    Returns: nats.
    """
    key_teacher, key_student = jax.random.split(key)
    points = sample(key_teacher, teacher, n).T
    noise = quasi_normal(key_student, *student.means.shape, n, student.means.dtype)
    return estimate(divergence, teacher, student, points, log_density(teacher, points), noise)


def starts_of(teacher: Mixture, broad: Mixture, num_starts: int) -> Mixture:
    """Students to start from, [R, ...]: `broad` (such as EM's), then some at components of the diagonal `teacher`.

    Mode-seeking divergences have a minimum at each set of modes that a student can sit on. Start r puts the student's K
    components on the teacher's r-th heaviest component and the K-1 next in weight.
    """
    order = jnp.argsort(-teacher.log_weights)
    components, size = broad.log_weights.shape[0], order.shape[0]
    # Beyond the lightest the order begins again: a student may have as many components as the teacher.
    which = order[(jnp.arange(num_starts - 1)[:, None] + jnp.arange(components)) % size]
    uniform = jnp.full(which.shape, -math.log(components), broad.means.dtype)
    narrow = Mixture(uniform, teacher.means[which], teacher.covariances[which])
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), broad, narrow)


def quasi_normal(key: jax.Array, components: int, dim: int, count: int, dtype=jnp.float32) -> jax.Array:
    """Standard normal noise [components, dim, count] that fills space more evenly than independent draws.

    The normal quantile of even steps along the first axis and, along the others, of an additive recurrence in powers of
    the generalised golden ratio (Roberts 2018), all shifted at random for each component (Cranley & Patterson 1976).
    Each draw is exactly normal, so means are unbiased; for smooth functions in few dimensions their errors fall almost
    as 1/count (for reparameterised gradients: Buchholz, Wenzel & Mandt 2018).

    Args:
        key: of the random shift.
        components, dim, count: sizes of the result.
    """
    steps = [np.arange(count) / count]
    if dim > 1:
        ratio = max(np.roots([1.0] + [0.0] * (dim - 2) + [-1.0, -1.0]).real)  # ratio ** dim = ratio + 1
        steps += [np.arange(count) / ratio**d % 1.0 for d in range(1, dim)]
    shift = jax.random.uniform(key, (components, dim, 1), dtype)
    uniform = (jnp.asarray(np.stack(steps), dtype) + shift) % 1.0
    # The quantiles of 0 and 1 are infinite.
    return jax.scipy.special.ndtri(jnp.clip(uniform, 2.0**-24, 1 - 2.0**-24))


def log_density(mixture: Mixture, points: jax.Array) -> jax.Array:
    """`mixture.log_prob` for points [D, N] along the last axis -> [N], with cheap derivatives."""
    joint = log_joint(mixture, precision_factor(mixture.covariances), points)
    return joint[0] if joint.shape[0] == 1 else jax.nn.logsumexp(joint, axis=0)


def _log_mix(log_a: jax.Array, log_b: jax.Array, share: jax.Array) -> jax.Array:
    """log((1-share) a + share b); exactly log a where share is 0."""
    return jnp.logaddexp(jnp.log1p(-share) + log_a, jnp.log(share) + log_b)


def _mixture(params: _Params) -> Mixture:
    return Mixture(jax.nn.log_softmax(params.logits), params.means, jnp.exp(params.log_variances))
