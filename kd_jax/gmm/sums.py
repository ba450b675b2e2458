"""Sums over many points, block by block.

A float32 sum of ones stops at 2^24, and rounding grows with the number of terms. Sums of 4096 terms keep four digits
even in the worst case.
"""

import jax
import jax.numpy as jnp

BLOCK = 4096  # points that are added up one after the other


def padding(count: int) -> int:
    """How many points of weight zero make `count` a whole number of blocks; none where it is less than one."""
    return -count % BLOCK if count > BLOCK else 0


def total(values: jax.Array, axis: int = -1) -> jax.Array:
    """Sum over an axis of points, whose length is at most a block or a whole number of blocks."""
    if values.shape[axis] <= BLOCK:
        return values.sum(axis)
    axis %= values.ndim
    # Two sums, each of few terms.
    blocks = values.reshape(*values.shape[:axis], -1, BLOCK, *values.shape[axis + 1 :])
    return blocks.sum(axis + 1).sum(axis)


def dot(subscripts: str, *operands: jax.Array) -> jax.Array:
    """einsum over the points, index n and the last axis of every operand; in float32 on every device."""
    if operands[0].shape[-1] <= BLOCK:
        return jnp.einsum(subscripts, *operands, precision="highest")
    inputs, output = subscripts.split("->")
    blocks = (operand.reshape(*operand.shape[:-1], -1, BLOCK) for operand in operands)
    return jnp.einsum(f"{inputs.replace('n', 'bn')}->b{output}", *blocks, precision="highest").sum(0)


def together(terms: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums over the points of several [K, N] in one pass: what the terms share is computed once and never stored."""
    # One reduction of many operands: XLA reads what they are made of once.
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    if terms[0].shape[1] > BLOCK:
        terms = [term.reshape(len(term), -1, BLOCK) for term in terms]
        terms = jax.lax.reduce(tuple(terms), zeros, add, (2,))
    return jax.lax.reduce(tuple(terms), zeros, add, (1,))
