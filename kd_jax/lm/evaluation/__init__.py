"""Precision and recall of models against p*, and the numbers that go with them."""

from kd_jax.lm.evaluation.precision_recall import (
    Entry,
    Found,
    Settings,
    carry_out,
    check,
    evaluate,
    plan,
    sampling_settings,
    seconds,
)

__all__ = [
    "Entry",
    "Found",
    "Settings",
    "carry_out",
    "check",
    "evaluate",
    "plan",
    "sampling_settings",
    "seconds",
]
