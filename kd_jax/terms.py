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
LOG_2 = math.log(2)
SUM_BLOCK = 1024  # ids that `sums` goes through at a time; 512 to 4096 take the same time

# The name and default of the parameter of those divergences that have one.
PARAMETER: dict[str, tuple[str, float]] = {
    "jensen_shannon": ("beta", 0.5),
    "skew_forward_kl": ("alpha", 0.1),
    "skew_reverse_kl": ("alpha", 0.1),
    "alpha_divergence": ("alpha", 0.5),
}


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


def sums(function: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the last axis of what `function` makes of arrays [..., vocab], element by element.

    On one CPU they are gone through in blocks, so that the terms are never written out: some 5 % of a loss' time, which
    is within the noise of one run.
    """
    size = arrays[0].shape[-1]
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or size < SUM_BLOCK:
        return tuple(map(total, function(*arrays)))

    def block(start, length=SUM_BLOCK):
        return function(*(jax.lax.dynamic_slice_in_dim(array, start, length, axis=-1) for array in arrays))

    def add(i, found):
        return jax.tree.map(jnp.add, found, block(i * SUM_BLOCK))

    count, rest = divmod(size, SUM_BLOCK)
    empty = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(block, 0))
    found = jax.tree.map(total, jax.lax.fori_loop(0, count, add, empty))
    return jax.tree.map(jnp.add, found, jax.tree.map(total, block(size - rest, rest))) if rest else found


def largest(values: jax.Array) -> jax.Array:
    """Maximum over the last axis, which is kept."""
    *rest, size = values.shape
    # over several devices the lanes would be on different ones, which then would send an eighth of the logits
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or size % 8:
        return values.max(axis=-1, keepdims=True)
    # In two steps, the second a minimum: XLA would make one of them, and on CPUs that a part of the product before it,
    # which takes longer with it.
    lanes = values.reshape(*rest, 8, size // 8).max(axis=-2)
    return -(-lanes).min(axis=-1, keepdims=True)


def log_softmax(logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """log softmax(logits / temperature) over the last axis, in float32 or wider."""
    logits = wide(logits)
    # the largest taken off first: the logarithm of the sum is then small, and rounded by little
    below = (logits - jax.lax.stop_gradient(largest(logits))) / temperature
    return _normalised(below)


@jax.custom_jvp
def _normalised(logits):
    return logits - jnp.log(total(jnp.exp(logits)))[..., None]


@_normalised.defjvp
def _normalised_slope(primals, tangents):
    log_q = _normalised(*primals)
    # Relative to a token that has most of q: backwards, it gets minus the sum of what the others get, see slopes.py.
    most = log_q > -LOG_2
    rest = jnp.where(most, 0, tangents[0] - total(jnp.where(most, tangents[0], 0))[..., None])
    return log_q, rest - total(jnp.exp(log_q) * rest)[..., None]


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
