"""Training: the update, the loop around it, its data, its settings and its log."""

from kd_jax.lm.training.loop import train
from kd_jax.lm.training.recipe import Member, TrainSpec
from kd_jax.lm.training.session import RULE

__all__ = ["RULE", "Member", "TrainSpec", "train"]
