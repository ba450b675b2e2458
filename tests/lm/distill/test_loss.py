"""Learning a teacher's distribution: the update from the definition, and a teacher that nothing changes."""

import dataclasses
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Layout
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill.loss import Distillation, DistillSpec
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib

TINY = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)  # compiles quicker
WIDE = dataclasses.replace(TINY, hidden_size=64, num_hidden_layers=2)
COMPUTE = Compute()
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(0, TINY.vocab_size, length).astype(np.int32) for length in (9, 3, 16, 2, 12, 5, 16, 7)]
PROMPTS = np.array([1, 2, 1, 1, 3, 1, 1, 1])


def model(architecture=TINY, seed=0, scale=1.0):
    params = model_lib.init(jax.random.key(seed), architecture)
    return Model(architecture, params | {"embedding": scale * params["embedding"]}, eos_ids=(2,))


@pytest.fixture(scope="module")
def student():
    return model()


@pytest.fixture(scope="module")
def teacher():
    return model(WIDE, seed=1, scale=3.0)


def batch(**layout):
    return state_lib.place(batches.arrange(TOKENS, PROMPTS, Layout(len(TOKENS), max_length=16, **layout)), None)


# each sequence in a row of its own: which positions are learnt, and what follows them
PADDED = np.stack([np.pad(ids, (0, 16 - len(ids))) for ids in TOKENS])
PLACES = [(row, j) for row, ids in enumerate(TOKENS) for j in range(PROMPTS[row] - 1, len(ids) - 1)]
ROWS, COLUMNS = np.array(PLACES).T
NEXT = PADDED[ROWS, COLUMNS + 1]


def definition(params, teacher, temperature, hard_weight, reverse, teacher_temperature=None):
    """Loss, and the statistics, from whole logits."""

    def logits(params, architecture):
        hidden = model_lib.forward(params, architecture, jnp.asarray(PADDED))[ROWS, COLUMNS]
        return hidden @ model_lib.head(params).T

    theirs = temperature if teacher_temperature is None else teacher_temperature
    p = jax.nn.log_softmax(logits(teacher, WIDE) / theirs)
    mine = logits(params, TINY)
    q = jax.nn.log_softmax(mine / temperature)
    divergence = jnp.sum(jnp.exp(q) * (q - p) if reverse else jnp.exp(p) * (p - q), -1)
    hard = -jax.nn.log_softmax(mine)[np.arange(len(NEXT)), NEXT]
    loss = (1 - hard_weight) * temperature**2 * divergence + hard_weight * hard
    return loss.mean(), {
        "divergence": divergence.mean(), "cross_entropy": hard.mean(),
        "student_entropy": -jnp.sum(jnp.exp(q) * q, -1).mean(),
        "teacher_entropy": -jnp.sum(jnp.exp(p) * p, -1).mean(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
    }  # fmt: skip


@pytest.mark.fast(1)
@pytest.mark.parametrize(
    "how, layout",
    [
        ({}, {}),
        ({"loss_temperature": 2.0, "hard_weight": 0.3}, {"row_length": 24, "parts": 3}),
        ({"divergence": "reverse_kl", "loss_temperature": 0.5}, {"parts": 2}),
        ({"loss_temperature": 2.0, "teacher_temperature": 0.5}, {}),
    ],
)
def test_loss_gradients_and_statistics_are_the_definition(student, teacher, how, layout):
    settings = DistillSpec(policy="online", **how)
    distillation = Distillation(settings, teacher)
    packed = "row_length" in layout
    loss, guide = distill.loss(distillation, student, COMPUTE, packed=packed), distill.guide(distillation)
    (found, statistics), gradient, count = jax.jit(
        lambda params, batch, guide: update_lib.loss_and_gradient(loss, params, batch, guide)
    )(student.params, batch(**layout), guide)
    reverse = settings.divergence == "reverse_kl"
    by_hand = jax.jit(jax.value_and_grad(definition, has_aux=True), static_argnums=4)
    (wanted, others), wanted_gradient = by_hand(
        student.params, teacher.params, settings.loss_temperature, settings.hard_weight, reverse,
        settings.teacher_temperature,
    )  # fmt: skip
    assert int(count) == len(NEXT) == sum(map(len, TOKENS)) - PROMPTS.sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert statistics.keys() == others.keys()
    for name, value in others.items():
        np.testing.assert_allclose(statistics[name], value, rtol=2e-5, err_msg=name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        other = dict(jax.tree_util.tree_leaves_with_path(wanted_gradient))[path]
        np.testing.assert_allclose(leaf, other, atol=2e-5 * float(abs(other).max()) + 1e-8, err_msg=str(path))


def test_the_teacher_gets_no_gradient(student, teacher):
    distillation = Distillation(DistillSpec(policy="online"), teacher)
    loss, guide = distill.loss(distillation, student, COMPUTE), distill.guide(distillation)
    part = jax.tree.map(lambda leaf: leaf[0], batch())
    gradient = jax.jit(jax.grad(lambda guide: loss(student.params, part, guide)[0].mean))(guide)
    assert all(float(abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_student_that_starts_as_the_teacher_leaves_it_alone():
    teacher = model()
    before = weights.fingerprint(teacher.params)
    schedule = optim.wsd(1e-2, 10, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    state = state_lib.from_params(teacher.params, TINY, optimizer)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(teacher.params), strict=True):
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    assert weights.fingerprint(state.params) == before
    # cross-entropy beside the divergence, which is 0 at the start
    distillation = Distillation(DistillSpec(policy="online", hard_weight=0.5), teacher)
    loss = distill.loss(distillation, teacher, COMPUTE)
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), TINY, optimizer)
    guide, divergences = distill.guide(distillation), []
    for _ in range(3):
        state, metrics = update(state, batch(), guide)
        divergences.append(float(metrics.statistics["divergence"]))
    assert weights.fingerprint(teacher.params) == before == weights.fingerprint(guide.teacher)
    assert weights.fingerprint(state.params) != before
    assert abs(divergences[0]) < 1e-6 < divergences[2]


@pytest.mark.slow
def test_ids_beyond_the_tokenizers_have_no_part_in_it():
    # vocabularies that are padded to other sizes, with the padding's logits the largest
    real, part = types.SimpleNamespace(vocab_size=300), jax.tree.map(lambda leaf: leaf[0], batch())
    part = part._replace(tokens=part.tokens % 300)
    models, losses = [], []
    for sizes in ((320, 330), (300, 300)):
        for architecture, size, seed in zip((TINY, WIDE), sizes, (0, 1), strict=True):
            found = model(dataclasses.replace(architecture, vocab_size=330), seed, scale=3.0)
            embedding = found.params["embedding"].at[300:].mul(20.0)[:size]
            smaller = dataclasses.replace(architecture, vocab_size=size)
            models.append(Model(smaller, found.params | {"embedding": embedding}, tokenizer=real))
        student, teacher = models[-2:]
        distillation = Distillation(DistillSpec(policy="online"), teacher)
        loss, guide = distill.loss(distillation, student, COMPUTE), distill.guide(distillation)
        losses.append(float(jax.jit(loss)(student.params, part, guide)[0].mean))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_other_numbers_are_no_other_program(student, teacher):
    schedule = optim.wsd(1e-3, 10, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    how = {"divergence": "jensen_shannon", "parameter": 0.1}
    distillation = Distillation(DistillSpec(policy="online", **how), teacher)
    loss = distill.loss(distillation, student, COMPUTE)
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), TINY, optimizer)
    state, losses = state_lib.from_params(student.params, TINY, optimizer), []
    names = {"loss_temperature": 3.0, "teacher_temperature": 0.4, "parameter": 0.7, "hard_weight": 0.9}
    for changes in ({}, *({name: value} for name, value in names.items())):
        other = distillation._replace(spec=DistillSpec(policy="online", **{**how, **changes}))
        state, metrics = update(state, batch(), distill.guide(other))
        losses.append(float(metrics.loss))
    assert update._cache_size() == 1 and len(set(losses)) == 5


@pytest.mark.parametrize("change, message", [
    ({"policy": "offsite"}, "policy='offsite'"),
    ({"divergence": "kl"}, "divergence='kl'"),
    ({"tail": "drop"}, "tail='drop'"),
    ({"loss_temperature": 0.0}, "loss_temperature=0.0"),
    ({"teacher_temperature": -1.0}, "teacher_temperature=-1.0"),
    ({"hard_weight": 1.5}, "hard_weight=1.5"),
    ({"on_policy_fraction": -0.1}, "on_policy_fraction=-0.1"),
    ({"prompt_length": -1}, "prompt_length=-1"),
    ({"parameter": 0.5}, "forward_kl has none"),
    ({"divergence": "jensen_shannon", "parameter": 1.5}, "beta of jensen_shannon"),
])  # fmt: skip
def test_settings_faults(change, message):
    with pytest.raises(ValueError, match=message):
        DistillSpec(**{"policy": "online", **change})


MESHES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.distill import loss as distill
from kd_jax.lm import model as model_lib, weights
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from tests.lm.distill.test_loss import *
schedule = optim.wsd(1e-2, 10, 0.0, 0.0)
optimizer = optim.adamw(schedule)
wanted = {}
for sizes, other, dtype in (
    (None, None, "float32"), ((8, 1, 1), (1, 2, 4), "float32"), ((2, 2, 2), (8, 1, 1), "float32"),
    (None, None, "bfloat16"), ((1, 4, 2), (2, 1, 4), "bfloat16"),
):
    mesh, over = (size and mesh_lib.make(*size) for size in (sizes, other))
    teacher = model(WIDE, seed=1, scale=3.0)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), teacher.params)
    if over is not None:
        params = jax.device_put(params, mesh_lib.shardings(model_lib.logical_axes(WIDE), params, over))
    before = weights.fingerprint(params)
    settings = DistillSpec(policy="online", loss_temperature=2.0)
    distillation = Distillation(settings, teacher._replace(params=params), Compute(dtype))
    student = model()
    state = state_lib.from_params(student.params, TINY, optimizer, mesh)
    loss = distill.loss(distillation, student, COMPUTE)
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), TINY, optimizer, mesh)
    layout = Layout(len(TOKENS), max_length=16, row_length=24, row_multiple=mesh_lib.batch_devices(mesh))
    batch = state_lib.place(batches.arrange(TOKENS, PROMPTS, layout), mesh)
    numbers = []
    for _ in range(3):
        state, metrics = update(state, batch, distill.guide(distillation))
        numbers += [float(metrics.loss), float(metrics.gradient_norm), float(metrics.statistics["teacher_entropy"])]
    rtol = 3e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(numbers, wanted.setdefault(dtype, numbers), rtol=rtol)
    assert weights.fingerprint(params) == before
    if over is not None:
        q = params["layers"]["q"]
        assert q.sharding.mesh.shape != state.params["layers"]["q"].sharding.mesh.shape
assert wanted["float32"] != wanted["bfloat16"]
print("equal")
"""


@pytest.mark.long
def test_on_eight_devices_with_the_teacher_laid_out_otherwise():
    done = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
