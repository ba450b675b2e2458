"""Nearest neighbours by hand, against scikit-learn, the prdc package and the definition of the clipped metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prdc
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from kd_jax.metrics import neighbours


def points(*values):
    return np.array(values, np.float32)[:, None]


@functools.cache
def blobs():
    """300 real points in 5 dimensions, and 250 fake ones that are shifted and wider."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 5)), 1.2 * rng.normal(size=(250, 5)) + 0.3


def test_neighbours_by_hand():
    # the balls of the real points have radius 1, those of the fake ones 1, 1 and 8.9
    got = neighbours.knn_precision_recall(points(0, 1, 2, 3), points(0.1, 1.1, 10), 1)
    np.testing.assert_allclose(got, (2 / 3, 1, 4 / 3, 3 / 4), rtol=1e-6)


@pytest.mark.parametrize("offset, scale", [(1e4, 1e-3), (1e6, 1e-2), (2**40, 1.0)])
def test_far_from_the_origin(offset, scale):
    real, fake = (np.round(100 * points) for points in blobs())
    near = neighbours.knn_precision_recall(real, fake, 5)
    far = neighbours.knn_precision_recall(offset + scale * real, offset + scale * fake, 5)
    np.testing.assert_allclose(far, near, atol=0.01)


def test_identical_sets_of_one_point():
    same = np.full((8, 2), 3.0, np.float32)
    with pytest.warns(UserWarning, match="16 points have 3 or more others"):
        got = neighbours.knn_precision_recall(same, same, 3)
    np.testing.assert_allclose(got, (1, 1, 8 / 3, 1), rtol=1e-6)


@pytest.mark.parametrize("chunk", [64, 1000])
def test_neighbours_are_scikit_learns(chunk):
    (real, fake), k = blobs(), 4
    radius = [NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1] for x in (real, fake)]
    distance = cdist(real, fake)
    inside = distance <= radius[0][:, None]
    wanted = (
        inside.any(axis=0).mean(), (distance <= radius[1]).any(axis=1).mean(), inside.sum() / (k * len(fake)),
        inside.any(axis=1).mean(),
    )  # fmt: skip
    got = neighbours.knn_precision_recall(real, fake, k, chunk=chunk)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_neighbours_are_prdcs(capsys):
    real, fake = blobs()
    theirs = prdc.compute_prdc(real, fake, 4)
    np.testing.assert_allclose(
        neighbours.knn_precision_recall(real, fake, 4), [theirs[name] for name in neighbours.Neighbours._fields]
    )


def clipped(real, fake, k):
    """Clipped density and uncalibrated clipped coverage from all distances, in float64."""
    itself, across = cdist(real, real), cdist(real, fake)
    radius = np.sort(itself, axis=1)[:, k]  # the point itself comes first
    small = np.minimum(radius, np.median(radius))[:, None]
    others = (itself <= small) & ~np.eye(len(real), dtype=bool)
    density, best = (np.minimum(inside.sum(axis=0) / k, 1).mean() for inside in (across <= small, others))
    return min(density / best, 1), np.minimum((across <= radius[:, None]).sum(axis=1) / k, 1).mean()


@pytest.mark.parametrize("num_real, num_fake", [(300, 250), (299, 100)])
def test_clipped_metrics_are_the_definition(num_real, num_fake):
    real, fake = blobs()[0][:num_real], blobs()[1][:num_fake]
    got = neighbours.clipped_density_coverage(real, fake, 5)
    density, coverage = clipped(real, fake, 5)
    np.testing.assert_allclose(got.density, density, rtol=1e-6)
    # the calibration is the inverse of the expectation
    expected = neighbours.expected_coverage(num_real, num_fake, 5)
    np.testing.assert_allclose(np.interp(got.coverage * num_fake, np.arange(num_fake + 1), expected), coverage)


def test_expected_coverage_is_that_of_draws_of_the_same_distribution():
    rng, k = np.random.default_rng(0), 3
    expected = neighbours.expected_coverage(40, 30, k)
    assert expected[0] == 0 and (np.diff(expected) > 0).all()
    for count in (5, 30):
        draws = [clipped(rng.normal(size=(40, 2)), rng.normal(size=(count, 2)), k)[1] for _ in range(300)]
        np.testing.assert_allclose(np.mean(draws), expected[count], atol=4 * np.std(draws) / np.sqrt(300))


@pytest.mark.slow
def test_clipped_metrics_are_the_share_of_good_samples():
    rng = np.random.default_rng(0)
    real, good = rng.normal(size=(2, 1000, 4))
    for share in (1.0, 0.5, 0.0):
        fake = np.concatenate([good[: int(1000 * share)], 100 + good[int(1000 * share) :]])
        got = neighbours.clipped_density_coverage(real, fake, 5)
        np.testing.assert_allclose(got, share, atol=0.05)
    # one far real point has a huge ball, which makes the plain density of bad samples large
    outlier = np.concatenate([real, [[300.0] * 4]])
    assert neighbours.knn_precision_recall(outlier, 100 + good, 5).precision == 1
    assert neighbours.clipped_density_coverage(outlier, 100 + good, 5).density == 0


def test_identical_sets_of_one_point_are_wholly_covered():
    same = np.full((8, 2), 3.0, np.float32)
    np.testing.assert_array_equal(neighbours.clipped_density_coverage(same, same, 3), 1)


def test_sums_of_counts_are_beyond_int32():
    # 70000 points in the same place would be in 70000 balls each: 4.9e9 in all. The same counts, made up.
    counts = neighbours._num_balls(*map(jnp.asarray, (points(0), points(0, 0))), np.ones(2, np.float32), 256)
    assert counts.dtype == np.int64


def test_memory_of_many_points():
    # 20000 x 64: all distances at once would be 1.6 GB, all differences 100 GB
    shape, radii = jax.ShapeDtypeStruct((20_000, 64), np.float32), jax.ShapeDtypeStruct((20_000,), np.float32)
    for lowered in (
        neighbours._squared_radii.lower(shape, 5, 256), neighbours._count_balls.lower(shape, shape, radii, 256),
        neighbours._count_inside.lower(shape, shape, radii, 256),
    ):  # fmt: skip
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 100e6
        # distances come from differences in float32, not from a product that a device may round
        assert "dot_general" not in lowered.as_text()


def test_float64():
    (real, fake), k = blobs(), 4
    wanted = neighbours.knn_precision_recall(real, fake, k), neighbours.clipped_density_coverage(real, fake, k)
    with jax.enable_x64(True):
        got = neighbours.knn_precision_recall(real, fake, k), neighbours.clipped_density_coverage(real, fake, k)
    np.testing.assert_allclose([*got[0], *got[1]], [*wanted[0], *wanted[1]], rtol=1e-6)


@pytest.mark.parametrize("shapes, k", [(((3, 2), (4, 3)), 1), (((3, 2), (4, 2)), 3), (((3, 2), (4, 2)), 0)])
def test_neighbours_faults(shapes, k):
    for function in (neighbours.knn_precision_recall, neighbours.clipped_density_coverage):
        with pytest.raises(ValueError, match="need points of one dimension|must be at least 1"):
            function(*(np.ones(shape) for shape in shapes), k)
