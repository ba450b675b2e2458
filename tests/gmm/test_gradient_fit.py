"""Divergences and students fitted by gradient: against quadrature, closed forms, exact values, their own promises."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from kd_jax.gmm import gradient_fit as dv
from kd_jax.gmm.mixture import Mixture, sample, sharpen
from kd_jax.gmm.students import eight_modes as modes

KEY = jax.random.key(0)
FAMILY = {
    "forward_kl": dv.forward_kl(),
    "reverse_kl": dv.reverse_kl(),
    "jensen_shannon_0.3": dv.jensen_shannon(0.3),
    "jensen_shannon_0.8": dv.jensen_shannon(0.8),
    "skew_forward_kl_0.2": dv.skew_forward_kl(0.2),
    "skew_reverse_kl_0.2": dv.skew_reverse_kl(0.2),
}
# one dimension: log weights, means, log variances
TEACHER = (np.log([0.5, 0.3, 0.2]), np.array([-1.0, 0.5, 2.0]), np.log([0.3, 0.1, 0.5]))
STUDENT = (np.array([0.4, -0.6]), np.array([-0.7, 1.4]), np.log([0.5, 0.8]))
GRID = np.linspace(-12, 14, 40001)


def density(parameters, x):
    logits, means, log_variances = (np.asarray(p, np.float64)[:, None] for p in parameters)
    terms = logits - logsumexp(logits) + norm.logpdf(x, means, np.exp(0.5 * log_variances))
    return np.exp(logsumexp(terms, axis=0))


def kl(p, q):
    """By the trapezium rule, with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.trapezoid(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0), GRID)


def exact(name, student):
    """The divergence, from its definition."""
    p, q = density(TEACHER, GRID), density(student, GRID)
    kind, _, parameter = name.rpartition("_")
    c = float(parameter) if kind in ("jensen_shannon", "skew_forward_kl", "skew_reverse_kl") else None
    if kind == "jensen_shannon":
        m = c * p + (1 - c) * q
        return c * kl(p, m) + (1 - c) * kl(q, m)
    if kind == "skew_forward_kl":
        return kl(p, c * p + (1 - c) * q)
    if kind == "skew_reverse_kl":
        return kl(q, c * q + (1 - c) * p)
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p)}[name]


def as_mixture(parameters):
    logits, means, log_variances = (jnp.asarray(p, jnp.float32) for p in parameters)
    return Mixture(logits, means[:, None], jnp.exp(log_variances)[:, None])


def gaussian(mean, variance):
    return Mixture(jnp.zeros(1), jnp.asarray([mean], jnp.float32), jnp.asarray([variance], jnp.float32))


def alone(mixture):
    """As the one start."""
    return jax.tree.map(lambda leaf: leaf[None], mixture)


@pytest.mark.slow
def test_estimate_and_its_gradient_are_unbiased():
    """Means over many estimates, each on few draws, against quadrature and its finite differences."""
    teacher = as_mixture(TEACHER)

    def one(parameters, key, target):
        key_points, key_noise = jax.random.split(key)
        points = sample(key_points, teacher, 200).T
        noise = dv.quasi_normal(key_noise, 2, 1, 20)
        return dv.estimate(target, teacher, as_mixture(parameters), points, dv.log_density(teacher, points), noise)

    parameters = tuple(jnp.asarray(p, jnp.float32) for p in STUDENT)
    many = jax.vmap(jax.value_and_grad(one), (None, 0, None))
    values, gradients = jax.jit(jax.vmap(many, (None, None, 0)))(
        parameters, jax.random.split(KEY, 2000), stacked(FAMILY)
    )
    found = np.concatenate([np.asarray(values, np.float64)[..., None], *map(np.float64, gradients)], -1)
    for i, name in enumerate(FAMILY):
        wanted = [exact(name, STUDENT), *slopes(name)]
        for part, (got, want) in enumerate(zip(found[i].T, wanted, strict=True)):
            error = got.std(ddof=1) / np.sqrt(len(got))
            assert abs(got.mean() - want) < 4 * error + 1e-5, (name, part)
            assert error < 0.004  # or the line above would hold for anything


def slopes(name, step=1e-4):
    """Derivatives of the exact divergence by every parameter of the student."""
    found = []
    for i, part in enumerate(STUDENT):
        for k in range(len(part)):
            up, down = (tuple(np.array(p, np.float64) for p in STUDENT) for _ in range(2))
            up[i][k] += step
            down[i][k] -= step
            found.append((exact(name, up) - exact(name, down)) / (2 * step))
    return found


def stacked(family):
    return jax.tree.map(lambda *leaves: jnp.array(leaves, jnp.float32), *family.values())


@pytest.mark.slow
def test_quasi_normal_is_normal_and_more_even_than_independent_draws():
    noise = np.asarray(jax.vmap(lambda k: dv.quasi_normal(k, 2, 2, 64))(jax.random.split(KEY, 500)), np.float64)
    assert np.isfinite(noise).all()
    flat = noise.reshape(500, -1)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        each = (flat**power).mean(1)
        assert abs(each.mean() - moment) < 4 * each.std() / np.sqrt(500)
    # of one set of 64: the mean of independent draws has a standard deviation of 1/8, that of their squares sqrt(2)/8
    assert noise.mean(-1).std() < 0.4 / 8 and (noise**2).mean(-1).std() < 0.4 * np.sqrt(2) / 8
    products = (noise[:, :, 0] * noise[:, :, 1]).mean(-1)
    assert abs(products.mean()) < 4 * products.std() / np.sqrt(1000)


# Fits of one Gaussian in two dimensions to at most 8 components, from 3 starts: one program for several tests.
_fit_one = jax.jit(partial(dv.fit, num_draws=1024))
RNG = np.random.default_rng(0)
X = (RNG.integers(-1, 2, (500, 2)) + 0.158 * RNG.normal(size=(500, 2))).astype(np.float32)


def fit_one(target, teacher, *starts, rate=0.1):
    """The fit from one start, or from the best of 3."""
    three = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(starts if len(starts) == 3 else starts * 3))
    return _fit_one(KEY, target, teacher, X, three, learning_rate=jnp.float32(rate))


def padded(*components):
    """A teacher of 8 components of which only these, (weight, mean, variance), have any weight."""
    empty = [(0.0, [0.0, 0.0], [1.0, 1.0])] * (8 - len(components))
    weights, means, variances = zip(*components, *empty, strict=True)
    with np.errstate(divide="ignore"):
        return Mixture(*(jnp.asarray(v, jnp.float32) for v in (np.log(weights), means, variances)))


@pytest.mark.slow
def test_forward_kl_is_the_moment_match():
    fit = fit_one(dv.forward_kl(), modes(2), gaussian([0.5, 0.0], [1.0, 2.0]))
    np.testing.assert_allclose(fit.mixture.means[0], X.mean(0), atol=1e-4)
    np.testing.assert_allclose(fit.mixture.covariances[0], X.var(0), rtol=1e-4)
    assert fit.gradient_norm < 1e-3


@pytest.mark.slow
def test_reverse_kl_to_a_gaussian_is_that_gaussian():
    mean, variance = [0.7, -1.2], [0.3, 0.05]
    fit = fit_one(dv.reverse_kl(), padded((1.0, mean, variance)), gaussian([0.0, 0.0], [1.0, 1.0]))
    # its own draws are 1024 quasi-random ones
    np.testing.assert_allclose(fit.mixture.means[0], mean, atol=2e-3)
    np.testing.assert_allclose(fit.mixture.covariances[0], variance, rtol=1e-2)
    assert fit.gradient_norm < 1e-3 and abs(fit.objective[-1]) < 1e-3


@pytest.mark.slow
def test_reverse_kl_to_separated_modes_sits_on_one():
    """A Gaussian equal to one corner's mode of p*, which is exact where the modes are infinitely far apart."""
    for separation, tolerance in ((1.0, 0.04), (2.0, 0.01)):
        p_star = modes(2, separation)
        fit = fit_one(dv.reverse_kl(), p_star, gaussian([0.8 * separation] * 2, [0.1, 0.1]))
        (mean,), (variance,) = (np.asarray(leaf, np.float64) for leaf in fit.mixture[1:])
        np.testing.assert_allclose(mean, separation, atol=0.1 * tolerance)
        np.testing.assert_allclose(variance, 0.025, rtol=tolerance)
        np.testing.assert_allclose(fit.objective[-1], np.log(8), atol=0.2 * tolerance)
        # Both are exact for a Gaussian q: log p* is log 1/8 + that of the mode, and E_p*[log q] a matter of moments.
        nearby = np.sum(-0.5 * np.log(2 * np.pi * 0.025) - 0.5 * (variance + (mean - separation) ** 2) / 0.025)
        apart = np.asarray(p_star.means, np.float64) - mean
        recall = np.sum(-0.5 * np.log(2 * np.pi * variance) - 0.5 * (0.025 + (apart**2).mean(0)) / variance)
        exact_recall = {1.0: -69.14900, 2.0: -279.14900}[separation]
        np.testing.assert_allclose(-np.log(8) + nearby, -1.22395, atol=tolerance)
        np.testing.assert_allclose(recall, exact_recall, rtol=tolerance)


@pytest.mark.slow
def test_gradient_norm_and_fresh_draws_tell_an_unconverged_fit():
    start = gaussian([0.8, 0.9], [0.1, 0.1])
    slow, good = (fit_one(dv.reverse_kl(), modes(2), start, rate=rate) for rate in (1e-4, 0.1))
    assert slow.gradient_norm > 1000 * good.gradient_norm
    fresh = jax.jit(lambda student: dv.held_out(KEY, dv.reverse_kl(), modes(2), student, 4096))
    assert fresh(slow.mixture) > fresh(good.mixture) + 0.1
    np.testing.assert_allclose(fresh(good.mixture), np.log(8), atol=0.02)


@pytest.mark.slow
def test_best_of_the_starts_is_kept():
    starts = dv.starts_of(modes(2), gaussian([0.0, 0.0], [0.775, 0.775]), 3)
    assert starts.means.shape == (3, 1, 2)
    each = [jax.tree.map(lambda leaf, r=r: leaf[r], starts) for r in range(3)]
    for target, narrow in ((dv.forward_kl(), False), (dv.reverse_kl(), True)):
        ends = np.array([fit_one(target, modes(2), start).objective[-1] for start in each])
        best = fit_one(target, modes(2), *each)
        np.testing.assert_allclose(best.objective[-1], ends.min(), atol=1e-4)
        assert best.start == np.argmax(ends <= ends.min() + 1e-5)  # of equals the first
        assert (best.mixture.covariances.max() < 0.1) == narrow


@pytest.mark.slow
def test_students_with_several_components_find_the_teacher():
    """Every divergence is least, and zero, where student and teacher are the same."""
    modes = np.array([[-1.0, -1], [0, -1], [1, 1]])
    teacher = sharpen(Mixture(jnp.log(jnp.array([3.0, 2, 1])), jnp.asarray(modes), jnp.full((3, 2), 0.025)), 1.5)
    x = sample(KEY, teacher, 2000)
    start = alone(Mixture(jnp.zeros(3), jnp.array([[-0.8, -0.7], [0.3, -0.8], [0.6, 0.6]]), jnp.full((3, 2), 0.1)))
    fit = jax.jit(jax.vmap(lambda target: dv.fit(KEY, target, teacher, x, start)))(stacked(FAMILY))
    for i, name in enumerate(FAMILY):
        assert fit.gradient_norm[i] < 1e-3, name
        weights = np.exp(teacher.log_weights)
        np.testing.assert_allclose(np.exp(fit.mixture.log_weights[i]), weights, atol=0.05, err_msg=name)
        np.testing.assert_allclose(fit.mixture.means[i], modes, atol=0.03, err_msg=name)
        assert abs(fit.objective[i, -1]) < 0.02, name


def test_starts_are_the_heaviest_components():
    teacher = Mixture(jnp.log(jnp.array([0.1, 0.6, 0.3])), jnp.arange(3.0)[:, None], jnp.arange(1.0, 4)[:, None])
    broad = Mixture(jnp.zeros(2), jnp.full((2, 1), 9.0), jnp.full((2, 1), 9.0))
    starts = dv.starts_of(teacher, broad, 4)
    np.testing.assert_array_equal(starts.means[..., 0], [[9, 9], [1, 2], [2, 0], [0, 1]])
    np.testing.assert_array_equal(starts.covariances[..., 0], [[9, 9], [2, 3], [3, 1], [1, 2]])


@pytest.mark.slow
def test_each_fit_of_a_batch_stands_alone_and_all_share_one_program():
    teacher = as_mixture(TEACHER)
    x = jnp.stack([sample(jax.random.key(i), teacher, 100) for i in range(4)]).at[3, 5].set(jnp.nan)
    family = jax.tree.map(lambda leaf: leaf[:4], stacked(FAMILY))
    betas, rates = jnp.arange(1, 5, dtype=jnp.float32), jnp.full(4, 0.05, jnp.float32)
    starts = alone(gaussian([0.0], [1.0]))

    def fit(target, beta, x, rate):
        return dv.fit(KEY, target, sharpen(teacher, beta), x, starts, num_updates=50, learning_rate=rate)

    batched = jax.jit(jax.vmap(chex.assert_max_traces(fit, n=1)))
    batch = batched(family, betas, x, rates)
    others = [jax.tree.map(lambda leaf: leaf[::-1].at[1].set(leaf[1]), v) for v in (family, betas, x, rates)]
    others[3] = jnp.array([0.01, 0.05, 0.02, 0.03], jnp.float32)
    again = batched(*others)
    for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one[1], other[1])
    assert not np.allclose(batch.mixture.means[2], again.mixture.means[2])
    assert np.isnan(batch.mixture.means[3]).all() and np.isnan(batch.objective[3, -1])
    assert np.isfinite(batch.mixture.means[:3]).all()


def test_ends_of_the_jensen_shannon_family():
    assert dv.jensen_shannon(0.0) == dv.forward_kl() == dv.skew_forward_kl(0.0)
    assert dv.jensen_shannon(1.0) == dv.reverse_kl() == dv.skew_reverse_kl(0.0)
    near, far = exact("jensen_shannon_1e-5", STUDENT) / 1e-5, exact("jensen_shannon_0.99999", STUDENT) / 1e-5
    np.testing.assert_allclose([near, far], [exact("forward_kl", STUDENT), exact("reverse_kl", STUDENT)], rtol=1e-3)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: dv.jensen_shannon(1.1), "beta=1.1"),
        (lambda: dv.jensen_shannon(float("nan")), "beta=nan"),
        (lambda: dv.skew_forward_kl(1.0), "alpha=1.0"),
        (lambda: dv.skew_reverse_kl(-0.1), "alpha=-0.1"),
        (lambda: dv.fit(KEY, dv.forward_kl(), modes(2), jnp.zeros((5, 2)), gaussian([0.0, 0.0], [1.0, 1.0])), "starts"),
        (lambda: dv.fit(KEY, dv.forward_kl(), modes(2), jnp.zeros((5, 3)), alone(gaussian([0.0] * 2, [1] * 2))), "x "),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
