"""The chunked output projection against its dense definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import fused

VOCAB, WIDTH = 37, 9
# shape of the positions, and tokens at a time: one, some that do not divide the positions, more than there are
CASES = [((13,), 7), ((3, 11), 1), ((3, 11), 7), ((3, 11), 1000), ((2, 3, 5), 13), ((13,), None)]

log_prob = jax.jit(fused.linear_log_prob, static_argnames=("entropy", "chunk", "num_tokens"))
cross_entropy = jax.jit(fused.linear_cross_entropy, static_argnames="chunk")


def inputs(shape, dtype=jnp.float32, scale=1.0):
    """Random hidden [*shape, width], head [vocab, width] and labels [*shape]."""
    random = np.random.RandomState(len(shape))
    hidden = jnp.asarray(scale * random.standard_normal((*shape, WIDTH)), dtype)
    return hidden, jnp.asarray(random.standard_normal((VOCAB, WIDTH)), dtype), random.randint(0, VOCAB, shape)


def wide(array):
    return np.asarray(array, np.float64)


def log_softmax(hidden, head):
    logits = wide(hidden) @ wide(head).T
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def of_labels(log_probs, labels):
    return np.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def check_log_prob(hidden, head, labels, chunk=None, atol=2e-5, rtol=1e-6):
    got, entropy = log_prob(hidden, head, labels, entropy=True, chunk=chunk)
    expected = log_softmax(hidden, head)
    assert got.dtype == entropy.dtype == jnp.float32 and got.shape == entropy.shape == labels.shape
    np.testing.assert_allclose(got, of_labels(expected, labels), rtol=rtol, atol=atol)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(axis=-1), rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape, chunk", CASES)
def test_log_prob_and_entropy(shape, chunk):
    check_log_prob(*inputs(shape), chunk)


def test_log_prob_without_entropy():
    hidden, head, labels = inputs((3, 11))
    got, entropy = log_prob(hidden, head, labels, chunk=7)
    assert entropy is None
    np.testing.assert_allclose(got, of_labels(log_softmax(hidden, head), labels), atol=2e-5)


def test_log_prob_of_very_peaked_logits():
    # logits reach thousands, so that nearly all probabilities are 0 in float32
    check_log_prob(*inputs((3, 11), scale=1000.0), chunk=7, rtol=2e-6, atol=2e-3)
    hidden, head = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0], [0.0], [-1.0]])
    got, entropy = log_prob(hidden, head, np.array([2, 2]), entropy=True)
    np.testing.assert_array_equal(got, [-2e4, 0])
    np.testing.assert_array_equal(entropy, [0, 0])


def test_log_prob_of_bfloat16_keeps_float32_logits():
    hidden, head, labels = inputs((3, 11), jnp.bfloat16, scale=3.0)
    check_log_prob(hidden, head, labels, chunk=7)
    # weights are rounded to the hidden states' precision, as a model's own products are
    got, _ = log_prob(hidden, head.astype(jnp.float32), labels)
    np.testing.assert_allclose(got, of_labels(log_softmax(hidden, head), labels), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape, chunk", CASES)
def test_map_joins_trees_in_order(shape, chunk):
    hidden, head, labels = inputs(shape)
    weights = np.random.RandomState(1).standard_normal(shape).astype(np.float32)
    rows, tokens = int(np.prod(shape[:-1])), int(np.prod(shape))
    seen = []

    def function(logits, label, weight):
        seen.append(logits.size // VOCAB)
        assert logits.dtype == jnp.float32 and label.shape == weight.shape == logits.shape[:-1]
        pairs = jnp.stack([logits[..., :3], logits[..., 3:6]], axis=-1)
        return {"pairs": pairs, "rest": (label, logits.argmax(axis=-1) < 18), "weighted": logits * weight[..., None]}

    got = jax.jit(lambda *arrays: fused.linear_map(function, *arrays, chunk=chunk))(hidden, head, labels, weights)
    logits = wide(hidden) @ wide(head).T
    assert got["pairs"].shape == (*shape, 3, 2)
    np.testing.assert_allclose(got["pairs"], np.stack([logits[..., :3], logits[..., 3:6]], axis=-1), atol=2e-5)
    np.testing.assert_array_equal(got["rest"][0], labels)
    np.testing.assert_array_equal(got["rest"][1], logits.argmax(axis=-1) < 18)
    np.testing.assert_allclose(got["weighted"], logits * weights[..., None], atol=2e-5)
    # a position of every row is the least that can be held at a time
    assert max(seen) <= max(rows, min(tokens, chunk or fused.chunk_tokens()))


def masks(shape):
    count, random = int(np.prod(shape)), np.random.RandomState(7)
    one_row = np.zeros(shape, bool)
    one_row[-1] = True  # one position where there is one axis
    one = (np.arange(count) == count - 1).reshape(shape)
    return {"all": np.ones(shape, bool), "some": random.rand(*shape) < 0.4, "one row": one_row, "one": one}


def dense(hidden, head, labels, mask):
    """Values of the masked positions, gradients of their mean with respect to hidden and head."""
    log_probs = log_softmax(hidden, head)
    values = -of_labels(log_probs, np.where(mask, labels, 0))[mask]
    by_logits = np.exp(log_probs) - np.eye(VOCAB)[np.where(mask, labels, 0)]
    by_logits = np.where(mask[..., None], by_logits, 0) / max(1, mask.sum())
    by_head = np.einsum("nv,nd->vd", by_logits.reshape(-1, VOCAB), wide(hidden).reshape(-1, WIDTH))
    return values, by_logits @ wide(head), by_head


@functools.partial(jax.jit, static_argnames=("chunk", "factor", "num_tokens"))
def value_and_gradients(hidden, head, labels, mask, chunk=None, factor=1, num_tokens=None):
    def loss(hidden, head):
        return factor * fused.linear_cross_entropy(hidden, head, labels, mask, num_tokens=num_tokens, chunk=chunk).mean

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


@pytest.mark.fast(2)
@pytest.mark.parametrize("shape, chunk", CASES)
def test_cross_entropy_and_its_gradients(shape, chunk):
    hidden, head, labels = inputs(shape)
    for name, mask in masks(shape).items():
        some = np.where(mask, labels, -100)  # what the mask leaves out need not be an id
        values, by_hidden, by_head = dense(hidden, head, labels, mask)
        got = cross_entropy(hidden, head, some, mask, chunk=chunk)
        assert got.count == mask.sum() and got.num_infinite == 0, name
        np.testing.assert_allclose(got.mean, values.mean(), rtol=1e-5, err_msg=name)
        if len(values) > 1:
            error = values.std(ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(got.standard_error, error, rtol=1e-4, err_msg=name)
        value, gradients = value_and_gradients(hidden, head, some, mask, chunk=chunk)
        np.testing.assert_allclose(value, values.mean(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradients[0], by_hidden, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradients[1], by_head, rtol=1e-4, atol=1e-6, err_msg=name)
        assert not np.asarray(gradients[0])[~mask].any(), name


def test_cross_entropy_under_an_outer_factor():
    hidden, head, labels = inputs((3, 11))
    mask = masks((3, 11))["some"]
    values, *expected = dense(hidden, head, labels, mask)
    value, gradients = value_and_gradients(hidden, head, labels, mask.astype(np.int32), chunk=7, factor=3)
    np.testing.assert_allclose(value, 3 * values.mean(), rtol=1e-5)
    for got, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, 3 * reference, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_cross_entropy_of_nothing_is_0():
    hidden, head, _ = inputs((3, 11), jnp.bfloat16)
    labels, mask = np.full((3, 11), -100), np.zeros((3, 11), bool)
    got = cross_entropy(hidden, head, labels, mask, chunk=7)
    assert got.mean == 0 and got.count == 0 and got.num_infinite == 0
    value, gradients = value_and_gradients(hidden, head, labels, mask, chunk=7)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(wide(gradient), 0)


def test_cross_entropy_of_very_peaked_logits():
    hidden, head, labels = inputs((3, 11), scale=1000.0)
    values, _, by_head = dense(hidden, head, labels, np.ones((3, 11), bool))
    value, (by_hidden, got) = value_and_gradients(hidden, head, labels, np.ones((3, 11), bool), chunk=7)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    assert np.isfinite(by_hidden).all()
    np.testing.assert_allclose(got, by_head, rtol=1e-3, atol=1e-2)


def test_cross_entropy_of_bfloat16():
    hidden, head, labels = inputs((3, 11), jnp.bfloat16)
    mask = masks((3, 11))["some"]
    values, *expected = dense(hidden, head, labels, mask)
    # master weights are float32; these have bfloat16 values, so that nothing is lost in rounding them
    value, gradients = value_and_gradients(hidden, head.astype(jnp.float32), labels, mask, chunk=7)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    for got, reference in zip(gradients, expected, strict=True):
        assert np.abs(wide(got) - reference).max() < 0.01 * np.abs(reference).max()


def of_values(values):
    """Hidden states whose cross-entropies of label 0 are `values`: logits are 0 and z, and log(1 + e^z) is wanted."""
    values = np.asarray(values, np.float64)
    hidden = jnp.asarray(np.log(np.expm1(values))[:, None], jnp.float32)
    return hidden, jnp.array([[0.0], [1.0]]), np.zeros(len(values), int), np.ones(len(values), bool)


def test_micro_batches_merge_into_the_whole_batch():
    values = [1.0, 3.0] + [0.5] * 6
    merged = cross_entropy(*of_values(values[:2])).merge(cross_entropy(*of_values(values[2:])))
    whole = cross_entropy(*of_values(values))
    for got in (merged, whole):
        # by tokens; the mean of the two means would be 1.25
        np.testing.assert_allclose(got.mean, 0.875, rtol=1e-5)
        np.testing.assert_allclose(got.standard_error, np.std(values, ddof=1) / np.sqrt(8), rtol=1e-5)
        assert got.count == 8
    nothing = cross_entropy(*of_values(values)[:3], np.zeros(8, bool))
    for got in (nothing.merge(whole), whole.merge(nothing)):
        np.testing.assert_allclose([got.mean, got.count], [0.875, 8], rtol=1e-5)


def test_gradient_of_merged_micro_batches():
    hidden, head, labels = inputs((4, 11))
    mask = np.arange(11) < np.array([11, 9, 2, 1])[:, None]

    def loss(hidden, head):
        first, second = (
            fused.linear_cross_entropy(hidden[part], head, labels[part], mask[part], chunk=7)
            for part in (np.s_[:2], np.s_[2:])
        )
        return first.merge(second).mean

    values, *expected = dense(hidden, head, labels, mask)
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    for got, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-6)


def test_float32_products_are_float32_on_every_device():
    # a GPU or TPU would take fewer bits unless asked; a CPU shows no difference, so the program is read
    hidden, head, labels = inputs((3, 11))
    program = value_and_gradients.lower(hidden, head, labels, np.ones((3, 11), bool)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096,), (8, 512)])
def test_logits_of_all_tokens_never_exist(shape):
    vocab, width, tokens = 8192, 16, 4096
    arguments = (
        jax.ShapeDtypeStruct((*shape, width), jnp.float32), jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool),
    )  # fmt: skip

    def temporary(function):
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def dense_mean(hidden, head, labels, mask):
        total = jax.nn.log_softmax(hidden @ head.T)
        return jnp.take_along_axis(total, labels[..., None], axis=-1).mean()

    def mean(*arrays):
        return fused.linear_cross_entropy(*arrays, chunk=128).mean

    def entropy(hidden, head, labels, mask):
        return fused.linear_log_prob(hidden, head, labels, entropy=True, chunk=128)

    logits = tokens * vocab * 4
    if len(shape) == 1:
        assert temporary(dense_mean) >= logits  # the measure sees them where they are
    for function in (mean, jax.value_and_grad(mean, (0, 1)), entropy):
        assert temporary(function) < logits / 8


@pytest.mark.parametrize("label", [-1, -100, 30, 31])
def test_a_label_that_is_no_id_makes_loss_and_gradient_nan(label):
    hidden, head = jnp.ones((4, 6)), jnp.ones((30, 6))
    labels = jnp.array([1, 2, label, 3])

    def loss(hidden, head, mask):
        return fused.linear_cross_entropy(hidden, head, labels, mask).mean

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head, jnp.ones(4, bool))
    assert np.isnan(value) and all(np.isnan(g).all() for g in gradients)
    assert np.isfinite(loss(hidden, head, labels != label))


def test_a_padded_vocabulary_has_probability_0():
    hidden, head, labels = inputs((3, 11))
    real, mask = 30, masks((3, 11))["some"]
    labels = labels % real
    got, entropy = log_prob(hidden, head, labels, entropy=True, chunk=7, num_tokens=real)
    wanted = log_softmax(hidden, head[:real])
    np.testing.assert_allclose(got, of_labels(wanted, labels), rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(wanted) * wanted).sum(axis=-1), rtol=1e-6, atol=2e-5)
    value, (by_hidden, by_head) = value_and_gradients(hidden, head, labels, mask, chunk=7, num_tokens=real)
    cut_value, (cut_by_hidden, cut_by_head) = value_and_gradients(hidden, head[:real], labels, mask, chunk=7)
    np.testing.assert_allclose(value, cut_value, rtol=1e-6)
    np.testing.assert_allclose(value, -of_labels(wanted, labels)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(by_hidden, cut_by_hidden, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(by_head[:real], cut_by_head, rtol=1e-5, atol=1e-7)
    assert not np.asarray(by_head)[real:].any()
    # a label among the padding is no id
    padding = np.full((3, 11), real)
    assert np.isnan(value_and_gradients(hidden, head, padding, mask, chunk=7, num_tokens=real)[0])


@pytest.mark.slow
def test_numbers_are_the_same_with_float64_enabled():
    hidden, head, labels = inputs((3, 11))
    mask = masks((3, 11))["some"]

    def everything():
        mean = fused.linear_cross_entropy(hidden, head, labels, mask, chunk=7)
        scores = fused.linear_log_prob(hidden, head, labels, entropy=True, chunk=7)
        return mean, scores, value_and_gradients(hidden, head, labels, mask, chunk=7)

    wanted = jax.tree.leaves(everything())
    with jax.enable_x64(True):
        got = jax.tree.leaves(everything())
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_go_together_are_named():
    for hidden, labels, mask in [((2, 3, 6), (2, 3), (3,)), ((2, 3, 6), (3,), (3,)), ((0, 3, 6), (0, 3), (0, 3))]:
        with pytest.raises(ValueError, match="shapes do not go together"):
            fused.linear_cross_entropy(jnp.ones(hidden), jnp.ones((30, 6)), jnp.ones(labels, int), jnp.ones(mask, bool))
