"""The tensors of a checkpoint, in Hugging Face's names and in GGUF's, and the weights that each is made of."""

from __future__ import annotations

from typing import NamedTuple

from kd_jax.lm import model as model_lib
from kd_jax.lm.model import Architecture


class Tensor(NamedTuple):
    """A tensor as a checkpoint stores it.

    Attributes:
        name: in the file.
        shape: as stored.
        parts: the weights that lie in it, one below the other: (weight, layer), where weight is a key of the params
            tree and layer is None outside of the layers. There are several in fused projections.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int | None], ...]


class Names(NamedTuple):
    """How a format names tensors.

    Attributes:
        outside: name of each weight outside of the layers.
        prefix: of the names in a layer, with {layer}.
        layer: name in a layer, without ".weight" or ".bias".
        fused: weights that are one tensor, by its name in a layer.
    """

    outside: dict[str, str]
    prefix: str
    layer: dict[str, str]
    fused: dict[str, tuple[str, ...]]


_HF = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
# Llama calls the norm before the MLP the one after the attention, which it is not where there is such a norm too.
_HF_BEFORE = {"mlp_norm": "post_attention_layernorm"}
_HF_AFTER = {
    "post_attention_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GGUF = {
    "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "post_attention_norm": "post_attention_norm", "post_mlp_norm": "post_ffw_norm",
}  # fmt: skip
# Phi-3 stores these as one tensor, one below the other, in this order.
_FUSED = ("q", "k", "v"), ("gate", "up")


def hugging_face(architecture: Architecture) -> Names:
    """The names in safetensors files, as transformers has them."""
    outside = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    layer = _HF | (_HF_BEFORE if architecture.norm_order == "before" else _HF_AFTER)
    names = ("self_attn.qkv_proj", "mlp.gate_up_proj") if architecture.family == "phi3" else ()
    return Names(outside, "model.layers.{layer}.", layer, dict(zip(names, _FUSED, strict=False)))


def gguf(architecture: Architecture) -> Names:
    """The names in GGUF files."""
    outside = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    names = ("attn_qkv", "ffn_up") if architecture.family == "phi3" else ()
    return Names(outside, "blk.{layer}.", _GGUF, dict(zip(names, _FUSED, strict=False)))


def listed(architecture: Architecture, names: Names) -> list[Tensor]:
    """All tensors of a checkpoint of this architecture, in order.

    Args:
        architecture: of the model.
        names: of the format.
    """
    tree = model_lib.abstract(architecture)
    layers = tree.pop("layers")
    tensors = [Tensor(names.outside[weight], leaf.shape, ((weight, None),)) for weight, leaf in tree.items()]
    # A fused tensor is listed in the place of its first weight.
    fused = {weights[0]: (name, weights) for name, weights in names.fused.items()}
    later = {weight for weights in names.fused.values() for weight in weights[1:]}
    # layer by layer, so that the shards of an export hold whole layers
    for layer in range(architecture.num_hidden_layers):
        prefix = names.prefix.format(layer=layer)
        # By name, so that exports of equal models are equal files.
        for weight in sorted(layers.keys() - later):
            base = weight.removesuffix("_bias")
            name, parts = fused.get(weight, (names.layer[base], (weight,)))
            rows = sum(layers[part].shape[1] for part in parts)
            tensors.append(
                Tensor(
                    f"{prefix}{name}.{'weight' if base == weight else 'bias'}",
                    (rows, *layers[weight].shape[2:]),
                    tuple((part, layer) for part in parts),
                )
            )
    return tensors


def places(tensors: list[Tensor], architecture: Architecture) -> dict[tuple[str, int | None], tuple[str, int]]:
    """(weight, layer) -> the tensor it lies in, and its first row there.

    Args:
        tensors: as `listed` gives them.
        architecture: of the model.
    """
    layers = model_lib.abstract(architecture)["layers"]
    found = {}
    for tensor in tensors:
        row = 0
        for part in tensor.parts:
            found[part] = tensor.name, row
            # Outside of the layers, a tensor is one weight.
            row += 0 if part[1] is None else layers[part[0]].shape[1]
    return found
