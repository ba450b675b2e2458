"""Hand-written derivatives of the divergences in log q, for digits that automatic differentiation loses in float32.

The gradient in a student's logits is q (s - sum q s), where q s is the divergence's slope in log q. A constant added
to all s cancels, but costs digits where it is larger than the differences between the s. So a slope here is the
derivative less a multiple of q, chosen to keep s small: s is 0 where p = q or, if most of q lies on tokens that the
teacher all but excludes (a one-hot teacher and a student that is sure of another token), s is 0 where p = 0.

The dropped multiple of q cancels behind a softmax and nowhere else: these slopes are good for logits only.

Every slope takes log p and log q [..., vocab] and the divergence's parameter, and returns [..., vocab].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd_jax.losses import terms
from kd_jax.losses.parameters import Scalar
from kd_jax.losses.reductions import total


def forward_kl(log_p: jax.Array, log_q: jax.Array, _) -> jax.Array:
    """q - p."""
    return jnp.exp(log_q) - jnp.exp(log_p)


def reverse_kl(log_p: jax.Array, log_q: jax.Array, _) -> jax.Array:
    """q log(q / p)."""
    return jnp.exp(log_q) * terms.log_ratio(log_q, log_p)


def jensen_shannon(log_p: jax.Array, log_q: jax.Array, beta: Scalar) -> jax.Array:
    """(1 - beta) q log(q / m); at the ends the slopes of the KLs."""
    q, m, ratio = terms.mixture(log_q, log_p, 1 - beta, beta)
    # At the ends the formula's factor is 0 and the KLs take its place.
    forward, reverse = beta == 0, beta == 1
    weight = jnp.where(reverse, 1, 1 - beta)
    near = jnp.where(forward, q - jnp.exp(log_p), weight * q * ratio)
    teacher_share = beta * _share(log_p, m)
    # log(q / m) where p = 0
    limit = jnp.log(jnp.where(reverse, 1, 1 - beta))
    far = weight * q * jnp.where(teacher_share < 0.5, jnp.log1p(-jnp.minimum(teacher_share, 0.5)), ratio + limit)
    return _smaller(near, far, -weight * limit)


def skew_forward_kl(log_p: jax.Array, log_q: jax.Array, alpha: Scalar) -> jax.Array:
    """(1 - alpha) q (1 - p / m)."""
    p, m, _ = terms.mixture(log_p, log_q, alpha, 1 - alpha)
    # (1 - alpha) q / m, which for alpha = 0 is 1 even where q is 0
    student_share = jnp.where(alpha == 0, 1, (1 - alpha) * _share(log_q, m))
    return _smaller((1 - alpha) * (jnp.exp(log_q) - p) * student_share, -p * student_share, 1 - alpha)


def skew_reverse_kl(log_p: jax.Array, log_q: jax.Array, alpha: Scalar) -> jax.Array:
    """q (log(q / m) + 1 - alpha q / m)."""
    q, m, ratio = terms.mixture(log_q, log_p, alpha, 1 - alpha)
    p = jnp.exp(log_p)
    near = q * ratio + (1 - alpha) * (p - q) * alpha * _share(log_q, m)
    teacher_share, safe_alpha = (1 - alpha) * _share(log_p, m), jnp.where(alpha == 0, 1, alpha)
    # log(alpha q / m), from whichever of the two shares is small.
    log_student_share = jnp.where(
        teacher_share < 0.5, jnp.log1p(-jnp.minimum(teacher_share, 0.5)), ratio + jnp.log(safe_alpha)
    )
    limit = jnp.where(alpha == 0, 0, safe_alpha - 1 - jnp.log(safe_alpha))
    return _smaller(near, q * (log_student_share + teacher_share), limit)


def total_variation(log_p: jax.Array, log_q: jax.Array, _) -> jax.Array:
    """q sign(q - p) / 2."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # sign(0) = 0: where p = q the slope is taken to be 0, in the middle of its two one-sided values.
    sign = jnp.sign(q - p)
    return _smaller(q * sign / 2, q * (sign - 1) / 2, 0.5)


def alpha_divergence(log_p: jax.Array, log_q: jax.Array, alpha: Scalar) -> jax.Array:
    """q (mass - e^(alpha r)) / alpha, where r = log(p / q) and mass is the mean of e^(alpha r) under q."""
    # Where p or q is 0 the exponent of p^alpha q^(1 - alpha) could be inf - inf.
    both = (log_p > -jnp.inf) & (log_q > -jnp.inf)
    safe_log_p, safe_log_q = (jnp.where(both, log, 0) for log in (log_p, log_q))
    mixed = jnp.where(both, jnp.exp(alpha * safe_log_p + (1 - alpha) * safe_log_q), 0)
    mass, ratio, q = total(mixed)[..., None], safe_log_p - safe_log_q, jnp.exp(log_q)
    value = total(terms.alpha_divergence(log_p, log_q, alpha))[..., None]
    limit = alpha == 0
    alpha = jnp.where(limit, 1, alpha)
    # The divergence gives a mass near 1 more exactly than the sum does.
    log_mass = jnp.where(mass < 0.5, jnp.log(mass), jnp.log1p(alpha * (alpha - 1) * value))
    above = jnp.where(limit, ratio + value, ratio - log_mass / alpha)
    close = jnp.where(limit, above, jnp.expm1(alpha * above) / alpha)
    # expm1 keeps the digits where the two terms of the slope nearly cancel; far away it would overflow.
    near = both & (limit | (abs(alpha * above) < 1))
    return jnp.where(near, -q * mass * close, (q * mass - mixed) / alpha)


def _share(log_a, m):
    """a / m; 0 where m is 0."""
    return jnp.exp(log_a) / jnp.where(m > 0, m, 1)


def _smaller(near, far, limit):
    """`near`, where s is 0 for p = q and `limit` for p = 0, or `far`, less `limit`: whose mean of s is closer to 0."""
    # By the mean of s under q, which is what the softmax's gradient subtracts.
    return jnp.where((limit > 0) & (total(near)[..., None] > limit / 2), far, near)
