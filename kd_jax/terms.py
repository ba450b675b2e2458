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

from kd_jax.chunks import dot

Scalar = float | jax.Array

# The name and default of the parameter of those divergences that have one.
PARAMETER: dict[str, tuple[str, float]] = {
    "jensen_shannon": ("beta", 0.5),
    "skew_forward_kl": ("alpha", 0.1),
    "skew_reverse_kl": ("alpha", 0.1),
    "alpha_divergence": ("alpha", 0.5),
}


@jax.custom_jvp
def kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """a log(a / b) - a + b; b where a is 0, infinite where b is 0 and a is not."""
    ratio = _ratio(log_a, log_b)
    return _less_the_difference(jnp.exp(log_a), jnp.exp(log_b), ratio, ratio, 0.0)


@kl.defjvp
def _kl_slope(primals, tangents):
    # what autodiff would find by way of the series, in one step
    a, b = map(jnp.exp, primals)
    return kl(*primals), a * _ratio(*primals) * tangents[0] + (b - a) * tangents[1]


@jax.custom_jvp
def kl_to_mixture(log_a: jax.Array, log_b: jax.Array, own: Scalar, other: Scalar) -> jax.Array:
    """`kl` of a and m = own a + other b, where own + other = 1; for own = 0 of a and b. No gradient to the shares."""
    a, m, ratio = _mixture(log_a, log_b, own, other)
    return _less_the_difference(a, m, ratio, ratio, 0.0)


@kl_to_mixture.defjvp
def _kl_to_mixture_slope(primals, tangents):
    log_a, log_b, own, other = primals
    a, m, ratio = _mixture(*primals)
    b = jnp.exp(log_b)
    safe = jnp.where(m > 0, m, 1)
    by_a, by_b = own * a / safe, jnp.where(own == 0, 1, other * b / safe)  # slopes of log m
    return kl_to_mixture(*primals), (
        (a * ratio + other * (b - a) * by_a) * tangents[0] + other * (b - a) * by_b * tangents[1]
    )


def _ratio(log_a, log_b):
    # where a is 0, log a - log b may be -inf + inf
    return jnp.where(jnp.exp(log_a) > 0, log_a - log_b, 0)


def _mixture(log_a, log_b, own, other):
    """a, m = own a + other b, and log(a / m), which is exact also where m is nearly a."""
    a, ratio = jnp.exp(log_a), _ratio(log_a, log_b)
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
    ratio = _ratio(log_a, log_b)
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


# --- what they are given ----------------------------------------------------------------------------------------------


def wide(array: jax.Array) -> jax.Array:
    """The array in float32, or in its own dtype if that is wider."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def total(values: jax.Array) -> jax.Array:
    """Sum over the last axis.

    On a CPU as a product with ones: XLA's own reductions run on one thread there, with all that is fused into them.
    """
    if jax.default_backend() != "cpu":
        return values.sum(axis=-1)
    return dot(values, jnp.ones(values.shape[-1:], values.dtype), (values.ndim - 1, 0), values.dtype)


def log_softmax(logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """log softmax(logits / temperature) over the last axis, in float32 or wider."""
    logits = wide(logits)
    # the largest taken off first: the logarithm of the sum is then small, and rounded by little
    below = (logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature
    return below - jnp.log(total(jnp.exp(below)))[..., None]


def log_sum(logits: jax.Array) -> jax.Array:
    """log sum exp over the last axis; -inf, with gradient 0, where all are -inf."""
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    some = top > -jnp.inf
    below = jnp.where(some[..., None], logits - jnp.where(some, top, 0)[..., None], 0)
    return jnp.where(some, jnp.log(total(jnp.exp(below))) + top, -jnp.inf)


def weighted(weight: Scalar, values: jax.Array) -> jax.Array:
    """weight * values, 0 where the weight is 0 even if a value is infinite."""
    return jnp.where(jnp.asarray(weight) == 0, 0, weight * values)


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
        return _in_range(called, parameter, lambda alpha: abs(alpha) < np.inf, "finite")
    if name == "jensen_shannon":
        return _in_range(called, parameter, lambda beta: (beta >= 0) & (beta <= 1), "from 0 to 1")
    return _in_range(called, parameter, lambda alpha: (alpha >= 0) & (alpha < 1), "at least 0 and below 1")


def checked_temperatures(temperature: Scalar, teacher_temperature: Scalar | None) -> tuple[Scalar, Scalar]:
    """The student's and the teacher's, which is the student's where it is None."""
    temperature = _in_range("temperature", temperature, lambda t: t > 0, "above 0")
    if teacher_temperature is None:
        return temperature, temperature
    return temperature, _in_range("teacher_temperature", teacher_temperature, lambda t: t > 0, "above 0")


def _in_range(name, value, inside, words):
    if isinstance(value, jax.core.Tracer):
        return jnp.where(inside(value), value, jnp.nan)
    if not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} must be {words}, not {value}")
    return value


def checked_hard_weight(labels: jax.Array | None, hard_weight: Scalar) -> Scalar:
    """The weight of the labels, which have to be there unless it is the number 0."""
    hard_weight = _in_range("hard_weight", hard_weight, lambda weight: (weight >= 0) & (weight <= 1), "from 0 to 1")
    if labels is None and (isinstance(hard_weight, jax.Array) or hard_weight != 0):
        raise ValueError(f"hard_weight={hard_weight} needs labels")
    return hard_weight


def check_vocabulary(teacher_size: int, student_size: int, num_tokens: int | None) -> None:
    """ValueError where it is not known which ids are real."""
    if num_tokens is None and teacher_size != student_size:
        raise ValueError(f"vocabularies of {teacher_size} and {student_size}: num_tokens must say which ids are real")
    if num_tokens is not None and not 1 <= num_tokens <= min(teacher_size, student_size):
        raise ValueError(f"num_tokens={num_tokens}, but the vocabularies have {teacher_size} and {student_size}")
