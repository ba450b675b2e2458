"""The numbers that a loss takes, and the ranges they must lie in.

A number out of its range is a ValueError. A traced value cannot be looked at, so it becomes NaN, and the loss with it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = float | jax.Array


class Interval(NamedTuple):
    """The numbers from `low` to `high`; `ends` is "[" or "(" and "]" or ")": whether each end belongs to them."""

    low: float
    high: float
    ends: str = "[]"

    def contains(self, value: Scalar) -> np.ndarray | jax.Array:
        """Whether a value lies inside; NaN does not."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        # `&`, not `and`: a traced value has no truth value.
        return above & below

    def __str__(self):
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


TEMPERATURE = Interval(0, np.inf, "(]")
WEIGHT = Interval(0, 1)


def in_range(name: str, value: Scalar, interval: Interval) -> Scalar:
    """The value if it lies in the interval; NaN for a traced one that does not.

    Args:
        name: of the value, for the message.
    Raises: ValueError for a number outside.
    """
    # A traced value has no number yet, so a wrong one can only show in the result.
    if isinstance(value, jax.core.Tracer):
        return jnp.where(interval.contains(value), value, jnp.nan)
    if not np.all(interval.contains(np.asarray(value))):
        raise ValueError(f"{name} must be in {interval}, not {value}")
    return value


def checked_temperatures(temperature: Scalar, teacher_temperature: Scalar | None) -> tuple[Scalar, Scalar]:
    """The student's and the teacher's temperature; None for the teacher's means the student's.

    Raises: ValueError for a temperature that is not above 0.
    """
    temperature = in_range("temperature", temperature, TEMPERATURE)
    if teacher_temperature is None:
        return temperature, temperature
    return temperature, in_range("teacher_temperature", teacher_temperature, TEMPERATURE)


def checked_hard_weight(labels: jax.Array | None, hard_weight: Scalar) -> Scalar:
    """The weight of the cross-entropy, which needs labels unless it is the number 0.

    Raises: ValueError for a weight outside [0, 1], or one that needs labels where there are none.
    """
    hard_weight = in_range("hard_weight", hard_weight, WEIGHT)
    # A traced weight may turn out to be above 0.
    if labels is None and (isinstance(hard_weight, jax.Array) or hard_weight != 0):
        raise ValueError(f"hard_weight={hard_weight} needs labels")
    return hard_weight


def check_vocabulary(teacher_size: int, student_size: int, num_tokens: int | None) -> None:
    """Raises ValueError where it is not known which ids are real, or where there are fewer than `num_tokens`.

    Args:
        teacher_size, student_size: ids of each vocabulary, padding included.
        num_tokens: number of real ids; None where both vocabularies are real and equal.
    """
    if num_tokens is None and teacher_size != student_size:
        raise ValueError(f"vocabularies of {teacher_size} and {student_size}: num_tokens must say which ids are real")
    if num_tokens is not None and not 1 <= num_tokens <= min(teacher_size, student_size):
        raise ValueError(f"num_tokens={num_tokens}, but the vocabularies have {teacher_size} and {student_size}")
