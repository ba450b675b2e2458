"""Divergences between a teacher's and a student's next-token distributions: logits in, one value per position out.

p is the teacher's distribution, q the student's; both are softmaxes of logits [..., vocab] divided by a temperature.
Values are nats [...], in float32 (float64 for float64 logits) whatever the logits' dtype, and carry no factor of the
temperature squared; `distillation_loss` multiplies by it. All are differentiable, forward and backward, in both models'
logits, the temperatures and the parameter; only `distillation_loss` stops gradients, the teacher's.

A token whose logit is -inf has probability 0. Where a divergence is then infinite (in KL(p, q): p > 0 and q = 0), so is
the value. Logits that are all -inf, or NaN, give NaN.

The table of divergences is `table.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd_jax.losses import derivatives, parameters, reductions, table
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.reductions import log_softmax
from kd_jax.metrics import Mean

_DETAILS = """

    Args:
        teacher_logits, student_logits: [..., vocab]; they broadcast.
        {parameter}temperature: divides the student's logits, and the teacher's unless they have their own; above 0,
            traced.
        teacher_temperature: divides the teacher's logits, if given.
        num_tokens: number of real ids: both vocabularies are cut to them before the softmax.
    Returns: [...], nats.
    Raises: ValueError for vocabularies that differ without `num_tokens`, or have fewer ids, and for a temperature or
        parameter out of its range. Where these are traced, the value is NaN instead.
    Source: {source}.
"""


def divergence(
    name: str, *, teacher_logits: jax.Array, student_logits: jax.Array, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, num_tokens: int | None = None, parameter: Scalar | None = None,
) -> jax.Array:  # fmt: skip
    """The divergence of that name (a key of `DIVERGENCES`).

    Args:
        parameter: its beta or alpha; None for its default.
        others: as in `forward_kl`.
    Returns: [...], nats.
    Raises: ValueError as in `forward_kl`, and for a name that is not in the table.
    """
    parameter = table.checked_parameter(name, parameter)
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    parameters.check_vocabulary(teacher_logits.shape[-1], student_logits.shape[-1], num_tokens)
    log_p = log_softmax(teacher_logits[..., :num_tokens], teacher_temperature)
    log_q = log_softmax(student_logits[..., :num_tokens], temperature)
    return derivatives.divergence(name, log_p, log_q, parameter)


def _named(row: table.Divergence) -> Callable[..., jax.Array]:
    """A function for the divergence of one row, whose parameter has its usual name (beta or alpha)."""

    def function(
        *, teacher_logits: jax.Array, student_logits: jax.Array, temperature: Scalar = 1.0,
        teacher_temperature: Scalar | None = None, num_tokens: int | None = None, **own: Scalar,
    ) -> jax.Array:  # fmt: skip
        if row.parameter is not None:
            if "parameter" in own:
                raise TypeError(f"{row.name} has no argument 'parameter': here it is called {row.parameter.name}")
            own["parameter"] = own.pop(row.parameter.name, None)
        return divergence(
            row.name, teacher_logits=teacher_logits, student_logits=student_logits, temperature=temperature,
            teacher_temperature=teacher_temperature, num_tokens=num_tokens, **own,
        )  # fmt: skip

    # For `help` and for editors: the parameter under its own name, with its range and default.
    described, signature = "", inspect.signature(function)
    arguments = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    if row.parameter is not None:
        called, default, interval = row.parameter
        described = f"{called}: in {interval}; traced.\n        "
        keyword = inspect.Parameter.KEYWORD_ONLY
        arguments.append(inspect.Parameter(called, keyword, default=default, annotation="Scalar"))
    function.__name__ = function.__qualname__ = row.name
    function.__doc__ = row.summary + _DETAILS.format(parameter=described, source=row.source)
    function.__signature__ = signature.replace(parameters=arguments)
    return function


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {name: _named(row) for name, row in table.TABLE.items()}

forward_kl = DIVERGENCES["forward_kl"]
reverse_kl = DIVERGENCES["reverse_kl"]
jensen_shannon = DIVERGENCES["jensen_shannon"]
skew_forward_kl = DIVERGENCES["skew_forward_kl"]
skew_reverse_kl = DIVERGENCES["skew_reverse_kl"]
total_variation = DIVERGENCES["total_variation"]
alpha_divergence = DIVERGENCES["alpha_divergence"]

# For functions that have an argument of that name.
_divergence = divergence


def cross_entropy(logits: jax.Array, labels: jax.Array, *, num_tokens: int | None = None) -> jax.Array:
    """-log q of the labels.

    Args:
        logits: [..., vocab].
        labels: int [...].
        num_tokens: number of real ids, to which the vocabulary is cut before the softmax.
    Returns: [...], nats; NaN where a label is not a real id.
    """
    logits = logits[..., :num_tokens]
    log_q = log_softmax(logits)
    # A label out of range would be clipped by the gather to another id's value; it must not look like a number.
    chosen = jnp.take_along_axis(log_q, jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), -chosen, jnp.nan)


def distillation_loss(
    *, teacher_logits: jax.Array, student_logits: jax.Array, labels: jax.Array | None, mask: jax.Array,
    divergence: str = "forward_kl", temperature: Scalar = 1.0, teacher_temperature: Scalar | None = None,
    parameter: Scalar | None = None, hard_weight: Scalar = 0.0, num_tokens: int | None = None,
) -> Mean:  # fmt: skip
    """(1 - hard_weight) T^2 D(p, q) + hard_weight CE, as a Mean over the positions that the mask selects.

    T^2 is the square of `temperature` (the student's). It keeps the gradient's size as T grows: for the KLs, T^2 D goes
    to half the variance over the vocabulary of the difference of the logits (Hinton et al. 2015, arXiv 1503.02531). CE
    is the student's cross-entropy at temperature 1. The teacher gets no gradient. Masked positions are never read and
    may be NaN; over no positions at all the mean is 0, and so is its gradient.

    Args:
        teacher_logits, student_logits: [..., vocab].
        labels: int [...]; may be None if `hard_weight` is 0 (a number, not traced).
        mask: bool [...].
        divergence: a key of `DIVERGENCES`; `parameter` is its beta or alpha.
        temperature, teacher_temperature, num_tokens: as in `forward_kl`.
    Returns: the Mean, in nats; differentiate its `mean`.
    Raises: ValueError as in `divergence`, for a weight outside [0, 1] or without labels, and for shapes that differ.
    """
    hard_weight = parameters.checked_hard_weight(labels, hard_weight)
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    shapes = [teacher_logits.shape[:-1], student_logits.shape[:-1], mask.shape]
    shapes += [] if labels is None else [labels.shape]
    if len(set(shapes)) > 1:
        raise ValueError(f"positions of teacher, student, mask and labels differ: {shapes}")
    mask = mask.astype(bool)
    # Masked before the softmax: the gradient of a value that is only masked afterwards could still be NaN.
    teacher_logits = jax.lax.stop_gradient(jnp.where(mask[..., None], teacher_logits, 0))
    student_logits = jnp.where(mask[..., None], student_logits, 0)
    soft = _divergence(
        divergence, teacher_logits=teacher_logits, student_logits=student_logits, temperature=temperature,
        teacher_temperature=teacher_temperature, num_tokens=num_tokens, parameter=parameter,
    )  # fmt: skip
    # `weighted`, not a product: with hard_weight = 1 the divergence may be infinite, and 0 * inf is NaN.
    values = reductions.weighted((1 - hard_weight) * temperature**2, soft)
    if labels is not None:
        hard = cross_entropy(student_logits, jnp.where(mask, labels, 0), num_tokens=num_tokens)
        values = values + reductions.weighted(hard_weight, hard)
    return masked_mean(values, mask)


def top_k_divergence(
    *, teacher_ids: jax.Array, teacher_log_probs: jax.Array, student_logits: jax.Array,
    teacher_tail_log_prob: jax.Array | None = None, divergence: str = "forward_kl", temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, parameter: Scalar | None = None, tail: str = "bucket",
    num_tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """A divergence where only the teacher's K most probable tokens are known.

    Both distributions, at temperature 1, are reduced to fewer outcomes: with `tail="bucket"` the K ids and "any other
    token", with "renormalise" the K ids alone, on which both are conditioned. The temperatures then divide the
    log-probabilities of these outcomes. With K = vocab this is the divergence itself. At temperature 1 a bucket can
    only make a divergence smaller; renormalising does not see what the student puts on other tokens.

    Args:
        teacher_log_probs: [..., K], under the whole vocabulary at temperature 1.
        teacher_ids: int [..., K], distinct.
        student_logits: [..., vocab].
        teacher_tail_log_prob: [...], log-probability of all other tokens together (-inf for none). By default it is
            computed from the K, whose rounding makes it inexact where it is small.
        others: as in `divergence`.
    Returns: [...], nats.
    Raises: ValueError as in `divergence`, for another `tail`, and for more ids than the vocabulary has.
    """
    student_logits = student_logits[..., :num_tokens]
    tail = checked_tail(tail, teacher_ids.shape[-1], student_logits.shape[-1])
    teacher = top_k_teacher(teacher_log_probs, teacher_tail_log_prob, tail)
    student = top_k_student(student_logits, teacher_ids, tail)
    return _divergence(
        divergence, teacher_logits=teacher, student_logits=student, temperature=temperature,
        teacher_temperature=teacher_temperature, parameter=parameter,
    )  # fmt: skip


def checked_tail(tail: str, k: int, num_tokens: int) -> str:
    """The kind of tail; where the K are all ids there is none, and "bucket" means the same as "renormalise".

    Args:
        tail: "bucket" or "renormalise".
        k: how many tokens are known of the teacher.
        num_tokens: number of real ids.
    Raises: ValueError for another tail, a k that is not from 1 to num_tokens, or one token renormalised: always 0.
    """
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"tail={tail!r} is neither 'bucket' nor 'renormalise'")
    if not 1 <= k <= num_tokens:
        raise ValueError(f"K={k} recorded tokens of the teacher must be from 1 to the vocabulary's {num_tokens}")
    if tail == "renormalise" and k == 1 < num_tokens:
        raise ValueError("tail='renormalise' makes one token's probability 1, and the loss 0; take more tokens")
    return "renormalise" if k == num_tokens else tail


def top_k_teacher(log_probs: jax.Array, tail_log_prob: jax.Array | None, tail: str) -> jax.Array:
    """The teacher's logits [..., K or K + 1] over the outcomes of `top_k_divergence`.

    Args:
        log_probs: [..., K], under the whole vocabulary.
        tail_log_prob: [...], of all other tokens together; None to compute it from the K.
        tail: "bucket" or "renormalise".
    """
    log_probs = reductions.wide(log_probs)
    if tail == "renormalise":
        # Not normalised: the softmax that follows conditions on the K.
        return log_probs
    if tail_log_prob is None:
        # Rounding may bring the K to more than 1 in all.
        tail_log_prob = jnp.log1p(-jnp.minimum(jnp.exp(log_probs).sum(axis=-1), 1))
    return jnp.concatenate([log_probs, tail_log_prob[..., None].astype(log_probs.dtype)], axis=-1)


def top_k_student(logits: jax.Array, ids: jax.Array, tail: str) -> jax.Array:
    """The student's logits [..., K or K + 1] over the same outcomes.

    Args:
        logits: [..., vocab].
        ids: int [..., K], the teacher's tokens.
        tail: as of `top_k_teacher`.
    """
    logits = reductions.wide(logits)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    # Logits will do without their log-sum-exp over the vocabulary: a softmax over the outcomes follows.
    if tail == "renormalise":
        return chosen
    # The sum over all other ids, not 1 minus the K: that difference would lose its digits where it is small.
    rest = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([chosen, reductions.log_sum(rest)[..., None]], axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over all positions that the mask selects; over none it is 0, so that it neither moves a sum nor is NaN.

    Args:
        values: [...], nats.
        mask: bool [...].
    """
    # One mean over all positions, not a mean of rows' means, which would give short rows more weight.
    mean = Mean.of(values.reshape(-1), where=mask.reshape(-1))
    return mean._replace(mean=jnp.where(mean.count > 0, mean.mean, 0.0))
