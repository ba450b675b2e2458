"""Mixtures against SciPy and exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from kd_jax.gmm.mixture import Mixture, blend, cool, log_prob, sample, sharpen, top_k, top_p, weight_entropy


def mixture(weights, means, covariances):
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(weights, np.float64))
    return Mixture(*(jnp.asarray(v, jnp.float32) for v in (log_weights, means, covariances)))


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("full", [False, True])
def test_log_prob_equals_scipy(dim, full):
    rng = np.random.default_rng(dim)
    weights, means = rng.dirichlet(np.ones(3)), rng.normal(size=(3, dim))
    factors = rng.normal(size=(3, dim, dim)) / np.sqrt(dim) + np.eye(dim)
    covariances = factors @ factors.swapaxes(1, 2) if full else rng.uniform(0.1, 2, (3, dim))
    x = rng.normal(size=(5, 7, dim))
    dense = covariances if full else np.stack([np.diag(c) for c in covariances])
    terms = [np.log(w) + multivariate_normal(m, c).logpdf(x) for w, m, c in zip(weights, means, dense, strict=True)]
    got = log_prob(mixture(weights, means, covariances), x.astype(np.float32))
    np.testing.assert_allclose(got, logsumexp(terms, axis=0).reshape(5, 7), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_far_and_tight_points_stay_in_log_space():
    far = mixture([0.5, 0.5], [[0.0], [1.0]], [[1.0], [1.0]])
    np.testing.assert_allclose(log_prob(far, jnp.array([1000.0])), -499002.112, rtol=1e-6)
    for dim, expected in ((9, 95.3458824), (70, 741.5790851)):
        for covariance in (np.full((1, dim), 1e-10), 1e-10 * np.eye(dim)[None]):
            tight = mixture([1.0], np.zeros((1, dim)), covariance)
            np.testing.assert_allclose(log_prob(tight, jnp.zeros(dim)), expected, rtol=1e-5)
    narrow = mixture([1.0], [[0.0]], [[1e-4]])
    np.testing.assert_allclose(log_prob(narrow, jnp.zeros(1)), 3.6862317, rtol=1e-6)


@pytest.mark.slow
def test_ill_conditioned_covariance():
    r = 1 - 1e-6
    bad = mixture([1.0], [[0.0, 0.0]], [[[1, r], [r, 1]]])
    np.testing.assert_allclose(log_prob(bad, jnp.array([[0.0, 0.0], [1.0, 1.0]])), [4.7233049, 4.2233046], atol=0.05)


@pytest.mark.slow
def test_ill_conditioned_covariance_in_float64():
    with jax.enable_x64(True):
        r = 1 - 1e-6
        bad = Mixture(jnp.zeros(1), jnp.zeros((1, 2)), jnp.array([[[1, r], [r, 1]]]))
        got = log_prob(bad, jnp.array([[0.0, 0.0], [1.0, 1.0]]))
        np.testing.assert_allclose(got, [4.7233049, 4.2233046], rtol=1e-6)


@pytest.mark.slow
def test_cooling_is_the_density_to_a_power_renormalised():
    one = mixture([1.0], [[0.5, -1.0]], [[0.3, 2.0]])
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    difference = log_prob(cool(one, 0.4), x) - log_prob(one, x) / 0.4
    np.testing.assert_allclose(difference, difference[0], rtol=1e-4)  # the normaliser alone


@pytest.mark.slow
def test_blend_is_the_weighted_sum_of_densities():
    one, other = mixture([0.2, 0.8], [[0.0], [1.0]], [[1.0], [0.5]]), mixture([3.0], [[4.0]], [[1.0]])
    x = jnp.linspace(-2, 6, 9)[:, None]
    for share in (0.0, 0.3, 1.0):
        wanted = (1 - share) * np.exp(log_prob(one, x)) + share * np.exp(log_prob(other, x))
        np.testing.assert_allclose(np.exp(log_prob(blend(share, one, other), x)), wanted, rtol=1e-5)


def test_zero_density_is_minus_infinity():
    nothing = mixture([0.0, 0.0], [[0.0], [1.0]], [[1.0], [1.0]])._replace(log_weights=jnp.array([-jnp.inf, 0.0]))
    assert np.isfinite(log_prob(nothing, jnp.zeros(1)))
    assert log_prob(nothing, jnp.array([1e30])) == -np.inf


W = [0.15912176, 0.2699429, 0.24034452, 0.33059081]


@pytest.mark.parametrize(
    "weights, beta, expected",
    [
        (W, 0.0, [0.25] * 4),
        (W, 1.0, W),
        (W, 10.0, [5.6864e-4, 0.1122688, 0.0351465, 0.8520160]),
        (W, 100.0, np.array(W) ** 100 / (np.array(W) ** 100).sum()),
        (W, 1e6, [0, 0, 0, 1]),
        (W, np.inf, [0, 0, 0, 1]),
        ([0, 0.5, 0.5], 0.0, [0, 0.5, 0.5]),
        ([0, 0.5, 0.5], 1.0, [0, 0.5, 0.5]),
        ([0, 0.5, 0.5], 1e6, [0, 0.5, 0.5]),
    ],
)
def test_sharpen(weights, beta, expected):
    k = len(weights)
    got = np.exp(sharpen(mixture(weights, np.zeros((k, 1)), np.ones((k, 1))), beta).log_weights)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize(
    "cut, weights, value, expected",
    [
        (top_k, [0.2, 0.1, 0.4, 0.3], 1, [0, 0, 1, 0]),
        (top_k, [0.2, 0.1, 0.4, 0.3], 3, [2 / 9, 0, 4 / 9, 3 / 9]),
        (top_k, [0.2, 0.1, 0.4, 0.3], 4, [0.2, 0.1, 0.4, 0.3]),
        (top_k, [0.2, 0.1, 0.4, 0.3], 50, [0.2, 0.1, 0.4, 0.3]),
        (top_k, [2, 2, 1, 0, 0], 1, [1, 0, 0, 0, 0]),  # the first of equals
        (top_k, [2, 2, 1, 0, 0], 4, [0.4, 0.4, 0.2, 0, 0]),
        (top_p, [0.1, 0.4, 0.3, 0.2], 0.8, [0, 0.444444, 0.333333, 0.222222]),  # the one that crosses p stays
        (top_p, [0.5, 0.3, 0.15, 0.05], 0.6, [0.625, 0.375, 0, 0]),
        (top_p, [0.5, 0.3, 0.15, 0.05], 1e-30, [1, 0, 0, 0]),
        (top_p, [0.25, 0.25, 0.25, 0.25], 0.5, [0.5, 0.5, 0, 0]),
        (top_p, [1, 0, 2, 0], 1.0, [1 / 3, 0, 2 / 3, 0]),
    ],
)
def test_lightest_components_are_dropped(cut, weights, value, expected):
    k = len(weights)
    one = mixture(weights, np.arange(k)[:, None], np.ones((k, 1)))
    got = jax.jit(cut)(one, value)
    np.testing.assert_allclose(np.exp(got.log_weights), expected, rtol=1e-5)
    np.testing.assert_array_equal(got.means, one.means)


def test_top_p_of_1_keeps_every_component_whatever_their_sum_rounds_to():
    weights = np.random.default_rng(0).dirichlet(np.ones(16), 200)
    stacked = Mixture(jnp.log(jnp.asarray(weights, jnp.float32)), jnp.zeros((200, 16, 1)), jnp.ones((200, 16, 1)))
    assert np.isfinite(jax.vmap(top_p, (0, None))(stacked, 1.0).log_weights).all()


def test_weight_entropy():
    entropy = weight_entropy(mixture([0, 0.5, 0.5], np.zeros((3, 1)), np.ones((3, 1))))
    np.testing.assert_allclose(entropy, np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_samples_are_in_random_order_and_exactly_n():
    two = mixture([0.3, 0.3], [[-10.0], [10.0]], [[1.0], [1.0]])  # weights are normalised
    draws = sample(jax.random.key(0), two, 1000)
    assert draws.shape == (1000, 1)
    first = np.asarray(draws)[:100, 0]
    assert (first < 0).any() and (first > 0).any()
    assert not np.array_equal(draws, sample(jax.random.key(1), two, 1000))
    np.testing.assert_allclose((np.asarray(draws) > 0).mean(), 0.5, atol=4 * 0.5 / np.sqrt(1000))


@pytest.mark.slow
def test_zero_weight_is_never_sampled():
    for weights in ([0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]):
        draws = sample(jax.random.key(2), mixture(weights, np.arange(5)[:, None] * 100, np.ones((5, 1))), 20000)
        seen = np.unique(np.round(np.asarray(draws)[:, 0] / 100).astype(int))
        np.testing.assert_array_equal(seen, np.flatnonzero(weights))


def test_sample_moments_of_a_full_covariance():
    covariance = np.array([[1.0, 0.8], [0.8, 2.0]])
    draws = np.asarray(sample(jax.random.key(3), mixture([1.0], [[5.0, -1.0]], covariance[None]), 40000))
    np.testing.assert_allclose(draws.mean(0), [5, -1], atol=4 * np.sqrt(2 / 40000))
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.08)


def test_sharpening_commutes_with_relabelling():
    one = mixture(W, np.arange(4)[:, None], np.ones((4, 1)))
    order = np.array([2, 0, 3, 1])
    permute = lambda m: jax.tree.map(lambda leaf: leaf[order], m)  # noqa: E731
    for a, b in zip(permute(sharpen(one, 7.0)), sharpen(permute(one), 7.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_wrong_shapes_are_named():
    one = mixture([1.0], [[0.0, 0.0]], [[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"\(3,\).*2"):
        log_prob(one, jnp.zeros(3))
    with pytest.raises(ValueError, match="covariances"):
        log_prob(one._replace(covariances=jnp.ones((1, 3))), jnp.zeros(2))
