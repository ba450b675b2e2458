"""GGUF files: weights, quantised or not, and the tokenizer inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.model.rotary import Scaling, frequencies
from kd_jax.lm.weights import families, gguf_reader
from kd_jax.lm.weights import tensors as tensors_lib
from kd_jax.lm.weights.gguf_reader import GGUF
from kd_jax.lm.weights.hf_files import Stored
from kd_jax.lm.weights.tokenizer import Tokenizer

EMBEDDING, ROPE_FACTORS = "token_embd.weight", "rope_freqs.weight"
# GGUF's name of a family (Mistral has Llama's) -> model_type in a config.json.
MODEL_TYPES = {
    name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "smollm3", "olmo2", "granite")
} | {"gemma3": "gemma3_text"}  # fmt: skip
# Families whose rotary pairs lie side by side in a GGUF file; see stored_rows.
INTERLEAVED = ("llama", "smollm3", "granite")

# config.json's key -> GGUF's, without the name of the family.
_KEYS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length", "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa", "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
           "max_position_embeddings")  # fmt: skip
# Models whose scores are scaled by the width of a head in the residual stream: Gemma 2 27B and Gemma 3 27B.
_WIDE = {("gemma2", 46), ("gemma3", 62)}


def open_file(path: Path) -> Stored:
    """Opens a GGUF file. Weights are dequantised as they are read, to float32.

    Raises: ValueError, naming the file and the key or tensor, where it is damaged or describes something other than
        a model of a known family. Where only the tokenizer is not supported there is a warning, and the model has none.
    """
    file = gguf_reader.read(path)
    try:
        architecture = _architecture(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    wanted = tensors_lib.listed(architecture, tensors_lib.gguf(architecture))
    places = tensors_lib.places(wanted, architecture)
    interleaved = architecture.family in INTERLEAVED

    def read(weight, layer, index):
        name, first = places[weight, layer]
        tensor, rows = file.tensors[name], np.arange(index[0].start, index[0].stop) + first
        if interleaved and weight.removesuffix("_bias") in ("q", "k"):
            rows = stored_rows(rows, architecture.head_dim)
        try:
            if len(tensor.shape) > 1:
                # A row is made of whole quantised blocks, so rows are dequantised alone; columns are cut afterwards.
                return dequantize(tensor.data[rows], tensor.kind)[:, *index[1:]]
            values = dequantize(tensor.data, tensor.kind)[rows]
        except NotImplementedError as error:
            raise ValueError(f"{path}: {name} is stored as {tensor.kind.name}, which gguf cannot read") from error
        # GGUF stores Gemma's gains with the 1 added, our weights (like Hugging Face's) without it.
        return values - 1 if architecture.unit_offset_gain and weight.endswith("norm") else values

    ids = _special_ids(file, architecture.vocab_size)
    try:
        tokens = _tokenizer(file)
    except ValueError as error:
        # Weights without a tokenizer are useful too: the data are token ids.
        warnings.warn(f"{path}: the weights are loaded without the tokenizer: {error}", stacklevel=2)
        tokens = None
    return Stored(Model(architecture, {}, *ids, tokens), shapes, wanted, read)


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

    Args:
        rows: numbers of rows, in our order.
        head_dim: dimensions of a head.
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return rows // head_dim * head_dim + within[rows % head_dim]


def _architecture(file: GGUF) -> Architecture:
    """The architecture by the file's metadata, whose keys are renamed to those of a config.json."""
    get, tensors = file.metadata.get, file.tensors
    if EMBEDDING not in tensors:
        raise ValueError(f"the file lacks {EMBEDDING}")
    family = get("general.architecture")
    if family not in MODEL_TYPES:
        raise ValueError(f"general.architecture is {family!r}; known are {', '.join(MODEL_TYPES)}")
    if get("split.count", 1) > 1:
        raise ValueError(f"split.count is {get('split.count')}; join the parts with llama-gguf-split")
    if f"{family}.rope.freq_base" not in file.metadata:
        warnings.warn(f"{file.path} has no {family}.rope.freq_base; its family's default is taken", stacklevel=2)
    config = {"model_type": MODEL_TYPES[family], "vocab_size": tensors[EMBEDDING].shape[0]}
    for key, name in _KEYS.items():
        value = get(f"{family}.{name}")
        if isinstance(value, list) or (value is None and key in _NEEDED):
            raise ValueError(f"{family}.{name} is {value}; it has to be one number")
        if value is not None:
            config[key] = _decimal(value) if isinstance(value, float) else value
    if config.get("sliding_window") == 0:  # how llama.cpp's converter writes that a Phi has none
        del config["sliding_window"]
    if family == "olmo2" and "sliding_window" in config:
        raise ValueError("olmo2.attention.sliding_window: this is OLMo 3, which is not among the families that load")
    head_dim = config.setdefault("head_dim", config["hidden_size"] // max(1, config["num_attention_heads"]))
    rotated = get(f"{family}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if family.startswith("gemma"):
        wide = (family, config["num_hidden_layers"]) in _WIDE
        heads = config["num_attention_heads"]
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if wide else head_dim
    # A file without an output matrix uses the embedding for it.
    config["tie_word_embeddings"] = "output.weight" not in tensors
    # a family whose layers never have biases, or windows, has no key for them
    config |= {"attention_bias": "blk.0.attn_output.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}
    known = families.FAMILIES[config["model_type"]]
    for key in {"attention_bias", "mlp_bias", "sliding_window"}.difference(known.keys, known.other_keys):
        config.pop(key, None)
    # Llama 3's scaling is stored as a tensor that the frequencies are divided by; ones scale nothing.
    factors = tensors.get(ROPE_FACTORS)
    factors = None if factors is None else dequantize(factors.data, factors.kind)
    config["rope_scaling"] = _scaling(get, family, config, factors)
    return families.read(config)


def _scaling(get, family, config, factors) -> dict[str, Any] | None:
    """The object rope_scaling of a config.json."""
    # Older files give a linear factor without a type.
    kind = get(f"{family}.rope.scaling.type", "none")
    factor = _decimal(get(f"{family}.rope.scaling.factor", get(f"{family}.rope.scale_linear", 1.0)))
    if kind == "none" and factor != 1:
        kind = "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{family}.rope.scaling.type is {kind!r}; known are none, linear and yarn")
    if factors is not None and not np.all(factors == 1):
        return _llama3(config, factors)
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = get(f"{family}.rope.scaling.original_context_length")
        scaling |= {"original_max_position_embeddings": original} if original else {}
    return scaling


def _llama3(config, factors) -> dict[str, Any]:
    """Llama 3's scaling from its factors alone: only their largest differs between the published models."""
    # The slowest pair is divided by the whole factor, so the largest divisor is the factor.
    scaling = Scaling("llama3", round(float(factors.max()), 3), 8192)
    plain = frequencies(config["rope_theta"], 2 * len(factors))
    scaled = frequencies(config["rope_theta"], 2 * len(factors), scaling)
    if not np.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
        raise ValueError(f"{ROPE_FACTORS} scales the rotary embedding otherwise than Llama 3 does")
    keys = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {key: getattr(scaling, key) for key in keys}


def _special_ids(file: GGUF, vocab_size: int) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id); what ends a turn of a chat ends a sequence too."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "bos", "padding")}
    for name, i in ids.items():
        # Checked here: an id beyond the vocabulary would never be drawn, and no sample would end.
        if i is not None and not 0 <= i < vocab_size:
            raise ValueError(f"{file.path}: {name}_token_id is {i}, not among the ids 0 to {vocab_size - 1}")
    # In order and each once: eos and eot may be one id.
    eos = dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None)
    return tuple(eos), ids["bos"], ids["padding"]


def _tokenizer(file: GGUF) -> Tokenizer | None:
    return Tokenizer.from_gguf(file) if "tokenizer.ggml.model" in file.metadata else None


def _decimal(value: float) -> float:
    """The shortest decimal that has this float32, which is what was meant: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
