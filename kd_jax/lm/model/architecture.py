"""The shape of a Llama model, and its weights, declared once.

Linen declares the weights because it does so without a mesh at hand: `init` under `eval_shape` gives shapes, dtypes and
logical axes, from which shardings follow before anything is allocated. (NNX places an annotated variable when it is
made, so it wants the mesh first.) Nothing outside this file knows: a model's weights are a dict of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

_KINDS = {"int": (int, np.integer), "float": (int, float, np.integer, np.floating), "bool": bool}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a Llama model; names are those of the checkpoints' config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if isinstance(value, bool) != (kind == "bool") or not isinstance(value, _KINDS[kind]):
                raise ValueError(f"{field.name}={value!r} has to be of type {kind}")
            if kind != "bool" and not value > 0:
                raise ValueError(f"{field.name}={value} must be above 0")
            # ids and positions are int32, and no model has any size near that
            if kind != "bool" and not value < (2**31 if kind == "int" else math.inf):
                raise ValueError(f"{field.name}={value} is too large")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(abstract(self)))


def _smollm2(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> Architecture:
    return Architecture(
        vocab_size=49152, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=64, rope_theta=100000.0,
    )  # fmt: skip


PRESETS = {
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    # the largest has another rotary base
    "smollm2-1.7b": dataclasses.replace(_smollm2(24, 2048, 32, 32, 8192), rope_theta=130000.0),
    # for tests: every axis has another size
    "tiny": Architecture(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_theta=10000.0, max_position_embeddings=512,
    ),
}  # fmt: skip


# Logical axes of the weights of a layer.
AXES = {
    "attention_norm": ("embed",),
    "q": ("heads", "embed"),
    "k": ("heads", "embed"),
    "v": ("heads", "embed"),
    "o": ("embed", "heads"),
    "mlp_norm": ("embed",),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
}


class _Weights(nn.Module):
    """Declares each weight once: name, shape, logical axes, initialiser."""

    architecture: Architecture

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        a = self.architecture
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        # 0.041666 for a width of 576, as published for SmolLM2: 1 / sqrt(width)
        normal, ones = nn.initializers.normal(a.hidden_size**-0.5), nn.initializers.ones
        layers = {
            "attention_norm": ((a.hidden_size,), ones),
            "q": ((queries, a.hidden_size), normal),
            "k": ((keys, a.hidden_size), normal),
            "v": ((keys, a.hidden_size), normal),
            "o": ((a.hidden_size, queries), normal),
            "mlp_norm": ((a.hidden_size,), ones),
            "gate": ((a.intermediate_size, a.hidden_size), normal),
            "up": ((a.intermediate_size, a.hidden_size), normal),
            "down": ((a.hidden_size, a.intermediate_size), normal),
        }
        weights = {
            "embedding": self._declare("embedding", ("vocab", "embed"), (a.vocab_size, a.hidden_size), normal),
            "layers": {
                name: self._declare(f"layers.{name}", ("layer", *AXES[name]), (a.num_hidden_layers, *shape), init)
                for name, (shape, init) in layers.items()
            },
            "norm": self._declare("norm", ("embed",), (a.hidden_size,), ones),
        }
        if not a.tie_word_embeddings:
            weights["head"] = self._declare("head", ("vocab", "embed"), (a.vocab_size, a.hidden_size), normal)
        return weights

    def _declare(self, name, axes, shape, init):
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32, unbox=False)


def _boxed(architecture: Architecture, key: jax.Array) -> dict[str, Any]:
    return _Weights(architecture).init_with_output(key)[0]


def init(key: jax.Array, architecture: Architecture, dtype=jnp.float32) -> dict[str, Any]:
    """Random weights: normal with standard deviation hidden_size**-0.5, norm gains 1. Jit it with out_shardings."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), nn.unbox(_boxed(architecture, key)))


def abstract(architecture: Architecture, dtype=jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of the weights; nothing is allocated."""
    return jax.eval_shape(lambda: init(jax.random.key(0), architecture, dtype))


def logical_axes(architecture: Architecture) -> dict[str, Any]:
    """A tuple of logical axis names for each weight, in the tree of `abstract`."""
    boxed = jax.eval_shape(lambda: _boxed(architecture, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
