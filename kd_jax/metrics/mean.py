"""Means with their standard errors; precision and recall of samples by nearest neighbours. Arrays in and out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A mean that can be merged with others and knows its standard error.

    Attributes:
        count: how many values.
        mean: their mean; -inf where one of them is (see `num_infinite`), NaN for no values.
        m2: sum of squared differences from the mean. Kept in place of a sum of squares, which loses all its
            digits in float32 when the mean is far from zero.
        num_infinite: how many of the values are infinite.
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array
    num_infinite: jax.Array

    @classmethod
    def of(cls, values: jax.Array, where: jax.Array | None = None, axis: int = -1) -> "Mean":
        """Mean over `axis` of the `values` selected by the mask `where` (all by default).

        What the mask leaves out is never looked at, NaN included.
        """
        where = jnp.ones(values.shape, bool) if where is None else jnp.broadcast_to(where, values.shape)
        count = where.sum(axis)
        # 0 / 0 is NaN: a mean of nothing must not look like a number.
        mean = jnp.where(where, values, 0).sum(axis) / count
        spread = jnp.where(where, values - jnp.expand_dims(mean, axis), 0)
        return cls(count, mean, (spread**2).sum(axis), (where & jnp.isinf(values)).sum(axis))

    @property
    def standard_error(self) -> jax.Array:
        """Standard error of the mean for independent values; NaN for fewer than two or infinite ones."""
        variance = self.m2 / jnp.where(self.count > 1, self.count - 1, jnp.nan)
        return jnp.sqrt(variance / self.count)

    def merge(self, other: "Mean") -> "Mean":
        """The mean of both sets of values together (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        divisor = jnp.maximum(count, 1)
        # A side without values has NaN for a mean and must add nothing.
        mine = jnp.where(self.count > 0, self.mean, 0)
        theirs = jnp.where(other.count > 0, other.mean, 0)
        mean = (mine * self.count + theirs * other.count) / jnp.where(count > 0, count, jnp.nan)
        between = (theirs - mine) ** 2 * (self.count * other.count / divisor)
        m2 = jnp.where(self.count > 0, self.m2, 0) + jnp.where(other.count > 0, other.m2, 0) + between
        return Mean(count, mean, m2, self.num_infinite + other.num_infinite)
