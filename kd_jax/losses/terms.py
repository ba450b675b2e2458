"""The formulas of the divergences: what each adds up over the vocabulary, element by element in log p and log q.

Terms of KL type are written as p log(p / q) - p + q. The added q - p sums to 0 over the vocabulary and makes every
term nonnegative. Equal distributions then have a divergence of exactly 0 and close ones keep their digits, while in a
sum of p log(p / q) terms of both signs cancel. An error in a log-normaliser, which all terms share, nearly cancels too.

log p and log q are [..., vocab], and so is what a formula returns.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kd_jax.losses.parameters import Scalar

# Below this ratio of logarithms the closed form of a term cancels to rounding, and its power series is used.
SERIES_BELOW = 0.25


def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """a log(a / b) - a + b; b where a is 0, infinite where b is 0 and a is not."""
    ratio = log_ratio(log_a, log_b)
    return _power_divergence(jnp.exp(log_a), jnp.exp(log_b), ratio, ratio, 0.0)


def kl_to_mixture(log_a: jax.Array, log_b: jax.Array, weight_a: Scalar, weight_b: Scalar) -> jax.Array:
    """`kl` of a and m = weight_a a + weight_b b, where the weights sum to 1; of a and b for weight_a = 0."""
    a, m, ratio = mixture(log_a, log_b, weight_a, weight_b)
    return _power_divergence(a, m, ratio, ratio, 0.0)


def log_ratio(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """log(a / b), 0 where a is 0."""
    return jnp.where(jnp.exp(log_a) > 0, log_a - log_b, 0)


def mixture(
    log_a: jax.Array, log_b: jax.Array, weight_a: Scalar, weight_b: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a, m = weight_a a + weight_b b, and log(a / m), which keeps its digits where m is nearly a."""
    a, ratio = jnp.exp(log_a), log_ratio(log_a, log_b)
    # log(a / m) = -log(weight_a + weight_b b / a), where b / a may overflow. For log(a / b) < -40 this is log(a / b)
    # plus a constant, so what goes beyond -40 is added outside.
    safe_weight = jnp.where(weight_a == 0, 0.5, weight_b)
    log_a_over_m = jnp.minimum(ratio + 40, 0) - jnp.log1p(safe_weight * jnp.expm1(-jnp.maximum(ratio, -40)))
    return a, weight_a * a + weight_b * jnp.exp(log_b), jnp.where(weight_a == 0, ratio, log_a_over_m)


def _power_divergence(a, b, ratio, raised, power):
    """(a raised - a + b) / (1 + power), where raised = ((a / b)^power - 1) / power, or log(a / b) for power 0."""
    # Near a = b the three parts cancel. Their sum is a times a power series in the ratio r that starts with r^2.
    near = (a > 0) & (jnp.maximum(1, abs(power)) * abs(ratio) < SERIES_BELOW)
    coefficients = [1.0]
    for n in range(2, 8):
        coefficients.append(power ** (n - 1) - coefficients[-1])
    r, series = jnp.where(near, ratio, 0), 0.0
    for n in range(8, 1, -1):
        series = series * r + coefficients[n - 2] / math.factorial(n)
    return jnp.where(near, a * r * r * series, (a * raised - a + b) / (1 + power))


def jensen_shannon(log_p: jax.Array, log_q: jax.Array, beta: Scalar) -> jax.Array:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q; KL(p, q) for beta = 0, KL(q, p) for 1."""
    # At an end one of the two has no weight, and m is the distribution of the other.
    weight = jnp.where((beta == 0) | (beta == 1), 1 - beta, beta)
    forward = kl_to_mixture(log_p, log_q, beta, 1 - beta)
    return weight * forward + (1 - weight) * kl_to_mixture(log_q, log_p, 1 - beta, beta)


def alpha_divergence(log_p: jax.Array, log_q: jax.Array, alpha: Scalar) -> jax.Array:
    """(p^alpha q^(1 - alpha) - alpha p - (1 - alpha) q) / (alpha (alpha - 1)), and its limits at 0 and 1."""
    # D_alpha(p, q) = D_(1 - alpha)(q, p). Taking the form with the larger index avoids division by a small number.
    swap = alpha < 0.5
    log_a, log_b = jnp.where(swap, log_q, log_p), jnp.where(swap, log_p, log_q)
    power = jnp.where(swap, -alpha, alpha - 1)
    ratio = log_ratio(log_a, log_b)
    safe_power = jnp.where(power == 0, -1.0, power)
    raised = jnp.where(power == 0, ratio, jnp.expm1(safe_power * ratio) / safe_power)
    return _power_divergence(jnp.exp(log_a), jnp.exp(log_b), ratio, raised, power)


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """|p - q| / 2."""
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2
