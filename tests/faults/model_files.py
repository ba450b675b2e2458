"""Small models on disk, in every form they come in; how each is loaded and what a load of it has to give."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kd_jax.lm import weights
from kd_jax.lm.model import Architecture
from tests.faults import formats
from tests.lm.weights import checkpoints

# rows of 32 and 64, in blocks of 32 where they are quantised
TINY = Architecture(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, rope_theta=10000.0, max_position_embeddings=64,
)  # fmt: skip
TENSORS = checkpoints.tensors_of(TINY)


def flat(params):
    """The weights under the names of a Hugging Face checkpoint."""
    ours = {
        "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    outside = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    found = {outside[name]: np.asarray(leaf) for name, leaf in params.items() if name != "layers"}
    for name, leaf in params["layers"].items():
        for i, layer in enumerate(np.asarray(leaf)):
            found[f"model.layers.{i}.{ours[name]}.weight"] = layer
    return found


def same_arrays(found, wanted):
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def check_model(model, wanted):
    """The model's weights are these, and its other values are ones that a program can go on with."""
    same_arrays(flat(model.params), wanted)
    a = model.architecture
    sizes = [getattr(a, name) for name in list(Architecture.__dataclass_fields__)[:10] if name not in (
        "rope_theta", "rms_norm_eps")]  # fmt: skip
    assert all(type(size) is int and size > 0 for size in sizes), a
    assert all(type(value) is float and 0 < value < math.inf for value in (a.rope_theta, a.rms_norm_eps)), a
    assert type(a.tie_word_embeddings) is bool
    ids = [*model.eos_ids, *(i for i in (model.bos_id, model.pad_id) if i is not None)]
    assert all(type(i) is int and 0 <= i < a.vocab_size for i in ids), ids


def build_folder(folder):
    checkpoints.write_folder(folder, TENSORS, TINY, tie_word_embeddings=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}))


def build_half(folder):
    halves = {
        name: value.astype(jnp.bfloat16 if i % 2 else np.float16) for i, (name, value) in enumerate(TENSORS.items())
    }
    checkpoints.write_folder(folder, halves, TINY)


def build_shards(folder):
    checkpoints.write_shards(folder, TENSORS)
    build_config(folder)


def build_config(folder):
    config = json.dumps(checkpoints.config_of(TINY) | {"rope_parameters": {"rope_theta": 10000.0}})
    (folder / "config.json").write_text(config)


def check_folder(model, folder):
    check_model(model, formats.safetensors((folder / "model.safetensors").read_bytes()))


def check_shards(model, folder):
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: formats.safetensors((folder / name).read_bytes()) for name in set(where.values())}
    check_model(model, {name: files[file][name] for name, file in where.items()})


def build_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ab", "abc", "Ġa"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 64, "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}é")


def build_small_tokenizer(folder):
    """One whose lists are not most of its file."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 3)])
    backend.add_special_tokens(["<s>"])
    backend.enable_padding()
    backend.enable_truncation(8)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": None}))


def build_checkpoint(folder):
    build_folder(folder / "hf")
    build_small_tokenizer(folder / "hf")
    weights.save(weights.load(folder / "hf"), folder / "saved")
    shutil.rmtree(folder / "hf")


def check_checkpoint(model, folder):
    check_model(model, TENSORS)
