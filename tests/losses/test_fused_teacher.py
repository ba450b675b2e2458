"""The chunked distillation losses against their dense definitions in float64."""

import functools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import fused, losses
from kd_jax.losses import reductions
from tests.losses import divergences as definition
from tests.losses.divergences import PARAMETERS
from tests.losses.test_divergences import P, Q, of_values, outcomes, top_k

NAMES = tuple(losses.DIVERGENCES)
# widths and padded vocabularies of teacher and student differ; the first 37 ids are real
REAL, TEACHER, STUDENT = 37, (40, 7), (43, 5)
SHAPE = (3, 11)
STATIC = ("divergence", "num_tokens", "chunk")


class Inputs:
    """Random hidden states, heads and labels."""

    def __init__(self, shape=SHAPE, scale=2.0, dtype=jnp.float32):
        random = np.random.default_rng(len(shape))

        def normal(*shape):
            return jnp.asarray(scale * random.standard_normal(shape), dtype)

        self.teacher = normal(*shape, TEACHER[1]), normal(*TEACHER) / 2
        self.student = normal(*shape, STUDENT[1]), normal(*STUDENT) / 2
        self.labels = random.integers(0, REAL, shape)
        self.masks = random.random((3, *shape)) < np.array([1.0, 0.4, 0.1]).reshape(3, *[1] * len(shape))
        self.logits = tuple(wide(h) @ wide(head).T[:, :REAL] for h, head in (self.teacher, self.student))


def wide(array):
    return np.asarray(array, np.float64)


@functools.partial(jax.jit, static_argnames=STATIC)
def _run(student, teacher, labels, mask, **settings):
    """Value, gradients and statistics of the fused loss."""

    def loss(hidden, head):
        mean, statistics = fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=teacher[0],
            teacher_head=teacher[1],
            labels=labels,
            mask=mask,
            **settings,
        )
        return mean.mean, (mean, statistics)

    (_, (mean, statistics)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*student)
    return mean, statistics, gradients


def run(
    inputs, mask, name="forward_kl", parameter=None, temperature=1.0, teacher_temperature=None, weight=0.0, chunk=7,
    **other,
):  # fmt: skip
    """The same; one program for a name, a chunk and a shape."""
    given = {"student": inputs.student, "teacher": inputs.teacher, "labels": inputs.labels, **other}
    if given["labels"] is not None:
        given["hard_weight"] = weight
    return _run(
        **given, mask=mask, divergence=name, parameter=PARAMETERS[name][0] if parameter is None else parameter,
        temperature=temperature, teacher_temperature=teacher_temperature or temperature, num_tokens=REAL, chunk=chunk,
    )  # fmt: skip


def dense(inputs, mask, name, parameter, temperature=1.0, teacher_temperature=None, weight=0.0):
    """Values of the masked positions, and the gradients of their mean, in float64."""
    teacher, student = inputs.logits
    args = name, teacher, student, parameter, temperature, teacher_temperature
    values, gradient = definition.value(*args), definition.gradient(*args)
    hard, hard_gradient = definition.cross_entropy(student, inputs.labels)
    soft_weight = (1 - weight) * temperature**2
    gradient = np.where(mask[..., None], soft_weight * gradient + weight * hard_gradient, 0) / max(1, mask.sum())
    return ((soft_weight * values + weight * hard)[mask], *back(inputs.student, gradient))


def back(student, gradient):
    """A gradient in the real ids' logits, brought back to hidden states and head."""
    hidden, head = map(wide, student)
    gradient = np.concatenate([gradient, np.zeros((*gradient.shape[:-1], len(head) - REAL))], axis=-1)
    by_head = gradient.reshape(-1, len(head)).T @ hidden.reshape(-1, hidden.shape[-1])
    return gradient @ head, by_head


def assert_close(got, wanted, rtol=1e-5, **kw):
    """To `rtol` of the largest element."""
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * abs(wanted).max(), **kw)


# --- equal to the definition ------------------------------------------------------------------------------------------


@pytest.mark.fast(1)
@pytest.mark.parametrize("name, parameter", [(name, p) for name in NAMES for p in PARAMETERS[name] if p != 2.0])
def test_value_and_gradients_are_the_dense_ones(name, parameter):
    inputs = Inputs()
    for chunk in (7, 1000) if parameter == PARAMETERS[name][0] else (7,):
        for mask in inputs.masks:
            for settings in ((1.0, None, 0.0), (4.0, None, 0.0), (0.5, None, 1.0), (2.0, 0.7, 0.3)):
                mean, _, gradients = run(inputs, mask, name, parameter, *settings, chunk=chunk)
                values, *wanted = dense(inputs, mask, name, parameter, *settings)
                np.testing.assert_allclose(mean.mean, values.mean(), rtol=1e-5)
                assert mean.count == mask.sum()
                for got, reference in zip(gradients, wanted, strict=True):
                    assert_close(got, reference, err_msg=f"{settings}, {chunk}")
                assert not np.asarray(gradients[0])[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("shape, chunk", [((13,), 7), ((3, 11), 1), ((2, 3, 5), 13), ((13,), None), ((1, 1), 4)])
def test_any_shape_and_chunk(shape, chunk):
    inputs = Inputs(shape)
    mask = inputs.masks[0]
    mean, _, gradients = run(inputs, mask, "skew_reverse_kl", 0.1, 2.0, None, 0.3, chunk)
    values, *wanted = dense(inputs, mask, "skew_reverse_kl", 0.1, 2.0, None, 0.3)
    np.testing.assert_allclose(mean.mean, values.mean(), rtol=1e-5)
    if values.size > 1:
        np.testing.assert_allclose(mean.standard_error, values.std(ddof=1) / np.sqrt(values.size), rtol=1e-4)
    for got, reference in zip(gradients, wanted, strict=True):
        assert_close(got, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_linear_divergence_has_no_factor(name):
    inputs, parameter = Inputs(), PARAMETERS[name][0]

    @jax.jit
    def loss(hidden, head):
        mean = fused.linear_divergence(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=inputs.teacher[0],
            teacher_head=inputs.teacher[1],
            mask=inputs.masks[1],
            divergence=name,
            temperature=2.0,
            num_tokens=REAL,
            chunk=7,
        )
        return 3 * mean.mean  # the gradient scales with what comes after

    mask = inputs.masks[1]
    value, gradients = jax.value_and_grad(loss, (0, 1))(*inputs.student)
    values, *wanted = dense(inputs, mask, name, parameter, 2.0)
    np.testing.assert_allclose(value, 3 * values.mean() / 4, rtol=1e-5)
    np.testing.assert_allclose(loss(*inputs.student), value, rtol=1e-6)
    for got, reference in zip(gradients, wanted, strict=True):
        assert_close(got, 3 / 4 * reference)


def test_statistics():
    inputs = Inputs()
    teacher, student = inputs.logits
    # the same most probable token in some places
    mask = inputs.masks[0].copy()
    mask[0, :2] = False
    mean, statistics, _ = run(inputs, mask, "forward_kl", None, 2.0, 0.7, 0.3)
    wanted = {
        "divergence": definition.value("forward_kl", teacher, student, None, 2.0, 0.7),
        "cross_entropy": definition.cross_entropy(student, inputs.labels)[0],
        "student_entropy": definition.entropy(student, 2.0),
        "teacher_entropy": definition.entropy(teacher, 0.7),
        "agreement": 1.0 * (teacher.argmax(axis=-1) == student.argmax(axis=-1)),
    }
    assert 0 < wanted["agreement"][mask].mean() < 1
    for name, values in wanted.items():
        got, values = getattr(statistics, name), values[mask]
        np.testing.assert_allclose([got.mean, got.count], [values.mean(), mask.sum()], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(got.standard_error, values.std(ddof=1) / np.sqrt(mask.sum()), rtol=1e-4)
    # without gradients, and without labels
    value, same = jax.jit(fused.linear_distillation, static_argnames=STATIC)(
        student_hidden=inputs.student[0],
        student_head=inputs.student[1],
        teacher_hidden=inputs.teacher[0],
        teacher_head=inputs.teacher[1],
        labels=None,
        mask=mask,
        temperature=2.0,
        teacher_temperature=0.7,
        num_tokens=REAL,
        chunk=7,
    )
    np.testing.assert_allclose(value.mean, 4 * wanted["divergence"][mask].mean(), rtol=1e-5)
    for name in set(wanted) - {"cross_entropy"}:
        np.testing.assert_allclose(getattr(same, name).mean, getattr(statistics, name).mean, rtol=1e-6)
    assert same.cross_entropy.count == same.cross_entropy.mean == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "alpha_divergence"])
def test_a_vocabulary_that_is_summed_in_blocks(name):
    random, vocab = np.random.default_rng(0), 2 * reductions.SUM_BLOCK + 452
    student, teacher = (
        (random.standard_normal((2, 3, 8), np.float32), random.standard_normal((vocab, 8), np.float32))
        for _ in range(2)
    )
    labels, mask = random.integers(0, vocab, (2, 3)), np.ones((2, 3), bool)
    # the rest beyond whole blocks counts too
    labels[0, 0] = vocab - 1
    z, other = (wide(hidden) @ wide(head).T for hidden, head in (student, teacher))
    # where both have the same most probable token
    teacher[1][z[1, 1].argmax()] += 5 * teacher[0][1, 1]
    other = wide(teacher[0]) @ wide(teacher[1]).T
    mean, statistics, gradients = _run(
        student, teacher, labels, mask, divergence=name, parameter=PARAMETERS[name][0], temperature=2.0,
        teacher_temperature=0.7, hard_weight=0.3, chunk=4,
    )  # fmt: skip
    args = name, other, z, PARAMETERS[name][0], 2.0, 0.7
    soft, gradient = definition.value(*args), definition.gradient(*args)
    hard, hard_gradient = definition.cross_entropy(z, labels)
    wanted = {
        "divergence": soft, "cross_entropy": hard, "student_entropy": definition.entropy(z, 2.0),
        "teacher_entropy": definition.entropy(other, 0.7), "agreement": 1.0 * (z.argmax(-1) == other.argmax(-1)),
    }  # fmt: skip
    assert 0 < wanted["agreement"].mean() < 1
    np.testing.assert_allclose(mean.mean, (0.7 * 4 * soft + 0.3 * hard).mean(), rtol=1e-5)
    for one, values in wanted.items():
        np.testing.assert_allclose(getattr(statistics, one).mean, values.mean(), rtol=1e-5, err_msg=one)
    by_logits = (0.7 * 4 * gradient + 0.3 * hard_gradient) / 6
    assert_close(gradients[0], by_logits @ wide(student[1]))
    assert_close(gradients[1], by_logits.reshape(6, -1).T @ wide(student[0]).reshape(6, -1))


@pytest.mark.slow
def test_statistics_and_settings_carry_no_gradient():
    inputs = Inputs()

    @jax.jit
    def gradient(teacher, student, scalars):
        def loss(teacher, student, scalars):
            temperature, beta, weight = scalars
            mean, statistics = fused.linear_distillation(
                student_hidden=student[0],
                student_head=student[1],
                teacher_hidden=teacher[0],
                teacher_head=teacher[1],
                labels=inputs.labels,
                mask=inputs.masks[0],
                divergence="jensen_shannon",
                temperature=temperature,
                parameter=beta,
                hard_weight=weight,
                num_tokens=REAL,
                chunk=7,
            )
            others = sum(getattr(statistics, name).mean for name in statistics._fields)
            return mean.mean, others + mean.m2

        return tuple(jax.grad(lambda *a, i=i: loss(*a)[i], (0, 1, 2))(teacher, student, scalars) for i in (0, 1))

    of_loss, of_others = gradient(inputs.teacher, inputs.student, (2.0, 0.5, 0.3))
    assert all(np.asarray(leaf).any() for leaf in of_loss[1])
    for leaf in jax.tree.leaves((of_loss[0], of_loss[2], of_others)):
        assert not np.asarray(leaf).any()


def test_a_teacher_with_the_students_own_arrays_stays_as_it_was():
    inputs = Inputs()
    start = inputs.student
    teacher, student = start, start

    @jax.jit
    def update(student):
        def loss(student):
            return fused.linear_distillation(
                student_hidden=student[0],
                student_head=student[1],
                teacher_hidden=teacher[0],
                teacher_head=teacher[1],
                labels=inputs.labels,
                mask=inputs.masks[0],
                hard_weight=0.5,
            )[0].mean

        return jax.tree.map(lambda leaf, slope: leaf - slope, student, jax.grad(loss)(student))

    before = [np.array(leaf) for leaf in teacher]
    for _ in range(3):
        student = update(student)
    for one, other, moved in zip(before, teacher, student, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (np.asarray(moved) != one).any()


# --- published cases, where logits are hidden states and the head is the identity -------------------------------------


@functools.partial(jax.jit, static_argnames=STATIC)
def of_logits(teacher, student, parameter=None, **settings):
    one = jnp.eye(teacher.shape[-1])
    mask = jnp.ones(teacher.shape[:-1], bool)

    def loss(student):
        mean, _ = fused.linear_distillation(
            student_hidden=student,
            student_head=one,
            teacher_hidden=teacher,
            teacher_head=one,
            labels=None,
            mask=mask,
            parameter=parameter,
            **settings,
        )
        return mean.mean

    return jax.value_and_grad(loss)(student)


@pytest.mark.slow
def test_published_values():
    p, q = P[None].astype(np.float32), Q[None].astype(np.float32)
    for name, wanted in {"forward_kl": 1.1018681, "reverse_kl": 1.0021042}.items():
        np.testing.assert_allclose(of_logits(p, q, divergence=name)[0], wanted, rtol=1e-6)
    for beta, wanted in ((0.0, 1.1018681), (1.0, 1.0021042), (0.1, 0.0926739), (0.5, 0.2306455), (0.9, 0.0864965)):
        np.testing.assert_allclose(of_logits(p, q, beta, divergence="jensen_shannon")[0], wanted, rtol=1e-6)
    teacher, student = np.float32([[2, 0, -1]]), np.float32([[0, 1, 0]])
    for temperature, wanted, tolerance in ((1, 0.9129829, 1e-6), (2, 1.0912223, 1e-6), (1000, 1.0004995, 1e-3)):
        got, gradient = of_logits(teacher, student, temperature=float(temperature))
        np.testing.assert_allclose(got, wanted, rtol=tolerance)
        if temperature == 2:
            np.testing.assert_allclose(gradient, [[-0.7089262, 0.4412777, 0.2676485]], rtol=1e-6)
    # a suppressed token: only the first three are real
    got, gradient = of_logits(np.float32([[1, 2, 0, 9]]), np.float32([[0, 1, 2, 9]]), num_tokens=3)
    np.testing.assert_allclose(got, 0.7299083, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.1546979, -0.4205125, 0.5752104, 0]], rtol=2e-6)
    # the mean does not grow with positions or vocabulary
    for shape, more in (((1, 1), 0), ((2, 5), 7)):
        many = (np.pad(np.tile(z[0], (*shape, 1)), [(0, 0)] * 2 + [(0, more)]) for z in (p, q))
        np.testing.assert_allclose(of_logits(*many, num_tokens=3)[0], 1.1018681, rtol=1e-6)


def test_padded_vocabularies_of_other_sizes():
    teacher, student = jnp.array([[2.0, 1, 0, -1, 4, 4]]), jnp.array([[0.0, 0, 1, 1, 3]])
    mask = jnp.ones(1, bool)
    args = {
        "teacher_hidden": teacher, "teacher_head": jnp.eye(6), "student_hidden": student, "student_head": jnp.eye(5),
        "mask": mask,
    }  # fmt: skip
    got = fused.linear_divergence(**args, divergence="forward_kl", num_tokens=4)
    np.testing.assert_allclose(got.mean, 0.9396690, rtol=1e-6)
    with pytest.raises(ValueError, match="vocabularies of 6 and 5"):
        fused.linear_divergence(**args, divergence="forward_kl")


@pytest.mark.slow
def test_nothing_to_learn_from_is_0_and_moves_nothing():
    inputs = Inputs(dtype=jnp.bfloat16)
    for labels in (inputs.labels - 100, None):
        mean, statistics, gradients = run(inputs, np.zeros(SHAPE, bool), labels=labels)
        assert mean.mean == mean.count == statistics.divergence.mean == 0
        assert not any(wide(leaf).any() for leaf in gradients)


def test_what_the_mask_leaves_out_may_be_anything():
    inputs, mask = Inputs(), np.arange(11) < np.array([11, 4, 0])[:, None]
    labels = np.where(mask, inputs.labels, -100)
    hidden, teacher = (jnp.where(mask[..., None], h, jnp.nan) for h in (inputs.student[0], inputs.teacher[0]))
    got = run(
        inputs, mask, "jensen_shannon", weight=0.3, labels=labels, student=(hidden, inputs.student[1]),
        teacher=(teacher, inputs.teacher[1]),
    )  # fmt: skip
    values, *wanted = dense(inputs, mask, "jensen_shannon", 0.5, weight=0.3)
    np.testing.assert_allclose(got[0].mean, values.mean(), rtol=1e-5)
    for gradient, reference in zip(got[2], wanted, strict=True):
        assert_close(gradient, reference)


@pytest.mark.slow
def test_micro_batches_merge_into_the_whole_batch():
    teacher, student = of_values([1.0, 3.0] + [0.5] * 6)
    one = jnp.eye(2)

    def part(student, where):
        mask = jnp.ones(len(range(*where.indices(8))), bool)
        return fused.linear_distillation(
            student_hidden=student[where],
            student_head=one,
            teacher_hidden=teacher[where],
            teacher_head=one,
            labels=None,
            mask=mask,
        )[0]

    def merged(student):
        return part(student, slice(2)).merge(part(student, slice(2, 8))).mean

    found = [jax.jit(jax.value_and_grad(f))(student) for f in (merged, lambda s: part(s, slice(8)).mean)]
    np.testing.assert_allclose([found[0][0], found[1][0]], 0.875, rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_bfloat16():
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.standard_normal((4, 64)), jnp.bfloat16)
    head = jnp.asarray(1.3 * random.standard_normal((49152, 64)), jnp.bfloat16)
    other = jnp.asarray(hidden * (1 + 0.01 * random.standard_normal((4, 64))), jnp.bfloat16)
    mask = jnp.ones(4, bool)
    loss = jax.jit(
        lambda student, teacher: fused.linear_divergence(
            student_hidden=student,
            student_head=head,
            teacher_hidden=teacher,
            teacher_head=head,
            mask=mask,
            divergence="forward_kl",
        )
    )
    assert loss(hidden, hidden).mean == 0
    wanted = definition.value("forward_kl", *(wide(h) @ wide(head).T for h in (hidden, other)))
    got = loss(other, hidden)
    assert wanted.max() < 1e-2
    np.testing.assert_allclose(got.mean, wanted.mean(), rtol=1e-4)

    inputs = Inputs(dtype=jnp.bfloat16)
    for name in ("forward_kl", "jensen_shannon", "total_variation"):
        mean, _, gradients = run(inputs, inputs.masks[1], name)
        values, *wanted = dense(inputs, inputs.masks[1], name, PARAMETERS[name][0])
        np.testing.assert_allclose(mean.mean, values.mean(), rtol=1e-5)
        for got, reference in zip(gradients, wanted, strict=True):
            assert got.dtype == jnp.bfloat16
            assert abs(wide(got) - reference).max() < 0.01 * abs(reference).max()
    # weights kept in float32 get their gradient in it; one model may have another dtype than the other
    student = inputs.student[0], inputs.student[1].astype(jnp.float32)
    teacher = tuple(leaf.astype(jnp.float32) for leaf in inputs.teacher)
    mean, _, gradients = run(inputs, inputs.masks[1], student=student, teacher=teacher)
    assert [leaf.dtype for leaf in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(mean.mean, dense(inputs, inputs.masks[1], "forward_kl", None)[0].mean(), rtol=1e-5)


@pytest.mark.slow
def test_peaked_logits():
    # logits reach hundreds: nearly all probabilities are 0 in float32
    inputs = Inputs(scale=15.0)
    for name in NAMES:
        mean, _, gradients = run(inputs, inputs.masks[0], name, temperature=0.05, weight=0.5)
        assert all(np.isfinite(leaf).all() for leaf in (mean.mean, *gradients)), name


# --- top k ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("divergence", "tail"))
def run_top_k(student, ids, log_probs, rest, labels, mask, **settings):
    def loss(hidden, head):
        mean, statistics = fused.linear_top_k_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_ids=ids,
            teacher_log_probs=log_probs,
            teacher_tail_log_prob=rest,
            labels=labels,
            mask=mask,
            num_tokens=REAL,
            chunk=7,
            **settings,
        )
        return mean.mean, statistics

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(*student)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_top_k(name, tail):
    inputs, parameter, mask = Inputs(), PARAMETERS[name][0], Inputs().masks[1]
    teacher, student = inputs.logits
    log_probs, ids, rest = top_k(teacher, 5)
    # of positions that are left out nothing is looked at
    ids, log_probs = np.where(mask[..., None], ids, -7), np.where(mask[..., None], log_probs, np.nan)
    (value, statistics), gradients = run_top_k(
        inputs.student, ids, log_probs, rest, inputs.labels, mask, divergence=name, temperature=2.0, hard_weight=0.3,
        tail=tail,
    )  # fmt: skip
    p, q = (outcomes(z, top_k(teacher, 5)[1], tail) for z in (teacher, student))
    soft = definition.value(name, p, q, parameter, 2.0)
    hard, hard_gradient = definition.cross_entropy(student, inputs.labels)
    np.testing.assert_allclose(value, (0.7 * 4 * soft + 0.3 * hard)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics.divergence.mean, soft[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(statistics.teacher_entropy.mean, definition.entropy(p, 2.0)[mask].mean(), rtol=1e-5)
    same = teacher.argmax(axis=-1) == student.argmax(axis=-1)
    np.testing.assert_allclose(statistics.agreement.mean, same[mask].mean(), rtol=1e-6)
    inner, real_ids = definition.gradient(name, p, q, parameter, 2.0), np.asarray(top_k(teacher, 5)[1])
    by_logits = np.zeros(student.shape)
    if tail == "bucket":
        share = definition.softmax(student)
        np.put_along_axis(share, real_ids, 0, axis=-1)
        by_logits += inner[..., -1:] * share / share.sum(axis=-1, keepdims=True)
    np.put_along_axis(by_logits, real_ids, inner[..., :5], axis=-1)
    by_logits = np.where(mask[..., None], 0.7 * 4 * by_logits + 0.3 * hard_gradient, 0) / mask.sum()
    for got, reference in zip(gradients, back(inputs.student, by_logits), strict=True):
        assert_close(got, reference, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "total_variation"])
def test_top_k_of_all_tokens_is_the_whole_loss(name):
    inputs, mask = Inputs(), Inputs().masks[1]
    log_probs, ids, rest = top_k(inputs.logits[0], REAL)
    (value, _), gradients = run_top_k(
        inputs.student, ids, log_probs, rest, inputs.labels, mask, divergence=name, temperature=2.0, hard_weight=0.3,
    )  # fmt: skip
    whole = run(inputs, mask, name, temperature=2.0, weight=0.3)
    np.testing.assert_allclose(value, whole[0].mean, rtol=2e-6)
    for got, reference in zip(gradients, whole[2], strict=True):
        assert_close(got, np.asarray(reference), rtol=5e-6)


# --- the program ------------------------------------------------------------------------------------------------------


def test_one_program_for_all_settings():
    inputs = Inputs()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(temperature, alpha, weight):
        return fused.linear_distillation(
            student_hidden=inputs.student[0],
            student_head=inputs.student[1],
            teacher_hidden=inputs.teacher[0],
            teacher_head=inputs.teacher[1],
            labels=inputs.labels,
            mask=inputs.masks[0],
            divergence="skew_forward_kl",
            temperature=temperature,
            parameter=alpha,
            hard_weight=weight,
            num_tokens=REAL,
            chunk=7,
        )[0].mean

    for settings in ((1.0, 0.0, 0.0), (2.0, 0.5, 0.5)):
        temperature, alpha, weight = settings
        values, *_ = dense(inputs, inputs.masks[0], "skew_forward_kl", alpha, temperature, None, weight)
        np.testing.assert_allclose(loss(*settings), values.mean(), rtol=1e-5)
    for settings in ((0.0, 0.5, 0.5), (1.0, 1.0, 0.5), (1.0, 0.5, -0.1)):
        assert np.isnan(loss(*settings)), settings


@pytest.mark.slow
def test_members_in_one_program():
    # several students at once, each with a temperature of its own
    inputs = Inputs()
    temperatures = jnp.array([1.0, 2.0])
    student = tuple(jnp.stack([leaf, leaf[::-1]]) for leaf in inputs.student)

    def both(student, temperature):
        def loss(student):
            return fused.linear_distillation(
                student_hidden=student[0],
                student_head=student[1],
                teacher_hidden=inputs.teacher[0],
                teacher_head=inputs.teacher[1],
                labels=inputs.labels,
                mask=inputs.masks[1],
                temperature=temperature,
                hard_weight=0.3,
                num_tokens=REAL,
                chunk=7,
            )[0].mean

        return jax.value_and_grad(loss)(student)

    values, gradients = jax.jit(jax.vmap(both))(student, temperatures)
    for i, temperature in enumerate(temperatures):
        value, gradient = jax.jit(both)(tuple(leaf[i] for leaf in student), temperature)
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for got, reference in zip(gradients, gradient, strict=True):
            assert_close(got[i], np.asarray(reference))


def test_derivatives_leave_the_loops_as_they_are():
    # one over the chunks and three over blocks of the vocabulary; parts moved out of them would cost time
    vocab, hidden = 2 * reductions.SUM_BLOCK, jnp.ones((8, 4))

    def loss(hidden, head):
        labels, mask = jnp.zeros(8, int), jnp.ones(8, bool)
        return fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=hidden,
            teacher_head=head,
            labels=labels,
            mask=mask,
            hard_weight=0.3,
            chunk=4,
        )[0].mean

    program = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, jnp.ones((vocab, 4))))
    assert program.count("scan[") == 4


@pytest.mark.slow
def test_numbers_are_the_same_with_float64_enabled():
    inputs, mask = Inputs(), Inputs().masks[1]
    log_probs, ids, rest = top_k(inputs.logits[0], 5)
    student = tuple(np.asarray(leaf) for leaf in inputs.student)

    def everything():
        whole = run(inputs, mask, "jensen_shannon", 0.5, 2.0, 0.7, 0.3)
        part = run_top_k(student, ids, log_probs, rest, inputs.labels, mask, divergence="forward_kl", hard_weight=0.3)
        return whole, part

    wanted = jax.tree.leaves(everything())
    with jax.enable_x64(True):
        got = jax.tree.leaves(everything())
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_products_are_float32_on_every_device():
    # a GPU or TPU would take fewer bits unless asked; a CPU shows no difference, so the program is read
    inputs = Inputs()
    program = _run.lower(
        inputs.student, inputs.teacher, inputs.labels, inputs.masks[0], num_tokens=REAL, chunk=7
    ).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= 4 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_logits_of_all_tokens_never_exist():
    vocab, width, tokens = 8192, 16, 4096
    h, w = jax.ShapeDtypeStruct((tokens, width), jnp.float32), jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    labels, mask = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens,), bool)

    def mean(hidden, head, teacher_hidden, teacher_head, labels, mask):
        return fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            labels=labels,
            mask=mask,
            hard_weight=0.5,
            chunk=128,
        )[0].mean

    def plain(hidden, head, teacher_hidden, teacher_head, labels, mask):
        return losses.distillation_loss(
            teacher_logits=teacher_hidden @ teacher_head.T,
            student_logits=hidden @ head.T,
            labels=labels,
            mask=mask,
            hard_weight=0.5,
        ).mean

    def temporary(function):
        program = jax.jit(jax.value_and_grad(function, (0, 1))).lower(h, w, h, w, labels, mask).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = tokens * vocab * 4
    assert temporary(plain) >= logits  # the measure sees them where they are
    assert temporary(mean) < logits / 5


@pytest.mark.parametrize("label", [-1, 37, 42, 43])
def test_a_label_that_is_no_id_makes_loss_and_gradient_nan(label):
    inputs, mask = Inputs(), np.ones(SHAPE, bool)
    labels = inputs.labels.copy()
    labels[1, 2] = label
    mean, _, gradients = run(inputs, mask, labels=labels)
    assert np.isnan(mean.mean) and np.isnan(gradients[0]).all() and np.isnan(gradients[1][:REAL]).all()
    mask[1, 2] = False
    assert np.isfinite(run(inputs, mask, labels=labels)[0].mean)


def test_what_does_not_go_together_is_named():
    hidden, head = jnp.ones((2, 3, 5)), jnp.ones((9, 5))
    mask, labels = jnp.ones((2, 3), bool), jnp.ones((2, 3), int)
    for teacher, some_labels, some_mask in (
        (jnp.ones((2, 4, 5)), labels, mask), (hidden, labels[0], mask), (hidden, labels, mask[0]),
        (hidden[:0], labels[:0], mask[:0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shapes do not go together"):
            student = hidden[: len(some_mask)] if not some_mask.size else hidden
            fused.linear_distillation(
                student_hidden=student,
                student_head=head,
                teacher_hidden=teacher,
                teacher_head=head,
                labels=some_labels,
                mask=some_mask,
            )
    with pytest.raises(ValueError, match="vocabularies of 9 and 8"):
        fused.linear_distillation(
            student_hidden=hidden,
            student_head=head[:8],
            teacher_hidden=hidden,
            teacher_head=head,
            labels=labels,
            mask=mask,
        )
    with pytest.raises(ValueError, match="needs labels"):
        fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=hidden,
            teacher_head=head,
            labels=None,
            mask=mask,
            hard_weight=jnp.float32(0),
        )
    with pytest.raises(ValueError, match="shapes do not go together"):
        fused.linear_top_k_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_ids=jnp.ones((2, 2), int),
            teacher_log_probs=jnp.ones((2, 3, 2)),
            teacher_tail_log_prob=None,
            labels=labels,
            mask=mask,
        )
    with pytest.raises(ValueError, match="K=10 recorded tokens .* vocabulary's 9"):
        ids = jnp.ones((2, 3, 10), int)
        fused.linear_top_k_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_ids=ids,
            teacher_log_probs=1.0 * ids,
            teacher_tail_log_prob=None,
            labels=labels,
            mask=mask,
        )


# --- over devices -----------------------------------------------------------------------------------------------------

DEVICES = """
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from kd_jax import fused
from kd_jax.parallel import mesh as mesh_lib

WIDTHS, ROWS, LENGTH, K = (24, 16), 8, 12, 4
random = np.random.default_rng(0)
def normal(*shape):
    return jnp.asarray(2 * random.standard_normal(shape), jnp.float32)

def arrays(vocabularies, real):
    hidden = [normal(ROWS, LENGTH, width) for width in WIDTHS]
    heads = [normal(vocab, width) / 8 for vocab, width in zip(vocabularies, WIDTHS)]
    labels = jnp.asarray(random.integers(0, real, (ROWS, LENGTH)))
    mask = jnp.asarray(np.arange(LENGTH) < random.integers(1, LENGTH + 1, ROWS)[:, None])
    logits = jnp.where(jnp.arange(vocabularies[1]) < real, hidden[1] @ heads[1].T, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    values, ids = jax.lax.top_k(log_probs, K)
    tail = jax.nn.logsumexp(jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False), axis=-1)
    return (hidden[0], heads[0]), (hidden[1], heads[1]), (ids, values, tail), labels, mask

def make(name, real, kind):
    @jax.jit
    def run(student, teacher, top, labels, mask):
        def loss(hidden, head):
            args = {"divergence": name, "temperature": 2.0, "hard_weight": 0.3, "num_tokens": real, "chunk": 24}
            if kind == "top_k":
                mean, statistics = fused.linear_top_k_distillation(
                    teacher_ids=top[0], teacher_log_probs=top[1], teacher_tail_log_prob=top[2], student_hidden=hidden,
                    student_head=head, labels=labels, mask=mask, **args,
                )
            else:
                mean, statistics = fused.linear_distillation(
                    teacher_hidden=teacher[0], teacher_head=teacher[1], student_hidden=hidden, student_head=head,
                    labels=labels, mask=mask, **args,
                )
            return mean.mean, statistics
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(*student)
    return run

def moved(text, sizes):
    # the collectives that bring pieces together, as wide as a whole vocabulary
    lines = re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute)\\(", text)
    return [line for line in lines if any(re.search(rf"[\\[,]{size}[,\\]]", line[0]) for size in sizes)]

out = []
for sizes, kind, name, vocabularies, real in json.loads(sys.argv[1]):
    data = arrays(vocabularies, real)
    student, teacher, top, labels, mask = data
    run = make(name, real, kind)
    wanted = run(*data)
    mesh = mesh_lib.make(*sizes)
    def place(tree, *axes):
        def one(leaf):
            return jax.device_put(leaf, mesh_lib.sharding((*axes, *[None] * (leaf.ndim - len(axes))), mesh))
        return jax.tree.map(one, tree)
    def model(pair):
        return place(pair[0], "batch"), place(pair[1], "vocab")
    placed = (model(student), model(teacher), *(place(tree, "batch") for tree in (top, labels, mask)))
    compiled = run.lower(*placed).compile()
    got = compiled(*placed)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * abs(other).max())
    text = compiled.as_text()
    out.append([moved(text, vocabularies), "all-reduce" in text])
    # the gradient of the head lies as the head does
    assert got[1][1].sharding.is_equivalent_to(placed[0][1].sharding, 2), got[1][1].sharding
print(json.dumps(out))
"""


def over_devices(*cases):
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, json.dumps(cases)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_over_eight_devices_nothing_is_gathered():
    same, other = ([136, 136], 130), ([136, 152], 130)
    cases = [
        ((8, 1, 1), "dense", "forward_kl", *same), ((1, 1, 8), "dense", "forward_kl", *same),
        ((2, 1, 4), "dense", "jensen_shannon", *same), ((2, 1, 4), "dense", "forward_kl", *other),
        ((2, 1, 4), "top_k", "forward_kl", *same),
    ]  # fmt: skip
    for case, (gathered, reduced) in zip(cases, over_devices(*cases), strict=True):
        assert gathered == [] and reduced, (case, gathered)
