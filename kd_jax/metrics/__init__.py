"""Metrics of samples: arrays in, numbers out."""

from kd_jax.metrics.mean import Mean
from kd_jax.metrics.neighbours import Neighbours, knn_precision_recall

__all__ = ["Mean", "Neighbours", "knn_precision_recall"]
