"""Students that begin somewhere: shallower copies, adapters, frozen weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import fused
from kd_jax.lm import model
from kd_jax.lm.model import PRESETS, Model, depth, frozen, lora
from kd_jax.lm.model.lora import Lora

TINY = PRESETS["tiny"]
TOKENS = np.random.RandomState(0).randint(0, TINY.vocab_size, (2, 12))


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init, static_argnums=1)(jax.random.key(0), TINY)


@functools.partial(jax.jit, static_argnums=1)
def hidden_of(params, architecture):
    return model.forward(params, architecture, TOKENS)


def loss_of(params, columns=None):
    hidden = model.forward(params, TINY, TOKENS, compute=model.Compute(columns=columns))
    labels, mask = np.roll(TOKENS, -1, -1), np.ones(TOKENS.shape, bool)
    return fused.linear_cross_entropy(hidden, model.head(params), labels, mask).mean


@pytest.mark.parametrize(
    "rule, count, kept",
    [
        ("every_2", 5, (0, 2, 4)),
        ("every_3", 3, (0,)),
        ("first_and_last_1", 4, (0, 3)),
        ("first_and_last_2", 4, (0, 1, 2, 3)),
        ((0, 3), 4, (0, 3)),
    ],
)
def test_layers_kept(rule, count, kept):
    assert depth.layers_kept(rule, count) == kept


@pytest.mark.parametrize("rule", ["every_0", "each_2", "first_and_last_3", (), (0, 4), (1, 0), (1, 1), (-1, 0)])
def test_layers_that_cannot_be_kept(rule):
    with pytest.raises(ValueError, match="layers_kept="):
        depth.layers_kept(rule, 4)


@pytest.mark.slow
def test_shallower_copy(params):
    whole = Model(dataclasses.replace(TINY, sliding_window=4, sliding_layers=(0, 2), unrotated_layers=(1, 2)), params)
    same = depth.shallower(whole, (0, 1, 2))
    assert same.architecture == whole.architecture
    jax.tree.map(np.testing.assert_array_equal, same.params, whole.params)
    cut = depth.shallower(whole, (0, 2))
    assert (cut.architecture.sliding_layers, cut.architecture.unrotated_layers) == ((0, 1), (1,))
    assert cut.params["embedding"] is params["embedding"]
    assert model.abstract(cut.architecture) == jax.eval_shape(lambda: cut.params)
    np.testing.assert_array_equal(cut.params["layers"]["up"][1], params["layers"]["up"][2])
    last = depth.shallower(whole, (1,)).architecture
    assert (last.sliding_window, last.sliding_layers, last.num_hidden_layers) == (None, (), 1)


@pytest.mark.long
def test_new_adapters_change_nothing_and_merge(params):
    settings = Lora(rank=3, alpha=6.0, targets=("q", "o", "down"))
    adapters = lora.init(jax.random.key(1), TINY, settings)
    before = hidden_of(params, TINY)
    np.testing.assert_array_equal(hidden_of(lora.attached(params, adapters, settings), TINY), before)
    jax.tree.map(np.testing.assert_array_equal, lora.merged(params, adapters, settings), params)
    random = np.random.RandomState(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(0.1 * random.standard_normal(x.shape), jnp.float32), adapters)
    attached = lora.attached(params, adapters, settings)
    merged = lora.merged(params, adapters, settings)
    q = np.asarray(params["layers"]["q"][1]) + 2.0 * np.asarray(adapters["q"]["b"][1] @ adapters["q"]["a"][1])
    np.testing.assert_allclose(merged["layers"]["q"][1], q, rtol=0, atol=1e-5)
    after = hidden_of(attached, TINY)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after, hidden_of(merged, TINY), rtol=0, atol=1e-4)
    # the same, one token at a time
    cache, parts = model.empty_cache(TINY, 2, 12), []
    for positions in (np.arange(11), np.arange(11, 12)):
        hidden, cache = jax.jit(model.extend, static_argnums=1)(
            attached, TINY, cache, TOKENS[:, positions], np.broadcast_to(positions, (2, len(positions)))
        )
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), after, rtol=0, atol=1e-4)
    axes = lora.logical_axes(settings)
    assert jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(adapters)


@pytest.mark.long
def test_gradient_of_adapters_is_that_of_the_merged_weights(params):
    settings = Lora(rank=2, alpha=1.0)
    adapters = lora.init(jax.random.key(1), TINY, settings)
    adapters["v"]["b"] += 0.1

    def gradient(way, columns):
        return jax.jit(jax.grad(lambda adapters: loss_of(way(params, adapters, settings), columns)))(adapters)

    expected = gradient(lora.merged, None)
    for columns in (True, False):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, gradient(lora.attached, columns), expected)


@pytest.mark.parametrize("settings", [Lora(rank=0), Lora(targets=("q_proj",)), Lora(targets=())])
def test_adapters_that_cannot_be(settings):
    with pytest.raises(ValueError, match="lora needs a rank of 1 or more and targets of q, k"):
        lora.init(jax.random.key(0), TINY, settings)


@pytest.mark.slow
def test_frozen_weights_stay_and_have_no_optimiser_state(params):
    plan = frozen.frozen_layers(("embedding", "layers.0-1", "layers.q", "norm"), TINY)
    trained, kept = frozen.split(params, plan)
    jax.tree.map(np.testing.assert_array_equal, frozen.join(trained, kept, plan), params)
    assert set(kept) - set(trained) == {"embedding", "layers.q", "norm"} and trained["layers.up"].shape[0] == 1
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(trained)

    @jax.jit
    def update(trained, state):
        gradients = jax.grad(lambda trained: loss_of(frozen.join(trained, kept, plan)))(trained)
        changes, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, changes), state

    after = frozen.join(update(trained, state)[0], kept, plan)
    for name in ("embedding", "norm"):
        np.testing.assert_array_equal(after[name], params[name])
    for name, stack in after["layers"].items():
        np.testing.assert_array_equal(stack[:2], params["layers"][name][:2])
        assert (stack[2] == params["layers"][name][2]).all() == (name == "q")


@pytest.mark.parametrize("pattern", ["layers.3", "layers.2-1", "layers.0.queries", "layer.0", "*", "layers.q_norm",
                                     "layers.0.q_bias", "head"])  # fmt: skip
def test_patterns_that_match_nothing(pattern):
    with pytest.raises(ValueError, match=f"frozen pattern {pattern!r}".replace("*", r"\*")):
        frozen.frozen_layers((pattern,), TINY)


def test_what_a_tied_head_is_frozen_with():
    with pytest.raises(ValueError, match="head and embedding of this model are one; freeze embedding"):
        frozen.frozen_layers(("head",), TINY)


def test_each_weight_that_a_model_has_can_be_frozen_alone():
    biased = dataclasses.replace(TINY, query_key_value_bias=True, query_key_norm="head", tie_word_embeddings=False)
    weights = model.abstract(biased)
    names = [name for name in weights if name != "layers"] + [f"layers.{name}" for name in weights["layers"]]
    assert {"head", "layers.q_bias", "layers.q_norm"} < set(names)
    for name in names:
        assert list(frozen.split(weights, frozen.frozen_layers((name,), biased))[1]) == [name]
    layers = frozen.split(weights, frozen.frozen_layers(("layers",), biased))[1]
    assert sorted(layers) == sorted(name for name in names if name.startswith("layers."))
