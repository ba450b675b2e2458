"""Sampling from a model: any number of samples through a fixed number of slots."""

from kd_jax.lm.decode.lowered import lower, lower_prompts
from kd_jax.lm.decode.sampler import Samples, generate, stream
from kd_jax.lm.sampler_spec import WHOLE, SamplerSpec

__all__ = [
    "WHOLE",
    "SamplerSpec",
    "Samples",
    "generate",
    "lower",
    "lower_prompts",
    "stream",
]
