"""EM against scikit-learn, exact values and its own promises."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from kd_jax.gmm import em, sums
from kd_jax.gmm.mixture import Mixture, sample

KEY = jax.random.key(0)


def clusters(dim, n=600, seed=0):
    rng = np.random.default_rng(seed)
    return (0.3 * rng.normal(size=(n, dim)) + rng.integers(0, 3, (n, 1))).astype(np.float32)


def start_at(means, full):
    k, dim = means.shape
    covariance = jnp.broadcast_to(jnp.eye(dim), (k, dim, dim)) if full else jnp.ones((k, dim))
    return Mixture(jnp.full(k, -np.log(k)), jnp.asarray(means), covariance)


@pytest.mark.fast(4)
@pytest.mark.parametrize("dim", [1, 2, 8, 32])
@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_equals_scikit_learn(dim, covariance_type):
    x, full = clusters(dim), covariance_type == "full"
    precisions = np.tile(np.eye(dim), (3, 1, 1)) if full else np.ones((3, dim))
    peer = GaussianMixture(
        3, covariance_type=covariance_type, weights_init=np.ones(3) / 3, means_init=x[:3].astype(np.float64),
        precisions_init=precisions, max_iter=40, tol=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.fit(x.astype(np.float64))
    got = em.fit(KEY, x, 3, covariance_type=covariance_type, start=start_at(x[:3], full), max_iter=40, tol=0.0)
    np.testing.assert_allclose(got.log_likelihood[-1], peer.lower_bound_, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(np.exp(got.mixture.log_weights), peer.weights_, rtol=1e-3)
    np.testing.assert_allclose(got.mixture.means, peer.means_, rtol=1e-3, atol=1e-3)
    # An off-diagonal entry near zero is judged by the scale of its matrix.
    np.testing.assert_allclose(got.mixture.covariances, peer.covariances_, rtol=1e-3, atol=1e-3 * 0.09)


def smallest_change(x, init, covariance_type):
    fit = jax.vmap(lambda k: em.fit(k, x, 6, init=init, covariance_type=covariance_type, tol=0.0))
    trace = np.asarray(fit(jax.random.split(jax.random.key(0), 20)).log_likelihood)
    assert np.isfinite(trace).all()
    return np.diff(trace).min() / np.abs(trace).max()


@pytest.mark.slow
@pytest.mark.fast(2)
@pytest.mark.parametrize("covariance_type, dim, n", [("diag", 2, 60), ("diag", 8, 60), ("full", 2, 60)])
@pytest.mark.parametrize("init", em.INITS)
def test_trace_never_falls(init, covariance_type, dim, n):
    assert smallest_change(jnp.asarray(clusters(dim, n)), init, covariance_type) > -2e-6


@pytest.mark.slow
def test_trace_never_falls_with_nearly_singular_covariances():
    # 10 points a component in 8 dimensions: the covariances reach condition numbers of 1e6, which float32 cannot hold.
    with jax.enable_x64(True):
        assert smallest_change(jnp.asarray(clusters(8, 60), jnp.float64), "random", "full") > -1e-10


@pytest.mark.slow
@pytest.mark.parametrize("covariance_type", em.COVARIANCE_TYPES)
def test_degenerate_data(covariance_type):
    fit = lambda x, k: em.fit(KEY, jnp.asarray(x, jnp.float32), k, covariance_type=covariance_type)  # noqa: E731
    diagonal = lambda f: np.asarray(f.mixture.covariances).reshape(f.mixture.means.shape[0], -1)  # noqa: E731
    for x, expected in (([20000, 20001, 20002, 20003], 1.25), ([10000, 10001], 0.25)):
        np.testing.assert_allclose(diagonal(fit(np.array(x)[:, None], 1)), expected, rtol=1e-3)
    owned = fit([[0.0], [10.0], [20.0]], 3)
    np.testing.assert_allclose(np.sort(owned.mixture.means[:, 0]), [0, 10, 20], atol=1e-5)
    np.testing.assert_allclose(diagonal(owned), 1e-6, rtol=1e-3)
    np.testing.assert_allclose(owned.log_likelihood[-1], 4.8902045, rtol=1e-5)
    equal = fit(np.tile([3.0, -2.0], (8, 1)), 2)
    np.testing.assert_allclose(equal.mixture.means, np.tile([3.0, -2.0], (2, 1)))
    np.testing.assert_allclose(np.exp(equal.mixture.log_weights).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(equal.log_likelihood[-1], 11.9776335, rtol=1e-5)


@pytest.mark.slow
def test_one_component_of_few_points_is_drawn_from_as_it_is():
    x = clusters(2, 31)
    one = em.fit(KEY, x, 1).mixture
    np.testing.assert_allclose(one.means[0], x.mean(0), rtol=1e-4)
    draws = sample(KEY, one, 31)
    assert draws.shape == (31, 2) and not np.array_equal(draws, sample(jax.random.key(1), one, 31))


@pytest.mark.slow
def test_tight_cluster_far_from_the_others_keeps_its_variance():
    rng = np.random.default_rng(0)
    tight, wide = 10 + 1e-2 * rng.normal(size=(200, 1)), rng.normal(size=(200, 1))
    got = em.fit(KEY, np.concatenate([tight, wide]).astype(np.float32), 2).mixture
    np.testing.assert_allclose(got.covariances.min(), tight.var() + 1e-6, rtol=1e-2)


@pytest.mark.slow
def test_offset_data_fit_as_centred_data_do():
    x = clusters(2, 400)
    near, far = (em.fit(KEY, jnp.asarray(x + o, jnp.float32), 3, tol=0.0, max_iter=30) for o in (0.0, 1e4))
    # float32 points near 1e4 are themselves rounded to 1e-3.
    np.testing.assert_allclose(near.log_likelihood[-1], far.log_likelihood[-1], atol=2e-3)


@pytest.mark.slow
def test_each_fit_of_a_batch_stands_alone():
    easy, hard = clusters(2, 100), np.random.default_rng(1).normal(size=(100, 2)).astype(np.float32)
    equal, broken = np.ones((100, 2), np.float32), clusters(2, 100)
    broken[7, 1] = np.nan
    fit = lambda x: em.fit(KEY, x, 3, max_iter=50)  # noqa: E731
    batch = jax.jit(jax.vmap(fit))(jnp.stack([easy, hard, equal, broken]))
    for i, x in enumerate([easy, hard, equal]):
        alone = fit(x)
        np.testing.assert_allclose(batch.log_likelihood[i], alone.log_likelihood, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(batch.mixture.means[i], alone.mixture.means, rtol=1e-4, atol=1e-5)
        assert batch.converged[i] == alone.converged
    assert np.isnan(batch.log_likelihood[3]).all() and not batch.converged[3]
    assert np.isnan(batch.mixture.means[3]).all()


def test_relabelled_start_gives_the_relabelled_fit():
    x, order = clusters(2), np.array([2, 0, 1])
    one, other = (em.fit(KEY, x, 3, start=start_at(m, False)) for m in (x[:3], x[:3][order]))
    np.testing.assert_allclose(one.log_likelihood, other.log_likelihood, atol=1e-5)
    np.testing.assert_allclose(one.mixture.means[order], other.mixture.means, atol=1e-4)


@pytest.mark.slow
def test_sample_weights_count_as_repeats_and_zero_is_never_read():
    x = clusters(2, 100)
    counts = np.random.default_rng(2).integers(0, 3, 100)
    start = start_at(x[:3], False)
    repeated = em.fit(KEY, np.repeat(x, counts, 0), 3, start=start, max_iter=20, tol=0.0)
    hole = np.where(counts[:, None] == 0, np.nan, x)
    weighted = em.fit(KEY, hole, 3, start=start, max_iter=20, tol=0.0, sample_weights=counts)
    np.testing.assert_allclose(weighted.mixture.means, repeated.mixture.means, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weighted.log_likelihood, repeated.log_likelihood, atol=1e-4)


@pytest.mark.slow
def test_more_starts_are_never_worse():
    x = clusters(2, 200)
    keys = jax.random.split(KEY, 8)
    best = em.fit(KEY, x, 5, init="random", num_starts=8).log_likelihood[-1]
    each = [em.fit(k, x, 5, init="random").log_likelihood[-1] for k in keys]
    np.testing.assert_allclose(best, max(each), atol=1e-5)


@pytest.mark.slow
def test_float64():
    with jax.enable_x64(True):
        got = em.fit(jax.random.key(0), jnp.asarray(clusters(2), jnp.float64), 3, covariance_type="full")
        assert {leaf.dtype for leaf in jax.tree.leaves(got.mixture)} == {np.dtype("float64")}
        assert got.converged


@pytest.mark.parametrize(
    "change, word",
    [({"num_components": 0}, "num_components"), ({"init": "kmean"}, "init"), ({"covariance_type": "tied"}, "tied"),
     ({"x": np.arange(6).reshape(3, 2)}, "float"), ({"max_iter": 0}, "max_iter"),
     ({"sample_weights": np.ones(2)}, "sample_weights")],
)  # fmt: skip
def test_wrong_input_is_named(change, word):
    arguments = {"x": clusters(2, 10), "num_components": 2} | change
    with pytest.raises(ValueError, match=word):
        em.fit(KEY, **arguments)


def quarter_and_rest(n):
    """n points in 1-D, a quarter from N(-3, 1), the rest from N(3, 1): mean 1.5, variance 7.75; and their variance."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n, np.float32)
    x[: n // 4] -= 3
    x[n // 4 :] += 3
    # in chunks: NumPy would make a float64 copy of all
    total, squares = np.sum([(c.sum(), (c**2).sum()) for c in map(np.float64, np.array_split(x, 1 + n // 2**20))], 0)
    return x[:, None], squares / n - (total / n) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [1_000_000, *(pytest.param(n, marks=pytest.mark.long) for n in (20_000_000, 60_000_000))])
def test_more_points_than_float32_can_count(n):
    x, truth = quarter_and_rest(n)  # 7.75 but for the draws' own error
    one = em.fit(KEY, x, 1).mixture
    np.testing.assert_allclose(one.covariances[0, 0], truth, rtol=1e-4)
    np.testing.assert_allclose(truth, 7.75, atol=5 * np.sqrt(2 * 7.75**2 / n))
    start = Mixture(jnp.log(jnp.array([0.5, 0.5])), jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1)))
    two = em.fit(KEY, x, 2, start=start, max_iter=25, tol=1e-5).mixture
    np.testing.assert_allclose(np.exp(two.log_weights), [0.25, 0.75], atol=1e-3)
    np.testing.assert_allclose(two.covariances[:, 0], 1, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("covariance_type, dim", [("diag", 2), ("full", 2), ("diag", 6), ("full", 6)])
def test_blocks_give_what_one_sum_gives(covariance_type, dim, monkeypatch):
    x = clusters(dim, 700)
    whole = em.fit(KEY, x, 3, covariance_type=covariance_type, tol=0.0, max_iter=10)
    monkeypatch.setattr(sums, "BLOCK", 64)
    blocks = em.fit(KEY, x, 3, covariance_type=covariance_type, tol=0.0, max_iter=10)
    np.testing.assert_allclose(blocks.log_likelihood, whole.log_likelihood, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(blocks.mixture.means, whole.mixture.means, rtol=1e-3, atol=1e-4)


def test_bad_sample_weights_are_named():
    x = jnp.array([[0.0], [1.0], [5.0]])
    for weights, name in (([1, -1, 1], r"sample_weights\[1\] is -1"), ([1.0, 2.0, np.nan], r"sample_weights\[2\]")):
        with pytest.raises(ValueError, match=name):
            em.fit(KEY, x, 1, sample_weights=np.array(weights))
    traced = jax.jit(lambda w: em.fit(KEY, x, 1, sample_weights=w))(jnp.array([1.0, -1.0, 1.0]))
    assert np.isnan(traced.mixture.means).all() and not traced.converged


@pytest.mark.slow
def test_fewer_active_components_are_a_smaller_fit():
    x = clusters(2, 300)
    fit = jax.jit(lambda active: em.fit(KEY, x, 4, num_active=active, tol=0.0))
    for active in (1, 3, 4):
        got, alone = fit(active), em.fit(KEY, x, active, tol=0.0)
        order = np.argsort(-got.mixture.log_weights)[:active], np.argsort(-alone.mixture.log_weights)
        assert np.isneginf(got.mixture.log_weights).sum() == 4 - active
        if active != 4:  # seeds of 4 and of fewer draw other candidates; the maximum of 1 and of 3 clusters is one
            np.testing.assert_allclose(got.log_likelihood[-1], alone.log_likelihood[-1], rtol=1e-3)
            np.testing.assert_allclose(got.mixture.means[order[0]], alone.mixture.means[order[1]], atol=2e-2)


@pytest.mark.parametrize(
    "changes, text",
    [({"num_components": 3}, "the means of start have"), ({"covariance_type": "full"}, "the covariances of start"),
     ({"num_starts": 2}, "num_starts=2 has no effect")],
)  # fmt: skip
def test_a_start_that_does_not_go_with_the_settings(changes, text):
    start = Mixture(jnp.log(jnp.array([0.5, 0.5])), jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=text):
        em.fit(KEY, jnp.zeros((9, 1)), **({"num_components": 2} | changes), start=start)
