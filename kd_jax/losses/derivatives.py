"""The value of a row of the table for two log-softmaxes, and its derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kd_jax.losses import reductions
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.reductions import total
from kd_jax.losses.table import TABLE, Divergence


# With a rule for its derivatives: those of the formula lose digits, and are NaN where two infinities meet.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def divergence(name: str, log_p: jax.Array, log_q: jax.Array, parameter: Scalar | None) -> jax.Array:
    """The divergence [...] of log-softmaxes [..., vocab].

    Its derivatives hold behind a softmax (see `slopes.py`). In log q they are the row's own; in log p and in the
    parameter, which no training needs, those of automatic differentiation. Where a limit stands in for the formula
    (at the ends of the Jensen-Shannon and alpha divergences), the derivative in the parameter means nothing.

    Args:
        name: a key of the table.
        log_p, log_q: log-softmaxes [..., vocab] of teacher and student, float32 or wider.
        parameter: of the divergence; None for one without.
    Returns: [...], nats.
    """
    return _formula(TABLE[name], log_p, log_q, parameter)


def _formula(row: Divergence, log_p, log_q, parameter):
    return row.of_sum(total(row.term(log_p, log_q, parameter)), parameter)


@functools.partial(divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(name, primals, tangents):
    row, (log_p, log_q, parameter) = TABLE[name], primals
    by_log_p, by_log_q, by_parameter = tangents
    value = divergence(name, *primals)
    tangent = jnp.zeros_like(value)
    # A slope may be infinite or NaN (in log p where p = 0, say), so it is not computed where nobody asks for it.
    if _asked_for(by_log_q):
        tangent = tangent + total(_slope(row, log_p, log_q, parameter) * by_log_q)
    if _asked_for(by_log_p):
        tangent = tangent + jax.jvp(lambda log_p: _formula(row, log_p, log_q, parameter), (log_p,), (by_log_p,))[1]
    if _asked_for(by_parameter):
        tangent = tangent + jax.jvp(lambda x: _formula(row, log_p, log_q, x), (parameter,), (by_parameter,))[1]
    return value, tangent


def _asked_for(tangent):
    return tangent is not None and not isinstance(tangent, SymbolicZero)


def _slope(row: Divergence, log_p, log_q, parameter):
    """The derivative in log q, less a multiple of q."""
    if row.slope is not None:
        return row.slope(log_p, log_q, parameter)
    # A row without a hand-written slope: exact, but with fewer digits where p and q are close.
    value, pull_back = jax.vjp(lambda log_q: _formula(row, log_p, log_q, parameter), log_q)
    (slope,) = pull_back(jnp.ones_like(value))
    # A token that the student excludes has q = 0, so its logit moves nothing; the formula may have inf * 0 there.
    return jnp.where(log_q > -jnp.inf, slope, 0)


def gradient(name: str, log_p: jax.Array, log_q: jax.Array, parameter: Scalar | None) -> jax.Array:
    """The gradient [..., vocab] of the divergence in the logits that log q is the log-softmax of.

    Args:
        name: a key of the table.
        log_p, log_q: log-softmaxes [..., vocab] of teacher and student.
        parameter: of the divergence; None for one without.
    """
    row = TABLE[name]
    slope = _slope(row, log_p, log_q, parameter)
    if row.slope_sums_to_zero:
        return slope
    slope = slope - jnp.exp(log_q) * total(slope)[..., None]
    # Gradients sum to 0. That of a token with most of q is a difference of nearly equal numbers, so it is taken from
    # the sum of the others, which keeps its digits.
    most = log_q > -reductions.LOG_2
    return jnp.where(most, -total(jnp.where(most, 0, slope))[..., None], slope)
