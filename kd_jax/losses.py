"""Divergences between a teacher's and a student's next-token distributions: logits in, one value per position out.

p is the teacher's distribution, q the student's; both are softmaxes of logits [..., vocab] divided by a temperature.
Values are nats [...], in float32 (float64 for float64 logits) whatever the logits' dtype, and carry no factor of the
temperature squared; `distillation_loss` multiplies by it. Nothing here stops gradients but `distillation_loss`, which
stops the teacher's.

A token whose logit is -inf has probability 0. Where a divergence is then infinite (in KL(p, q): p > 0 and q = 0), so is
the value. Logits that are all -inf, or NaN, give NaN.

Every divergence is a sum over the vocabulary of terms of (log p, log q). The terms of the KLs and of the alpha
divergence have q - p added, which sums to 0 and makes each of them at least 0: so equal distributions have 0, and close
ones keep their digits, where sums of p (log p - log q) lose them to terms of both signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.metrics import Mean

Scalar = float | jax.Array


def forward_kl(
    teacher_logits: jax.Array, student_logits: jax.Array, *, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """KL(p, q) = sum p log(p / q): the student must cover what the teacher does (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        teacher_logits, student_logits: [..., vocab]; they broadcast.
        temperature: divides the student's logits, and the teacher's unless they have their own; above 0; traced.
        teacher_temperature: divides the teacher's logits, if given.
        num_tokens: how many ids are real: the vocabularies are cut to them before the softmax.
    Returns: [...].
    Raises: ValueError for vocabularies that differ without `num_tokens`, or have fewer, and for a temperature (or, in
        the other divergences, beta or alpha) out of its range. Where these are traced, the value is NaN instead.
    """
    return divergence(
        "forward_kl", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens,
    )  # fmt: skip


def reverse_kl(
    teacher_logits: jax.Array, student_logits: jax.Array, *, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """KL(q, p) = sum q log(q / p): the student must stay where the teacher is (Gu et al. 2024, arXiv 2306.08543)."""
    return divergence(
        "reverse_kl", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens,
    )  # fmt: skip


def jensen_shannon(
    teacher_logits: jax.Array, student_logits: jax.Array, *, beta: Scalar = 0.5, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (Agarwal et al. 2024, arXiv 2306.13649, eq. 1).

    It goes to 0 as beta goes to 0 or 1. At 0 itself the forward and at 1 the reverse KL stand in its place: the limits
    of JSD / beta and JSD / (1 - beta), by the paper's convention.
    """
    return divergence(
        "jensen_shannon", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=beta,
    )  # fmt: skip


def skew_forward_kl(
    teacher_logits: jax.Array, student_logits: jax.Array, *, alpha: Scalar = 0.1, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """KL(p, alpha p + (1 - alpha) q), alpha in [0, 1) (Ko et al. 2024, DistiLLM, arXiv 2402.03898)."""
    return divergence(
        "skew_forward_kl", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=alpha,
    )  # fmt: skip


def skew_reverse_kl(
    teacher_logits: jax.Array, student_logits: jax.Array, *, alpha: Scalar = 0.1, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """KL(q, alpha q + (1 - alpha) p), alpha in [0, 1) (Ko et al. 2024, DistiLLM, arXiv 2402.03898)."""
    return divergence(
        "skew_reverse_kl", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=alpha,
    )  # fmt: skip


def total_variation(
    teacher_logits: jax.Array, student_logits: jax.Array, *, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """sum |p - q| / 2, from 0 to 1 (Wen et al. 2023, arXiv 2307.15190). Where p = q the slope is taken to be 0."""
    return divergence(
        "total_variation", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens,
    )  # fmt: skip


def alpha_divergence(
    teacher_logits: jax.Array, student_logits: jax.Array, *, alpha: Scalar = 0.5, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)) (Minka 2005; Wang et al. 2021, arXiv 2102.07954).

    At alpha = 1 its limit, the forward KL; at 0 the reverse KL; at 1/2 four times the squared Hellinger distance. Any
    real alpha will do; outside [0, 1] values can be huge.
    """
    return divergence(
        "alpha_divergence", teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=alpha,
    )  # fmt: skip


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "alpha_divergence": alpha_divergence,
}

# The name and default of the parameter of those divergences that have one.
PARAMETER: dict[str, tuple[str, float]] = {
    "jensen_shannon": ("beta", 0.5),
    "skew_forward_kl": ("alpha", 0.1),
    "skew_reverse_kl": ("alpha", 0.1),
    "alpha_divergence": ("alpha", 0.5),
}


def divergence(
    name: str, teacher_logits: jax.Array, student_logits: jax.Array, *, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None, parameter: Scalar | None = None,
) -> jax.Array:  # fmt: skip
    """The divergence of that name; `parameter` is its beta or alpha, by default that of its own function."""
    parameter = checked_parameter(name, parameter)
    temperature, teacher_temperature = checked_temperatures(temperature, teacher_temperature)
    teacher_logits, student_logits = cut_vocabulary(teacher_logits, student_logits, num_tokens)
    log_p = log_softmax(teacher_logits, teacher_temperature)
    log_q = log_softmax(student_logits, temperature)
    return terms(name, log_p, log_q, parameter).sum(axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log q of the labels: logits [..., vocab], int labels [...] -> [...]; NaN where a label is not an id."""
    log_q = log_softmax(logits)
    chosen = jnp.take_along_axis(log_q, jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), -chosen, jnp.nan)


def distillation_loss(
    teacher_logits: jax.Array, student_logits: jax.Array, labels: jax.Array | None, mask: jax.Array, *,
    divergence: str = "forward_kl", temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, hard_weight: Scalar = 0.0, num_tokens: int | None = None,
) -> Mean:  # fmt: skip
    """(1 - hard_weight) T^2 D(p, q) + hard_weight CE over the positions that the mask selects, as a Mean over them.

    T^2 is the square of `temperature` (the student's) and keeps the gradient's size as T grows: for the KLs, T^2 D goes
    to half the variance over the vocabulary of the difference of the logits. CE is the cross-entropy of the student at
    temperature 1. The teacher gets no gradient. What the mask leaves out is never looked at, NaN included; of no
    positions at all the mean is 0, and so is its gradient.

    Args:
        labels: int [...]; may be None if `hard_weight` is 0 (a number, not traced).
        mask: bool [...].
        divergence: a name in `DIVERGENCES`; `parameter` is its beta or alpha.
        temperature, teacher_temperature, num_tokens: as in `forward_kl`.
    """
    check_hard_weight(labels, hard_weight)
    mask = mask.astype(bool)
    teacher_logits, student_logits = cut_vocabulary(teacher_logits, student_logits, num_tokens)
    teacher_logits = jax.lax.stop_gradient(jnp.where(mask[..., None], teacher_logits, 0))
    student_logits = jnp.where(mask[..., None], student_logits, 0)
    soft = _DIVERGENCE(
        divergence, teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, parameter=parameter,
    )  # fmt: skip
    values = soft * temperature**2
    if labels is not None:
        hard = cross_entropy(student_logits, jnp.where(mask, labels, 0))
        values = (1 - hard_weight) * values + hard_weight * hard
    return masked_mean(values, mask)


_DIVERGENCE = divergence  # an argument of `distillation_loss` has its name


def top_k_divergence(
    teacher_log_probs: jax.Array, teacher_ids: jax.Array, student_logits: jax.Array, *,
    teacher_tail_log_prob: jax.Array | None = None, divergence: str = "forward_kl", temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, parameter: Scalar | None = None, tail: str = "bucket",
    num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """A divergence [...] of which only the teacher's K most probable tokens are known.

    Both distributions, at temperature 1, are made ones over fewer outcomes: the K ids, and with `tail="bucket"` one
    more, any other token; with "renormalise" they are conditioned on the K ids instead. The temperatures then divide
    the logarithms of these outcomes' probabilities. With K = vocab it is the divergence itself. At temperature 1 a
    bucket makes a divergence smaller, never larger; renormalising does not see what the student puts elsewhere.

    Args:
        teacher_log_probs: [..., K], under the whole vocabulary at temperature 1.
        teacher_ids: int [..., K], distinct.
        student_logits: [..., vocab].
        teacher_tail_log_prob: [...], log of the probability of all other tokens together (-inf for none); by default
            what the K leave, which for small tails is rounding.
    """
    if num_tokens is not None:
        student_logits = student_logits[..., :num_tokens]
    teacher = top_k_teacher(teacher_log_probs, teacher_tail_log_prob, tail)
    student = top_k_student(student_logits, teacher_ids, tail)
    return _DIVERGENCE(
        divergence, teacher, student, temperature=temperature, teacher_temperature=teacher_temperature,
        parameter=parameter,
    )  # fmt: skip


def top_k_teacher(log_probs: jax.Array, tail_log_prob: jax.Array | None, tail: str) -> jax.Array:
    """The teacher's logits over the K outcomes, and the bucket if there is one."""
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"tail={tail!r} is neither 'bucket' nor 'renormalise'")
    log_probs = _wide(log_probs)
    if tail == "renormalise":
        return log_probs
    if tail_log_prob is None:
        tail_log_prob = jnp.log1p(-jnp.minimum(jnp.exp(log_probs).sum(axis=-1), 1))
    return jnp.concatenate([log_probs, tail_log_prob[..., None].astype(log_probs.dtype)], axis=-1)


def top_k_student(logits: jax.Array, ids: jax.Array, tail: str) -> jax.Array:
    """The student's logits over the same outcomes."""
    logits = _wide(logits)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if tail == "renormalise":
        return chosen
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([chosen, _log_sum(rest)[..., None]], axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over all positions that the mask selects. Of none it is 0: they neither move anything nor make NaN."""
    mean = Mean.of(values.reshape(-1), where=mask.reshape(-1))
    return mean._replace(mean=jnp.where(mean.count > 0, mean.mean, 0.0), count=mean.count.astype(jnp.float32))


def log_softmax(logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """log softmax(logits / temperature) over the last axis, in float32 or wider."""
    logits = _wide(logits)
    # the largest taken off first: its logarithm of a sum is then small, and rounded by little
    below = (logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature
    return below - jnp.log(jnp.exp(below).sum(axis=-1, keepdims=True))


def _log_sum(logits):
    """logsumexp over the last axis; -inf, with gradient 0, where all are -inf."""
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    some = top > -jnp.inf
    safe = jnp.where(some[..., None], logits - jnp.where(some, top, 0)[..., None], 0)
    return jnp.where(some, jnp.log(jnp.exp(safe).sum(axis=-1)) + top, -jnp.inf)


def _wide(array):
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


# --- terms: functions of log p and log q, element by element ----------------------------------------------------------


def terms(name: str, log_p: jax.Array, log_q: jax.Array, parameter: Scalar | None = None) -> jax.Array:
    """What the divergence of that name is the sum of over the vocabulary."""
    return _TERMS[name](log_p, log_q, parameter)


@jax.custom_jvp
def _kl(log_a, log_b):
    return _power_terms(log_a, log_b, 0.0)


@_kl.defjvp
def _kl_slope(primals, tangents):
    # what autodiff would find by way of the series, in one step
    a, b = map(jnp.exp, primals)
    difference = jnp.where(a > 0, primals[0] - primals[1], 0)
    return _kl(*primals), a * difference * tangents[0] + (b - a) * tangents[1]


def _power_terms(log_a, log_b, power):
    """(a ((a / b)^power - 1) / power - a + b) / (1 + power); for power = 0 its limit a log(a / b) - a + b."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    # where a is 0, log a - log b may be -inf + inf
    ratio = jnp.where(a > 0, log_a - log_b, 0)
    near = (a > 0) & (jnp.maximum(1, abs(power)) * abs(ratio) < 0.25)
    r = jnp.where(near, ratio, 0)
    if isinstance(power, float) and power == 0:
        raised = ratio
    else:
        safe = jnp.where(power == 0, -1.0, power)
        raised = jnp.where(power == 0, ratio, jnp.expm1(safe * ratio) / safe)
    # the series in r of the same: there the three parts are nearly all of each other
    coefficients = [1.0]
    for n in range(2, 8):
        coefficients.append(power ** (n - 1) - coefficients[-1])
    series = 0.0
    for n in range(8, 1, -1):
        series = series * r + coefficients[n - 2] / math.factorial(n)
    return jnp.where(near, a * r * r * series, (a * raised - a + b) / (1 + power))


def _log_mixture(log_a, log_b, share):
    """log(share a + (1 - share) b) for 0 <= share < 1."""
    safe = jnp.where(share == 0, 0.5, share)
    # finite, so that no gradient is inf - inf where both are suppressed
    one = jnp.maximum(log_a, -1e30) + jnp.log(safe)
    other = jnp.maximum(log_b, -1e30) + jnp.log1p(-safe)
    top = jnp.maximum(one, other)
    return jnp.where(share == 0, log_b, top + jnp.log1p(jnp.exp(jnp.minimum(one, other) - top)))


def _jensen_shannon(log_p, log_q, beta):
    inside = (beta > 0) & (beta < 1)
    share = jnp.where(inside, beta, 0.5)
    log_m = _log_mixture(log_p, log_q, share)
    between = share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)
    # of what is not chosen the gradient must be finite too: there a distribution is compared with itself
    forward = _kl(log_p, jnp.where(beta == 0, log_q, log_p))
    reverse = _kl(log_q, jnp.where(beta == 1, log_p, log_q))
    return jnp.where(inside, between, jnp.where(beta == 0, forward, jnp.where(beta == 1, reverse, jnp.nan)))


def _alpha_divergence(log_p, log_q, alpha):
    # D_alpha(p, q) = D_(1 - alpha)(q, p): with the larger of the two nothing is divided by a small number
    swap = alpha < 0.5
    log_a, log_b = jnp.where(swap, log_q, log_p), jnp.where(swap, log_p, log_q)
    return _power_terms(log_a, log_b, jnp.where(swap, -alpha, alpha - 1))


_TERMS: dict[str, Callable[..., jax.Array]] = {
    "forward_kl": lambda log_p, log_q, _: _kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, _: _kl(log_q, log_p),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": lambda log_p, log_q, alpha: _kl(log_p, _log_mixture(log_p, log_q, alpha)),
    "skew_reverse_kl": lambda log_p, log_q, alpha: _kl(log_q, _log_mixture(log_q, log_p, alpha)),
    "total_variation": lambda log_p, log_q, _: jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2,
    "alpha_divergence": _alpha_divergence,
}


# --- settings, looked at before any work ------------------------------------------------------------------------------


def checked_parameter(name: str, parameter: Scalar | None) -> Scalar | None:
    """The beta or alpha of a divergence, or its default; traced and out of range: NaN."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r} is not one of {', '.join(DIVERGENCES)}")
    if name not in PARAMETER:
        if parameter is not None:
            raise ValueError(f"{name} has no beta or alpha, and was given {parameter}")
        return None
    called, default = PARAMETER[name]
    parameter = default if parameter is None else parameter
    if name == "alpha_divergence":
        return parameter
    closed = name == "jensen_shannon"
    return _in_range(
        f"{called} of {name}", parameter, lambda x: (x >= 0) & ((x <= 1) if closed else (x < 1)),
        "from 0 to 1" if closed else "from 0 to below 1",
    )  # fmt: skip


def checked_temperatures(temperature: Scalar, teacher_temperature: Scalar | None) -> tuple[Scalar, Scalar]:
    """The student's and the teacher's temperature; traced and not above 0: NaN."""
    if teacher_temperature is None:
        teacher_temperature = temperature
    return tuple(
        _in_range(name, value, lambda x: x > 0, "above 0")
        for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature))
    )


def check_hard_weight(labels: Any, hard_weight: Scalar) -> None:
    """ValueError for a weight on labels that are not there."""
    if labels is None and not (isinstance(hard_weight, int | float) and hard_weight == 0):
        raise ValueError(f"hard_weight={hard_weight} needs labels")


def _in_range(name, value, inside, words):
    if isinstance(value, jax.core.Tracer):
        return jnp.where(inside(value), value, jnp.nan)
    if not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} must be {words}, not {value}")
    return value


def cut_vocabulary(
    teacher_logits: jax.Array, student_logits: jax.Array, num_tokens: int | None
) -> tuple[jax.Array, jax.Array]:
    """Both logits cut to the real ids; ValueError where it is not known which those are."""
    sizes = teacher_logits.shape[-1], student_logits.shape[-1]
    check_vocabulary(*sizes, num_tokens)
    return teacher_logits[..., :num_tokens], student_logits[..., :num_tokens]


def check_vocabulary(teacher_size: int, student_size: int, num_tokens: int | None) -> None:
    """ValueError where it is not known which ids are real."""
    if num_tokens is None and teacher_size != student_size:
        raise ValueError(f"vocabularies of {teacher_size} and {student_size}: num_tokens must say which ids are real")
    if num_tokens is not None and not 1 <= num_tokens <= min(teacher_size, student_size):
        raise ValueError(f"num_tokens={num_tokens}, but the vocabularies have {teacher_size} and {student_size}")
