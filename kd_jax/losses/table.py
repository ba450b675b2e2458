"""The table of divergences, a row each. To add one, write its formula and its row; nothing else in kd_jax changes.

Everything that takes a divergence by name reads this table: `losses.divergence` and `losses.DIVERGENCES`, the fused
losses, and the settings of a distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from kd_jax.losses import slopes, terms
from kd_jax.losses.parameters import Interval, Scalar, in_range


class Parameter(NamedTuple):
    """The parameter of a divergence: what it is called, its default, and the interval that it must lie in."""

    name: str
    default: float
    interval: Interval


class Divergence(NamedTuple):
    """A divergence D(p, q) of a teacher's distribution p and a student's q: `of_sum` of the sum of `term`.

    Attributes:
        name: what settings call it.
        summary: the formula and, in a few words, what it is good for.
        source: the paper.
        term: (log_p, log_q, parameter) -> [..., vocab], element by element, of log-probabilities [..., vocab]; log p or
            log q may be -inf. The losses add it up over the vocabulary in blocks.
        parameter: None for a divergence without one; `term` then gets None.
        of_sum: (sum [...], parameter) -> the divergence [...]; the sum itself by default.
        slope: (log_p, log_q, parameter) -> [..., vocab], the derivative in log q, less any multiple of q (see
            `slopes.py`). By default it is that of the formula, by automatic differentiation.
        slope_sums_to_zero: whether the slope sums to 0 over the vocabulary as it stands, and so is the gradient in the
            logits.
    """

    name: str
    summary: str
    source: str
    term: Callable[[jax.Array, jax.Array, Scalar | None], jax.Array]
    parameter: Parameter | None = None
    of_sum: Callable[[jax.Array, Scalar | None], jax.Array] = lambda total, _: total
    slope: Callable[[jax.Array, jax.Array, Scalar | None], jax.Array] | None = None
    slope_sums_to_zero: bool = False


# Not 1: there the mixture is the first distribution itself, and the divergence 0 whatever the student does.
_SKEW = Parameter("alpha", 0.1, Interval(0, 1, "[)"))

_ROWS = (
    Divergence(
        name="forward_kl",
        summary="KL(p, q) = sum p log(p / q): the student must cover everything that the teacher does.",
        source="Hinton et al. 2015, arXiv 1503.02531",
        term=lambda log_p, log_q, _: terms.kl(log_p, log_q),
        slope=slopes.forward_kl,
        # Its slope, q - p, sums to 0 as it is: no multiple of q has to be taken off.
        slope_sums_to_zero=True,
    ),
    Divergence(
        name="reverse_kl",
        summary="KL(q, p) = sum q log(q / p): the student must stay where the teacher is.",
        source="Gu et al. 2024, arXiv 2306.08543",
        term=lambda log_p, log_q, _: terms.kl(log_q, log_p),
        slope=slopes.reverse_kl,
    ),
    Divergence(
        name="jensen_shannon",
        summary="beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q. It goes to 0 as beta goes to 0 or 1; "
        "at 0 itself the forward and at 1 the reverse KL take its place, by the paper's convention: the limits of "
        "JSD / beta and of JSD / (1 - beta).",
        source="Agarwal et al. 2024, arXiv 2306.13649, eq. 1",
        term=terms.jensen_shannon,
        parameter=Parameter("beta", 0.5, Interval(0, 1)),
        slope=slopes.jensen_shannon,
    ),
    Divergence(
        name="skew_forward_kl",
        summary="KL(p, alpha p + (1 - alpha) q).",
        source="Ko et al. 2024, DistiLLM, arXiv 2402.03898",
        term=lambda log_p, log_q, alpha: terms.kl_to_mixture(log_p, log_q, alpha, 1 - alpha),
        parameter=_SKEW,
        slope=slopes.skew_forward_kl,
    ),
    Divergence(
        name="skew_reverse_kl",
        summary="KL(q, alpha q + (1 - alpha) p).",
        source="Ko et al. 2024, DistiLLM, arXiv 2402.03898",
        term=lambda log_p, log_q, alpha: terms.kl_to_mixture(log_q, log_p, alpha, 1 - alpha),
        parameter=_SKEW,
        slope=slopes.skew_reverse_kl,
    ),
    Divergence(
        name="total_variation",
        summary="sum |p - q| / 2, from 0 to 1. Its slope where p = q is taken to be 0.",
        source="Wen et al. 2023, arXiv 2307.15190",
        term=lambda log_p, log_q, _: terms.total_variation(log_p, log_q),
        slope=slopes.total_variation,
    ),
    Divergence(
        name="alpha_divergence",
        summary="(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1)): at alpha = 1 the forward KL, at 0 the reverse "
        "KL, at 1/2 four times the squared Hellinger distance. Outside [0, 1] values can be huge.",
        source="Minka 2005; Wang et al. 2021, arXiv 2102.07954",
        term=terms.alpha_divergence,
        # Any finite number; 0 and 1, where the formula is 0 / 0, have limits of their own.
        parameter=Parameter("alpha", 0.5, Interval(-np.inf, np.inf, "()")),
        slope=slopes.alpha_divergence,
    ),
)

# In the order in which they are listed to users.
TABLE: dict[str, Divergence] = {row.name: row for row in _ROWS}

# Name, default and interval of the parameter, for the divergences that have one.
PARAMETER: dict[str, Parameter] = {row.name: row.parameter for row in _ROWS if row.parameter is not None}


def checked_parameter(name: str, parameter: Scalar | None) -> Scalar | None:
    """The parameter that a divergence is computed with: the given one or its default; None for one without.

    Args:
        name: a key of the table.
        parameter: a number, a traced scalar, or None for the default.
    Raises: ValueError for an unknown divergence, a parameter that it does not have, or a number out of its interval.
    """
    if name not in TABLE:
        raise ValueError(f"divergence={name!r} is not one of {', '.join(TABLE)}")
    if name not in PARAMETER:
        if parameter is not None:
            raise ValueError(f"{name} has no parameter, but was given {parameter}")
        return None
    called, default, interval = PARAMETER[name]
    return in_range(f"{called} of {name}", default if parameter is None else parameter, interval)
