"""Losses fused with the output projection, chunk by chunk: logits [tokens, vocab] never exist. The public names."""

from kd_jax.losses.fused_teacher import Statistics, linear_distillation, linear_divergence, linear_top_k_distillation
from kd_jax.losses.fused_text import linear_cross_entropy, linear_log_prob
from kd_jax.losses.head import chunk_tokens, dot, linear_map, precision, project

__all__ = [
    "Statistics", "chunk_tokens", "dot", "linear_cross_entropy", "linear_distillation", "linear_divergence",
    "linear_log_prob", "linear_map", "linear_top_k_distillation", "precision", "project",
]  # fmt: skip
