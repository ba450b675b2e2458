"""Tiny checkpoints of random weights, written as others write them, and what is asked of them once they are loaded."""

import json
import os
import subprocess
import sys
import textwrap

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from gguf.quants import quantize
from safetensors.numpy import save_file

from kd_jax.lm.model import PRESETS, Architecture

TINY = PRESETS["tiny"]
# rows of 64, 96 and 64: multiples of the 32 that a quantised block has
BLOCKS = Architecture(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rope_theta=100000.0, max_position_embeddings=128,
)  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tensors_of(a, dtype=np.float32, seed=0):
    """Random weights under the names of a Hugging Face checkpoint; no head."""
    random = np.random.RandomState(seed)
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    shapes = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size), "model.norm.weight": (a.hidden_size,)}
    for i in range(a.num_hidden_layers):
        for name, shape in {
            "input_layernorm": (a.hidden_size,),
            "self_attn.q_proj": (queries, a.hidden_size),
            "self_attn.k_proj": (keys, a.hidden_size),
            "self_attn.v_proj": (keys, a.hidden_size),
            "self_attn.o_proj": (a.hidden_size, queries),
            "post_attention_layernorm": (a.hidden_size,),
            "mlp.gate_proj": (a.intermediate_size, a.hidden_size),
            "mlp.up_proj": (a.intermediate_size, a.hidden_size),
            "mlp.down_proj": (a.hidden_size, a.intermediate_size),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def config_of(a):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size, "intermediate_size": a.intermediate_size, "hidden_act": "silu",
        "num_hidden_layers": a.num_hidden_layers, "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads, "head_dim": a.head_dim, "rope_theta": a.rope_theta,
        "rms_norm_eps": 1e-5, "max_position_embeddings": a.max_position_embeddings, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def write_folder(folder, tensors=None, architecture=TINY, **changes):
    """A Hugging Face folder; a change to `...` leaves the key out of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config_of(architecture), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file(tensors_of(architecture) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def assert_params(params, tensors, dtype=jnp.float32):
    """Each weight in `params` is the tensor of that name, cast to `dtype`, and there are no others."""
    ours = {
        "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    seen = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    if "head" in params:
        seen["lm_head.weight"] = params["head"]
    assert set(params) - {"head"} == {"embedding", "norm", "layers"} and set(params["layers"]) == set(ours)
    for key, name in ours.items():
        for i, layer in enumerate(params["layers"][key]):
            seen[f"model.layers.{i}.{name}.weight"] = layer
    assert set(seen) == set(tensors)
    for name, leaf in seen.items():
        assert leaf.dtype == dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), tensors[name].astype(dtype), err_msg=name)


def run_python(script, *arguments, **env):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_shards(folder, tensors):
    """Two shards with an index, dealt out in turn."""
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names, where


def write_tokenizer(folder, tokens):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(tokens)}, "t0"))
    backend.save(str(folder / "tokenizer.json"))


def gguf_tensors(tensors, architecture):
    """As a GGUF file names and orders them: row 2j + h of a query or key head is our row h * head_dim / 2 + j."""
    half, out = architecture.head_dim // 2, {}
    for name, value in tensors.items():
        if ".layers." in name:
            _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
            new = f"blk.{layer}.{GGUF_NAMES[kind]}.weight"
        else:
            outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            new = outside[name.removesuffix(".weight")] + ".weight"
        if "q_proj" in name or "k_proj" in name:
            rows = np.empty_like(value)
            for start in range(0, len(value), 2 * half):
                for h in range(2):
                    for j in range(half):
                        rows[start + 2 * j + h] = value[start + h * half + j]
            value = rows
        out[new] = value
    return out


def write_gguf(path, tensors, architecture=BLOCKS, kind="F32", **changes):
    """A GGUF file; matrices quantised as `kind` unless they are bytes already. A change to None leaves a key out."""
    a = architecture
    keys = {
        "llama.vocab_size": a.vocab_size, "llama.context_length": a.max_position_embeddings,
        "llama.embedding_length": a.hidden_size, "llama.block_count": a.num_hidden_layers,
        "llama.feed_forward_length": a.intermediate_size, "llama.attention.head_count": a.num_attention_heads,
        "llama.attention.head_count_kv": a.num_key_value_heads, "llama.attention.key_length": a.head_dim,
        "llama.rope.dimension_count": a.head_dim, "llama.rope.freq_base": a.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1, **changes,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, value in tensors.items():
        type_ = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        data = value if value.dtype == np.uint8 else quantize(value, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
