import json
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from transformers import AutoConfig

from kd_jax.lm import decode, score, weights
from kd_jax.lm.corpus import compatibility
from kd_jax.lm.model import Architecture
from kd_jax.lm.weights import families
from tests.lm.weights.checkpoints import (
    TINY,
    assert_params,
    config_of,
    gguf_tensors,
    tensors_of,
    write_folder,
    write_gguf,
    write_shards,
    write_tokenizer,
)


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
    assert_params(weights.load(write_folder(tmp_path, other, tie_word_embeddings=...)).params, other)
    with pytest.raises(ValueError, match="absent, which means false"):
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
    with pytest.warns(UserWarning, match="neither rope_theta nor rope_parameters.*default"):
        assert weights.load(write_folder(tmp_path, rope_theta=...)).architecture.rope_theta == 10000.0
    assert theta(rope_parameters=nested) == 100000.0
    for changes, message in (
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"config\.json: config\.json lacks factor"),
        ({"rope_scaling": [2.0]}, r"rope_scaling=\[2.0\] has to be an object"),
        ({"rope_parameters": {"full_attention": nested}}, "rope_parameters lacks sliding_attention"),
        ({"rope_parameters": {"rope_type": "default", "mscale": 0.5}}, "mscale=0.5 is not understood"),
    ):
        with pytest.raises(ValueError, match=message):
            theta(**changes)


LINEAR, LLAMA3 = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)  # fmt: skip
FULL, LOCAL = {"rope_type": "default", "rope_theta": 2e6}, {"rope_type": "default", "rope_theta": 2e4}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        {"rope_scaling": LINEAR | {"rope_theta": 4e4}, "rope_parameters": LLAMA3, "rope_theta": 5e4},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LLAMA3, "rope_theta": 5e4},
        {"rope_scaling": {}, "rope_parameters": LLAMA3 | {"rope_theta": 3e4}},
        {"rope_scaling": LINEAR, "rope_theta": 5e4, "model_type": "gemma3_text"},
        {
            "rope_scaling": LINEAR, "rope_theta": 5e4, "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL},
        },
        {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}},
            "rope_theta": 5e4, "rope_local_base_freq": 6e3, "model_type": "gemma3_text",
        },
    ],
)  # fmt: skip
def test_rotary_settings_in_two_places_are_read_as_transformers_reads_them(tmp_path, changes):
    config = {**config_of(TINY), "rope_theta": ..., "architectures": None, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, ours = AutoConfig.from_pretrained(tmp_path).rope_parameters, families.read(config)
    theirs, local = theirs.get("full_attention", theirs), theirs.get("sliding_attention", {})
    assert (ours.rope_theta, ours.local_rope_theta) == (theirs["rope_theta"], local.get("rope_theta"))
    scaling = {} if ours.rope_scaling is None else vars(ours.rope_scaling)
    assert scaling.get("rope_type", "default") == theirs["rope_type"]
    names = {*theirs} - {"rope_theta", "rope_type", "type"}
    assert {name: scaling.get(name) for name in names} == {name: theirs[name] for name in names}


def test_what_a_config_may_leave_out(tmp_path):
    square = Architecture(**{**vars(TINY), "head_dim": 12, "num_key_value_heads": 4})
    tensors = tensors_of(square)
    folder = write_folder(tmp_path, tensors, square, head_dim=..., num_key_value_heads=..., hidden_act=...)
    model = weights.load(folder)
    assert model.architecture == square
    model = weights.load(write_folder(tmp_path, rms_norm_eps=..., max_position_embeddings=...))
    # transformers' LlamaConfig() has these
    assert (model.architecture.rms_norm_eps, model.architecture.max_position_embeddings) == (1e-6, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": "mistral"}, r"architectures is \['LlamaForCausalLM'\]; only MistralForCausalLM"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"mlp_bias": True}, r"lacks model\.layers\.0\.mlp\.down_proj\.bias"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config, .* dequantise and save again"),
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
    assert ids({"eos_token_id": 0, "bos_token_id": -1, "pad_token_id": -1}) == ((0,), None, None)
    assert ids({"eos_token_id": None}, eos_token_id=[3, 4]) == ((3, 4), 1, 2)
    assert ids(eos_token_id=..., bos_token_id=None, pad_token_id=...) == ((), None, None)


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
    with pytest.raises(ValueError, match="names files that are not in its folder"):
        weights.load(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    whole = (tmp_path / second).read_bytes()
    (tmp_path / second).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{second} \({len(whole) - 100} bytes\) is cut short or damaged"):
        weights.load(tmp_path)
    (tmp_path / second).unlink()
    names_it = f"{second} is missing; model.safetensors.index.json names it"
    with pytest.raises(FileNotFoundError, match=f"{names_it}; remove the index if model.safetensors is the model"):
        weights.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{names_it}$"):
        weights.load(tmp_path)
    for damaged in ({"weight_map": None}, {}, {"weight_map": {"model.norm.weight": 1}}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"index\.json: weight_map=.* has to give the file of each tensor"):
            weights.load(tmp_path)


def test_index_that_is_left_from_before(tmp_path):
    """As where transformers saves a model a second time, in one file."""
    tensors, again = tensors_of(TINY), tensors_of(TINY, seed=1)
    names, _ = write_shards(tmp_path, tensors)
    for name in names:
        (tmp_path / name).unlink()
    save_file(again, tmp_path / "model.safetensors")
    assert_params(weights.load(tmp_path).params, again)
    identity = weights.identity(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weights.identity(tmp_path) == identity


def test_adapters_and_runs_are_no_models(tmp_path):
    beside, alone, run = (tmp_path / name for name in ("beside", "alone", "run"))
    write_folder(beside)
    for folder in (alone, run):
        folder.mkdir()
    for folder in (beside, alone):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        for read in (weights.load, weights.describe, weights.identity):
            with pytest.raises(ValueError, match=rf"{folder.name} holds a PEFT adapter .*merge_and_unload"):
                read(folder)
    (run / "config.json").write_text('{"experiment": "lm", "seed": 0}')
    with pytest.raises(ValueError, match=r"run is the folder of a run, not a model: .* lie in .*run/stages"):
        weights.load(run)
    # adapters in a folder of their own, as beside a training's model, are no obstacle
    (beside / "adapter_config.json").unlink()
    (beside / "adapter").mkdir()
    (beside / "adapter" / "adapter_config.json").write_text("{}")
    assert weights.load(beside).architecture == TINY


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
    path.write_bytes(whole + bytes(64))
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is cut short or damaged"):
        weights.load(tmp_path)
    save_file(tensors, path, metadata={})
    assert_params(weights.load(tmp_path).params, tensors)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    assert_params(weights.load(write_folder(tmp_path, {**tensors, **table})).params, tensors)


def test_tokenizer_comes_along(tmp_path):
    write_tokenizer(write_folder(tmp_path), 300)
    model = weights.load(tmp_path)
    assert model.tokenizer.vocab_size == model.num_tokens == 300
    # the model's last 20 ids are padding
    write_folder(tmp_path, eos_token_id=[2, 300])
    with pytest.raises(ValueError, match="eos_token_id has 300, but the tokenizer's ids end at 299"):
        weights.load(tmp_path)
    write_folder(tmp_path, eos_token_id=299)
    assert weights.load(tmp_path).eos_ids == (299,)
    write_tokenizer(tmp_path, 321)
    with pytest.raises(ValueError, match="321 ids, but the model only 320"):
        weights.load(tmp_path)


def test_added_tokens_may_lie_beyond_the_model(tmp_path):
    """As Gemma 3's <image_soft_token> does in its text models, or [PAD] where the model was not resized for it."""
    folder = write_folder(tmp_path / "model")
    write_tokenizer(folder, 320)
    plain = weights.load(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<image>"])
    backend.save(str(folder / "tokenizer.json"))
    model = weights.load(folder)
    assert (model.tokenizer.vocab_size, model.num_tokens) == (321, 320)
    assert model.tokenizer.encode("t5 <image>") == [5, 320]
    with pytest.raises(ValueError, match="prompt 0 has id 320; the model's ids are 0 to 319"):
        decode.generate(model, "t5 <image>", 1, max_length=8)
    with pytest.raises(ValueError, match="row 0 has id 320 at position 1; the model's are 0 to 319"):
        score.log_prob(model, np.array([[5, 320]]), np.array([2]))
    with pytest.raises(ValueError, match="the text has id 320 .'<image>'.; the model's are 0 to 319"):
        compatibility.check_ids("the text", [np.array([5]), np.array([320, 5])], model)
    # the same vocabulary as itself, and the same logits as without the token
    assert compatibility.other_vocabulary("one", model, "other", weights.load(folder)) is None
    rows = np.array([[5, 7, 9]]), np.array([3])
    np.testing.assert_array_equal(*(score.log_prob(one, *rows)[0] for one in (plain, model)))
    weights.export(model, tmp_path / "exported")
    again = weights.load(tmp_path / "exported")
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint and again.architecture == TINY
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "exported/tokenizer.json"))
    assert written.get_vocab(with_added_tokens=True) == backend.get_vocab(with_added_tokens=True)
