"""Precision and recall of models against p*, and the numbers that go with them."""

from kd_jax.lm.evaluation.lazy_models import LazyModel
from kd_jax.lm.evaluation.metric_rows import METRICS
from kd_jax.lm.evaluation.precision_recall import carry_out, evaluate, plan, seconds
from kd_jax.lm.evaluation.preconditions import TEACHERS_APART, Entry, EvaluationSpec, MeasureSpec, check
from kd_jax.lm.evaluation.tasks import different_prompts, home, sampling_settings

__all__ = [
    "METRICS",
    "TEACHERS_APART",
    "Entry",
    "EvaluationSpec",
    "LazyModel",
    "MeasureSpec",
    "carry_out",
    "check",
    "different_prompts",
    "evaluate",
    "home",
    "plan",
    "sampling_settings",
    "seconds",
]
