"""Diversity of samples against the vendi_score package and all pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cosine
from vendi_score import vendi

from kd_jax.metrics import diversity


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_vendi_score_is_the_packages(shape):
    points = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(diversity.vendi_score(points), vendi.score_X(points, normalize=True), rtol=1e-5)
    for scale in (1e-25, 1e25):  # whose squares are beyond float32
        np.testing.assert_allclose(diversity.vendi_score(scale * points), diversity.vendi_score(points), rtol=1e-5)
    kernel = np.exp(-((points[:, None] - points) ** 2).sum(-1) / 10)
    np.testing.assert_allclose(diversity.vendi_score_of_kernel(kernel), vendi.score_K(kernel), rtol=1e-9)


def test_vendi_score_counts_what_is_different():
    np.testing.assert_allclose(diversity.vendi_score(np.eye(6)), 6, rtol=1e-6)
    # three groups of the same direction, of other lengths
    points = np.repeat(np.eye(5)[:3], 4, axis=0) * np.arange(1, 13)[:, None]
    np.testing.assert_allclose(diversity.vendi_score(points), 3, rtol=1e-6)
    np.testing.assert_allclose(diversity.vendi_score(np.ones((7, 3))), 1, rtol=1e-6)


@pytest.mark.slow
def test_prompt_diversity_is_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    points, prompts = rng.normal(size=(12, 4)) + 1, np.array([0, 2, 0, 1, 2, 2, 0, 4, 4, 2, 0, 5])
    means = []
    for prompt in (0, 2, 4):  # prompts 1 and 5 have one sample, 3 has none
        of_prompt = points[prompts == prompt]
        means.append(np.mean([cosine(a, b) for a, b in itertools.combinations(of_prompt, 2)]))
    got = diversity.prompt_diversity(points, prompts)
    np.testing.assert_allclose([got.mean, got.count], [np.mean(means), 3], rtol=1e-5)
    np.testing.assert_allclose(got.standard_error, np.std(means, ddof=1) / np.sqrt(3), rtol=1e-4)
    assert np.isnan(diversity.prompt_diversity(points, np.arange(12)).mean)
    same = diversity.prompt_diversity(np.ones((6, 4)), np.array([0, 0, 0, 1, 1, 1]))
    np.testing.assert_allclose(same.mean, 0, atol=1e-6)


def test_products_are_float32_on_every_device():
    # a GPU or TPU would take fewer bits unless asked; a CPU shows no difference, so the program is read
    program = diversity._cosine_kernel.lower(jnp.ones((9, 4))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 1 and "precision = [HIGHEST, HIGHEST]" in products[0]


@pytest.mark.slow
def test_float64():
    points, prompts = np.random.default_rng(0).normal(size=(20, 6)), np.arange(20) // 4
    wanted = diversity.vendi_score(points), diversity.prompt_diversity(points, prompts).mean
    with jax.enable_x64(True):
        got = diversity.vendi_score(points), diversity.prompt_diversity(points, prompts).mean
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
