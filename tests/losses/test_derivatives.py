"""Slopes written by hand against automatic differentiation, and derivatives of every loss in every direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from kd_jax import fused, losses
from kd_jax.losses import derivatives
from kd_jax.losses.reductions import log_softmax
from kd_jax.losses.table import TABLE, Divergence, Interval, Parameter
from tests.losses import divergences as definition
from tests.losses.divergences import PARAMETERS

NAMES = tuple(TABLE)
CASES = [(name, parameter) for name, parameters in PARAMETERS.items() for parameter in parameters]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def logits(shape=(4, 6), scale=2.0):
    random = np.random.default_rng(0)
    return [jnp.asarray(scale * random.standard_normal(shape)) for _ in range(2)]


@pytest.mark.fast(11)
@pytest.mark.parametrize("name, parameter", CASES)
def test_hand_written_slopes_are_those_of_automatic_differentiation(name, parameter, monkeypatch):
    teacher, student = logits()
    # a token that neither has, one that only the student has, and a one-hot teacher
    teacher = teacher.at[1:3, 2].set(-jnp.inf).at[3].set(jnp.where(jnp.arange(6) == 1, 0, -jnp.inf))
    student = student.at[1, 2].set(-jnp.inf)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    by_hand = derivatives.gradient(name, log_p, log_q, parameter)
    finite = np.isfinite(derivatives.divergence(name, log_p, log_q, parameter))
    assert finite[:2].all()
    monkeypatch.setitem(TABLE, name, TABLE[name]._replace(slope=None, slope_sums_to_zero=False))
    automatic = derivatives.gradient(name, log_p, log_q, parameter)
    np.testing.assert_allclose(automatic[finite], by_hand[finite], rtol=1e-7, atol=1e-9)


def check_derivatives(loss, *args, rtol=1e-6):
    """First derivatives in both directions and second ones against differences of the function in float64."""
    point, unravel = ravel_pytree(args)

    @jax.jit
    def all_of(point):
        def function(point):
            return loss(*unravel(point))

        steps = 1e-5 * jnp.eye(len(point))
        up, down = (jax.vmap(jax.value_and_grad(function))(point + step) for step in (steps, -steps))
        first, second = ((one - other) / 2e-5 for one, other in zip(up, down, strict=True))
        return jax.grad(function)(point), jax.jacfwd(function)(point), first, jax.hessian(function)(point), second

    backward, forward, first, hessian, second = all_of(point)
    np.testing.assert_allclose(backward, first, rtol=rtol, atol=rtol * abs(first).max())
    np.testing.assert_allclose(forward, backward, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(hessian, second, rtol=rtol, atol=rtol * abs(second).max())


# Inside its interval, where the derivative in the parameter exists; the alpha divergence on the other side of 1/2 too.
INSIDE = [
    ("forward_kl", None),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("reverse_kl", None), ("jensen_shannon", 0.3), ("skew_forward_kl", 0.2), ("skew_reverse_kl", 0.2),
            ("total_variation", None),
            ("alpha_divergence", 0.3), ("alpha_divergence", 1.7),
        )
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, parameter", INSIDE)
def test_first_and_second_derivatives_in_everything(name, parameter):
    own = {} if parameter is None else {losses.PARAMETER[name].name: parameter}

    def loss(teacher, student, temperature, teacher_temperature, own):
        return losses.DIVERGENCES[name](
            teacher_logits=teacher,
            student_logits=student,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            **own,
        ).sum()

    check_derivatives(loss, *logits((2, 3)), 1.5, 0.8, own)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hessians_with_suppressed_tokens(name):
    teacher, student = jnp.array([1, 2, -jnp.inf, 0]), jnp.array([0, 1, -jnp.inf, 2])
    hessian = np.asarray(
        jax.jit(jax.hessian(lambda z: losses.DIVERGENCES[name](teacher_logits=teacher, student_logits=z)))(student)
    )
    assert not hessian[2].any() and not hessian[:, 2].any()
    step = 1e-6 * np.eye(4)
    up, down = (definition.gradient(name, teacher, np.asarray(student) + s, PARAMETERS[name][0]) for s in (step, -step))
    np.testing.assert_allclose(hessian, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_derivatives_of_losses_on_logits():
    teacher, student = logits((3, 5))
    labels, mask = jnp.array([0, 3, 9]), jnp.array([True, True, False])
    ids = jnp.array([[0, 3], [1, 2], [4, 0]])
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(teacher), ids, axis=-1)

    def mixed(student, temperature, weight):
        return losses.distillation_loss(
            teacher_logits=teacher,
            student_logits=student,
            labels=labels,
            mask=mask,
            divergence="skew_reverse_kl",
            temperature=temperature,
            hard_weight=weight,
        ).mean

    def top_k(log_probs, student, temperature):
        return losses.top_k_divergence(
            teacher_log_probs=log_probs, teacher_ids=ids, student_logits=student, temperature=temperature
        ).sum()

    check_derivatives(mixed, student, 1.5, 0.3)
    check_derivatives(top_k, log_probs, student, 1.5)
    check_derivatives(lambda z: losses.cross_entropy(z, labels[:2]).sum(), student[:2])


# --- the fused losses: their logits are float32 -----------------------------------------------------------------------

TEACHER_HIDDEN, HIDDEN = (one.astype(jnp.float32) for one in (np.random.default_rng(1).standard_normal((2, 2, 3, 4))))
TEACHER_HEAD, HEAD = (one.astype(jnp.float32) for one in (np.random.default_rng(2).standard_normal((2, 7, 4))))
LABELS, MASK = np.array([[0, 5, 1], [2, 2, 4]]), np.array([[True, False, True], [True, True, True]])
TOP_IDS = np.argsort(-(TEACHER_HIDDEN @ TEACHER_HEAD.T)[..., :6], axis=-1)[..., :3]
TOP_LOG_PROBS = np.take_along_axis(
    np.asarray(jax.nn.log_softmax((TEACHER_HIDDEN @ TEACHER_HEAD.T)[..., :6])), TOP_IDS, axis=-1
)
REAL = {"num_tokens": 6}


def fused_cross_entropy(hidden, head):
    return fused.linear_cross_entropy(hidden, head, LABELS, MASK, chunk=2, **REAL).mean


def cross_entropy(hidden, head):
    return losses.masked_mean(losses.cross_entropy(hidden @ head.T, LABELS, **REAL), MASK).mean


def fused_distillation(hidden, head):
    settings = {"divergence": "jensen_shannon", "temperature": 2.0, "hard_weight": 0.3}
    teacher = TEACHER_HIDDEN, TEACHER_HEAD
    return fused.linear_distillation(
        student_hidden=hidden,
        student_head=head,
        teacher_hidden=teacher[0],
        teacher_head=teacher[1],
        labels=LABELS,
        mask=MASK,
        chunk=2,
        **settings,
        **REAL,
    )[0].mean


def distillation(hidden, head):
    settings = {"divergence": "jensen_shannon", "temperature": 2.0, "hard_weight": 0.3}
    teacher = TEACHER_HIDDEN @ TEACHER_HEAD.T
    return losses.distillation_loss(
        teacher_logits=teacher, student_logits=hidden @ head.T, labels=LABELS, mask=MASK, **settings, **REAL
    ).mean


def fused_top_k(hidden, head):
    teacher = TOP_IDS, TOP_LOG_PROBS, None
    return fused.linear_top_k_distillation(
        student_hidden=hidden,
        student_head=head,
        teacher_ids=teacher[0],
        teacher_log_probs=teacher[1],
        teacher_tail_log_prob=teacher[2],
        labels=None,
        mask=MASK,
        chunk=2,
        **REAL,
    )[0].mean


def top_k(hidden, head):
    values = losses.top_k_divergence(
        teacher_log_probs=TOP_LOG_PROBS, teacher_ids=TOP_IDS, student_logits=hidden @ head.T, **REAL
    )
    return losses.masked_mean(values, MASK).mean


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, dense",
    [(fused_cross_entropy, cross_entropy), (fused_distillation, distillation), (fused_top_k, top_k)],
)
def test_fused_losses_have_all_derivatives_of_the_dense_ones(function, dense):
    random = np.random.default_rng(0)
    tangents = tuple(random.standard_normal(one.shape).astype(np.float32) for one in (HIDDEN, HEAD))

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(function, hidden, head):
        value, tangent = jax.jvp(function, (hidden, head), tangents)
        backward, forward = (of(function, (0, 1))(hidden, head) for of in (jax.grad, jax.jacfwd))

        def along(*args):
            return sum((g * t).sum() for g, t in zip(jax.grad(function, (0, 1))(*args), tangents, strict=True))

        # second derivatives, backward over backward and forward over backward
        return (
            value,
            tangent,
            backward,
            forward,
            jax.grad(along, (0, 1))(hidden, head),
            jax.hessian(function)(hidden, head),
        )

    for got, wanted in zip(
        jax.tree.leaves(all_of(function, HIDDEN, HEAD)), jax.tree.leaves(all_of(dense, HIDDEN, HEAD)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5 * abs(wanted).max())


@pytest.mark.slow
def test_log_probabilities_and_entropies_have_derivatives():
    def total(hidden, head):
        return sum(one.sum() for one in fused.linear_log_prob(hidden, head, LABELS, entropy=True, chunk=2))

    def dense(hidden, head):
        log_q = jax.nn.log_softmax(hidden @ head.T)
        return jnp.take_along_axis(log_q, LABELS[..., None], -1).sum() - (jnp.exp(log_q) * log_q).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(function, hidden, head):
        return [of(function)(hidden, head) for of in (jax.grad, jax.jacfwd, jax.hessian)]

    for got, wanted in zip(all_of(total, HIDDEN, HEAD), all_of(dense, HIDDEN, HEAD), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


# --- a new row --------------------------------------------------------------------------------------------------------


def renyi(p, q, alpha):
    """log(sum p^alpha q^(1 - alpha)) / (alpha - 1), from the definition."""
    return np.log((p**alpha * q ** (1 - alpha)).sum(-1)) / (alpha - 1)


@pytest.mark.slow
def test_a_row_is_all_that_a_divergence_needs(monkeypatch):
    alpha = Parameter("alpha", 0.4, Interval(0, 1, "()"))
    row = Divergence(
        "renyi", "Rényi's divergence.", "Rényi 1961", lambda p, q, alpha: jnp.exp(alpha * p + (1 - alpha) * q), alpha,
        of_sum=lambda total, alpha: jnp.log(total) / (alpha - 1),
    )  # fmt: skip
    monkeypatch.setitem(TABLE, "renyi", row)
    monkeypatch.setitem(losses.PARAMETER, "renyi", alpha)
    teacher, student = TEACHER_HIDDEN @ TEACHER_HEAD.T, HIDDEN @ HEAD.T
    p, q = (definition.softmax(z[..., :6]) for z in (teacher, student))
    for parameter in (None, 0.7):
        values = losses.divergence("renyi", teacher_logits=teacher, student_logits=student, parameter=parameter, **REAL)
        np.testing.assert_allclose(values, renyi(p, q, parameter or 0.4), rtol=2e-5)

        def dense(hidden, head, parameter=parameter):
            student = hidden @ head.T
            settings = {"divergence": "renyi", "parameter": parameter, "hard_weight": 0.3}
            return losses.distillation_loss(
                teacher_logits=teacher, student_logits=student, labels=LABELS, mask=MASK, **settings, **REAL
            ).mean

        def chunked(hidden, head, parameter=parameter):
            settings = {"divergence": "renyi", "parameter": parameter, "hard_weight": 0.3}
            return fused.linear_distillation(
                student_hidden=hidden,
                student_head=head,
                teacher_hidden=TEACHER_HIDDEN,
                teacher_head=TEACHER_HEAD,
                labels=LABELS,
                mask=MASK,
                chunk=2,
                **settings,
                **REAL,
            )[0].mean

        for one, other in zip(
            *(jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(HIDDEN, HEAD)) for f in (dense, chunked)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="alpha of renyi must be in"):
        losses.divergence("renyi", teacher_logits=teacher, student_logits=student, parameter=1.0)
