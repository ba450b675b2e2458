import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from kd_jax.lm import model
from kd_jax.lm.model import PRESETS, Architecture, Compute, attention, rotary
from kd_jax.parallel import mesh as mesh_lib

TINY = PRESETS["tiny"]
SMALL = dataclasses.replace(TINY, num_hidden_layers=2)  # compiles quicker
VARIANTS = {
    "grouped, tied": TINY,
    "a kv head for each query head, untied": dataclasses.replace(
        TINY, num_key_value_heads=4, rope_theta=1e5, tie_word_embeddings=False
    ),
    "one kv head, head_dim 6": dataclasses.replace(
        TINY, num_hidden_layers=2, num_key_value_heads=1, head_dim=6, rope_theta=1.3e5
    ),
    "six heads in threes, eps 0.1": dataclasses.replace(
        TINY, num_hidden_layers=2, num_attention_heads=6, head_dim=10, rms_norm_eps=0.1
    ),
}


@functools.cache
def weights_of(architecture):
    """Random weights whose norm gains are not all 1, so that one left out or in the wrong place shows."""
    random = np.random.RandomState(0)
    scale = 1.2 * architecture.hidden_size**-0.5

    def draw(path, leaf):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        return jnp.asarray(scale * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract(architecture))


def tokens_of(architecture, *shape, seed=0):
    return np.random.RandomState(seed).randint(0, architecture.vocab_size, shape)


@functools.partial(jax.jit, static_argnums=1, static_argnames="compute")
def forward(params, architecture, tokens, **options):
    return model.forward(params, architecture, tokens, **options)


extend = jax.jit(model.extend, static_argnums=1)


def reference_hidden(params, a, tokens, positions=None):
    """The Llama model from its definition: one sequence [position], one head at a time, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = np.arange(len(tokens)) if positions is None else positions
    pairs = np.arange(a.head_dim // 2)
    angles = positions[:, None] / a.rope_theta ** (2 * pairs / a.head_dim)

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + a.rms_norm_eps) * gain

    def rotate(x):
        turned = (x[:, pairs] + 1j * x[:, pairs + a.head_dim // 2]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def head(x, w, number):
        kv = number // (a.num_attention_heads // a.num_key_value_heads)
        rows, kv_rows = (slice(i * a.head_dim, (i + 1) * a.head_dim) for i in (number, kv))
        scores = rotate(x @ w["q"][rows].T) @ rotate(x @ w["k"][kv_rows].T).T / np.sqrt(a.head_dim)
        weights = np.tril(np.exp(scores - scores.max(axis=-1, keepdims=True)))
        return weights / weights.sum(axis=-1, keepdims=True) @ (x @ w["v"][kv_rows].T)

    x = params["embedding"][tokens]
    for i in range(a.num_hidden_layers):
        w = {name: stacked[i] for name, stacked in params["layers"].items()}
        h = norm(x, w["attention_norm"])
        x = x + np.concatenate([head(h, w, n) for n in range(a.num_attention_heads)], axis=-1) @ w["o"].T
        h = norm(x, w["mlp_norm"])
        gate = h @ w["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T
    return norm(x, params["norm"])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "name, count", [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384)]
)
def test_parameter_counts(name, count):
    a = PRESETS[name]
    attention = 2 * a.hidden_size * a.head_dim * (a.num_attention_heads + a.num_key_value_heads)
    layer = attention + 3 * a.hidden_size * a.intermediate_size + 2 * a.hidden_size
    tied = a.vocab_size * a.hidden_size + a.num_hidden_layers * layer + a.hidden_size
    assert a.num_parameters == tied == count
    untied = dataclasses.replace(a, tie_word_embeddings=False)
    assert untied.num_parameters == count + a.vocab_size * a.hidden_size


@pytest.mark.parametrize("architecture", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_the_definition(architecture):
    params, tokens = weights_of(architecture), tokens_of(architecture, 2, 20)
    assert ("head" in params) != architecture.tie_word_embeddings
    projection = np.asarray(params["embedding" if architecture.tie_word_embeddings else "head"], np.float64)
    hidden = forward(params, architecture, tokens)
    ours = model.logits(params, architecture, hidden)
    assert hidden.dtype == ours.dtype == jnp.float32
    for row in range(2):
        reference = reference_hidden(params, architecture, tokens[row]) @ projection.T
        np.testing.assert_allclose(log_softmax(ours[row]), log_softmax(reference), rtol=0, atol=1e-5)


def test_rotary_phases():
    a = PRESETS["smollm2-135m"]
    assert (a.head_dim, a.rope_theta) == (64, 100000.0)
    cos, sin = (np.asarray(x)[0, :, 0] for x in rotary.phases(jnp.array([[0, 1, 1000]]), a.rope_theta, 64, None))
    assert cos.shape == (3, 32) and cos.dtype == np.float32
    np.testing.assert_array_equal(cos[0], 1)
    np.testing.assert_allclose(np.arctan2(sin[1, 1], cos[1, 1]), 0.6978306, atol=1e-6)
    # an angle past half a turn: 3.1622777 - 2 pi
    np.testing.assert_allclose(np.arctan2(sin[2, 16], cos[2, 16]), 3.1622777 - 2 * np.pi, atol=2e-6)


def reference_attention(q, k, v, segments):
    """Softmax attention of one row, position by position, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for i in range(len(q)):
        seen = np.flatnonzero(segments[: i + 1] == segments[i])
        for head in range(q.shape[1]):
            kv = head // (q.shape[1] // k.shape[1])
            weights = np.exp(k[seen, kv] @ q[i, head] / np.sqrt(q.shape[2]))
            out[i, head] = weights / weights.sum() @ v[seen, kv]
    return out.reshape(len(q), -1)


@pytest.mark.slow
@pytest.mark.parametrize("segmented, blocks", [(False, (7, 16)), (True, (1, 7, 16, 128))])
def test_attention_kinds_agree(segmented, blocks):
    random = np.random.RandomState(0)
    q, k, v = (random.standard_normal((2, 17, heads, 6)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.array([[0] * 5 + [1] * 12, [7] * 16 + [2]]) if segmented else None
    causal = jax.jit(attention.causal, static_argnames=("kind", "block"))
    for kind, block in [("xla", 128), *(("blocked", n) for n in blocks)]:
        out = causal(q, k, v, segments, kind=kind, block=block)
        for row in range(2):
            reference = reference_attention(q[row], k[row], v[row], segments[row] if segmented else np.zeros(17))
            np.testing.assert_allclose(out[row], reference, atol=1e-5, err_msg=f"{kind} {block}")


def test_compute_picks_the_attention(monkeypatch):
    asked = []

    def causal(q, k, v, segments, kind, block, rule, mesh):
        asked.append((kind, block))
        return jnp.zeros((*q.shape[:2], q.shape[2] * q.shape[3]))

    monkeypatch.setattr(attention, "causal", causal)
    params, compute = model.abstract(SMALL), Compute(attention="xla", query_block=5)
    shape = jax.eval_shape(lambda params: model.forward(params, SMALL, jnp.zeros((1, 4), int), compute=compute), params)
    assert shape.shape == (1, 4, 48) and set(asked) == {("xla", 5)}


@pytest.mark.slow
@pytest.mark.parametrize("given_positions", [True, False], ids=["own positions", "positions of the row"])
def test_packed_segments_are_separate_sequences(given_positions):
    params, lengths = weights_of(SMALL), (1, 8, 4, 7)
    rows = [tokens_of(SMALL, n, seed=n) for n in lengths]
    segments = np.repeat(np.arange(4), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None] if given_positions else None
    # rotary embedding sees differences of positions only, so where a sequence starts does not matter
    packed = forward(params, SMALL, np.concatenate(rows)[None], segments=segments, positions=positions)[0]
    for row, part in zip(rows, np.split(packed, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_allclose(part, reference_hidden(params, SMALL, row), atol=1e-5)


def test_padding_changes_nothing():
    params, tokens, pads = weights_of(SMALL), tokens_of(SMALL, 15), 5
    alone = reference_hidden(params, SMALL, tokens)
    padded = np.concatenate([np.full(pads, 3), tokens])[None]
    segments, positions = (np.arange(20) >= pads).astype(int)[None], np.maximum(np.arange(20) - pads, 0)[None]
    left = forward(params, SMALL, padded, segments=segments, positions=positions)[0, pads:]
    np.testing.assert_allclose(left, alone, atol=1e-5)

    fills = [np.concatenate([tokens, np.full(pads, fill)])[None] for fill in (3, 250)]
    right = [np.asarray(forward(params, SMALL, fill)[0, :15]) for fill in fills]
    np.testing.assert_allclose(right[0], alone, atol=1e-5)
    np.testing.assert_array_equal(right[0], right[1])


def in_pieces(params, tokens, cache, size):
    parts = []
    for start in range(0, tokens.shape[1], size):
        piece = tokens[:, start : start + size]
        positions = np.broadcast_to(start + np.arange(piece.shape[1]), piece.shape)
        hidden, cache = extend(params, SMALL, cache, piece, positions)
        parts.append(hidden)
    return np.concatenate(parts, axis=1), cache


@pytest.mark.slow
@pytest.mark.parametrize("rows, sizes, unstacked_sizes", [(1, [1], [12]), (3, [12, 3], [1])])
def test_extend_is_forward(rows, sizes, unstacked_sizes):
    params, tokens = weights_of(SMALL), tokens_of(SMALL, rows, 12)
    whole = np.stack([reference_hidden(params, SMALL, row) for row in tokens])
    # what was never written does not count: 50 would show
    cache = jax.tree.map(lambda x: np.full(x.shape, 50, x.dtype), model.empty_cache(SMALL, rows, 14))
    chex.assert_shape((*cache.keys, *cache.values), [(rows, 2, 16, 14)] * 2 + [(rows, 2, 14, 16)] * 2)
    unstacked = model.unstack(params)
    assert isinstance(unstacked["layers"], tuple) and len(unstacked["layers"]) == 2
    for weights, size in [*((params, n) for n in sizes), *((unstacked, n) for n in unstacked_sizes)]:
        hidden, _ = in_pieces(weights, tokens, cache, size)
        np.testing.assert_allclose(hidden, whole, atol=1e-4, err_msg=f"pieces of {size}")


def test_weights_that_are_only_sampled_from_are_held_once():
    given = jax.tree.map(jnp.array, weights_of(SMALL))
    copies = jax.tree.map(np.array, given["layers"])
    layers = model.unstack(given, delete=True)["layers"]
    assert all(stack.is_deleted() for stack in given["layers"].values()) and not given["embedding"].is_deleted()
    for name, stack in copies.items():
        np.testing.assert_array_equal([layer[name] for layer in layers], stack)
    assert model.unstack(given | {"layers": layers})["layers"] is layers


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_extend_from_prompts_of_different_lengths(side):
    params, starts, longest, steps = weights_of(SMALL), np.array([1, 2, 7, 8, 9]), 9, 4
    tokens, room = tokens_of(SMALL, 5, longest + steps), longest + steps
    whole = np.stack([reference_hidden(params, SMALL, row) for row in tokens])
    prompt, positions = np.full((5, longest), 3), np.full((5, longest), room)  # outside the cache: padding
    for row, n in enumerate(starts):
        place = slice(longest - n, longest) if side == "left" else slice(0, n)
        prompt[row, place], positions[row, place] = tokens[row, :n], np.arange(n)
    hidden, cache = jax.tree.map(
        np.asarray, extend(params, SMALL, model.empty_cache(SMALL, 5, room), prompt, positions)
    )
    for row, n in enumerate(starts):
        np.testing.assert_allclose(hidden[row][positions[row] < room], whole[row, :n], atol=1e-4)
        for keys, values in zip(*cache, strict=True):  # padding is not written
            assert keys[row, ..., :n].all() and not keys[row, ..., n:].any()
            assert values[row, :, :n].all() and not values[row, :, n:].any()
    rows = np.arange(5)
    for at in (starts + step for step in range(steps)):
        hidden, cache = extend(params, SMALL, cache, tokens[rows, at][:, None], at[:, None])
        np.testing.assert_allclose(hidden[:, 0], whole[rows, at], atol=1e-4)


@pytest.mark.slow
def test_compute_dtype_is_apart_from_that_of_the_weights():
    params, tokens = weights_of(SMALL), tokens_of(SMALL, 20)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact, rounded = (reference_hidden(weights, SMALL, tokens) for weights in (params, half))
    for weights in (params, half):
        hidden = forward(weights, SMALL, tokens[None], compute=Compute(dtype="bfloat16"))[0]
        assert hidden.dtype == jnp.bfloat16 and model.logits(weights, SMALL, hidden).dtype == jnp.float32
        difference = np.abs(np.asarray(hidden, np.float32) - exact)
        assert 1e-4 < difference.mean() < 0.03 and difference.max() < 0.3
    # bfloat16 weights in float32 arithmetic: exact up to the weights' own rounding
    assert np.abs(rounded - exact).max() > 1e-3
    widened = forward(half, SMALL, tokens[None])[0]
    assert widened.dtype == jnp.float32
    np.testing.assert_allclose(widened, rounded, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_right_and_remat_does_not_change_them():
    params, tokens = weights_of(SMALL), tokens_of(SMALL, 9)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, compute):
        def total(params):
            return (model.logits(params, SMALL, model.forward(params, SMALL, tokens[None], compute=compute)) ** 2).sum()

        return jax.grad(total)(params)

    plain, remat = gradient(params, Compute()), gradient(params, Compute(remat=True))
    chex.assert_tree_all_finite(plain)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-2), plain, remat)

    random = np.random.RandomState(0)
    direction = jax.tree.map(lambda x: random.standard_normal(x.shape), params)

    def moved(step):
        weights = jax.tree.map(lambda x, d: x + step * d, jax.tree.map(np.float64, params), direction)
        return ((reference_hidden(weights, SMALL, tokens) @ weights["embedding"].T) ** 2).sum()

    slope = sum((np.asarray(g) * d).sum() for g, d in zip(*map(jax.tree.leaves, (plain, direction)), strict=True))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ],
)
def test_architecture_faults(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int8"}, "int8.*float32, bfloat16 or float16"),
        ({"query_block": 0}, "query_block=0"),
        ({"attention": "flash"}, "flash.*auto, blocked, xla, cudnn"),
        ({"attention": "cudnn"}, "cudnn.*(needs a GPU|needs dtype)"),
    ],
)
def test_compute_faults(options, message):
    with pytest.raises(ValueError, match=message):
        Compute(**options)


@pytest.mark.parametrize("tied", [True, False])
def test_logical_axes_name_the_sizes(tied):
    architecture = dataclasses.replace(TINY, tie_word_embeddings=tied)
    shapes, axes = model.abstract(architecture, jnp.bfloat16), model.logical_axes(architecture)
    assert ("head" in shapes) != tied
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    # no two axes of this model have the same size, but for queries (64) and keys (32)
    names = {3: "layer", 320: "vocab", 48: "embed", 80: "mlp", 64: "heads", 32: "heads"}

    def check(leaf, axes):
        assert leaf.dtype == jnp.bfloat16 and axes == tuple(names[size] for size in leaf.shape)

    jax.tree.map(check, shapes, axes)


@pytest.mark.slow
def test_initial_weights():
    untied = dataclasses.replace(SMALL, tie_word_embeddings=False)
    params = jax.tree.map(np.asarray, jax.jit(model.init, static_argnums=1)(jax.random.key(3), untied))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.abstract(untied))
    first = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "norm" in jax.tree_util.keystr(path):
            assert (leaf == 1).all()
        else:
            np.testing.assert_allclose([leaf.mean(), leaf.std()], [0, 48**-0.5], atol=6 * 48**-0.5 / leaf.size**0.5)
            first.append(float(leaf.ravel()[0]))
    # each weight is drawn for itself, and each layer
    assert len(set(first)) == 9
    assert (params["layers"]["gate"][0] != params["layers"]["gate"][1]).mean() > 0.99


def test_mesh_sizes():
    # the size of a mesh does not depend on its devices being different ones
    eight = jax.devices()[:1] * 8
    assert dict(mesh_lib.make(devices=eight).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh_lib.make(2, -1, 2, eight).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh_lib.make(2, 2, 2, eight).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_lib.one_axis("sweep", eight).shape == {"sweep": 8}
    for sizes, message in [
        ((3, 1, 1), "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ((-1, 3, 1), "data=-1 x fsdp=3 x tensor=1 does not fit 8"),
        ((-1, 16, 1), "does not fit 8"),
        ((2, 2, 1), "does not fit 8"),
        ((-1, -1, 1), "one size may be -1"),
        ((0, 1, 1), "data=0"),
        ((-2, 1, 1), "data=-2"),
    ]:
        with pytest.raises(ValueError, match=message):
            mesh_lib.make(*sizes, eight)


def test_mesh_partitions():
    mesh = AbstractMesh((2, 2, 2), mesh_lib.AXES)
    assert mesh_lib.spec(("batch", None, "nothing"), mesh) == PartitionSpec(("data", "fsdp"), None, None)
    assert mesh_lib.spec(("layer", "heads", "embed"), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert mesh_lib.spec(("vocab", "embed"), AbstractMesh((8, 1, 1), mesh_lib.AXES)) == PartitionSpec(None, None)
    # two axes of one array over one axis of the mesh: JAX refuses the sharding
    for axes, name in ((("batch", "embed"), "fsdp"), (("vocab", "mlp"), "tensor")):
        with pytest.raises(Exception, match=name):  # its class is not public
            NamedSharding(mesh, mesh_lib.spec(axes, mesh))

    shardings = mesh_lib.shardings(model.logical_axes(TINY), model.abstract(TINY), mesh)
    assert shardings["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["layers"]["down"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings["norm"].spec == PartitionSpec("fsdp")


@pytest.mark.parametrize(
    "sizes, message",
    [
        # 48 wide: not in 5; 4 query heads of 16 = 64 and 80 for the MLP: not in 3, and neither is the vocabulary
        ((1, 5, 1), r"'embedding'.*axis 'embed' of size 48.*fsdp = 5 devices"),
        ((1, 1, 3), r"'embedding'.*axis 'vocab' of size 320.*tensor = 3 devices"),
        ((1, 1, 5), r"'layers'.*'k'.*axis 'heads' of size 32.*tensor = 5 devices"),
        ((1, 1, 32), r"'layers'.*'down'.*axis 'mlp' of size 80.*tensor = 32 devices"),
    ],
)
def test_axis_that_does_not_divide_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.shardings(model.logical_axes(TINY), model.abstract(TINY), AbstractMesh(sizes, mesh_lib.AXES))


def test_head_dims_that_need_not_make_up_the_width():
    a = Architecture(
        vocab_size=10, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rope_theta=1e4,
    )  # fmt: skip
    shapes = model.abstract(a)["layers"]
    assert (shapes["q"].shape, shapes["k"].shape, shapes["o"].shape) == ((1, 16, 6), (1, 8, 6), (1, 6, 16))
