"""The settings of a decoder, and its weights, declared once.

Families of models (Llama, Qwen, Gemma, ...) are settings of one architecture, not classes; the table from families to
settings is kd_jax.lm.weights.families.

Linen declares the weights because it needs no mesh to do so: `init` under `eval_shape` gives shapes, dtypes and logical
axes, from which shardings follow before anything is allocated. (NNX places an annotated variable when it is made, so it
needs the mesh first.) No other file depends on Linen: a model's weights are a dict of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kd_jax.lm.model.rotary import Scaling


class LayerKind(NamedTuple):
    """What layers of one model may differ in.

    Attributes:
        window: a position attends to so many positions, itself included; None for all before it.
        rotary: which rotary phases it has: "global", "local" (with the base `local_rope_theta`) or "none".
    """

    window: int | None
    rotary: str


_ABOVE_ZERO = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The settings of a decoder-only transformer; without the optional ones it is Llama.

    The first eleven have the names of the checkpoints' config.json. Tuples and `rope_scaling` may be given as lists and
    objects of JSON.

    Attributes:
        family: whose layout an export has; a key of kd_jax.lm.weights.families.FAMILIES. It changes no number.
        query_key_value_bias, output_bias, mlp_bias: which linear layers have biases.
        query_key_norm: RMS norm of queries and keys before they are rotated: "none", "head" (each head by itself) or
            "width" (all heads of a position together).
        attention_scale: factor of the scores; None for 1 / sqrt(head_dim).
        attention_softcap: scores become cap * tanh(score / cap).
        sliding_window, sliding_layers: the window in tokens, and the layers that have it.
        rotary_dim: the first dimensions of a head that are rotated; None for all.
        rope_scaling: see kd_jax.lm.model.rotary; not for local phases.
        local_rope_theta: rotary base of the sliding layers, if it is another.
        unrotated_layers: layers without rotary phases.
        norm_order: RMS norms "before" attention and MLP, "after" them (on what is added to the residual), or "both".
        unit_offset_gain: the norms multiply by 1 + weight (Gemma).
        activation: of the gated MLP, "silu", "gelu_tanh" (the tanh approximation) or "gelu".
        embedding_multiplier, residual_multiplier: factors of the embeddings, and of what attention and MLP add.
        logits_divisor: logits are divided by it; `forward` divides the hidden states instead.
        logit_softcap: logits become cap * tanh(logit / cap), after the division.
    """

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
    family: str = "llama"
    query_key_value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: str = "none"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    rope_scaling: Scaling | None = None
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    norm_order: str = "before"
    unit_offset_gain: bool = False
    activation: str = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self):
        # JSON has lists; the architecture is static under jit and has to be hashable.
        object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
        object.__setattr__(self, "unrotated_layers", tuple(self.unrotated_layers))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", Scaling(**self.rope_scaling))
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            # ids and positions are int32; layers are listed one by one, so that a damaged file's billion would not end
            limit = 2**16 if name == "num_hidden_layers" else 2**31
            if isinstance(value, bool | str) or value is None or not 0 < value < limit:
                raise ValueError(f"{name}={value!r} has to be above 0 and below {limit}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.rotated % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def rotated(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""

        def kind(layer):
            sliding = layer in self.sliding_layers
            # Gemma 3: layers with a window have a rotary base of their own.
            local = sliding and self.local_rope_theta is not None
            rotary = "none" if layer in self.unrotated_layers else "local" if local else "global"
            return LayerKind(self.sliding_window if sliding else None, rotary)

        return tuple(map(kind, range(self.num_hidden_layers)))

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        return sum(leaf.size for leaf in jax.tree.leaves(abstract(self)))


class Model(NamedTuple):
    """A model that can be scored, sampled and exported.

    Attributes:
        architecture: its shape.
        params: its weights; the tree is that of `abstract(architecture)`.
        eos_ids: ids that end a sequence; none for a model that never stops.
        bos_id: id that starts one, or None.
        pad_id: id that fills up a row, or None; never used to find out what is padding.
        tokenizer: a kd_jax.lm.weights.tokenizer.Tokenizer, or None.
    """

    architecture: Architecture
    params: dict[str, Any]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    tokenizer: Any = None

    @property
    def num_tokens(self) -> int:
        """How many ids are real: a vocabulary may be padded, and a tokenizer have added tokens without weights."""
        count = self.architecture.vocab_size
        return count if self.tokenizer is None else min(count, self.tokenizer.vocab_size)


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


# Logical axes of the weights of a layer; kd_jax.parallel.mesh.RULES says which are split, and over what. Linear layers
# are [out, in].
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
    "q_bias": ("heads",),
    "k_bias": ("heads",),
    "v_bias": ("heads",),
    "o_bias": ("embed",),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
    "down_bias": ("embed",),
    # whole on every device: gains of one head, or of all of them, are few numbers
    "q_norm": (None,),
    "k_norm": (None,),
    "post_attention_norm": ("embed",),
    "post_mlp_norm": ("embed",),
}


class _Weights(nn.Module):
    """Declares each weight once: name, shape, logical axes, initialiser.

    Linen draws each weight's key from its name and from how many were declared before it, so the order of these
    declarations is part of what a seed means: new weights come last.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        a = self.architecture
        # Drawn in float32 whatever the dtype of training, so that a seed means the same weights in each dtype.
        # The published standard deviation of SmolLM2: 0.041666 for a width of 576, which is 1 / sqrt(width).
        normal = nn.initializers.normal(a.hidden_size**-0.5)
        # Norms start as the identity: a gain of 1, which Gemma stores as 0.
        gain = nn.initializers.zeros if a.unit_offset_gain else nn.initializers.ones
        initialisers = {name: gain for name in AXES if name.endswith("norm")}
        initialisers |= {name: nn.initializers.zeros for name in AXES if name.endswith("bias")}
        weights = {
            "embedding": self._declare("embedding", ("vocab", "embed"), (a.vocab_size, a.hidden_size), normal),
            "layers": {
                name: self._declare(
                    f"layers.{name}", ("layer", *AXES[name]), (a.num_hidden_layers, *shape),
                    initialisers.get(name, normal),
                )
                for name, shape in layer_shapes(a).items()
            },
            "norm": self._declare("norm", ("embed",), (a.hidden_size,), gain),
        }  # fmt: skip
        if not a.tie_word_embeddings:
            weights["head"] = self._declare("head", ("vocab", "embed"), (a.vocab_size, a.hidden_size), normal)
        return weights

    def _declare(self, name, axes, shape, init):
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32, unbox=False)


def layer_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of each weight that a layer of this architecture has."""
    width, mlp = a.hidden_size, a.intermediate_size
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    linear = {
        "q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries),
        "gate": (mlp, width), "up": (mlp, width), "down": (width, mlp),
    }  # fmt: skip
    before, after = a.norm_order in ("before", "both"), a.norm_order in ("after", "both")
    # In the order of the layer's computation, which is also the order of declaration (see _Weights).
    shapes = {"attention_norm": (width,)} if before else {}
    shapes |= {name: linear[name] for name in ("q", "k", "v", "o")}
    shapes |= {"mlp_norm": (width,)} if before else {}
    shapes |= {name: linear[name] for name in ("gate", "up", "down")}
    # A tuple times False is empty.
    biased = ("q", "k", "v") * a.query_key_value_bias + ("o",) * a.output_bias + ("gate", "up", "down") * a.mlp_bias
    shapes |= {f"{name}_bias": linear[name][:1] for name in biased}
    if a.query_key_norm != "none":
        whole = a.query_key_norm == "width"
        shapes |= {"q_norm": (queries if whole else a.head_dim,), "k_norm": (keys if whole else a.head_dim,)}
    return shapes | ({"post_attention_norm": (width,), "post_mlp_norm": (width,)} if after else {})


def _boxed(architecture: Architecture, key: jax.Array) -> dict[str, Any]:
    return _Weights(architecture).init_with_output(key)[0]


def init(key: jax.Array, architecture: Architecture, dtype=jnp.float32) -> dict[str, Any]:
    """Random weights; jit it with out_shardings.

    Args:
        key: a key of jax.random.
        dtype: of the weights; they are drawn in float32.
    Returns: linear weights and embeddings normal with standard deviation hidden_size**-0.5, biases 0, norms of gain 1.
    """
    # unbox: the axis names have done their work in `logical_axes`; outside of this file weights are plain arrays.
    return jax.tree.map(lambda leaf: leaf.astype(dtype), nn.unbox(_boxed(architecture, key)))


def abstract(architecture: Architecture, dtype=jnp.float32) -> dict[str, Any]:
    """Shapes and dtypes of the weights, as a tree of jax.ShapeDtypeStruct; nothing is allocated.

    Args:
        architecture: of the model.
        dtype: of the weights.
    """
    # Traced, not run: the weights of a model that fits no device have shapes too.
    return jax.eval_shape(lambda: init(jax.random.key(0), architecture, dtype))


def logical_axes(architecture: Architecture) -> dict[str, Any]:
    """A tuple of logical axis names for each weight, in the tree of `abstract`; kd_jax.parallel.mesh reads them."""
    boxed = jax.eval_shape(lambda: _boxed(architecture, jax.random.key(0)))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def unstack(params: dict[str, Any], *, delete: bool = False) -> dict[str, Any]:
    """The same weights with a tuple of layers instead of a stack; a copy, so that no step of decoding copies any.

    Args:
        params: in the tree of `abstract`; unstacked ones are returned as they are.
        delete: whether to delete each stack once it is copied, so that memory holds the weights once. `params` cannot
            be used afterwards.
    """
    stacks = params["layers"]
    if isinstance(stacks, tuple):
        return params
    # by number: an array on the devices of several processes cannot be iterated over
    layers = [{} for _ in range(len(next(iter(stacks.values()))))]
    for name, stack in stacks.items():
        for i, layer in enumerate(layers):
            layer[name] = stack[i]
        if delete:
            jax.block_until_ready(layers)
            stack.delete()
    return {**params, "layers": tuple(layers)}
