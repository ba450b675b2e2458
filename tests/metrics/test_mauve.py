"""MAUVE against integrals, closed forms and scikit-learn's clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from sklearn.cluster import KMeans

from kd_jax.metrics import mauve


def test_histograms_without_overlap_and_equal_ones():
    for scaling in (1.0, 2.0, 5.0):
        floor = scaling * special.beta(scaling + 1, scaling)
        np.testing.assert_allclose(mauve.area([1, 0], [0, 1], scaling), floor, rtol=1e-4)
    np.testing.assert_allclose(mauve.area([1, 0], [0, 1]), 1 / 252, rtol=1e-4)
    assert mauve.area([0.2, 0.8, 0], [0.2, 0.8, 0]) == 1


@pytest.mark.slow
def test_area_is_the_integral():
    p, q, scaling = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.2, 0.3, 0.4]), 3.0

    def point(w):
        r = w * p + (1 - w) * q
        return np.exp(-scaling * stats.entropy(q, r)), np.exp(-scaling * stats.entropy(p, r))

    def slope(w, step=1e-6):
        return (point(w + step)[0] - point(w - step)[0]) / (2 * step)

    inside = integrate.quad(lambda w: -point(w)[1] * slope(w), 1e-5, 1 - 1e-5, limit=200)[0]
    # from w = 0, where x is 1, along y; at w = 1 the frontier stops short of x = 0, at y = 1
    right = inside + point(1)[0]
    np.testing.assert_allclose(mauve.area(p, q, scaling), right, rtol=1e-3)
    np.testing.assert_allclose(mauve.area(q, p, scaling), mauve.area(p, q, scaling), rtol=1e-3)


@pytest.mark.slow
def test_clusters_are_those_of_separate_blobs():
    random = np.random.RandomState(0)
    centres = 20 * random.standard_normal((6, 3))
    label = np.repeat(np.arange(6), 30)
    points = (centres[label] + random.standard_normal((180, 3))).astype(np.float32)
    ours = np.asarray(mauve._clusters(jax.random.key(0), points, 6))
    theirs = KMeans(6, n_init=10, random_state=0).fit(points).labels_
    for labels in (label, theirs):
        assert len({*zip(ours.tolist(), labels.tolist(), strict=True)}) == 6  # the same up to their names


@pytest.mark.slow
def test_the_same_text_in_two_halves_and_other_text():
    random = np.random.RandomState(0)
    scores = {}
    for n in (100, 2000):
        real, same, other = (random.standard_normal((n, 4)) + shift for shift in (0, 0, 3))
        scores[n] = mauve.compare(real, {"same": same, "other": other, "itself": real}, num_buckets=10)
        assert scores[n]["other"].score < 0.1 < scores[n]["same"].score < scores[n]["itself"].score == 1
        assert all(each[1:] == (n, 10, 0, 5.0) for each in scores[n].values())
    assert scores[100]["same"].score < scores[2000]["same"].score  # fewer points look further apart
    assert mauve.compare(real, {"a": same}, num_buckets=10) == {"a": scores[2000]["same"]}
    assert mauve.compare(real, {"a": same}, num_buckets=10, seed=1)["a"] != scores[2000]["same"]


def test_far_from_the_origin():
    random = np.random.RandomState(0)
    real, far = random.standard_normal((400, 16)), random.standard_normal((400, 16)) + 1
    near = mauve.compare(real, {"far": far}, num_buckets=40)["far"].score
    assert mauve.compare(real + 1e6, {"far": far + 1e6}, num_buckets=40)["far"].score == pytest.approx(near, abs=0.01)
    assert near < 0.1


@pytest.mark.slow
def test_points_that_coincide():
    same = np.ones((40, 3))
    assert mauve.compare(same, {"a": same}, num_buckets=8)["a"].score == 1


@pytest.mark.parametrize(
    "fake, options, message",
    [
        (np.ones((39, 3)), {}, "a has shape \\(39, 3\\) and the real points \\(40, 3\\)"),
        (np.ones((40, 2)), {}, "only sets of the same number of points"),
        (np.ones((40, 3)), {"num_buckets": 41}, "num_buckets=41"),
        (np.ones((40, 3)), {"num_buckets": 1}, "num_buckets=1"),
    ],
)
def test_sets_that_cannot_be_compared(fake, options, message):
    with pytest.raises(ValueError, match=message):
        mauve.compare(np.ones((40, 3)), {"a": fake}, **options)


def test_products_are_float32_on_every_device():
    # a GPU or TPU would take fewer bits unless asked; a CPU shows no difference, so the program is read
    program = mauve._clusters.lower(jax.random.key(0), jnp.ones((20, 3)), 4).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_float64():
    real, fake = np.random.RandomState(0).standard_normal((2, 60, 3))
    wanted = mauve.compare(real, {"a": fake}, num_buckets=6)
    with jax.enable_x64(True):
        assert mauve.compare(real, {"a": fake}, num_buckets=6) == wanted
