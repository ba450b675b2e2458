"""Every family against values that torch and transformers computed (tests/golden/make.py), and what all must do."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from kd_jax import fused
from kd_jax.lm import decode, model, score, weights
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.model.decoder import _period
from tests.golden import families
from tests.lm.weights.checkpoints import run_python
from tests.lm.weights.test_golden import scored_part, table


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """From a name of tests.golden.families to the loaded model."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: weights.load(families.write_folder(name, folder / name)))


@pytest.fixture(scope="module")
def golden():
    with np.load(families.FOLDER / "families.npz") as file:
        return dict(file)


@pytest.mark.fast(6)
@pytest.mark.parametrize("name", families.CONFIGS)
def test_log_probs(name, load, golden):
    tokens, lengths = table(families.sequences(name))
    found = scored_part(*score.log_prob(load(name), tokens, lengths, batch_tokens=1000), lengths)
    np.testing.assert_allclose(np.concatenate(found), golden[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma 3", "olmo 2, grouped, biases"])
def test_log_probs_in_rows(name, load, golden):
    """Activations as they are on several devices; the tests around this one have them as a single CPU does."""
    tokens, lengths = table(families.sequences(name))
    rows = score.log_prob(load(name), tokens, lengths, batch_tokens=1000, compute=Compute(columns=False))
    np.testing.assert_allclose(np.concatenate(scored_part(*rows, lengths)), golden[name], rtol=0, atol=1e-5)


@functools.partial(jax.jit, static_argnums=1, static_argnames="compute")
def _forward(params, architecture, tokens, **options):
    return model.forward(params, architecture, tokens, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma 3", "smollm 3, window"])
def test_cached_decode_is_the_full_forward_at_every_position(name, load):
    loaded, (tokens, _) = load(name), families.sequences(name)
    a, window = loaded.architecture, loaded.architecture.sliding_window
    tokens = tokens[None, : 3 * window]
    whole = _forward(loaded.params, a, tokens)
    extend, cache = jax.jit(model.extend, static_argnums=1), model.empty_cache(a, 1, tokens.shape[1])
    # a prefill that ends before the window's edge, then one token at a time
    first = window - 2
    hidden, cache = extend(loaded.params, a, cache, tokens[:, :first], np.arange(first)[None])
    parts = [hidden]
    for at in range(first, tokens.shape[1]):
        hidden, cache = extend(loaded.params, a, cache, tokens[:, at : at + 1], np.array([[at]]))
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma 2"])
def test_packed_segments_and_blocks_are_separate_texts(name, load):
    """Windows inside packed rows, in blocks of queries that skip keys; and each text by itself."""
    loaded = load(name)
    texts = [families.sequences(name)[0][:n] for n in (19, 11, 25)]
    segments = np.repeat(np.arange(3), [len(text) for text in texts])[None]
    positions = np.concatenate([np.arange(len(text)) for text in texts])[None]
    compute = Compute(query_block=8, remat=True)
    packed = _forward(
        loaded.params, loaded.architecture, np.concatenate(texts)[None], segments=segments, positions=positions,
        compute=compute,
    )[0]  # fmt: skip
    alone, lengths = table(texts)
    alone = _forward(loaded.params, loaded.architecture, alone)
    for row, n, part in zip(alone, lengths, np.split(packed, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_allclose(part, row[:n], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma 2", "granite 3, biases"])
def test_gradient_is_the_slope_of_the_loss(name, load):
    """Through blocked attention with caps and windows, and the fused loss with a cap on the logits."""
    loaded, (tokens, _) = load(name), families.sequences(name)
    a, tokens = loaded.architecture, tokens[None, :24]
    labels, random = np.roll(tokens, -1, -1), np.random.RandomState(0)
    direction = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), loaded.params)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(step, compute):
        params = jax.tree.map(lambda x, d: x + step * d, loaded.params, direction)
        hidden = model.forward(params, a, tokens, compute=compute)
        mask = np.ones(labels.shape, bool)
        return fused.linear_cross_entropy(hidden, model.head(params), labels, mask, softcap=a.logit_softcap).mean

    slope = jax.grad(loss)(0.0, Compute(query_block=8, remat=True))
    # of fourth order: the slope along a random direction is small beside the curvature
    near, far = (loss(step, Compute()) - loss(-step, Compute()) for step in (1e-3, 2e-3))
    difference = (8 * near - far) / 12e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_export_is_the_same_model(name, load, tmp_path):
    loaded = load(name)
    weights.export(loaded, tmp_path / "out")
    again = weights.load(tmp_path / "out")
    assert again.architecture == loaded.architecture
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == families.shapes_of(name).keys()


@pytest.mark.parametrize("name", families.CONFIGS)
def test_export_has_the_rotary_settings_for_two_versions_of_transformers(name, load, tmp_path):
    """Version 5 reads what it reads in the original; version 4 reads keys of its own."""
    config = families.described()[name]["config"]
    weights.export(load(name), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = (
        AutoConfig.for_model(**{key: value for key, value in of.items() if key != "transformers_version"})
        for of in (config, written)
    )
    kinds = set(after.rope_parameters) & {"full_attention", "sliding_attention"}
    for theirs, ours in [(before.rope_parameters[kind], after.rope_parameters[kind]) for kind in kinds] or [
        (before.rope_parameters, after.rope_parameters)
    ]:
        assert {key: ours.get(key) for key in theirs} == theirs
    # what config.json of version 4 had, by that version's LlamaConfig, Phi3Config and Gemma3TextConfig
    rope = config["rope_parameters"]
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    assert (written["rope_theta"], written.get("rope_local_base_freq")) == (full["rope_theta"], local.get("rope_theta"))
    assert written.get("partial_rotary_factor", 1.0) == full.get("partial_rotary_factor", 1.0)
    scaling = {key: full[key] for key in full if key not in ("rope_theta", "partial_rotary_factor")}
    if full["rope_type"] == "default":
        assert written["rope_scaling"] is None
    else:
        assert {key: written["rope_scaling"].get(key) for key in scaling} == scaling


@pytest.mark.slow
def test_own_checkpoint_keeps_the_settings(load, tmp_path):
    loaded = load("gemma 3, linear")
    weights.save(loaded, tmp_path / "ours")
    assert weights.load(tmp_path / "ours").architecture == loaded.architecture
    assert hash(weights.load(tmp_path / "ours").architecture) == hash(loaded.architecture)


def test_text_model_of_a_multimodal_checkpoint(load, tmp_path):
    folder = families.write_folder("gemma 3", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for prefix in ("language_model.model.", "model.language_model."):
        tensors = {
            key.replace("model.", prefix): value for key, value in load_file(folder / "model.safetensors").items()
        }
        tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
        (tmp_path / "out").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "out" / "model.safetensors")
        whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
        (tmp_path / "out" / "config.json").write_text(json.dumps(whole))
        loaded = weights.load(tmp_path / "out")
        assert loaded.architecture == load("gemma 3").architecture
        jax.tree.map(np.testing.assert_array_equal, loaded.params, load("gemma 3").params)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama 2", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not understood for model_type 'llama'"),
        ("llama 2", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("llama 2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama 3.1", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "extra": 1}}, "extra=1"),
        ("phi 3", {"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "longrope"),
        ("gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma 3", {"layer_types": ["full_attention"]}, "layer_types"),
        (
            "qwen 3",
            {"sliding_window": "6", "use_sliding_window": True, "layer_types": None, "max_window_layers": 0},
            "sliding_window='6'",
        ),
        ("granite 3", {"embedding_multiplier": True}, "embedding_multiplier=True"),
        ("mistral", {"model_type": "mixtral"}, "model_type is 'mixtral'; known are llama, mistral"),
    ],
)
def test_what_is_not_understood_is_named(name, changes, message, tmp_path):
    folder = families.write_folder(name, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


def test_settings_that_a_family_cannot_say_are_not_exported(load, tmp_path):
    loaded = load("llama 2")
    other = loaded._replace(architecture=dataclasses.replace(loaded.architecture, logit_softcap=30.0))
    with pytest.raises(ValueError, match="llama config.json cannot express this model's logit_softcap"):
        weights.export(other, tmp_path / "out")


def test_period_of_the_pattern_of_layers(load):
    kinds = load("gemma 3").architecture.layer_kinds
    assert [kind.rotary for kind in kinds] == ["local"] * 5 + ["global"] + ["local"] * 2
    assert [_period(kinds[:n]) for n in (1, 5, 6, 8)] == [1, 1, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma 2"])
def test_sampling_draws_what_the_scorer_says(name, load):
    """Through pages, across the window's edge: log-probabilities of samples are those of the scorer."""
    loaded = load(name)
    tokens, lengths, log_probs = decode.generate(loaded._replace(eos_ids=()), [5, 7, 9], 8, max_length=40, seed=1)
    scored, mask = score.log_prob(loaded, tokens, lengths, batch_tokens=1000)
    np.testing.assert_allclose(log_probs[:, 3:], scored[:, 2:], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_large_vocabulary_costs_little_memory():
    """Scoring 8 x 512 tokens with Gemma 3 270M: whole logits would be 4 GiB."""
    gemma = Architecture(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, rope_theta=1e6, local_rope_theta=1e4, query_key_norm="head",
        sliding_window=512, sliding_layers=tuple(i for i in range(18) if i % 6 != 5), norm_order="both",
        unit_offset_gain=True, activation="gelu_tanh", embedding_multiplier=640**0.5, attention_scale=1 / 16,
    )  # fmt: skip
    lowered = score.lower(Model(gemma, model.abstract(gemma)), jax.ShapeDtypeStruct((8, 512), np.int32), Compute())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**30


MESH = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from kd_jax import fused
    from kd_jax.lm import model, weights
    from kd_jax.parallel import mesh as mesh_lib

    loaded, tokens = weights.load(sys.argv[1]), np.random.RandomState(0).randint(0, 97, (4, 24))
    mesh = mesh_lib.make(2, 2, 1)
    a, axes = loaded.architecture, model.logical_axes(loaded.architecture)

    def loss(params, mesh):
        hidden = model.forward(params, a, tokens, compute=model.Compute(mesh=mesh, query_block=8))
        labels, mask = np.roll(tokens, -1, -1), np.ones(tokens.shape, bool)
        cap = a.logit_softcap
        return fused.linear_cross_entropy(hidden, model.head(params), labels, mask, softcap=cap, mesh=mesh).mean

    alone = jax.jit(jax.grad(loss), static_argnums=1)(loaded.params, None)
    params = jax.device_put(loaded.params, mesh_lib.shardings(axes, loaded.params, mesh))
    split = jax.jit(jax.grad(loss), static_argnums=1)(params, mesh)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), split, alone)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma 2", "olmo 2, grouped, biases"])
def test_gradient_over_a_mesh(name, tmp_path):
    folder = families.write_folder(name, tmp_path / "m")
    run_python(MESH, folder, XLA_FLAGS="--xla_force_host_platform_device_count=4")


WINDOWS = """
    import sys, jax, numpy as np
    from kd_jax.lm import decode, model, score, weights
    from kd_jax.lm.distill import teacher_forward
    from kd_jax.parallel import mesh as mesh_lib

    alone = weights.load(sys.argv[1])
    tokens, lengths = np.random.RandomState(0).randint(0, 97, (4, 40)), np.array([40, 33, 7, 40])
    wanted, mask = score.log_prob(alone, tokens, lengths)
    top = teacher_forward.jitted(alone, want="top_k", k=5)(tokens, lengths)
    drawn = decode.generate(alone._replace(eos_ids=()), [5, 7, 9], 8, max_length=40, seed=1, batch_size=4)
    for sizes in ((2, 2, 1), (4, 1, 1)):  # a vocabulary of 97 ids cannot be split over tensor
        mesh = mesh_lib.make(*sizes)
        split = weights.load(sys.argv[1], mesh=mesh)
        found, _ = score.log_prob(split, tokens, lengths, mesh=mesh)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        best = teacher_forward.over_mesh(alone, mesh, want="top_k", k=5)(tokens, lengths)
        assert (np.asarray(best.ids) == np.asarray(top.ids))[np.arange(40) < lengths[:, None]].all()
        again = decode.generate(
            split._replace(eos_ids=()), [5, 7, 9], 8, max_length=40, seed=1, batch_size=4, mesh=mesh
        )
        np.testing.assert_array_equal(again[0], drawn[0])
        np.testing.assert_allclose(again[2], drawn[2], rtol=0, atol=1e-4)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma 3", "smollm 3, window"])
def test_windows_over_a_mesh(name, tmp_path):
    """Scoring, a teacher's best tokens, and sampling through pages that are given back: the same as on one device."""
    folder = families.write_folder(name, tmp_path / "m")
    run_python(WINDOWS, folder, XLA_FLAGS="--xla_force_host_platform_device_count=4")
