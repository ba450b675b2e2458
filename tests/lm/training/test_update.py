"""The update: its loss and gradients from the definition, however the batch is cut, packed or spread over devices."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Layout
from kd_jax.lm.distill.loss import cross_entropy
from kd_jax.lm.model import PRESETS, Compute
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training import validation

TINY = PRESETS["tiny"]
LOSS = cross_entropy(TINY, Compute())
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(0, TINY.vocab_size, length).astype(np.int32) for length in (9, 3, 16, 2, 12, 5, 16, 7)]
PROMPTS = np.array([1, 2, 1, 1, 3, 1, 1, 1])


def compiled(optimizer, schedule, mesh=None):
    loss = cross_entropy(TINY, Compute(mesh=mesh))
    return update_lib.compiled(update_lib.make(loss, optimizer, schedule), TINY, optimizer, mesh)


@pytest.fixture(scope="module")
def params():
    return model_lib.init(jax.random.key(0), TINY)


def batch(**layout):
    return state_lib.place(batches.arrange(TOKENS, PROMPTS, Layout(len(TOKENS), max_length=16, **layout)), None)


# each sequence in a row of its own: the positions that are learnt, and the tokens after them
PADDED = np.stack([np.pad(ids, (0, 16 - len(ids))) for ids in TOKENS])
ROWS, COLUMNS = np.array([(row, j) for row, ids in enumerate(TOKENS) for j in range(PROMPTS[row] - 1, len(ids) - 1)]).T


def definition(params):
    """Mean cross-entropy over what was generated, with optax's loss on whole logits."""
    hidden = model_lib.forward(params, TINY, jnp.asarray(PADDED))[ROWS, COLUMNS]
    logits = hidden @ model_lib.head(params).T
    return optax.softmax_cross_entropy_with_integer_labels(logits, PADDED[ROWS, COLUMNS + 1]).mean()


@pytest.fixture(scope="module")
def wanted(params):
    """The loss and gradients of the definition."""
    return jax.jit(jax.value_and_grad(definition))(params)


# not jitted, each operation would be compiled by itself
loss_and_gradient = jax.jit(update_lib.loss_and_gradient, static_argnums=0)


@pytest.mark.fast(1)
@pytest.mark.parametrize(
    "layout", [{}, {"row_length": 16}, {"row_length": 40}, {"parts": 2}, {"row_length": 24, "parts": 3}]
)
def test_loss_and_gradients_are_the_definition(params, wanted, layout):
    (loss, _), gradient, count = loss_and_gradient(LOSS, params, batch(**layout))
    wanted_loss, wanted_gradient = wanted
    assert int(count) == sum(map(len, TOKENS)) - PROMPTS.sum()
    np.testing.assert_allclose(loss, wanted_loss, rtol=2e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        other = dict(jax.tree_util.tree_leaves_with_path(wanted_gradient))[path]
        np.testing.assert_allclose(leaf, other, atol=2e-6 * float(abs(other).max()) + 1e-8, err_msg=str(path))


def test_a_batch_without_a_token_to_learn_moves_nothing(params):
    empty = batch()._replace(mask=jnp.zeros_like(batch().mask))
    (loss, _), gradient, count = loss_and_gradient(LOSS, params, empty)
    assert float(loss) == 0 and int(count) == 0
    assert all(float(abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_update_is_the_optimisers(params):
    schedule = optim.wsd(1e-2, 10, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    update = compiled(optimizer, schedule)
    _, gradient, _ = loss_and_gradient(LOSS, params, batch())
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    wanted = optax.apply_updates(params, changes)
    state, metrics = update(
        state_lib.State(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0)), batch()
    )
    for ours, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted), strict=True):
        # Adam divides by the root of the square of the gradient: where that is near 0, rounding shows
        np.testing.assert_allclose(ours, other, atol=2e-4)
    assert int(state.step) == 1 and abs(float(metrics.learning_rate) - 1e-2) < 1e-8
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.slow
def test_the_state_is_taken_over_three_times():
    schedule = optim.wsd(1e-2, 10, 0.0, 0.0)
    update = compiled(optim.adamw(schedule), schedule)
    state = state_lib.init(jax.random.key(1), TINY, optim.adamw(schedule))
    losses = []
    for _ in range(3):
        before = state
        state, metrics = update(state, batch())
        losses.append(float(metrics.loss))
        assert before.params["embedding"].is_deleted()
    assert losses[2] < losses[1] < losses[0]
    assert update._cache_size() == 1


@pytest.mark.slow
def test_evaluate_is_the_mean_over_all_batches(params, wanted):
    parts = [batches.arrange(TOKENS[i : i + 3], PROMPTS[i : i + 3], Layout(3, max_length=16)) for i in (0, 3, 6)]
    found = validation.make(LOSS)(params, [state_lib.place(part, None) for part in parts])["loss"]
    np.testing.assert_allclose(found, wanted[0], rtol=2e-6)


@pytest.mark.slow
def test_bf16_compute_keeps_float32_weights_and_gradients(params):
    _, gradient, _ = loss_and_gradient(cross_entropy(TINY, Compute(dtype="bfloat16")), params, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


MESHES = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from tests.lm.training.test_update import TINY, compiled, TOKENS, PROMPTS, batches, Layout
schedule = optim.wsd(1e-2, 10, 0.0, 0.0)
optimizer = optim.adamw(schedule)
wanted = None
for sizes in (None, (8, 1, 1), (2, 2, 2), (1, 4, 2)):
    mesh = sizes and mesh_lib.make(*sizes)
    state = state_lib.init(jax.random.key(0), TINY, optimizer, mesh)
    update = compiled(optimizer, schedule, mesh)
    layout = Layout(len(TOKENS), max_length=16, row_length=24, row_multiple=mesh_lib.batch_devices(mesh))
    batch = state_lib.place(batches.arrange(TOKENS, PROMPTS, layout), mesh)
    losses = []
    for _ in range(3):
        state, metrics = update(state, batch)
        losses += [float(metrics.loss), float(metrics.gradient_norm)]
    wanted = wanted or losses
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    if mesh is not None and mesh.shape["fsdp"] > 1:
        q = state.params["layers"]["q"]
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == q.shape]
        assert len(moments) == 2 and all(leaf.sharding == q.sharding for leaf in moments)
        assert q.addressable_shards[0].data.size < q.size
print("equal")
"""


@pytest.mark.long
def test_on_eight_devices():
    done = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
