"""Live against the losses of TRL and Liger, where they mean the same; docs/losses.md lists where they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import fused, losses

torch = pytest.importorskip("torch")
gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
trl = pytest.importorskip("trl.trainer.distillation_trainer")
liger = pytest.importorskip("liger_kernel.chunked_loss")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_torch_thread")]

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
SHAPE, VOCAB, WIDTHS = (3, 11), 97, (16, 24)
random = np.random.default_rng(0)
STUDENT = (
    random.standard_normal((*SHAPE, WIDTHS[0]), np.float32),
    random.standard_normal((VOCAB, WIDTHS[0]), np.float32),
)
TEACHER = (
    random.standard_normal((*SHAPE, WIDTHS[1]), np.float32),
    random.standard_normal((VOCAB, WIDTHS[1]), np.float32),
)
MASK = random.random(SHAPE) < 0.6
LABELS = np.where(MASK, random.integers(0, VOCAB, SHAPE), -100)


def theirs(function, *leaves):
    """Value and gradients of a function of torch tensors; what it returns beside the value."""
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    out = function(*tensors)
    value, *rest = out if isinstance(out, tuple) else (out,)
    value.backward()
    return value.item(), [tensor.grad.numpy() for tensor in tensors], [float(x) for x in rest]


def agree(mine, other):
    value, gradients = mine
    np.testing.assert_allclose(value, other[0], rtol=1e-5)
    for gradient, reference in zip(gradients, other[1], strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=2e-6 * abs(reference).max())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_gkd_on_logits(beta, temperature):
    logits, teacher = (hidden @ head.T for hidden, head in (STUDENT, TEACHER))
    other = theirs(
        lambda logits: gkd.GKDTrainer.generalized_jsd_loss(
            logits, torch.tensor(teacher), labels=torch.tensor(LABELS), beta=beta, temperature=temperature
        ),
        logits,
    )

    @functools.partial(jax.jit, static_argnums=1)
    def loss(logits, name, beta):
        values = losses.divergence(
            name, teacher_logits=teacher, student_logits=logits, parameter=beta, temperature=temperature
        )
        return losses.masked_mean(values, jnp.asarray(MASK)).mean

    agree(jax.value_and_grad(lambda x: loss(x[0], "jensen_shannon", beta))((logits,)), other)
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        if beta == end:
            agree(jax.value_and_grad(lambda x, name=name: loss(x[0], name, None))((logits,)), other)


def ours(beta, temperature=1.0, hard_weight=0.0, labels=None):
    @jax.jit
    def loss(student, beta, hard_weight):
        mean, statistics = fused.linear_distillation(
            student_hidden=student[0],
            student_head=student[1],
            teacher_hidden=TEACHER[0],
            teacher_head=TEACHER[1],
            labels=labels,
            mask=MASK,
            divergence="jensen_shannon",
            parameter=beta,
            temperature=temperature,
            hard_weight=hard_weight if labels is not None else 0.0,
            chunk=7,
        )
        return mean.mean, statistics

    (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(STUDENT, beta, hard_weight)
    return (value, gradients), statistics


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.0, 2.0), (0.5, 2.0)])
def test_trl_chunked(beta, temperature):
    def function(hidden, head):
        return trl._chunked_divergence_loss(
            hidden, *(torch.tensor(TEACHER[0]), head, torch.tensor(TEACHER[1])), torch.tensor(MASK), beta,
            temperature=temperature,
        )  # fmt: skip

    value, gradients, (entropy, count) = theirs(function, *STUDENT)
    mine, statistics = ours(beta, temperature)
    # they leave T^2 to the learning rate
    factor = temperature**2
    agree(mine, (factor * value, [factor * gradient for gradient in gradients]))
    student = statistics.student_entropy
    np.testing.assert_allclose([student.mean, student.count], [entropy / count, count], rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_liger_chunked(beta, hard_weight):
    module = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard_weight, weight_soft_loss=1 - hard_weight, beta=beta, compiled=False, chunk_size=8
    )

    def function(hidden, head):
        flat = [torch.tensor(leaf).reshape(-1, leaf.shape[-1]) for leaf in TEACHER]
        return module(hidden.reshape(-1, WIDTHS[0]), head, *flat, torch.tensor(LABELS).reshape(-1))

    other = theirs(function, *STUDENT)
    mine, _ = ours(beta, hard_weight=hard_weight, labels=LABELS if hard_weight else None)
    agree(mine, other)


def test_liger_has_no_factor_of_the_temperature():
    module = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=2.0, compiled=False
    )

    def function(hidden, head):
        flat = [torch.tensor(leaf).reshape(-1, leaf.shape[-1]) for leaf in TEACHER]
        return module(hidden.reshape(-1, WIDTHS[0]), head, *flat, torch.tensor(LABELS).reshape(-1))

    @jax.jit
    def loss(student):
        return fused.linear_divergence(
            student_hidden=student[0],
            student_head=student[1],
            teacher_hidden=TEACHER[0],
            teacher_head=TEACHER[1],
            mask=MASK,
            divergence="forward_kl",
            temperature=2.0,
        ).mean

    agree(jax.value_and_grad(loss)(STUDENT), theirs(function, *STUDENT))
