"""GGUF files: weights, quantised or not, and the tokenizer inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.weights import gguf_reader
from kd_jax.lm.weights.gguf_reader import GGUF
from kd_jax.lm.weights.hf_files import Stored
from kd_jax.lm.weights.tokenizer import Tokenizer

OUTSIDE = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
LAYER = {
    "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"


def tensor_name(weight: str, layer: int | None) -> str:
    """The name of a weight in a GGUF file."""
    return OUTSIDE[weight] if layer is None else f"blk.{layer}.{LAYER[weight]}.weight"


def open_file(path: Path) -> Stored:
    """Opens a GGUF file. Weights are dequantised as they are read, to float32.

    Raises: ValueError, naming the file and the key or tensor, where it is damaged or describes something other than
        this Llama. Where only the tokenizer is not supported there is a warning, and the model has none.
    """
    file = gguf_reader.read(path)
    try:
        architecture = _architecture(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    _check_rope_factors(file)
    # no weight: frequencies follow from the base
    shapes.pop(_ROPE_FACTORS, None)

    def read(weight, layer, index):
        tensor = file.tensors[tensor_name(weight, layer)]
        # quantised blocks lie within a row, so that rows can be read in any order and columns only after dequantising
        rows = index[0]
        if weight in ("q", "k"):
            rows = stored_rows(np.arange(rows.start, rows.stop), architecture.head_dim)
        try:
            if len(index) == 1:
                return dequantize(tensor.data, tensor.kind)[rows]
            return dequantize(tensor.data[rows], tensor.kind)[:, *index[1:]]
        except NotImplementedError as error:
            name = tensor_name(weight, layer)
            raise ValueError(f"{path}: {name} is stored as {tensor.kind.name}, which gguf cannot read") from error

    ids = _special_ids(file, architecture.vocab_size)
    try:
        tokens = _tokenizer(file)
    except ValueError as error:
        warnings.warn(f"{path}: the weights are loaded without the tokenizer: {error}", stacklevel=2)
        tokens = None
    return Stored(Model(architecture, {}, *ids, tokens), shapes, tensor_name, read)


def tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer inside a GGUF file; None where there is none.

    Raises: ValueError, naming the file, where it is not supported.
    """
    file = gguf_reader.read(path)
    try:
        return _tokenizer(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def stored_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where a GGUF file has these rows of a query or key weight.

    It pairs neighbours in the rotary embedding, and Hugging Face's layout, which is ours, the two halves of a head:
    writers turn each head's rows from [2, head_dim / 2] into [head_dim / 2, 2].
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return rows // head_dim * head_dim + within[rows % head_dim]


def _architecture(file: GGUF) -> Architecture:
    """The architecture by the file's metadata, whose keys begin with the family's name."""
    family = file.metadata.get("general.architecture")
    if family != "llama":
        raise ValueError(f"general.architecture is {family!r}; only 'llama' is known")
    if OUTSIDE["embedding"] not in file.tensors:
        raise ValueError(f"the file lacks {OUTSIDE['embedding']}")

    def value(key: str, default: Any = None) -> int | float:
        number = file.metadata.get(f"{family}.{key}", default)
        if not isinstance(number, int | float):
            raise ValueError(f"it lacks {family}.{key}" if number is None else f"{family}.{key} is {number}")
        return number

    # a model with another value would load, and then compute something else
    known = {f"{family}.rope.scaling.type": "none", f"{family}.rope.scale_linear": 1, f"{family}.expert_count": 0}
    for key, only in known.items():
        if file.metadata.get(key, only) != only:
            raise ValueError(f"{key} is {file.metadata[key]!r}; only {only!r} is supported")
    if file.metadata.get("split.count", 1) > 1:
        raise ValueError(f"split.count is {file.metadata['split.count']}; join the parts with llama-gguf-split")
    if f"{family}.rope.freq_base" not in file.metadata:
        warnings.warn(f"{file.path} has no {family}.rope.freq_base; 10000 is taken", stacklevel=2)
    width, heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", width // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{family}.rope.dimension_count is not {head_dim}, the dimensions of a head")
    return Architecture(
        vocab_size=value("vocab_size", file.tensors[OUTSIDE["embedding"]].shape[0]),
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=_decimal(value("rope.freq_base", 10000.0)),
        rms_norm_eps=_decimal(value("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=value("context_length"),
        tie_word_embeddings=OUTSIDE["head"] not in file.tensors,
    )


def _check_rope_factors(file: GGUF) -> None:
    """Factors that divide the rotary frequencies, one for each pair of dimensions, have to be ones.

    Writers put Llama 3's scaled frequencies there, and ones where a model has none.
    """
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is not None and not np.all(dequantize(factors.data, factors.kind) == 1):
        raise ValueError(f"{file.path}: {_ROPE_FACTORS} scales the rotary embedding, which is not supported here")


def _special_ids(file: GGUF, vocab_size: int) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id); what ends a turn of a chat ends a sequence too."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "bos", "padding")}
    for name, i in ids.items():
        if i is not None and not 0 <= i < vocab_size:
            raise ValueError(f"{file.path}: {name}_token_id is {i}, not among the ids 0 to {vocab_size - 1}")
    eos = dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None)
    return tuple(eos), ids["bos"], ids["padding"]


def _tokenizer(file: GGUF) -> Tokenizer | None:
    return Tokenizer.from_gguf(file) if "tokenizer.ggml.model" in file.metadata else None


def _decimal(value: float) -> float:
    """The shortest decimal that has this float32, which is what was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
