"""Means that can be merged, with their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A running float32 sum of ones stops at 2^24. Sums over more values than this are made of the sums of blocks of them.
BLOCK = 2**14


class Mean(NamedTuple):
    """A mean that can be merged with others and knows its standard error; float32, or float64 for float64 values.

    Attributes:
        count: number of values.
        mean: their mean; infinite where one of them is (see `num_infinite`), NaN for no values.
        m2: sum of squared differences from the mean. A sum of squares would lose all its digits in float32 when the
            mean is far from zero.
        num_infinite: how many of the values are infinite.
        lost: what rounding took from each of the four, in this order. With it `merge` stays exact to about twice the
            digits: counts go on beyond 2^24, and a mean over many values still moves when a few are added.
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array
    num_infinite: jax.Array
    lost: tuple[jax.Array, jax.Array, jax.Array, jax.Array] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, values: jax.Array, where: jax.Array | None = None, axis: int = -1) -> Mean:
        """Mean over an axis.

        Args:
            values: [...].
            where: bool, broadcast to the values: which of them count; all by default. The others are never read and
                may be NaN.
            axis: the axis that is reduced.
        """
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        where = jnp.ones(values.shape, bool) if where is None else jnp.broadcast_to(where, values.shape)
        count, lost_count = _float(where.sum(axis), values.dtype)
        # 0 / 0 is NaN: a mean of nothing must not look like a number.
        mean = _sum(jnp.where(where, values, 0), axis) / count
        # A second pass over the values, for squares of differences from a mean that is known.
        spread = jnp.where(where, values - jnp.expand_dims(mean, axis), 0)
        num_infinite, lost_infinite = _float((where & jnp.isinf(values)).sum(axis), values.dtype)
        nothing = jnp.zeros_like(mean)
        return cls(count, mean, _sum(spread**2, axis), num_infinite, (lost_count, nothing, nothing, lost_infinite))

    @property
    def standard_error(self) -> jax.Array:
        """Standard error of the mean for independent values; NaN for fewer than two or infinite ones."""
        variance = self.m2 / jnp.where(self.count > 1, self.count - 1, jnp.nan)
        return jnp.sqrt(variance / self.count)

    def merge(self, other: Mean) -> Mean:
        """The mean of both sets of values together (Chan, Golub & LeVeque 1983), in compensated sums (Knuth 1969)."""
        count, lost_count = _add(self.count, other.count, self.lost[0] + other.lost[0])
        # The mean is moved by its share of the difference: count * mean would need digits that float32 does not have.
        share = other.count / jnp.maximum(count, 1)
        # A side without values has NaN for a mean and must add nothing.
        mine, theirs = (jnp.where(one.count > 0, one.mean, 0) for one in (self, other))
        # An infinite mean stays what it is, unless the other is its opposite; inf - inf would be NaN.
        stays = jnp.isinf(mine) & (theirs != -mine)
        difference = jnp.where(stays, 0, theirs - mine + (other.lost[1] - self.lost[1]))
        change = jnp.where(other.count > 0, difference * share, 0)
        mean, lost_mean = _add(mine, change, self.lost[1])
        m2, lost_m2 = _add(
            jnp.where(self.count > 0, self.m2, 0),
            jnp.where(other.count > 0, other.m2, 0) + difference**2 * (self.count * share),
            self.lost[2] + other.lost[2],
        )
        num_infinite, lost_infinite = _add(self.num_infinite, other.num_infinite, self.lost[3] + other.lost[3])
        mean = jnp.where(count > 0, mean, jnp.nan)
        return Mean(count, mean, m2, num_infinite, (lost_count, lost_mean, lost_m2, lost_infinite))


def _sum(values: jax.Array, axis: int) -> jax.Array:
    """Sum over an axis, in blocks if it is long."""
    size = values.shape[axis]
    if size <= BLOCK:
        return values.sum(axis)
    # Sums within blocks, and the sum over blocks, stay short enough that no term is lost to rounding.
    values = jnp.moveaxis(values, axis, -1)
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -size % BLOCK)])
    return values.reshape(*values.shape[:-1], -1, BLOCK).sum(-1).sum(-1)


def _float(count: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """An integer as a float and what its rounding lost."""
    rounded = count.astype(dtype)
    return rounded, (count - rounded.astype(count.dtype)).astype(dtype)


def _add(a: jax.Array, b: jax.Array, lost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b + lost, and what the rounding of that sum lost."""
    # XLA keeps the order of additions, so the rounding error can be computed (Knuth's two-sum).
    total = a + b
    of_b = total - a
    # An infinite sum lost nothing, but inf - inf is NaN.
    error = jnp.where(jnp.isfinite(total), (a - (total - of_b)) + (b - of_b) + lost, 0)
    rounded = total + error
    return rounded, jnp.where(jnp.isfinite(rounded), (total - rounded) + error, 0)
