"""Instructions whose answers a program can check: templates of prompts, and checkers of answers."""

from kd_jax.lm.instruct.checkers import CHECKERS, check
from kd_jax.lm.instruct.templates import SPLITS, Instruction, instructions

__all__ = ["CHECKERS", "SPLITS", "Instruction", "check", "instructions"]
