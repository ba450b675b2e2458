"""A language model: its architecture, its weights, and its forward pass as pure functions of them."""

from kd_jax.lm.model.architecture import AXES, PRESETS, Architecture, Model, abstract, init, logical_axes, unstack
from kd_jax.lm.model.decoder import DEFAULT, Compute, empty_cache, extend, forward, head, logits
from kd_jax.lm.model.kv_cache import Cache, Pages

__all__ = [
    "AXES", "DEFAULT", "PRESETS", "Architecture", "Cache", "Compute", "Model", "Pages", "abstract", "empty_cache",
    "extend", "forward", "head", "init", "logical_axes", "logits", "unstack",
]  # fmt: skip
