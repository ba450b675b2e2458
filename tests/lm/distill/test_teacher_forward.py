import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm.distill import teacher_forward as teacher
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.parallel import mesh as mesh_lib

TINY = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)  # compiles quicker
VOCAB = TINY.vocab_size
REAL = 301  # ids of a vocabulary that is padded to VOCAB
LENGTHS = np.array([9, 1, 5, 0, 9])
INSIDE = np.arange(9) < LENGTHS[:, None]
TOKENS = np.random.RandomState(0).randint(0, REAL, (5, 9))
# at the start, in the middle, twice, last of a row, and beyond some rows' length
POSITIONS = np.array([[0, 8, 4, 4], [0, 1, 8, 3], [4, 5, 0, 1], [0, 1, 2, 3], [7, 8, 0, 2]])
ARRAYS = {"hidden": (TOKENS, LENGTHS), "logits": (TOKENS, LENGTHS, POSITIONS), "top_k": (TOKENS, LENGTHS)}
OPTIONS = {"hidden": {}, "logits": {}, "top_k": {"k": 6}}


@functools.cache
def tiny():
    """A model of REAL ids; those of the padding would be the most probable."""
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda leaf: 0.15 * random.standard_normal(leaf.shape), model_lib.abstract(TINY))
    params["norm"] = random.uniform(0.5, 1.5, params["norm"].shape)
    params["embedding"][REAL:] *= 20
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return Model(TINY, params, tokenizer=types.SimpleNamespace(vocab_size=REAL))


@functools.cache
def reference():
    """Hidden states of each row run by itself, without padding, and the float64 logits of all ids."""
    forward = jax.jit(model_lib.forward, static_argnums=1)
    hidden = np.zeros((5, 9, TINY.hidden_size))
    for row, length in enumerate(LENGTHS):
        if length:
            hidden[row, :length] = forward(tiny().params, TINY, TOKENS[row : row + 1, :length])[0]
    return hidden, hidden @ np.asarray(model_lib.head(tiny().params), np.float64).T


@functools.cache
def by_jit(want):
    """What the model gives on one device, as NumPy arrays."""
    return jax.tree.map(np.asarray, teacher.jitted(tiny(), want=want, **OPTIONS[want])(*ARRAYS[want]))


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def makers():
    """The three forms on one device."""
    device = jax.devices()[:1]
    return {
        "jitted": teacher.jitted,
        "over_mesh": functools.partial(teacher.over_mesh, mesh=mesh_lib.make(devices=device)),
        "pmapped": functools.partial(teacher.pmapped, devices=device),
    }


def outputs(want):
    """What each form gives on one device; the first is worked out once for all tests."""
    others = {name: make for name, make in makers().items() if name != "jitted"}
    others = {name: make(tiny(), want=want, **OPTIONS[want])(*ARRAYS[want]) for name, make in others.items()}
    return {"jitted": by_jit(want), **others}


@pytest.mark.long
def test_hidden_states_are_those_of_each_row_alone():
    expected, _ = reference()
    for name, got in outputs("hidden").items():
        assert got.shape == (5, 9, TINY.hidden_size), name
        np.testing.assert_allclose(got, np.where(INSIDE[..., None], expected, 0), atol=1e-5, err_msg=name)
        assert not np.asarray(got)[~INSIDE].any(), name


@pytest.mark.slow
def test_logits_are_those_of_the_chosen_positions():
    rows = np.arange(5)[:, None]
    hidden, by_hand = reference()
    by_model = model_lib.logits(tiny().params, TINY, jnp.asarray(hidden, jnp.float32))
    inside = INSIDE[rows, POSITIONS]
    for name, got in outputs("logits").items():
        assert got.shape == (5, 4, REAL) and got.dtype == np.float32, name
        for expected in (by_hand, np.asarray(by_model)):
            expected = np.where(inside[..., None], expected[rows, POSITIONS][..., :REAL], 0)
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_top_k_is_that_of_a_sort_of_the_real_ids():
    _, logits = reference()
    assert logits.argmax(axis=-1)[INSIDE].min() >= REAL  # where padding had a part, it would be on top
    log_probs = log_softmax(logits[..., :REAL])
    order = np.argsort(-log_probs, axis=-1)
    best = np.take_along_axis(log_probs, order, axis=-1)
    rest = np.log(np.exp(best[..., 6:]).sum(axis=-1))
    for name, out in outputs("top_k").items():
        assert out.log_probs.dtype == out.tail.dtype == np.float32 and out.ids.dtype == np.int32, name
        assert out.log_probs.shape == out.ids.shape == (5, 9, 6), name
        np.testing.assert_array_equal(np.asarray(out.ids)[INSIDE], order[..., :6][INSIDE], err_msg=name)
        expected = np.where(INSIDE[..., None], best[..., :6], -np.inf)
        np.testing.assert_allclose(out.log_probs, expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(out.tail, np.where(INSIDE, rest, -np.inf), atol=1e-5, err_msg=name)


def test_top_k_of_all_ids_leaves_nothing():
    # what lies beyond the lengths need not be an id
    out = teacher.jitted(tiny(), want="top_k", k=REAL)(np.where(INSIDE, TOKENS, -100), LENGTHS)
    assert (np.asarray(out.tail) == -np.inf).all()
    np.testing.assert_allclose(np.exp(np.asarray(out.log_probs, np.float64)).sum(-1)[INSIDE], 1, rtol=1e-5)
    every = np.broadcast_to(np.arange(REAL), (5, 9, REAL))
    np.testing.assert_array_equal(np.sort(out.ids, axis=-1)[INSIDE], every[INSIDE])


def test_tail_of_a_peaked_model_is_exact():
    # layers add nothing and all ids have one embedding, so that logits are known: 25, 24, 23 and 0 for all others
    architecture = dataclasses.replace(TINY, tie_word_embeddings=False)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model_lib.abstract(architecture))
    params["embedding"] += 1
    params["norm"] += np.float32(np.sqrt(1 + architecture.rms_norm_eps))
    top = np.array([25.0, 24.0, 23.0])
    params["head"][[7, 300, 4], 5] = top
    params = jax.device_put(params)
    logits = teacher.jitted(Model(architecture, params), want="logits")([[3]], [1], [[0]])
    np.testing.assert_allclose(np.sort(logits[0, 0])[::-1][:4], [*top, 0], rtol=1e-6)

    out = teacher.jitted(Model(architecture, params), want="top_k", k=3)([[3]], [1])
    rest = VOCAB - 3
    expected = rest / (np.exp(top).sum() + rest)
    assert 1e-10 < expected < 1e-8
    np.testing.assert_allclose(np.exp(np.float64(out.tail[0, 0])), expected, rtol=1e-3)
    np.testing.assert_array_equal(out.ids[0, 0], [7, 300, 4])
    np.testing.assert_allclose(out.log_probs[0, 0], top - np.log(np.exp(top).sum() + rest), atol=1e-5)


def test_bfloat16_gives_hidden_states_of_it_and_float32_logits():
    for want, dtype in {"hidden": jnp.bfloat16, "logits": jnp.float32}.items():
        options = {"want": want, "compute": Compute("bfloat16")}
        out = jax.eval_shape(lambda *a, o=options: teacher.forward(tiny().params, TINY, *a, **o), *ARRAYS[want])
        assert out.dtype == dtype


def test_no_gradient_flows():
    full = np.full(5, 9)

    def total(params, want):
        arrays = (TOKENS, full, *ARRAYS[want][2:])
        out = teacher.forward(params, TINY, *map(jnp.asarray, arrays), want=want, **OPTIONS[want])
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(out))

    @jax.jit
    def every(params):
        return {want: jax.value_and_grad(total)(params, want) for want in teacher.WANTS}

    for want, (value, gradients) in every(tiny().params).items():
        assert np.isfinite(value) and value != 0, want
        for gradient in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(gradient, 0, err_msg=want)


DEVICES = """
import sys
import jax, numpy as np
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.lm.distill import teacher_forward as teacher
from tests.lm.distill import test_teacher_forward as here

assert jax.device_count() == 8
one, model = np.load(sys.argv[1]), here.tiny()
whole = (here.VOCAB, here.TINY.hidden_size)
# sizes of a mesh, and the part of the embedding that a device then holds
meshes = [((8, 1, 1), whole), ((2, 2, 2), (160, 24)), ((4, 1, 2), (160, 48))]
for want in teacher.WANTS:
    options = {"want": want, **here.OPTIONS[want]}
    # five rows: fewer than the devices, or two for each
    forms = {"pmapped": teacher.pmapped(model, jax.devices()[: 3 if want == "logits" else 8], **options)}
    for sizes, part in meshes:
        forms[str(sizes)] = teacher.over_mesh(model, mesh_lib.make(*sizes), **options)
        assert part in {x.sharding.shard_shape(whole) for x in jax.live_arrays() if x.shape == whole}
    for form, run in forms.items():
        for i, leaf in enumerate(jax.tree.leaves(run(*here.ARRAYS[want]))):
            expected = one[f"{want} {i}"]
            keep = np.broadcast_to(True, expected.shape)
            if expected.dtype == np.int32:  # ids beyond the lengths mean nothing
                keep = here.INSIDE
            np.testing.assert_allclose(np.asarray(leaf)[keep], expected[keep], rtol=0, atol=1e-5, err_msg=form)
            assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
    print("same", want, *forms)
"""


@pytest.mark.long
def test_eight_devices_give_the_same(tmp_path):
    leaves = {want: jax.tree.leaves(by_jit(want)) for want in teacher.WANTS}
    np.savez(tmp_path / "one.npz", **{f"{want} {i}": x for want in leaves for i, x in enumerate(leaves[want])})
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, tmp_path / "one.npz"], env=os.environ | flags, capture_output=True, text=True,
        timeout=300, cwd=pathlib.Path(__file__).parents[3],
    )  # fmt: skip
    forms = "pmapped (8, 1, 1) (2, 2, 2) (4, 1, 2)"
    assert done.stdout.splitlines() == [f"same {want} {forms}" for want in teacher.WANTS], done.stderr


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"want": "probs"}, "want='probs' must be one of hidden, logits, top_k"),
        ({"want": "top_k"}, "k=None must be from 1 to the model's 301 ids"),
        ({"want": "top_k", "k": 0}, "k=0 must be from 1 to"),
        ({"want": "top_k", "k": 302}, "k=302 must be from 1 to"),
    ],
)
def test_what_cannot_be_wanted_is_named(options, fault):
    for make in makers().values():
        with pytest.raises(ValueError, match=fault):
            make(tiny(), **options)


@pytest.mark.parametrize(
    "want, arrays, fault",
    [
        ("hidden", (TOKENS, LENGTHS[:4]), "broadcast"),
        ("hidden", (TOKENS.astype(np.int64) + 2**32, LENGTHS), "ids from .* must be from 0 to 300"),
        ("hidden", (TOKENS, LENGTHS + 1), "lengths from 1 to 10 must be from 0 to 9"),
        ("hidden", (TOKENS, LENGTHS - 1), "lengths from -1 to 8"),
        ("hidden", (np.where(TOKENS == TOKENS[0, 0], REAL, TOKENS), LENGTHS), "ids from .* to 301 must be"),
        ("hidden", (np.where(TOKENS == TOKENS[0, 0], -1, TOKENS), LENGTHS), "ids from -1 "),
        ("hidden", (TOKENS, LENGTHS, POSITIONS), "needs positions, and only that"),
        ("top_k", (TOKENS, LENGTHS, POSITIONS), "needs positions, and only that"),
        ("logits", (TOKENS, LENGTHS), "needs positions"),
        ("logits", (TOKENS, LENGTHS, POSITIONS + 1), "positions from .* must be from 0 to 8"),
        ("logits", (TOKENS, LENGTHS, POSITIONS - 1), "positions from .* must be from 0 to 8"),
    ],
)
def test_faults_in_arrays_are_named(want, arrays, fault):
    for make in makers().values():
        with pytest.raises(ValueError, match=fault):
            make(tiny(), want=want, **OPTIONS[want])(*arrays)
