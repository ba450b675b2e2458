import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import transformers
from safetensors.numpy import load_file

from kd_jax.lm import weights
from kd_jax.lm.model import Architecture
from kd_jax.storage.errors import RunError
from tests.lm.weights.checkpoints import (
    TINY,
    assert_params,
    config_of,
    tensors_of,
    write_folder,
)


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


@pytest.mark.slow
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
        (
            {"architecture": {**about["architecture"], "vocab_size": 321}},
            "or not the weights of .*model.json: ",
        ),
        (
            {"architecture": {**about["architecture"], "tie_word_embeddings": False}},
            "or not the weights of .*model.json: ",
        ),
        ({"architecture": {**about["architecture"], "experts": 2}}, "is damaged.*experts"),
    ):
        (tmp_path / "ours" / "model.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(ValueError, match=message):
            weights.load(tmp_path / "ours")
    (tmp_path / "ours" / "model.json").write_text(json.dumps(about))
    shutil.rmtree(tmp_path / "ours" / "weights")
    with pytest.raises(FileNotFoundError, match="weights is missing"):
        weights.load(tmp_path / "ours")


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["folder", "own checkpoint"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_values_beyond_float16_are_an_error(tmp_path, stored):
    tensors = tensors_of(TINY)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000
    tensors["model.norm.weight"][0] = 65000
    source = write_folder(tmp_path / "source", tensors)
    if stored == "own checkpoint":
        weights.save(weights.load(source), tmp_path / "ours")
        source = tmp_path / "ours"
    with pytest.raises(ValueError, match=r"layers\.up has values beyond 65504, .* load it as bfloat16"):
        weights.load(source, dtype=jnp.float16)
    assert_params(weights.load(source, dtype=jnp.bfloat16).params, tensors, jnp.bfloat16)
    if stored == "folder":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1
        kept = weights.load(write_folder(source, tensors), dtype=jnp.float16).params
        assert_params(kept, tensors, jnp.float16)


def test_no_checkpoint_is_written_where_it_cannot_be_read_back(tmp_path, model):
    (tmp_path / "exp[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "exp[1]")
    for folder in (tmp_path / "exp[1]" / "model", tmp_path / "link" / "model"):
        with pytest.raises(RunError, match=r"cannot be read back from a path with \[ in it; choose another folder"):
            weights.save(model, folder)
    assert not list((tmp_path / "exp[1]").iterdir())


def test_flipped_bits_of_a_checkpoint_are_noticed(tmp_path, model):
    folder = tmp_path / "ours"
    weights.save(model, folder)
    about = json.loads((folder / "model.json").read_text())
    assert about["fingerprint"] == weights.fingerprint(model.params) and about["dtype"] == "float32"
    path = max((folder / "weights").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    whole, messages = path.read_bytes(), []
    for place in range(len(whole) // 12, len(whole), len(whole) // 6):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="weights is damaged") as error:
            weights.load(folder)
        messages.append(str(error.value))
    # what the library itself takes for whole
    assert any("fingerprint" in message for message in messages)
    path.write_bytes(whole)
    assert_params(weights.load(folder, dtype=jnp.bfloat16).params, tensors_of(TINY), jnp.bfloat16)


@pytest.mark.slow
def test_fingerprint_of_other_weights_is_refused(tmp_path, model):
    folder = tmp_path / "ours"
    weights.save(model, folder)
    weights.save(model._replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params)), tmp_path / "other")
    shutil.rmtree(folder / "weights")
    shutil.copytree(tmp_path / "other" / "weights", folder / "weights")
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match="ours/weights is damaged.*fingerprint .*ours/model.json"):
            weights.load(folder, dtype=dtype)
    about = json.loads((folder / "model.json").read_text())
    del about["fingerprint"]  # as checkpoints were once
    (folder / "model.json").write_text(json.dumps(about))
    assert_params(weights.load(folder).params, {name: value + 1 for name, value in tensors_of(TINY).items()})


def test_identity_goes_by_the_fingerprint(tmp_path, model):
    for name in ("one", "two"):
        weights.save(model, tmp_path / name)
    assert weights.identity(tmp_path / "one") == weights.identity(tmp_path / "two")
    weights.save(model._replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params)), tmp_path / "three")
    assert weights.identity(tmp_path / "one") != weights.identity(tmp_path / "three")


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


@pytest.mark.parity
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_an_export(tmp_path, model, tied):
    torch = pytest.importorskip("torch")
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
