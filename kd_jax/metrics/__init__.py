"""Means with errors, and metrics of samples: arrays in, numbers out."""

from kd_jax.metrics.diversity import prompt_diversity, vendi_score, vendi_score_of_kernel
from kd_jax.metrics.mean import Mean
from kd_jax.metrics.neighbours import ClippedNeighbours, Neighbours, clipped_density_coverage, knn_precision_recall
from kd_jax.metrics.sample_metrics import SAMPLE_METRICS, Bias, SampleMetric, Samples, compute, self_bias

__all__ = [
    "Bias", "ClippedNeighbours", "Mean", "Neighbours", "SAMPLE_METRICS", "SampleMetric", "Samples",
    "clipped_density_coverage", "compute", "knn_precision_recall", "prompt_diversity", "self_bias",
    "vendi_score", "vendi_score_of_kernel",
]  # fmt: skip
