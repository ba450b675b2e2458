"""Training a part of a model: adapters, or all weights but the frozen ones."""

import json

import jax
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm import training, weights
from kd_jax.lm.distill.loss import Distillation, DistillSpec
from kd_jax.lm.model import Model, frozen
from kd_jax.lm.model.frozen import Part
from kd_jax.lm.model.lora import Lora
from kd_jax.lm.training import Member
from kd_jax.lm.training import state as state_lib
from tests.lm.training import test_loop
from tests.lm.training.test_loop import COMPUTE, TINY, StopAt, make_corpus, numbers, settings

LORA = Lora(rank=2, alpha=4.0, targets=("q", "down"))
PARTS = {"adapters": {"lora": LORA}, "frozen": {"frozen": ("embedding", "layers.0-1", "layers.q")}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def start():
    return jax.jit(model_lib.init, static_argnums=1)(jax.random.key(3), TINY)


def train(folders, corpus, start, *, frozen=(), lora=None, **options):
    members = [Member(corpus, 8, 5 + i, folder, start=start, base="org/tiny") for i, folder in enumerate(folders)]
    spec = settings(frozen=frozen, learning_rate=1e-2, epochs=2)
    return training.train(spec, test_loop.model(), members, compute=COMPUTE, lora=lora, **options)


@pytest.fixture(scope="module", params=PARTS)
def straight(request, corpus, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "t"
    train([folder], corpus, start, **PARTS[request.param])
    return request.param, folder


@pytest.mark.slow
def test_only_the_part_changes(straight, start):
    kind, folder = straight
    losses = [row["loss"] for row in numbers(folder) if row["kind"] == "validation"]
    assert losses[-1] < losses[0] - 0.05
    params = weights.load(folder).params
    changed = {name for name, leaf in params["layers"].items() if (leaf != start["layers"][name]).any()}
    np.testing.assert_array_equal(params["embedding"], start["embedding"])
    if kind == "adapters":
        assert changed == {"q", "down"} and (params["norm"] == start["norm"]).all()
    else:
        assert changed == set(start["layers"]) - {"q"} and (params["norm"] != start["norm"]).any()
        for name, leaf in params["layers"].items():
            np.testing.assert_array_equal(leaf[:2], start["layers"][name][:2])


@pytest.mark.slow
def test_checkpoints_hold_the_part_alone(straight):
    kind, folder = straight
    steps = sorted((path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: p.name)
    assert all((step / "trained").is_dir() and not (step / "weights").exists() for step in steps)
    assert (folder / "adapter").exists() == (kind == "adapters")
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)):
        weights.load(steps[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [4])
def test_interrupted_it_ends_with_the_same_numbers(straight, corpus, start, tmp_path, stop_at):
    kind, folder = straight
    with pytest.raises(KeyboardInterrupt):
        train([tmp_path], corpus, start, stop=StopAt(tmp_path, stop_at), **PARTS[kind])
    train([tmp_path], corpus, start, **PARTS[kind])
    assert numbers(tmp_path) == numbers(folder)
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path).params, weights.load(folder).params)


@pytest.mark.slow
def test_the_adapter_folder_is_the_model_less_its_start(corpus, start, tmp_path):
    train([tmp_path], corpus, start, lora=LORA)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("org/tiny", 2, 4.0)
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    params = weights.load(tmp_path / "model").params
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    update = 2.0 * stored[name.format("B")] @ stored[name.format("A")]
    found = np.asarray(params["layers"]["down"][1] - start["layers"]["down"][1])
    assert np.abs(update).max() > 1e-3
    np.testing.assert_allclose(found, update, rtol=0, atol=1e-6)


def test_optimiser_state_is_of_what_is_trained(start):
    optimizer = settings().optimizer(10)
    for part in (Part(lora=LORA), Part(("embedding", "layers.0-1"))):
        state = state_lib.abstract(TINY, optimizer, None, part)
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
        assert moments == 2 * trained < 2 * TINY.num_parameters


def test_frozen_weights_are_shared_not_copied(start):
    kept = state_lib.place_frozen(start, TINY, None, Part(lora=LORA))

    def place(leaf):
        return leaf.unsafe_buffer_pointer()

    assert jax.tree.map(place, kept) == jax.tree.map(place, start)
    kept = state_lib.place_frozen(start, TINY, None, Part(("embedding",)))
    assert list(kept) == ["embedding"] and place(kept["embedding"]) == place(start["embedding"])


def test_before_any_update_it_is_its_start(start):
    for part in (Part(lora=LORA), Part(("layers.0-1", "norm"))):
        trained, kept = frozen.cut(start, TINY, part)
        trained = frozen.init(jax.random.key(0), TINY, part) if trained is None else trained
        jax.tree.map(np.testing.assert_array_equal, frozen.merged(trained, kept, TINY, part), start)


@pytest.mark.slow
def test_together_each_has_the_numbers_it_has_alone(corpus, start, tmp_path):
    pair = [tmp_path / "a", tmp_path / "b"]
    train(pair, corpus, start, lora=LORA)
    for i, folder in enumerate(pair):
        members = [Member(corpus, 8, 5 + i, tmp_path / f"alone-{i}", start=start)]
        spec = settings(learning_rate=1e-2, epochs=2)
        training.train(spec, test_loop.model(), members, compute=COMPUTE, lora=LORA)
        alone, together = numbers(tmp_path / f"alone-{i}"), numbers(folder)
        np.testing.assert_allclose([r["loss"] for r in together], [r["loss"] for r in alone], rtol=1e-5)


@pytest.mark.slow
def test_rollouts_are_of_base_and_adapters_together(corpus, start, tmp_path, monkeypatch):
    """The student's own samples are drawn from the merged weights of their update; the teacher is the base itself."""
    from kd_jax.lm.distill import rollouts

    seen, drawn = [], rollouts.Rollouts.batch

    def batch(self, params, update):
        seen.append(jax.tree.map(np.asarray, params))
        return drawn(self, params, update)

    monkeypatch.setattr(rollouts.Rollouts, "batch", batch)
    teacher = Model(TINY, start, eos_ids=(2,))
    spec = DistillSpec(policy="on_policy", on_policy_fraction=1.0)
    train([tmp_path], corpus, start, lora=LORA, distillation=Distillation(spec, teacher))
    # the first update's adapters are zero, and its divergence from the teacher is too
    jax.tree.map(np.testing.assert_array_equal, seen[0], jax.tree.map(np.asarray, start))
    rows = [row for row in numbers(tmp_path) if row["kind"] == "training"]
    assert abs(rows[0]["loss"]) < 1e-6 and len(seen) == len(rows)
    assert set(seen[-1]["layers"]) == set(start["layers"])


def test_a_part_needs_a_start(corpus, tmp_path):
    with pytest.raises(ValueError, match="need a model that training starts from"):
        train([tmp_path], corpus, None, lora=LORA)
