"""The divergences of two log-softmaxes, and derivatives that keep their digits in float32.

A gradient in a student's logits is q (s - sum q s), where q s is the divergence's slope in log q. A number that all s
have in common goes away, but takes digits with it: where s are large beside their differences, these are rounding. So
slopes are given less such a number: s is 0 where p = q, or, if most of q is on tokens that the teacher all but excludes
(a one-hot teacher, say, and a student that is sure of something else), where p = 0.

What is derived here is a function of distributions, so its derivatives hold behind a softmax and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kd_jax.losses import reductions, terms
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.reductions import total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def divergence(name: str, log_p: jax.Array, log_q: jax.Array, parameter: Scalar | None) -> jax.Array:
    """The divergence [...] of that name of log-softmaxes [..., vocab]; its parameter gets no gradient."""
    return total(terms.TERMS[name](log_p, log_q, parameter))


@functools.partial(divergence.defjvp, symbolic_zeros=True)
def _divergence_slope(name, primals, tangents):
    log_p, log_q, parameter = primals
    value = divergence(name, *primals)
    slope = jnp.zeros_like(value)
    # a slope may be infinite where nobody asks for it
    if not isinstance(tangents[0], SymbolicZero):
        other, mirrored = MIRROR[name]
        by_p = SLOPES[other](log_q, log_p, None if parameter is None else mirrored(parameter))
        slope = slope + total(by_p * tangents[0])
    if not isinstance(tangents[1], SymbolicZero):
        slope = slope + total(SLOPES[name](log_p, log_q, parameter) * tangents[1])
    return value, slope


def gradient(name: str, log_p: jax.Array, log_q: jax.Array, parameter: Scalar | None) -> jax.Array:
    """The gradient [..., vocab] of the divergence in the logits that log q is the log-softmax of."""
    slope = SLOPES[name](log_p, log_q, parameter)
    if name == "forward_kl":  # q - p: their sum is 0
        return slope
    slope = slope - jnp.exp(log_q) * total(slope)[..., None]
    # All sum to 0. Of a token that has most of q the gradient is a difference of nearly equal numbers, the sum is not.
    most = log_q > -reductions.LOG_2
    return jnp.where(most, -total(jnp.where(most, 0, slope))[..., None], slope)


# --- slopes in log q, less a multiple of q ----------------------------------------------------------------------------


def _forward_kl(log_p, log_q, _):
    return jnp.exp(log_q) - jnp.exp(log_p)


def _reverse_kl(log_p, log_q, _):
    return jnp.exp(log_q) * terms.log_ratio(log_q, log_p)


def _jensen_shannon(log_p, log_q, beta):
    q, m, ratio = terms.mixture(log_q, log_p, 1 - beta, beta)
    forward, reverse = beta == 0, beta == 1  # at the ends
    weight = jnp.where(reverse, 1, 1 - beta)
    near = jnp.where(forward, q - jnp.exp(log_p), weight * q * ratio)
    theirs = beta * _share(log_p, m)
    least = jnp.log(jnp.where(reverse, 1, 1 - beta))
    far = weight * q * jnp.where(theirs < 0.5, jnp.log1p(-jnp.minimum(theirs, 0.5)), ratio + least)
    return _measured(near, far, -weight * least)


def _skew_forward_kl(log_p, log_q, alpha):
    p, m, _ = terms.mixture(log_p, log_q, alpha, 1 - alpha)
    # of (1 - alpha) q / m, which is 1 throughout for alpha = 0
    ours = jnp.where(alpha == 0, 1, (1 - alpha) * _share(log_q, m))
    return _measured((1 - alpha) * (jnp.exp(log_q) - p) * ours, -p * ours, 1 - alpha)


def _skew_reverse_kl(log_p, log_q, alpha):
    q, m, ratio = terms.mixture(log_q, log_p, alpha, 1 - alpha)
    p = jnp.exp(log_p)
    near = q * ratio + (1 - alpha) * (p - q) * alpha * _share(log_q, m)
    theirs, some = (1 - alpha) * _share(log_p, m), jnp.where(alpha == 0, 1, alpha)
    log_ours = jnp.where(theirs < 0.5, jnp.log1p(-jnp.minimum(theirs, 0.5)), ratio + jnp.log(some))
    return _measured(near, q * (log_ours + theirs), jnp.where(alpha == 0, 0, some - 1 - jnp.log(some)))


def _total_variation(log_p, log_q, _):
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    sign = jnp.sign(q - p)
    return _measured(q * sign / 2, q * (sign - 1) / 2, 0.5)


def _alpha_divergence(log_p, log_q, alpha):
    # q (mass - e^(alpha ratio)) / alpha, where ratio = log(p / q) and mass is the mean of e^(alpha ratio) under q
    both = (log_p > -jnp.inf) & (log_q > -jnp.inf)
    some_p, some_q = (jnp.where(both, log, 0) for log in (log_p, log_q))
    mixed = jnp.where(both, jnp.exp(alpha * some_p + (1 - alpha) * some_q), 0)
    mass, ratio, q = total(mixed)[..., None], some_p - some_q, jnp.exp(log_q)
    value = divergence("alpha_divergence", log_p, log_q, alpha)[..., None]
    limit = alpha == 0
    alpha = jnp.where(limit, 1, alpha)
    # a mass near 1 is known better from the divergence
    log_mass = jnp.where(mass < 0.5, jnp.log(mass), jnp.log1p(alpha * (alpha - 1) * value))
    above = jnp.where(limit, ratio + value, ratio - log_mass / alpha)
    close = jnp.where(limit, above, jnp.expm1(alpha * above) / alpha)
    near = both & (limit | (abs(alpha * above) < 1))
    return jnp.where(near, -q * mass * close, (q * mass - mixed) / alpha)


def _share(log_a, m):
    """a / m; 0 where m is."""
    return jnp.exp(log_a) / jnp.where(m > 0, m, 1)


def _measured(near, far, limit):
    """Slopes from where p = q, or from p = 0, where s is `limit`: whichever leaves a mean of s closer to 0."""
    return jnp.where((limit > 0) & (total(near)[..., None] > limit / 2), far, near)


SLOPES: dict[str, Callable[[jax.Array, jax.Array, Scalar | None], jax.Array]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha_divergence": _alpha_divergence,
}

# D(p, q) is which divergence of (q, p), and with what parameter: its slopes in log q are D's in log p
MIRROR: dict[str, tuple[str, Callable[[Scalar], Scalar]]] = {
    "forward_kl": ("reverse_kl", lambda none: none),
    "reverse_kl": ("forward_kl", lambda none: none),
    "jensen_shannon": ("jensen_shannon", lambda beta: 1 - beta),
    "skew_forward_kl": ("skew_reverse_kl", lambda alpha: alpha),
    "skew_reverse_kl": ("skew_forward_kl", lambda alpha: alpha),
    "total_variation": ("total_variation", lambda none: none),
    "alpha_divergence": ("alpha_divergence", lambda alpha: 1 - alpha),
}
