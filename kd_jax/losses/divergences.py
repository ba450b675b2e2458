"""Divergences between a teacher's and a student's next-token distributions: logits in, one value per position out.

p is the teacher's distribution, q the student's; both are softmaxes of logits [..., vocab] divided by a temperature.
Values are nats [...], in float32 (float64 for float64 logits) whatever the logits' dtype, and carry no factor of the
temperature squared; `distillation_loss` multiplies by it. Nothing here stops gradients but `distillation_loss`, which
stops the teacher's.

A token whose logit is -inf has probability 0. Where a divergence is then infinite (in KL(p, q): p > 0 and q = 0), so is
the value. Logits that are all -inf, or NaN, give NaN.

The formulas are in `terms.py`, their derivatives in `slopes.py`; here they are given a softmax and a signature.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax.losses import parameters, reductions, slopes, terms
from kd_jax.losses.parameters import PARAMETER, Scalar
from kd_jax.losses.reductions import log_softmax
from kd_jax.metrics import Mean

__all__ = [
    "DIVERGENCES", "PARAMETER", "alpha_divergence", "cross_entropy", "distillation_loss", "divergence", "forward_kl",
    "jensen_shannon", "masked_mean", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "top_k_divergence",
    "top_k_student", "top_k_teacher", "total_variation",
]  # fmt: skip


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


def divergence(
    name: str, teacher_logits: jax.Array, student_logits: jax.Array, *, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None, parameter: Scalar | None = None,
) -> jax.Array:  # fmt: skip
    """The divergence of that name; `parameter` is its beta or alpha, by default its function's. It gets no gradient."""
    parameter = jax.lax.stop_gradient(terms.checked_parameter(name, parameter))
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    parameters.check_vocabulary(teacher_logits.shape[-1], student_logits.shape[-1], num_tokens)
    log_p = log_softmax(teacher_logits[..., :num_tokens], teacher_temperature)
    log_q = log_softmax(student_logits[..., :num_tokens], temperature)
    return slopes.divergence(name, log_p, log_q, parameter)


_divergence = divergence  # for functions with an argument of that name


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
    hard_weight = parameters.checked_hard_weight(labels, hard_weight)
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    shapes = [teacher_logits.shape[:-1], student_logits.shape[:-1], mask.shape]
    shapes += [] if labels is None else [labels.shape]
    if len(set(shapes)) > 1:
        raise ValueError(f"positions of teacher, student, mask and labels do not go together: {shapes}")
    mask = mask.astype(bool)
    teacher_logits = jax.lax.stop_gradient(jnp.where(mask[..., None], teacher_logits, 0))
    student_logits = jnp.where(mask[..., None], student_logits, 0)
    soft = _divergence(
        divergence, teacher_logits, student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=parameter,
    )  # fmt: skip
    values = reductions.weighted((1 - hard_weight) * temperature**2, soft)
    if labels is not None:
        hard = cross_entropy(student_logits[..., :num_tokens], jnp.where(mask, labels, 0))
        values = values + reductions.weighted(hard_weight, hard)
    return masked_mean(values, mask)


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
    student_logits = student_logits[..., :num_tokens]
    tail = checked_tail(tail, teacher_ids.shape[-1], student_logits.shape[-1])
    teacher = top_k_teacher(teacher_log_probs, teacher_tail_log_prob, tail)
    student = top_k_student(student_logits, teacher_ids, tail)
    return _divergence(
        divergence, teacher, student, temperature=temperature, teacher_temperature=teacher_temperature,
        parameter=parameter,
    )  # fmt: skip


def checked_tail(tail: str, k: int, num_tokens: int) -> str:
    """The kind of tail; where all ids are among the K there is none, and with a bucket or without is the same."""
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"tail={tail!r} is neither 'bucket' nor 'renormalise'")
    if not 1 <= k <= num_tokens:
        raise ValueError(f"the teacher's {k} most probable of {num_tokens} tokens")
    return "renormalise" if k == num_tokens else tail


def top_k_teacher(log_probs: jax.Array, tail_log_prob: jax.Array | None, tail: str) -> jax.Array:
    """The teacher's logits over the K outcomes, and the bucket if there is one."""
    log_probs = reductions.wide(log_probs)
    if tail == "renormalise":
        return log_probs
    if tail_log_prob is None:
        tail_log_prob = jnp.log1p(-jnp.minimum(jnp.exp(log_probs).sum(axis=-1), 1))
    return jnp.concatenate([log_probs, tail_log_prob[..., None].astype(log_probs.dtype)], axis=-1)


def top_k_student(logits: jax.Array, ids: jax.Array, tail: str) -> jax.Array:
    """The student's logits over the same outcomes."""
    logits = reductions.wide(logits)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if tail == "renormalise":
        return chosen
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([chosen, reductions.log_sum(rest)[..., None]], axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over all positions that the mask selects. Of none it is 0: they neither move anything nor make NaN."""
    mean = Mean.of(values.reshape(-1), where=mask.reshape(-1))
    return mean._replace(mean=jnp.where(mean.count > 0, mean.mean, 0.0), count=mean.count.astype(jnp.float32))
