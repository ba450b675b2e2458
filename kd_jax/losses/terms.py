"""What a divergence is the sum of over the vocabulary, as functions of log p and log q, element by element.

The terms of the KLs, and of what is made of them, have q - p added. Over the vocabulary that sums to 0, and it makes
each term at least 0: equal distributions have exactly 0, and close ones keep their digits, where a sum of p log(p / q)
loses them to terms of both signs. An error in the logarithm of a normaliser, in all terms alike, nearly cancels too.

Settings are looked at here as well: a number out of its range is a ValueError, a traced value becomes NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.losses.parameters import PARAMETER, Scalar, in_range


def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """a log(a / b) - a + b; b where a is 0, infinite where b is 0 and a is not."""
    ratio = log_ratio(log_a, log_b)
    return _less_the_difference(jnp.exp(log_a), jnp.exp(log_b), ratio, ratio, 0.0)


def kl_to_mixture(log_a: jax.Array, log_b: jax.Array, own: Scalar, other: Scalar) -> jax.Array:
    """`kl` of a and m = own a + other b, where own + other = 1; for own = 0 of a and b."""
    a, m, ratio = mixture(log_a, log_b, own, other)
    return _less_the_difference(a, m, ratio, ratio, 0.0)


def log_ratio(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """log(a / b), 0 where a is 0."""
    return jnp.where(jnp.exp(log_a) > 0, log_a - log_b, 0)


def mixture(log_a: jax.Array, log_b: jax.Array, own: Scalar, other: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a, m = own a + other b, and log(a / m), which is exact also where m is nearly a."""
    a, ratio = jnp.exp(log_a), log_ratio(log_a, log_b)
    # -log(own + other b / a); below -40 it is a straight line, and b / a might overflow
    share = jnp.where(own == 0, 0.5, other)
    to_mixture = jnp.minimum(ratio + 40, 0) - jnp.log1p(share * jnp.expm1(-jnp.maximum(ratio, -40)))
    return a, own * a + other * jnp.exp(log_b), jnp.where(own == 0, ratio, to_mixture)


def _less_the_difference(a, b, ratio, raised, power):
    """(a raised - a + b) / (1 + power), where raised = ((a / b)^power - 1) / power, or log(a / b) for power 0."""
    # near a = b the three parts are nearly all of each other; their sum is a power series in the ratio from r^2 on
    near = (a > 0) & (jnp.maximum(1, abs(power)) * abs(ratio) < 0.25)
    coefficients = [1.0]
    for n in range(2, 8):
        coefficients.append(power ** (n - 1) - coefficients[-1])
    r, series = jnp.where(near, ratio, 0), 0.0
    for n in range(8, 1, -1):
        series = series * r + coefficients[n - 2] / math.factorial(n)
    return jnp.where(near, a * r * r * series, (a * raised - a + b) / (1 + power))


def jensen_shannon(log_p: jax.Array, log_q: jax.Array, beta: Scalar) -> jax.Array:
    """beta KL(p, m) + (1 - beta) KL(q, m); at the ends KL(p, q) and KL(q, p)."""
    # at an end only one of the two counts, and m is the other's distribution
    weight = jnp.where((beta == 0) | (beta == 1), 1 - beta, beta)
    forward = kl_to_mixture(log_p, log_q, beta, 1 - beta)
    return weight * forward + (1 - weight) * kl_to_mixture(log_q, log_p, 1 - beta, beta)


def alpha_divergence(log_p: jax.Array, log_q: jax.Array, alpha: Scalar) -> jax.Array:
    """(p^alpha q^(1 - alpha) - alpha p - (1 - alpha) q) / (alpha (alpha - 1)), and its limits at 0 and 1."""
    # D_alpha(p, q) = D_(1 - alpha)(q, p): with the larger of the two nothing is divided by a small number
    swap = alpha < 0.5
    log_a, log_b = jnp.where(swap, log_q, log_p), jnp.where(swap, log_p, log_q)
    power = jnp.where(swap, -alpha, alpha - 1)
    ratio = log_ratio(log_a, log_b)
    safe = jnp.where(power == 0, -1.0, power)
    raised = jnp.where(power == 0, ratio, jnp.expm1(safe * ratio) / safe)
    return _less_the_difference(jnp.exp(log_a), jnp.exp(log_b), ratio, raised, power)


TERMS: dict[str, Callable[[jax.Array, jax.Array, Scalar | None], jax.Array]] = {
    "forward_kl": lambda log_p, log_q, _: kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, _: kl(log_q, log_p),
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": lambda log_p, log_q, alpha: kl_to_mixture(log_p, log_q, alpha, 1 - alpha),
    "skew_reverse_kl": lambda log_p, log_q, alpha: kl_to_mixture(log_q, log_p, alpha, 1 - alpha),
    "total_variation": lambda log_p, log_q, _: jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2,
    "alpha_divergence": alpha_divergence,
}


def checked_parameter(name: str, parameter: Scalar | None) -> Scalar | None:
    """The beta or alpha of the divergence of that name, or its default; None for those without."""
    if name not in TERMS:
        raise ValueError(f"divergence={name!r} is not one of {', '.join(TERMS)}")
    if name not in PARAMETER:
        if parameter is not None:
            raise ValueError(f"{name} has no beta or alpha, and was given {parameter}")
        return None
    called, default = PARAMETER[name]
    parameter = default if parameter is None else parameter
    called = f"{called} of {name}"
    if name == "alpha_divergence":
        return in_range(called, parameter, lambda alpha: abs(alpha) < np.inf, "finite")
    if name == "jensen_shannon":
        return in_range(called, parameter, lambda beta: (beta >= 0) & (beta <= 1), "from 0 to 1")
    return in_range(called, parameter, lambda alpha: (alpha >= 0) & (alpha < 1), "at least 0 and below 1")
