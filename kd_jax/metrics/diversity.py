"""How different samples are from each other: the Vendi score, and the diversity among samples of one prompt."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.metrics.mean import Mean
from kd_jax.metrics.points import checked


def vendi_score(points: jax.Array) -> float:
    """Effective number of different points: exp of the entropy of the eigenvalues of the cosine kernel / N.

    1 where all points have the same direction, N where all are orthogonal (Friedman & Dieng 2023, arXiv 2210.02410,
    eq. 2). It cannot be above D.

    Args:
        points: [N, D]; at most one [min(N, D), min(N, D)] matrix is made of them.
    """
    # The factor undoes the division by the small kernel's size; the eigenvalues are those of the kernel / N.
    return vendi_score_of_kernel(_cosine_kernel(_with_directions(points)) * (min(points.shape) / len(points)))


def vendi_score_of_kernel(kernel: np.ndarray) -> float:
    """Vendi score of a kernel [N, N], symmetric and positive semidefinite, with ones on its diagonal."""
    # float64: eigenvalues near 0 are differences of numbers near 1, and there are many of them.
    eigenvalues = np.linalg.eigvalsh(np.asarray(kernel, np.float64) / len(kernel))
    # An eigenvalue of 0 has a term of 0; rounding may put it below.
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


@jax.jit
def _cosine_kernel(points):
    """u u^T of the directions u, or the smaller u^T u, which has the same eigenvalues but for zeros."""
    directions = _directions(points)
    # With more points than dimensions the small product saves both memory and a cubic number of operations.
    if points.shape[0] > points.shape[1]:
        directions = directions.T
    return jnp.matmul(directions, directions.T, precision=jax.lax.Precision.HIGHEST)


def prompt_diversity(points: jax.Array, prompts: jax.Array) -> Mean:
    """Mean cosine distance between two samples of one prompt, averaged over prompts.

    The per-input diversity of Kirk et al. 2024 (arXiv 2310.06452).

    Args:
        points: [N, D], embeddings of samples.
        prompts: int [N], which prompt each belongs to, from 0.
    Returns: a Mean over the prompts with two samples or more, from 0 (all the same) to 2; NaN if there are none.
    """
    return _prompt_diversity(_with_directions(points), jnp.asarray(prompts), int(np.max(prompts)) + 1)


@functools.partial(jax.jit, static_argnums=2)
def _prompt_diversity(points, prompts, num_prompts):
    directions = _directions(points)
    counts = jax.ops.segment_sum(jnp.ones(len(points), directions.dtype), prompts, num_prompts)
    sums = jax.ops.segment_sum(directions, prompts, num_prompts)
    # |sum u|^2 is the sum of all cosines, those of the samples with themselves included: no pairs are gone through.
    pairs = counts * (counts - 1)
    cosine = ((sums**2).sum(axis=-1) - counts) / jnp.where(pairs > 0, pairs, 1)
    return Mean.of(1 - cosine, where=pairs > 0)


def _with_directions(points):
    points = checked(points, "the points")
    zero = np.flatnonzero(~np.asarray(points.any(axis=1)))
    if len(zero):
        raise ValueError(f"row {zero[0]} of the points is zero, and has no direction to compare")
    return points


def _directions(points):
    # The largest coordinate first: the square of a large number would overflow, that of a small one vanish.
    points = points / jnp.abs(points).max(axis=-1, keepdims=True)
    return points / jnp.linalg.norm(points, axis=-1, keepdims=True)
