"""Divergences on logits against their definitions in float64, published cases, and what must hold of every one."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_jax import fused, losses
from kd_jax.losses.divergences import checked_tail
from tests.losses import divergences as definition
from tests.losses.divergences import PARAMETERS

P, Q = np.log([0.7, 0.2, 0.1]), np.log([0.1, 0.3, 0.6])
NAMES = tuple(losses.DIVERGENCES)
CASES = [(name, parameter) for name, parameters in PARAMETERS.items() for parameter in parameters]
INF = np.inf


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(name, teacher, student, parameter, temperature, teacher_temperature):
    def total(student):
        values = losses.divergence(
            name,
            teacher_logits=teacher,
            student_logits=student,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            parameter=parameter,
        )
        return jnp.where(jnp.isfinite(values), values, 0).sum(), values

    (_, values), gradients = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradients


def value_and_gradient(name, teacher, student, parameter=None, temperature=1.0, teacher_temperature=None):
    """Values [...] and their gradients with respect to the student's logits. One program for a name and a shape."""
    parameter = PARAMETERS[name][0] if parameter is None else parameter
    return _value_and_gradient(name, teacher, student, parameter, temperature, teacher_temperature or temperature)


def pairs(shape=(6, 41), scale=3.0):
    """Random logits of a teacher and a student, float32."""
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for _ in range(2))


# --- the definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameter", CASES)
def test_the_definitions_gradients_are_finite_differences(name, parameter):
    teacher, student = (np.asarray(logits[0], np.float64) for logits in pairs((1, 7)))
    for temperatures in ((1.0, None), (2.5, 0.7)):
        step = 1e-6 * np.eye(7)
        up, down = (definition.value(name, teacher, student + s, parameter, *temperatures) for s in (step, -step))
        found = definition.gradient(name, teacher, student, parameter, *temperatures)
        np.testing.assert_allclose(found, (up - down) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, parameter", CASES)
def test_values_and_gradients_are_the_definition(name, parameter):
    teacher, student = pairs()
    for temperatures in ((1.0, None), (0.5, None), (4.0, None), (2.0, 0.7)):
        values, gradients = value_and_gradient(name, teacher, student, parameter, *temperatures)
        assert values.dtype == gradients.dtype == jnp.float32 and values.shape == (6,)
        wanted = definition.value(name, teacher, student, parameter, *temperatures)
        np.testing.assert_allclose(values, wanted, rtol=5e-6)
        wanted = definition.gradient(name, teacher, student, parameter, *temperatures)
        np.testing.assert_allclose(gradients, wanted, rtol=1e-5, atol=5e-6 * abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("name, parameter", CASES)
def test_gradients_in_the_teachers_logits_are_finite_differences_of_the_definition(name, parameter):
    teacher, student = pairs((1, 7))

    def total(teacher):
        return losses.divergence(
            name, teacher_logits=teacher, student_logits=student, temperature=2.5, teacher_temperature=0.7,
            parameter=PARAMETERS[name][0] if parameter is None else parameter,
        ).sum()  # fmt: skip

    found = jax.grad(total)(teacher)[0]
    one, step = np.asarray(teacher[0], np.float64), 1e-6 * np.eye(7)
    up, down = (definition.value(name, one + s, np.asarray(student[0]), parameter, 2.5, 0.7) for s in (step, -step))
    np.testing.assert_allclose(found, (up - down) / 2e-6, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_public_functions_are_these_by_name():
    teacher, student = pairs()
    assert list(losses.DIVERGENCES) == list(PARAMETERS)
    for name, function in losses.DIVERGENCES.items():
        default = PARAMETERS[name][0]
        for parameter in {default, PARAMETERS[name][-1]}:
            own = {} if parameter is None else {losses.PARAMETER[name][0]: parameter}
            got = jax.jit(function)(
                teacher_logits=teacher, student_logits=student, temperature=2.0, teacher_temperature=0.7, **own
            )
            np.testing.assert_allclose(got, definition.value(name, teacher, student, parameter, 2.0, 0.7), rtol=3e-6)
        got = jax.jit(function, static_argnames="num_tokens")(
            teacher_logits=teacher, student_logits=student, num_tokens=30
        )
        np.testing.assert_allclose(
            got, definition.value(name, teacher[:, :30], student[:, :30], default), rtol=3e-6, err_msg=name
        )


# --- published cases --------------------------------------------------------------------------------------------------


def test_a_named_divergence_has_its_own_name_for_its_parameter():
    logits = {"teacher_logits": np.zeros(3), "student_logits": np.arange(3.0)}
    with pytest.raises(TypeError, match="jensen_shannon has no argument 'parameter': here it is called beta"):
        losses.jensen_shannon(**logits, parameter=0.9)


def test_which_way_round_and_the_ends_of_jensen_shannon():
    got = {beta: float(value_and_gradient("jensen_shannon", P, Q, beta)[0]) for beta in (0, 1, 0.5, 0.1, 0.9, 1e-6)}
    expected = {0: 1.1018681, 1: 1.0021042, 0.5: 0.2306455, 0.1: 0.0926739, 0.9: 0.0864965, 1e-6: 1.1e-6}
    for beta, wanted in expected.items():
        np.testing.assert_allclose(got[beta], wanted, rtol=1e-6 if beta != 1e-6 else 0.01)
    np.testing.assert_allclose(losses.forward_kl(teacher_logits=P, student_logits=Q), 1.1018681, rtol=1e-6)
    np.testing.assert_allclose(losses.reverse_kl(teacher_logits=P, student_logits=Q), 1.0021042, rtol=1e-6)


def test_factor_of_the_temperature():
    teacher, student = jnp.array([2.0, 0, -1]), jnp.array([0.0, 1, 0])
    mask = jnp.ones((), bool)

    @jax.jit
    def loss(student, temperature):
        return losses.distillation_loss(
            teacher_logits=teacher, student_logits=student, labels=None, mask=mask, temperature=temperature
        ).mean

    for temperature, wanted in ((1.0, 0.9129829), (2.0, 1.0912223), (4.0, 1.0880090)):
        np.testing.assert_allclose(loss(student, temperature), wanted, rtol=1e-6)
    np.testing.assert_allclose(loss(student, 1000.0), 1.0004995, atol=1e-3)
    gradient = jax.jit(jax.grad(loss))(student, 2.0)
    np.testing.assert_allclose(gradient, [-0.7089262, 0.4412777, 0.2676485], rtol=1e-6)


def test_tokens_suppressed_in_both():
    teacher, student = jnp.array([1, 2, -INF, 0]), jnp.array([0, 1, -INF, 2])
    values, gradients = value_and_gradient("forward_kl", teacher, student)
    np.testing.assert_allclose(values, 0.7299083, rtol=1e-6)
    np.testing.assert_allclose(gradients, [-0.1546979, -0.4205125, 0, 0.5752104], rtol=2e-6)
    np.testing.assert_allclose(value_and_gradient("reverse_kl", teacher, student)[0], 0.9957229, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, 0.4])
def test_a_batch_without_a_position_to_learn_from(weights):
    teacher, student = pairs((2, 4, 5))
    labels = jnp.zeros((2, 4), int)

    @jax.jit
    def loss(student, mask):
        hard = {"labels": labels, "hard_weight": weights} if weights else {"labels": None}
        return losses.distillation_loss(teacher_logits=teacher, student_logits=student, mask=mask, **hard).mean

    value, gradient = jax.value_and_grad(loss)(student, jnp.zeros((2, 4), bool))
    assert value == 0 and not np.asarray(gradient).any()
    one_row = jnp.array([[True] * 4, [False] * 4])
    values = definition.value("forward_kl", teacher[0], student[0])
    if weights:
        values = 0.6 * values + 0.4 * definition.cross_entropy(student[0], labels[0])[0]
    np.testing.assert_allclose(loss(student, one_row), values.mean(), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rubbish", [-INF, np.nan])
def test_nothing_comes_from_positions_that_are_left_out(name, rubbish):
    teacher, student = ([[1, 2, -INF, 0]] * 2 + [[rubbish] * 4], [[0, 1, -INF, 2]] * 2 + [[rubbish] * 4])
    mask, labels = jnp.array([True, True, False]), jnp.array([0, 1, -100])

    @jax.jit
    def loss(teacher, student):
        return losses.distillation_loss(
            teacher_logits=teacher, student_logits=student, labels=labels, mask=mask, divergence=name, hard_weight=0.3
        )

    teacher, student = jnp.array(teacher), jnp.array(student)
    mean = loss(teacher, student)
    soft = definition.value(name, teacher[:2], student[:2], PARAMETERS[name][0])
    hard, _ = definition.cross_entropy(student[:2], labels[:2])
    np.testing.assert_allclose([mean.mean, mean.count], [(0.7 * soft + 0.3 * hard).mean(), 2], rtol=2e-6)
    gradient = np.asarray(jax.grad(lambda student: loss(teacher, student).mean)(student))
    assert np.isfinite(gradient).all() and gradient[:2].any() and not gradient[2].any()


def of_values(values):
    """Logits whose forward KLs are `values`: the teacher has all on token 0, of which q is 1 / (1 + e^z)."""
    z = np.log(np.expm1(np.asarray(values, np.float64)))
    teacher = np.broadcast_to([0.0, -100.0], (len(z), 2))
    return jnp.asarray(teacher, jnp.float32), jnp.asarray(np.stack([0 * z, z], axis=-1), jnp.float32)


def test_micro_batches_merge_into_the_whole_batch():
    values = [1.0, 3.0] + [0.5] * 6
    teacher, student = of_values(values)

    def mean(student, part):
        student = student[part]
        return losses.distillation_loss(
            teacher_logits=teacher[part], student_logits=student, labels=None, mask=jnp.ones(student.shape[:1], bool)
        )

    def merged(student):
        return mean(student, np.s_[:2]).merge(mean(student, np.s_[2:])).mean

    def whole(student):
        return mean(student, np.s_[:]).mean

    (one, one_gradient), (two, two_gradient) = (jax.jit(jax.value_and_grad(f))(student) for f in (whole, merged))
    # by positions; the mean of the two means would be 1.25
    np.testing.assert_allclose([one, two], 0.875, rtol=1e-6)
    np.testing.assert_allclose(two_gradient, one_gradient, rtol=1e-6)
    np.testing.assert_allclose(one_gradient[0], np.array([-1, 1]) * (1 - np.exp(-1)) / 8, rtol=1e-5)


@pytest.mark.slow
def test_the_mean_does_not_grow_with_positions_or_vocabulary():
    for shape, more in (((1, 1), 0), ((2, 5), 0), ((2, 5), 7)):
        teacher, student = (
            np.pad(np.tile(z, (*shape, 1)), [(0, 0)] * 2 + [(0, more)], constant_values=-INF) for z in (P, Q)
        )
        mean = losses.distillation_loss(
            teacher_logits=teacher, student_logits=student, labels=None, mask=np.ones(shape, bool)
        )
        np.testing.assert_allclose(mean.mean, 1.1018681, rtol=1e-6)


def test_bfloat16_logits():
    teacher = (10 * jax.random.normal(jax.random.key(0), (4, 49152))).astype(jnp.bfloat16)
    student = (teacher + 0.05 * jax.random.normal(jax.random.key(1), teacher.shape)).astype(jnp.bfloat16)
    for function in (losses.forward_kl, jax.jit(losses.forward_kl)):
        assert not np.asarray(function(teacher_logits=teacher, student_logits=teacher)).any()
        got = np.asarray(function(teacher_logits=teacher, student_logits=student))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [2.991e-6, 6.140e-8, 3.277e-6, 5.922e-7], atol=2e-9)
        wanted = definition.value("forward_kl", *(np.asarray(z, np.float64) for z in (teacher, student)))
        np.testing.assert_allclose(got, wanted, rtol=1e-3)


@pytest.mark.slow
def test_the_teacher_gets_no_gradient():
    teacher, student = pairs((2, 3, 5))
    labels, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)
    for name in NAMES:

        def loss(teacher, student, name=name):
            return losses.distillation_loss(
                teacher_logits=teacher,
                student_logits=student,
                labels=labels,
                mask=mask,
                divergence=name,
                hard_weight=0.5,
            ).mean

        gradients = jax.jit(jax.grad(loss, (0, 1)))(teacher, student)
        assert not np.asarray(gradients[0]).any() and np.asarray(gradients[1]).any()


def test_vocabularies_are_cut_to_the_real_ids():
    teacher, student = jnp.array([2.0, 1, 0, -1, 4, 4]), jnp.array([0.0, 0, 1, 1, 3])
    np.testing.assert_allclose(
        losses.forward_kl(teacher_logits=teacher, student_logits=student, num_tokens=4), 0.9396690, rtol=1e-6
    )
    mean = losses.distillation_loss(
        teacher_logits=teacher,
        student_logits=student,
        labels=jnp.array(2),
        mask=jnp.ones((), bool),
        hard_weight=0.5,
        num_tokens=4,
    )
    hard, _ = definition.cross_entropy(student[:4], 2)
    np.testing.assert_allclose(mean.mean, (0.9396690 + hard) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="6 and 5: num_tokens"):
        losses.forward_kl(teacher_logits=teacher, student_logits=student)
    with pytest.raises(ValueError, match="num_tokens=6, but the vocabularies have 6 and 5"):
        losses.forward_kl(teacher_logits=teacher, student_logits=student, num_tokens=6)


# --- what must hold of every divergence -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameter", CASES)
def test_zero_on_itself_and_never_below(name, parameter):
    teacher, student = pairs()
    # whose softmax is not rounded alike
    moved = teacher + jnp.float32(17.3)
    for other, bound in ((teacher, 1e-9), (moved, 1e-6 if name == "total_variation" else 1e-9)):
        values, gradients = value_and_gradient(name, teacher, other, parameter)
        assert abs(np.asarray(values)).max() <= bound
        if name != "total_variation":
            np.testing.assert_allclose(gradients, 0, atol=3e-6)
    near = teacher + 1e-3 * student
    assert (np.asarray(value_and_gradient(name, teacher, near, parameter)[0]) > 0).all()


@pytest.mark.parametrize("name, parameter", CASES)
def test_close_distributions_keep_their_digits(name, parameter):
    teacher, student = pairs(scale=1.0)
    near = teacher + 1e-3 * student
    values, gradients = value_and_gradient(name, teacher, near, parameter)
    np.testing.assert_allclose(values, definition.value(name, teacher, near, parameter), rtol=2e-3)
    wanted = definition.gradient(name, teacher, near, parameter)
    np.testing.assert_allclose(gradients, wanted, rtol=0, atol=2e-3 * abs(wanted).max())


def test_temperature_limit():
    teacher, student = pairs(scale=1.0)
    difference = np.asarray(teacher - student, np.float64)
    # of p and q that are nearly uniform every f-divergence is f''(1)/2 times the mean of the squared difference
    curvature = {
        "forward_kl": 1, "reverse_kl": 1, "jensen_shannon": 1 / 4, "skew_forward_kl": 0.9**2,
        "skew_reverse_kl": 0.9**2, "alpha_divergence": 1,
    }  # fmt: skip
    for name, factor in curvature.items():
        temperature = 300.0
        values, gradients = value_and_gradient(name, teacher, student, PARAMETERS[name][0], temperature)
        np.testing.assert_allclose(temperature**2 * values, factor * difference.var(axis=-1) / 2, rtol=0.02)
        wanted = -factor * (difference - difference.mean(axis=-1, keepdims=True)) / 41
        np.testing.assert_allclose(temperature**2 * gradients, wanted, rtol=0, atol=0.02 * abs(wanted).max())


@pytest.mark.parametrize("name, parameter", CASES)
def test_extreme_logits_give_finite_gradients(name, parameter):
    teacher, student = (jnp.clip(z, -3, 3) for z in pairs(scale=2.0))
    # at a temperature of 0.05 logits are 20 times as far apart: most probabilities are 0 in float32
    values, gradients = value_and_gradient(name, teacher, student, parameter, 0.05)
    if parameter == 2.0:  # p^2 / q is beyond float32
        return
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(values, definition.value(name, teacher, student, parameter, 0.05), rtol=1e-5)
    wanted = definition.gradient(name, teacher, student, parameter, 0.05)
    # which of two numbers that are nearly 1 is the larger, float32 does not always know
    rounding = 2e-6 if name == "total_variation" else 0.0
    np.testing.assert_allclose(gradients, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max() + rounding)


ENDS = [
    ("jensen_shannon", 0.0, "forward"), ("jensen_shannon", 1.0, "reverse"), ("skew_forward_kl", 0.0, "forward"),
    ("skew_reverse_kl", 0.0, "reverse"), ("alpha_divergence", 1.0, "forward"), ("alpha_divergence", 0.0, "reverse"),
    ("forward_kl", None, "forward"), ("reverse_kl", None, "reverse"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, parameter, which", ENDS)
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_ends_are_the_kls_also_where_probabilities_are_0_in_float32(name, parameter, which, temperature):
    teacher, student = pairs((64, 41))
    log_p, log_q = (log_softmax(np.asarray(z, np.float64) / temperature, axis=-1) for z in (teacher, student))
    p, q = np.exp(log_p), np.exp(log_q)
    assert ((np.float32(p) > 0) & (np.float32(q) == 0)).any() and ((np.float32(q) > 0) & (np.float32(p) == 0)).any()
    values, gradients = value_and_gradient(name, teacher, student, parameter, temperature)
    if which == "forward":
        wanted, slope = (p * (log_p - log_q)).sum(axis=-1), q - p
    else:
        wanted = (q * (log_q - log_p)).sum(axis=-1)
        slope = q * (log_q - log_p - wanted[:, None])
    # two that are sure of the same token: in float64, too, 1e-13 nats have but a few digits
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-15)
    np.testing.assert_allclose(gradients, slope / temperature, rtol=1e-4, atol=1e-5 * abs(slope).max() / temperature)


ONE_HOT = np.where(np.eye(41)[[2, 5, 0, 40, 9, 2]], 0, -INF)


@pytest.mark.parametrize("name, parameter", CASES)
def test_one_hot_teachers_and_suppressed_tokens(name, parameter):
    _, student = pairs()
    hole = jnp.asarray(student).at[:, 7].set(-INF)  # both have no token 7, the one-hot teacher has but one
    for teacher, other in ((ONE_HOT, student), (ONE_HOT, hole), (hole + 1.0, hole * 0.5)):
        values, gradients = value_and_gradient(name, jnp.asarray(teacher, jnp.float32), other, parameter)
        wanted = definition.value(name, teacher, other, parameter)
        np.testing.assert_allclose(values, wanted, rtol=1e-5)
        finite = np.isfinite(wanted)
        wanted = definition.gradient(name, teacher, other, parameter)[finite]
        np.testing.assert_allclose(np.asarray(gradients)[finite], wanted, rtol=3e-5, atol=1e-6)


@pytest.mark.slow
def test_infinite_divergences_say_so():
    teacher, student = jnp.array([0.0, 1, 2]), jnp.array([0.0, 1, -INF])
    assert (
        losses.forward_kl(teacher_logits=teacher, student_logits=student)
        == losses.reverse_kl(teacher_logits=student, student_logits=teacher)
        == INF
    )
    assert (
        np.isfinite(losses.jensen_shannon(teacher_logits=teacher, student_logits=student))
        and losses.total_variation(teacher_logits=teacher, student_logits=student) < 1
    )
    mean = losses.distillation_loss(
        teacher_logits=teacher[None], student_logits=student[None], labels=None, mask=np.ones(1, bool)
    )
    assert mean.mean == INF and mean.num_infinite == 1
    # a term of weight 0 is no part of the loss, infinite or not
    for label, weight in ((2, 0.0), (0, 1.0)):
        args = {"teacher_logits": teacher[None], "student_logits": student[None], "labels": np.array([label])}
        mean = losses.distillation_loss(
            **args, mask=np.ones(1, bool), divergence="jensen_shannon" if label else "forward_kl", hard_weight=weight
        )
        assert np.isfinite(mean.mean)


def test_one_program_for_all_settings():
    teacher, student = pairs()
    labels, mask = jnp.zeros(6, int), jnp.ones(6, bool)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(temperature, beta, weight):
        return losses.distillation_loss(
            teacher_logits=teacher,
            student_logits=student,
            labels=labels,
            mask=mask,
            divergence="jensen_shannon",
            temperature=temperature,
            parameter=beta,
            hard_weight=weight,
        ).mean

    for temperature, beta, weight in ((1.0, 0.0, 0.0), (2.0, 1.0, 0.5), (0.5, 0.3, 1.0)):
        soft = temperature**2 * definition.value("jensen_shannon", teacher, student, beta, temperature)
        hard, _ = definition.cross_entropy(student, labels)
        wanted = ((1 - weight) * soft + weight * hard).mean()
        np.testing.assert_allclose(loss(temperature, beta, weight), wanted, rtol=3e-6)
    # what would be an error if it were a number
    for settings in ((0.0, 0.5, 0.5), (-1.0, 0.5, 0.5), (1.0, 1.1, 0.5), (1.0, -0.1, 0.5), (1.0, 0.5, 1.5)):
        assert np.isnan(loss(*settings)), settings


def test_gradients_under_vmap_over_the_parameter():
    # ends and inside in one program: what is not chosen must not reach the gradient
    teacher = jnp.array([1.0, 2, -INF, 0, -INF])
    student = jnp.array([0.0, 1, 0.5, 2, -INF])
    betas = jnp.array([0.0, 0.5])
    gradient = jax.grad(
        lambda student, beta: losses.jensen_shannon(teacher_logits=teacher, student_logits=student, beta=beta)
    )
    found = jax.jit(jax.vmap(gradient, (None, 0)))(student, betas)
    for beta, got in zip(betas, found, strict=True):
        wanted = definition.gradient("jensen_shannon", teacher, student, float(beta))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# --- cross-entropy, top k ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cross_entropy():
    _, student = pairs((2, 3, 5))
    labels = np.array([[0, 1, 2], [3, 4, 0]])
    wanted, gradient = definition.cross_entropy(student, labels)
    np.testing.assert_allclose(losses.cross_entropy(student, labels), wanted, rtol=2e-6)
    got = jax.grad(lambda student: losses.cross_entropy(student, labels).sum())(student)
    np.testing.assert_allclose(got, gradient, atol=1e-6)
    got = losses.cross_entropy(student, labels % 4, num_tokens=4)
    np.testing.assert_allclose(got, definition.cross_entropy(student[..., :4], labels % 4)[0], rtol=2e-6)
    bad = losses.cross_entropy(student, labels + np.array([[0, 0, 3], [-4, 0, 0]]))
    np.testing.assert_array_equal(np.isnan(bad), [[False, False, True], [True, False, False]])


def top_k(teacher, k):
    """The k most probable tokens' log-probabilities and ids, and the logarithm of what they leave, from float64."""
    p = definition.softmax(teacher)
    ids = np.argsort(-p, axis=-1)[..., :k]
    rest = 1 - np.take_along_axis(p, ids, axis=-1).sum(axis=-1) if k < p.shape[-1] else 0 * p[..., 0]
    with np.errstate(divide="ignore"):
        return tuple(
            map(
                jnp.asarray,
                (np.log(np.take_along_axis(p, ids, axis=-1)).astype(np.float32), ids, np.log(rest).astype(np.float32)),
            )
        )


def outcomes(logits, ids, tail):
    """Logits over the ids, and one for all other tokens together, in float64."""
    p = definition.softmax(logits)
    some = np.take_along_axis(p, np.asarray(ids), axis=-1)
    if tail == "bucket":
        some = np.concatenate([some, 1 - some.sum(axis=-1, keepdims=True)], axis=-1)
    return np.log(some)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", NAMES)
def test_top_k_is_the_divergence_of_fewer_outcomes(name, tail):
    teacher, student = pairs((5, 12))
    parameter, k = PARAMETERS[name][0], 4
    log_probs, ids, rest = top_k(teacher, k)

    @jax.jit
    def loss(student, temperature, rest=rest):
        values = losses.top_k_divergence(
            teacher_log_probs=log_probs,
            teacher_ids=ids,
            student_logits=student,
            teacher_tail_log_prob=rest,
            divergence=name,
            temperature=temperature,
            tail=tail,
        )
        return values.sum(), values

    for temperature in (1.0, 2.0):
        (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(student, temperature)
        p, q = (outcomes(z, ids, tail) for z in (teacher, student))
        np.testing.assert_allclose(values, definition.value(name, p, q, parameter, temperature), rtol=1e-5)
        # back to the logits: an id's own, and for the bucket the share of each token in it
        inner = definition.gradient(name, p, q, parameter, temperature)
        back = np.zeros(student.shape)
        if tail == "bucket":
            share = definition.softmax(student)
            np.put_along_axis(share, np.asarray(ids), 0, axis=-1)
            back += inner[:, -1:] * share / share.sum(axis=-1, keepdims=True)
        np.put_along_axis(back, np.asarray(ids), inner[:, :k], axis=-1)
        np.testing.assert_allclose(gradient, back, rtol=1e-4, atol=2e-6)
        if tail == "bucket":
            np.testing.assert_allclose(loss(student, temperature, None)[1], values, rtol=1e-4)
            if temperature == 1:
                assert (values <= definition.value(name, teacher, student, parameter) + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k_of_all_tokens_is_the_divergence_itself(tail):
    teacher, student = pairs((5, 12))
    log_probs, ids, rest = top_k(teacher, 12)
    for name in NAMES:
        for given in (rest, None):
            got = losses.top_k_divergence(
                teacher_log_probs=log_probs,
                teacher_ids=ids,
                student_logits=student,
                teacher_tail_log_prob=given,
                divergence=name,
                temperature=2.0,
                teacher_temperature=0.7,
                tail=tail,
            )
            wanted = definition.value(name, teacher, student, PARAMETERS[name][0], 2.0, 0.7)
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.slow
def test_numbers_are_the_same_with_float64_enabled():
    teacher, student = pairs((5, 12))
    labels, mask = np.array([0, 3, 11, 2, 2]), np.array([True, True, False, True, True])
    log_probs, ids, rest = top_k(teacher, 4)

    def everything():
        divergences = {
            name: function(teacher_logits=teacher, student_logits=student, temperature=2.0)
            for name, function in losses.DIVERGENCES.items()
        }
        settings = {"temperature": 2.0, "hard_weight": 0.3, "divergence": "alpha_divergence"}
        gradient = jax.grad(
            lambda z: (
                losses.distillation_loss(
                    teacher_logits=teacher, student_logits=z, labels=labels, mask=mask, **settings
                ).mean
            )
        )(student)
        part = losses.top_k_divergence(
            teacher_log_probs=log_probs,
            teacher_ids=ids,
            student_logits=student,
            teacher_tail_log_prob=rest,
            temperature=2.0,
        )
        return (
            divergences,
            gradient,
            part,
            losses.distillation_loss(
                teacher_logits=teacher, student_logits=student, labels=labels, mask=mask, **settings
            ),
        )

    wanted = jax.tree.leaves(everything())
    with jax.enable_x64(True):
        got = jax.tree.leaves(everything())
        assert (
            losses.forward_kl(teacher_logits=np.float64([0.0, 1.0]), student_logits=np.float64([1.0, 0.0])).dtype
            == jnp.float64
        )
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"divergence": "kl"}, "divergence='kl' is not one of forward_kl"),
        ({"temperature": 0.0}, "temperature must be in (0, inf], not 0.0"),
        ({"teacher_temperature": -1}, "teacher_temperature must be in (0, inf], not -1"),
        ({"parameter": 0.5}, "forward_kl has no parameter, but was given 0.5"),
        ({"divergence": "jensen_shannon", "parameter": 1.5}, "beta of jensen_shannon must be in [0, 1], not 1.5"),
        ({"divergence": "skew_forward_kl", "parameter": 1.0}, "alpha of skew_forward_kl must be in [0, 1), not 1.0"),
        ({"divergence": "alpha_divergence", "parameter": np.nan}, "alpha of alpha_divergence must be in (-inf, inf)"),
        ({"hard_weight": 0.5}, "hard_weight=0.5 needs labels"),
        ({"hard_weight": 1.5}, "hard_weight must be in [0, 1], not 1.5"),
        ({"mask": np.ones(5, bool)}, "mask and labels differ: [(6,), (6,), (5,)]"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    teacher, student = pairs()
    with pytest.raises(ValueError, match=re.escape(words)):
        losses.distillation_loss(
            teacher_logits=teacher, student_logits=student, labels=None, **{"mask": np.ones(6, bool), **settings}
        )


def test_wrong_top_k_is_named():
    log_probs, ids, _ = top_k(pairs((5, 12))[0], 4)
    with pytest.raises(ValueError, match="take more tokens"):
        checked_tail("renormalise", 1, 12)
    with pytest.raises(ValueError, match="tail='none'"):
        losses.top_k_divergence(
            teacher_log_probs=log_probs, teacher_ids=ids, student_logits=jnp.zeros((5, 12)), tail="none"
        )
    with pytest.raises(ValueError, match="K=4 recorded tokens .* vocabulary's 3"):
        losses.top_k_divergence(
            teacher_log_probs=log_probs, teacher_ids=ids, student_logits=jnp.zeros((5, 12)), num_tokens=3
        )


def test_teacher_and_student_go_by_keyword():
    # swapped by place, they would give another divergence without a word
    teacher, student = pairs((2, 5))
    for function in (*losses.DIVERGENCES.values(), losses.universal_distance):
        with pytest.raises(TypeError, match="positional"):
            function(teacher, student)
    with pytest.raises(TypeError, match="positional"):
        losses.distillation_loss(teacher, student, None, np.ones(2, bool))
    with pytest.raises(TypeError, match="positional"):
        fused.linear_divergence(teacher, teacher, student, student, np.ones(2, bool), divergence="forward_kl")
