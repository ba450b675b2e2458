"""Losses between a teacher's and a student's predictions: logits in, one value per position out."""

from kd_jax.losses.aligned import Shared, Start, aligned_divergence, event_log_probs, universal_distance
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
from kd_jax.losses.table import PARAMETER, TABLE, Divergence, Parameter, checked_parameter

__all__ = [
    "DIVERGENCES", "Divergence", "PARAMETER", "Parameter", "Shared", "Start", "TABLE", "aligned_divergence",
    "alpha_divergence", "checked_parameter", "cross_entropy", "distillation_loss", "divergence", "event_log_probs",
    "forward_kl", "jensen_shannon", "masked_mean", "reverse_kl", "skew_forward_kl", "skew_reverse_kl",
    "top_k_divergence", "top_k_student", "top_k_teacher", "total_variation", "universal_distance",
]  # fmt: skip
