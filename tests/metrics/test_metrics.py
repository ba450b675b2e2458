"""Means against NumPy; nearest neighbours by hand and against scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from kd_jax.metrics import Mean, neighbours


def test_mean_and_standard_error_far_from_zero():
    values = (1e4 + np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    got = Mean.of(jnp.asarray(values))
    np.testing.assert_allclose(got.mean, values.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(got.standard_error, values.astype(np.float64).std(ddof=1) / np.sqrt(1000), rtol=1e-3)


def test_merge_is_the_mean_of_everything():
    values = np.random.default_rng(1).normal(size=100).astype(np.float32)
    merged = Mean.of(jnp.asarray(values[:7])).merge(Mean.of(jnp.asarray(values[7:])))
    whole = Mean.of(jnp.asarray(values))
    for a, b in zip(merged, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    empty = Mean.of(jnp.zeros(3), jnp.zeros(3, bool))
    np.testing.assert_allclose(empty.merge(whole).mean, whole.mean, rtol=1e-6)
    assert np.isnan(empty.mean)


def test_masked_values_are_never_read():
    got = Mean.of(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    assert (got.mean, got.count) == (2.0, 2)


def test_one_far_value_is_kept_and_zero_density_is_counted():
    far = jnp.array([-5000.9189385] + [-0.9189385] * 9)
    np.testing.assert_allclose(Mean.of(far).mean, -500.9189385, rtol=1e-6)
    zero = Mean.of(far.at[3].set(-jnp.inf))
    assert zero.mean == -np.inf and zero.num_infinite == 1


def points(*values):
    return np.array(values, np.float32)[:, None]


def test_neighbours_by_hand():
    # balls of the real points all have radius 1; those of the fake ones 1, 1 and 8.9
    found = neighbours.knn_precision_recall(points(0, 1, 2, 3), points(0.1, 1.1, 10), 1)
    np.testing.assert_allclose(found, (2 / 3, 1, 4 / 3, 3 / 4), rtol=1e-6)


def test_identical_sets_of_one_point():
    same = np.full((8, 2), 3.0, np.float32)
    with pytest.warns(UserWarning, match="16 points have 3 or more others"):
        found = neighbours.knn_precision_recall(same, same, 3)
    np.testing.assert_allclose(found, (1, 1, 8 / 3, 1), rtol=1e-6)


def test_neighbours_are_scikit_learns():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 5)), 1.2 * rng.normal(size=(250, 5)) + 0.3
    k = 4
    radius = [NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1] for x in (real, fake)]
    distance = np.linalg.norm(real[:, None] - fake, axis=-1)
    inside = distance <= radius[0][:, None]
    wanted = (
        inside.any(axis=0).mean(), (distance <= radius[1]).any(axis=1).mean(), inside.sum() / (k * len(fake)),
        inside.any(axis=1).mean(),
    )  # fmt: skip
    for chunk in (64, 1000):
        found = neighbours.knn_precision_recall(real, fake, k, chunk=chunk)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("shapes, k", [(((3, 2), (4, 3)), 1), (((3, 2), (4, 2)), 3), (((3, 2), (4, 2)), 0)])
def test_neighbours_faults(shapes, k):
    with pytest.raises(ValueError):
        neighbours.knn_precision_recall(*(np.ones(shape) for shape in shapes), k)
