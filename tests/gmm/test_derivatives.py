"""Derivatives of the density against SciPy's differences, the precision of matrix products, and x64."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from kd_jax.gmm import em, experiment, frontier, gradient_fit
from kd_jax.gmm.mixture import Mixture, log_prob, sharpen
from kd_jax.gmm.specs import GmmFrontierSpec, GmmSpec

ROOT = Path(__file__).parents[2]
X = np.array([0.3, -0.4])
MEANS = np.array([[0.0, 0.0], [1.0, -1.0], [5.0, 5.0]])


def parts(full):
    """Log weights (one of them -inf), means and covariances."""
    log_weights = np.array([np.log(0.3), np.log(0.7), -np.inf])
    diagonal = np.array([[0.5, 1.5], [1.0, 0.7], [1.0, 1.0]])
    matrices = np.stack([np.diag(d) + 0.2 * (1 - np.eye(2)) for d in diagonal])
    return [log_weights, MEANS, matrices if full else diagonal]


def peer(log_weights, means, covariances, x):
    terms = []
    for weight, mean, covariance in zip(log_weights - logsumexp(log_weights), means, covariances, strict=True):
        matrix = covariance if covariance.ndim == 2 else np.diag(covariance)
        terms.append(weight + multivariate_normal(mean, (matrix + matrix.T) / 2).logpdf(x))
    return logsumexp(terms)


def differences(function, at, step=1e-5):
    """Central differences of a scalar function; 0 at entries that are not finite."""
    gradient = np.zeros_like(at)
    for index in zip(*np.nonzero(np.isfinite(at)), strict=True):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.fast(2)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_first_and_second_derivatives_equal_differences(full, which):
    with jax.enable_x64(True):
        arguments = [*parts(full), X]

        def density(value):
            log_weights, means, covariances, x = arguments[:which] + [value] + arguments[which + 1 :]
            return log_prob(Mixture(*map(jnp.asarray, (log_weights, means, covariances))), x)

        at = jnp.asarray(arguments[which])
        by_peer = differences(lambda v: peer(*arguments[:which], v, *arguments[which + 1 :]), arguments[which])
        gradient_of = jax.jit(jax.grad(density))
        gradient = np.asarray(gradient_of(at))
        np.testing.assert_allclose(jax.jit(jax.jacfwd(density))(at), gradient, atol=1e-10)
        hessian = np.asarray(jax.jit(jax.hessian(density))(at)).reshape(at.size, at.size)
        by_gradient = np.stack([
            differences(lambda v, i=i: float(np.asarray(gradient_of(v)).ravel()[i]), np.array(at)).ravel()
            for i in range(at.size)
        ])  # fmt: skip
        assert np.isfinite(hessian).all()
        np.testing.assert_allclose(hessian, by_gradient, atol=1e-5)
        if which == 2 and full:  # only the lower triangle is read; the peer's difference moves both halves of a pair
            gradient, by_peer = (np.tril(g) + np.tril(g.swapaxes(-1, -2), -1) for g in (gradient, by_peer))
        np.testing.assert_allclose(gradient, by_peer, atol=1e-6)


@pytest.mark.slow
def test_derivatives_in_float32_of_a_batch():
    mixture = Mixture(*(jnp.asarray(part, jnp.float32) for part in parts(False)))
    gradient = jax.grad(lambda m, x: log_prob(m, x).sum(), (0, 1))(mixture, jnp.zeros((7, 2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def products(function, *arguments):
    text = jax.jit(function).lower(*arguments).as_text()
    return re.findall(r"stablehlo\.dot_general.*", text)


@pytest.mark.slow
@pytest.mark.parametrize("dim, full", [(8, False), (8, True), (2, True)])
def test_every_matrix_product_of_a_density_or_fit_states_its_precision(dim, full):
    covariances = jnp.tile(jnp.eye(dim), (3, 1, 1)) if full else jnp.ones((3, dim))
    mixture, x = Mixture(jnp.zeros(3), jnp.zeros((3, dim)), covariances), jnp.zeros((50, dim))
    kind = "full" if full else "diag"
    found = products(log_prob, mixture, x) + products(jax.grad(lambda m: log_prob(m, x).sum()), mixture)
    found += products(lambda x: em.fit(jax.random.key(0), x, 3, covariance_type=kind), x)
    assert found and all("precision = [HIGHEST, HIGHEST]" in product for product in found)


@pytest.mark.slow
def test_every_matrix_product_of_a_whole_experiment_states_its_precision():
    """Of all that a run computes, its scores and entropies included."""
    small = {"dim": 8, "num_data": 20, "num_distill": 30, "num_precision": 40, "num_recall": 40, "seeds": 2}
    spec, other = GmmSpec(**small, covariance_type="full"), GmmFrontierSpec(**small, num_draws=16, num_updates=3)
    seeds = np.arange(2, dtype=np.uint32)
    lowered = [
        experiment._sweep.lower(experiment.base_of(spec), seeds, experiment.numbers_of(spec)),
        frontier._jitted.lower(frontier.program_of(other), seeds, frontier.numbers_of(other)),
    ]
    found = [re.findall(r"stablehlo\.dot_general.*", program.as_text()) for program in lowered]
    assert all(found) and all("precision = [HIGHEST, HIGHEST]" in product for product in sum(found, []))


X64 = """
import jax, jax.numpy as jnp, numpy as np
from kd_jax.gmm import em, gradient_fit
from kd_jax.gmm.mixture import Mixture, log_prob, sample
teacher = Mixture(jnp.log(jnp.array([.3, .7], jnp.float32)), jnp.array([[-1., 0.], [1., 0.]], jnp.float32),
                  jnp.full((2, 2), .1, jnp.float32))
x = sample(jax.random.key(0), teacher, 300)
fit = em.fit(jax.random.key(1), x, 2)
start = gradient_fit.starts_of(fit.mixture, em.fit(jax.random.key(1), x, 1).mixture, 2)
student = gradient_fit.fit(jax.random.key(2), gradient_fit.jensen_shannon(0.5), teacher, x, start, num_updates=20)
fresh = gradient_fit.held_out(jax.random.key(3), gradient_fit.reverse_kl(), teacher, student.mixture, 100)
print(*[float(v) for v in (fit.log_likelihood[-1], log_prob(fit.mixture, x).mean(), student.objective[-1], fresh)])
"""


@pytest.mark.long
def test_x64_gives_the_same_numbers():
    def numbers(flag):
        command = [sys.executable, "-c", X64]
        environment = os.environ | {"JAX_ENABLE_X64": flag}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    np.testing.assert_allclose(numbers("1"), numbers("0"), rtol=1e-3)


@pytest.mark.slow
def test_a_gradient_fit_differentiates_its_estimate():
    teacher = Mixture(*(jnp.asarray(part[:2], jnp.float32) for part in parts(False)))
    noise = gradient_fit.quasi_normal(jax.random.key(0), 2, 2, 16)
    points = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    log_p = gradient_fit.log_density(teacher, points)
    estimate = lambda student: gradient_fit.estimate(  # noqa: E731
        gradient_fit.jensen_shannon(0.3), teacher, student, points, log_p, noise
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(estimate)(teacher)))


def test_derivative_of_sharpening_equal_weights():
    with jax.enable_x64(True):
        equal = Mixture(jnp.log(jnp.full(2, 0.5)), jnp.zeros((2, 1)), jnp.ones((2, 1)))
        weights = lambda log_weights: sharpen(equal._replace(log_weights=log_weights), 3.0).log_weights  # noqa: E731
        # d log w'_i / d log w_k = beta (1[i = k] - w'_k)
        np.testing.assert_allclose(jax.jacrev(weights)(equal.log_weights), 3 * (np.eye(2) - 0.5), atol=1e-12)
