"""Losses between a teacher's and a student's predictions: logits in, one value per position out."""

from kd_jax.losses.divergences import (
    DIVERGENCES,
    alpha_divergence,
    cross_entropy,
    distillation_loss,
    divergence,
    forward_kl,
    jensen_shannon,
    masked_mean,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    top_k_divergence,
    top_k_student,
    top_k_teacher,
    total_variation,
)
from kd_jax.losses.parameters import PARAMETER

__all__ = [
    "DIVERGENCES", "PARAMETER", "alpha_divergence", "cross_entropy", "distillation_loss", "divergence", "forward_kl",
    "jensen_shannon", "masked_mean", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "top_k_divergence",
    "top_k_student", "top_k_teacher", "total_variation",
]  # fmt: skip
