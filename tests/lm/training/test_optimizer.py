"""The schedule and the optimiser, from their definitions in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm.model import PRESETS
from kd_jax.lm.training import optimizer as optim


def test_warm_up_stable_decay():
    schedule = optim.wsd(1e-3, 100, warmup=0.1, decay=0.2)
    found = [float(schedule(step)) for step in (0, 1, 7, 10, 50, 80, 90, 99)]
    np.testing.assert_allclose(found, [0, 1e-4, 7e-4, 1e-3, 1e-3, 1e-3, 5e-4, 5e-5], rtol=1e-5)


def test_without_warm_up_or_decay():
    schedule = optim.wsd(2.0, 10, warmup=0.0, decay=0.0)
    assert [float(schedule(step)) for step in (0, 5, 10)] == [2.0, 2.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_adamw_is_the_definition(clip):
    rng = np.random.default_rng(0)
    shapes = {"attention_norm": (3, 4), "q": (3, 4, 4)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    optimizer = optim.adamw(lambda step: 0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.2, clip=clip)
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    state = optimizer.init(ours)
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for step in range(1, 4):
        gradient = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        changes, state = optimizer.update({n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}, state, ours)
        ours = {name: ours[name] + changes[name] for name in ours}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1.0, clip / norm) if clip else g
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            change = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
            decay = 0.0 if "norm" in name else 0.2  # gains of norms are not decayed
            params[name] = params[name] - 0.1 * (change + decay * params[name])
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=2e-5, atol=1e-6)


def test_only_what_is_declared_a_matrix_is_decayed():
    every_kind = dataclasses.replace(
        PRESETS["tiny"], query_key_value_bias=True, output_bias=True, mlp_bias=True, query_key_norm="head",
        norm_order="both", tie_word_embeddings=False,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model_lib.abstract(every_kind))
    optimizer = optim.adamw(lambda step: 0.1, weight_decay=0.5)
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    axes = jax.tree.leaves(model_lib.logical_axes(every_kind), is_leaf=lambda leaf: isinstance(leaf, tuple))
    for change, names in zip(jax.tree.leaves(changes), axes, strict=True):
        decayed = len(set(names) - {"layer"}) == 2
        np.testing.assert_allclose(change, -0.1 * 0.5 if decayed else 0.0, rtol=1e-6)


def test_moments_of_16_bit_weights_are_float32():
    params = {"q": jnp.ones((2, 3), jnp.bfloat16)}
    state = optim.adamw(lambda step: 0.1).init(params)
    found = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim == 2}
    assert jnp.dtype(jnp.float32) in found
