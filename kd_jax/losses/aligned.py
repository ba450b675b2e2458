"""Divergences between models with different vocabularies: logits in, one value per position or span out.

A span is a piece of text whose ends both tokenizations share; in each it is one token or several.

universal_distance   compares sorted probabilities. It ignores which token has which probability.
aligned_divergence   compares the distributions of what comes at the start of a span: the span's text, by the chain rule
                     over its tokens; each token that both vocabularies have; the end of the text, through any id that
                     ends it; and all the rest as one event. It ignores differences within the rest, and that a text
                     can be reached through other tokens than its own tokenization. With one vocabulary on both sides
                     it is the plain divergence.

Both are differentiable in all logits and have no factor of the temperature squared.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.losses import derivatives, parameters, reductions, table
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.reductions import log_softmax


class Start(NamedTuple):
    """One model's predictions of spans.

    Attributes:
        logits: [..., vocab], of the span's first token.
        first: int [...], that token.
        later: [...], log-probability of the span's other tokens, each given those before it; unused for one token.
        single: bool [...], whether the span is one token.
    """

    logits: jax.Array
    first: jax.Array
    later: jax.Array
    single: jax.Array


class Shared(NamedTuple):
    """The tokens that both vocabularies have: int [shared] ids each, in the same order.

    Attributes:
        teacher, student: the ids.
        teacher_ends, student_ends: int [ends], where several ids of a model end a text, these: they are one event, and
            the first of them stands for it among the shared tokens. None for one id.
    """

    teacher: jax.Array
    student: jax.Array
    teacher_ends: jax.Array | None = None
    student_ends: jax.Array | None = None


def universal_distance(
    *, teacher_logits: jax.Array, student_logits: jax.Array, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None,
) -> jax.Array:  # fmt: skip
    """sum |p - q| over probabilities sorted in descending order, the smaller vocabulary filled up with zeros.

    Args:
        teacher_logits: [..., teacher's vocab].
        student_logits: [..., student's vocab].
        temperature: divides both; above 0, traced.
        teacher_temperature: divides the teacher's, in its place.
    Returns: [...], from 0 to 2.
    Source: Boizard et al. 2024, universal logit distillation, arXiv 2402.12030.
    """
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    log_probs = log_softmax(teacher_logits, teacher_temperature), log_softmax(student_logits, temperature)
    p, q = (_sorted_down(jnp.exp(one)) for one in log_probs)
    # What one vocabulary has beyond the other is compared with zeros.
    size = min(p.shape[-1], q.shape[-1])
    both = jnp.abs(p[..., :size] - q[..., :size]).sum(axis=-1)
    return both + p[..., size:].sum(axis=-1) + q[..., size:].sum(axis=-1)


def aligned_divergence(
    name: str, *, teacher: Start, student: Start, shared: Shared, whole: jax.Array, temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None, parameter: Scalar | None = None,
) -> jax.Array:  # fmt: skip
    """The divergence of that name (a key of `DIVERGENCES`) between what the models expect at the start of spans.

    Where one of the vocabularies is a part of the other, there is no rest on its side; both distributions are then over
    the shared tokens and the span's text alone.

    Args:
        teacher, student: of the same spans; `later` is at the model's temperature.
        shared: the tokens that both have.
        whole: int [...], which of the shared tokens is the span's text; -1 for none.
        temperature: divides both models' logits; above 0, traced.
        teacher_temperature: divides the teacher's, in its place.
        parameter: of the divergence; None for its default.
    Returns: [...], nats.
    Source: the chain rule for merged tokens as in the GOLD trainer of TRL (Hugging Face 2025).
    """
    parameter = table.checked_parameter(name, parameter)
    temperature, teacher_temperature = parameters.checked_temperatures(temperature, teacher_temperature)
    sides = (teacher, shared.teacher, shared.teacher_ends), (student, shared.student, shared.student_ends)
    # Of several ends, all but one are neither shared tokens nor part of the rest.
    some_rest = all(
        start.logits.shape[-1] > len(ids) + (0 if ends is None else len(ends) - 1) for start, ids, ends in sides
    )
    log_p, log_q = (
        event_log_probs(start, ids, whole, temperature=of_side, rest=some_rest, ends=ends)
        for (start, ids, ends), of_side in zip(sides, (teacher_temperature, temperature), strict=True)
    )
    return derivatives.divergence(name, log_p, log_q, parameter)


def event_log_probs(
    start: Start, shared: jax.Array, whole: jax.Array, *, temperature: Scalar = 1.0, rest: bool = True,
    ends: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Log-probabilities of what may come at the start of spans: [..., shared + 2].

    Args:
        start: a model's predictions.
        shared: int [shared], ids of the tokens that the other vocabulary has, too.
        whole: int [...], which of them is the span's text; -1 for none.
        temperature: divides the logits.
        rest: count the tokens that are not shared; otherwise the events that are left are normalised.
        ends: of this model, see `Shared`.
    Returns: of each shared token; of the span's text, where it is not a shared token (else -inf); of all else.
    """
    log_probs = log_softmax(start.logits, temperature)
    if ends is not None:
        log_probs, start = _with_one_end(log_probs, start, ends)
    first = jnp.take_along_axis(log_probs, start.first[..., None], axis=-1)[..., 0]
    # The first token of several is divided in two events: the span's text, and that token before another one.
    # A probability of 1 in float32 must not give the second an infinite slope.
    later = jnp.where(start.single, -1.0, jnp.minimum(start.later, -jnp.finfo(log_probs.dtype).eps))
    text = jnp.where(start.single, first, first + later)
    other = jnp.where(start.single, -jnp.inf, first + jnp.log(-jnp.expm1(later)))
    is_first = jnp.arange(log_probs.shape[-1]) == start.first[..., None]
    tokens = jnp.where(is_first, other[..., None], log_probs)
    of_shared = jnp.take(tokens, shared, axis=-1)
    is_text = jnp.arange(shared.shape[0]) == whole[..., None]
    # where the text is a shared token, it may be that token, or the tokens that the model's tokenizer makes of it
    of_shared = jnp.where(is_text, _log_add(of_shared, text[..., None]), of_shared)
    text = jnp.where(whole < 0, text, -jnp.inf)
    if rest:
        # A mask over the vocabulary, so that the rest needs no list of its ids.
        is_shared = jnp.zeros(log_probs.shape[-1], bool).at[shared].set(True)
        # A sum of its own: 1 minus the shared tokens would lose the digits of a small rest.
        of_rest = reductions.log_sum(jnp.where(is_shared, -jnp.inf, tokens))
    else:
        of_rest = jnp.full(text.shape, -jnp.inf, log_probs.dtype)
    events = jnp.concatenate([of_shared, text[..., None], of_rest[..., None]], axis=-1)
    # Without the rest the events do not add up to 1.
    return events if rest else log_softmax(events)


@jax.custom_jvp
def _sorted_down(probs: jax.Array) -> jax.Array:
    """Probabilities along the last axis, the largest first."""
    return jax.lax.bitcast_convert_type(jnp.flip(jnp.sort(_keys(probs), stable=False), -1), probs.dtype)


@_sorted_down.defjvp
def _sorted_down_jvp(primals, tangents):
    (probs,), (tangent,) = primals, tangents
    places = jax.lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    _, order = jax.lax.sort_key_val(_keys(probs), places, is_stable=False)
    return tuple(jnp.take_along_axis(array, jnp.flip(order, -1), axis=-1) for array in (probs, tangent))


def _keys(probs: jax.Array) -> jax.Array:
    """Integers in the same order: the bits of numbers that are not negative. On a CPU they sort four times as fast."""
    return jax.lax.bitcast_convert_type(probs, {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[probs.dtype.itemsize])


def _with_one_end(log_probs: jax.Array, start: Start, ends: jax.Array) -> tuple[jax.Array, Start]:
    """All ends of a text as the first of them: it has the sum of their probabilities, and the others have none."""
    any_end = reductions.log_sum(jnp.take(log_probs, ends, axis=-1))
    log_probs = log_probs.at[..., ends].set(-jnp.inf).at[..., ends[0]].set(any_end)
    is_end = (start.first[..., None] == ends).any(axis=-1)
    return log_probs, start._replace(first=jnp.where(is_end, ends[0], start.first))


def _log_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(e^a + e^b) where b is finite and a may be -inf, with finite slopes."""
    some = a > -jnp.inf
    # What a `where` does not choose is differentiated too.
    return jnp.where(some, jnp.logaddexp(jnp.where(some, a, b), b), b)
