"""GGUF files of families beside Llama, named by the gguf package: load, export and load again are the same model."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from tests.golden import families
from tests.lm.weights.checkpoints import write_gguf

# From a config.json's key to GGUF's, without the family's name: what llama.cpp's converter writes for all families.
KEYS = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
# A family's name in GGUF, and models of tests.golden.families whose settings a GGUF file can say.
NAMES = {
    "qwen 2.5": "qwen2", "qwen 3": "qwen3", "gemma 2": "gemma2", "gemma 3": "gemma3", "phi 3": "phi3",
    "olmo 2": "olmo2", "granite 3": "granite",
}  # fmt: skip
INTERLEAVED = ("granite",)
# Families that have windows in no GGUF file.
NO_WINDOW = ("qwen2", "qwen3")


def side_by_side(rows, head_dim):
    """Query or key rows with the two of a rotary pair side by side, as llama.cpp's converter writes them."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write(name, path, **more):
    """The model of tests.golden.families of that name as a GGUF file, with `more` keys of its family."""
    family, config = NAMES[name], families.described()[name]["config"]
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    keys = {
        f"{family}.{to}": config[key]
        for key, to in KEYS.items()
        if config.get(key) is not None and not (key == "sliding_window" and family in NO_WINDOW)
    }
    keys |= {f"{family}.attention.key_length": head_dim, f"{family}.rope.dimension_count": head_dim}
    if family == "gemma3":
        rope = config["rope_parameters"]
        keys[f"{family}.rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        theta = rope["full_attention"]["rope_theta"]
    keys |= {f"{family}.rope.freq_base": float(theta), "general.architecture": family}
    keys |= {f"{family}.{key}": value for key, value in more.items()}
    llama = (*KEYS.values(), "vocab_size", "attention.key_length", "rope.dimension_count", "rope.freq_base")
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == family)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors = {}
    for key, value in families.tensors(name, families.shapes_of(name)).items():
        if family.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1  # the gain itself
        if family in INTERLEAVED and key.rsplit(".", 2)[1] in ("q_proj", "k_proj"):
            value = side_by_side(value, head_dim)
        tensors[names.get_name(key, try_suffixes=(".weight", ".bias"))] = value
    return write_gguf(
        path, tensors, **{f"llama.{key}": None for key in llama}, **keys,
        **{"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gguf_is_the_model_and_exports_to_it(name, tmp_path):
    wanted = weights.load(families.write_folder(name, tmp_path / "hf"))
    loaded = weights.load(write(name, tmp_path / "m.gguf"))
    same = wanted.architecture
    if NAMES[name].startswith("gemma"):  # a GGUF file has no query_pre_attn_scalar
        same = dataclasses.replace(same, attention_scale=same.head_dim**-0.5)
    assert loaded.architecture == same and loaded.eos_ids == (2,)
    # a gain of 1 + w in float32 loses a digit of w
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-7), loaded.params, wanted.params)
    weights.export(loaded, tmp_path / "out")
    again = weights.load(tmp_path / "out")
    assert again.architecture == loaded.architecture
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_a_window_of_0_is_none(tmp_path):
    """llama.cpp's converter writes it for each Phi without a window, such as Phi-4."""
    path = write("phi 3", tmp_path / "m.gguf", **{"attention.sliding_window": 0})
    assert {kind.window for kind in weights.load(path).architecture.layer_kinds} == {None}


def test_olmo_3_is_refused(tmp_path):
    """llama.cpp calls it olmo2, with windows."""
    path = write("olmo 2", tmp_path / "m.gguf", **{"attention.sliding_window": 64})
    with pytest.raises(ValueError, match="olmo2.attention.sliding_window: this is OLMo 3"):
        weights.load(path)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["qwen 2.5", "qwen 3", "gemma 2", "gemma 3"])
def test_transformers_reads_the_export_of_a_gguf_to_equal_logits(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded = weights.load(write(name, tmp_path / "m.gguf"))
    weights.export(loaded, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = families.sequences(name)[0][None]
    with torch.inference_mode():
        logits = theirs.eval()(torch.as_tensor(tokens)).logits.numpy()
    hidden = model_lib.forward(loaded.params, loaded.architecture, tokens)
    ours = model_lib.logits(loaded.params, loaded.architecture, hidden)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-5)
