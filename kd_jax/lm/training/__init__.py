"""Training: the update, the loop around it, its data, settings and log."""

from kd_jax.lm.training.loop import RULE, train
from kd_jax.lm.training.recipe import Member, Settings

__all__ = [
    "RULE",
    "Member",
    "Settings",
    "train",
]
