"""GGUF files: weights, quantised or not, and the tokenizer inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.weights.gguf_reader import Reader
from kd_jax.lm.weights.hf_files import Stored
from kd_jax.lm.weights.tokenizer import Tokenizer

OUTSIDE = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
LAYER = {
    "attention_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
# Q5 because K-quants fall back to it where a row is not a multiple of 256, as in the smaller models.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def tensor_name(weight: str, layer: int | None) -> str:
    """The name of a weight in a GGUF file."""
    return OUTSIDE[weight] if layer is None else f"blk.{layer}.{LAYER[weight]}.weight"


def open_file(path: Path) -> Stored:
    """Opens a GGUF file. Weights are dequantised as they are read, to float32.

    Raises ValueError, naming the file and the key or tensor, where it is damaged or describes something other than
    this Llama. Where only the tokenizer is not supported, there is a warning, and none in the model.
    """
    reader = Reader(path)
    tensors = reader.tensors
    for name, tensor in tensors.items():
        if tensor.kind.name not in TYPES:
            raise ValueError(f"{path}: {name} is stored as {tensor.kind.name}; known are {', '.join(TYPES)}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    architecture = _architecture(reader, shapes, path)

    def read(weight, layer, index):
        tensor = tensors[tensor_name(weight, layer)]
        rows = index[0]
        if weight in ("q", "k"):
            rows = stored_rows(np.arange(rows.start, rows.stop), architecture.head_dim)
        if len(index) == 1:
            return dequantize(tensor.data, tensor.kind)[rows]
        return dequantize(tensor.data[rows], tensor.kind)[:, *index[1:]]

    ids = _special_ids(reader, path, architecture.vocab_size)
    try:
        tokens = _tokenizer(reader)
    except ValueError as error:
        warnings.warn(f"{path}: the weights are loaded without the tokenizer: {error}", stacklevel=2)
        tokens = None
    return Stored(Model(architecture, {}, *ids, tokens), shapes, tensor_name, read)


def tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer inside a GGUF file, of which only the metadata is read; None where there is none.

    Raises ValueError, naming the file, where that is damaged or the tokenizer is not supported.
    """
    reader = Reader(path)
    try:
        return _tokenizer(reader)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def stored_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where a GGUF file has these rows of a query or key weight.

    It pairs neighbours in the rotary embedding, and Hugging Face's layout, which is ours, the two halves of a head:
    writers turn each head's rows from [2, head_dim / 2] into [head_dim / 2, 2].
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return rows // head_dim * head_dim + within[rows % head_dim]


def _architecture(reader: Reader, shapes: dict[str, tuple[int, ...]], path: Path) -> Architecture:
    _refuse_other_models(reader, shapes, path)

    def value(key: str, default: Any = None):
        found = reader.get(f"llama.{key}", default)
        if found is None:
            raise ValueError(f"{path} lacks llama.{key}")
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ValueError(f"{path}: llama.{key} is {found!r}; it has to be a number")
        return found

    if len(shapes.get(OUTSIDE["embedding"], ())) != 2:
        raise ValueError(f"{path} lacks {OUTSIDE['embedding']}, or it is no matrix")
    vocab_size = shapes[OUTSIDE["embedding"]][0]
    if value("vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"{path}: llama.vocab_size is {value('vocab_size')}, but the embedding has {vocab_size} rows")
    width, heads = value("embedding_length"), value("attention.head_count")
    if reader.get("llama.rope.freq_base") is None:
        warnings.warn(f"{path} has no llama.rope.freq_base; 10000 is taken", stacklevel=2)
    head_dim = value("attention.key_length", width // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if value(key, head_dim) != head_dim:
            raise ValueError(f"{path}: llama.{key} is {value(key)}, but a head has {head_dim} dimensions")
    try:
        return Architecture(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=value("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=_decimal(value("rope.freq_base", 10000.0)),
            rms_norm_eps=_decimal(value("attention.layer_norm_rms_epsilon")),
            max_position_embeddings=value("context_length"),
            tie_word_embeddings=OUTSIDE["head"] not in shapes,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def _refuse_other_models(reader: Reader, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """A model that would load, and then compute something else."""
    if reader.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: general.architecture is {reader.get('general.architecture')!r}; only 'llama' is known"
        )
    known = {
        "llama.rope.scaling.type": "none", "llama.rope.scale_linear": 1, "llama.expert_count": 0, "split.count": 1,
    }  # fmt: skip
    for key, only in known.items():
        found = reader.get(key, only)
        # a file that is not split may say 0 parts
        if found != only and not (key == "split.count" and found == 0):
            raise ValueError(f"{path}: {key} is {found!r}, which is not supported; it has to be {only!r} or absent")
    if "rope_freqs.weight" in shapes:
        raise ValueError(f"{path}: rope_freqs.weight means a scaled rotary embedding, which is not supported")


def _special_ids(reader: Reader, path: Path, vocab_size: int) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id); what ends a turn of a chat ends a sequence too."""
    ids = {}
    for name in ("eos", "eot", "bos", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        ids[name] = reader.get(key)
        found = ids[name]
        if found is not None and (type(found) is not int or not 0 <= found < vocab_size):
            raise ValueError(f"{path}: {key} is {found!r:.40}, not among the ids 0 to {vocab_size - 1}")
    eos = dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None)
    return tuple(eos), ids["bos"], ids["padding"]


def _tokenizer(reader: Reader) -> Tokenizer | None:
    return None if reader.get("tokenizer.ggml.model") is None else Tokenizer.from_gguf(reader)


def _decimal(value: float) -> float:
    """The shortest decimal that has this float32, which is what was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
