"""The settings of a loss: beta or alpha of a divergence, temperatures, the weight of the labels.

A number out of its range is a ValueError; a traced value out of its range becomes NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Scalar = float | jax.Array


# The name and default of the parameter of those divergences that have one.
PARAMETER: dict[str, tuple[str, float]] = {
    "jensen_shannon": ("beta", 0.5),
    "skew_forward_kl": ("alpha", 0.1),
    "skew_reverse_kl": ("alpha", 0.1),
    "alpha_divergence": ("alpha", 0.5),
}


def checked_temperatures(temperature: Scalar, teacher_temperature: Scalar | None) -> tuple[Scalar, Scalar]:
    """The student's and the teacher's, which is the student's where it is None."""
    temperature = in_range("temperature", temperature, lambda t: t > 0, "above 0")
    if teacher_temperature is None:
        return temperature, temperature
    return temperature, in_range("teacher_temperature", teacher_temperature, lambda t: t > 0, "above 0")


def in_range(name, value, inside, words):
    if isinstance(value, jax.core.Tracer):
        return jnp.where(inside(value), value, jnp.nan)
    if not np.all(inside(np.asarray(value))):
        raise ValueError(f"{name} must be {words}, not {value}")
    return value


def checked_hard_weight(labels: jax.Array | None, hard_weight: Scalar) -> Scalar:
    """The weight of the labels, which have to be there unless it is the number 0."""
    hard_weight = in_range("hard_weight", hard_weight, lambda weight: (weight >= 0) & (weight <= 1), "from 0 to 1")
    if labels is None and (isinstance(hard_weight, jax.Array) or hard_weight != 0):
        raise ValueError(f"hard_weight={hard_weight} needs labels")
    return hard_weight


def check_vocabulary(teacher_size: int, student_size: int, num_tokens: int | None) -> None:
    """ValueError where it is not known which ids are real."""
    if num_tokens is None and teacher_size != student_size:
        raise ValueError(f"vocabularies of {teacher_size} and {student_size}: num_tokens must say which ids are real")
    if num_tokens is not None and not 1 <= num_tokens <= min(teacher_size, student_size):
        raise ValueError(f"num_tokens={num_tokens}, but the vocabularies have {teacher_size} and {student_size}")
