"""The map of embeddings: principal components against scikit-learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from kd_jax.lm.evaluation import embedding_map


def test_principal_components_are_scikit_learns():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 8)) * np.array([5, 3, 1, 1, 0.5, 0.5, 0.1, 0.1]) + 2
    other = real[:20] * 0.3
    placed, share = embedding_map.principal_components(real.astype(np.float32), {"a": other})
    fitted = PCA(2).fit(real)
    assert share == pytest.approx(fitted.explained_variance_ratio_.sum(), rel=1e-5)
    for points, name in ((real, "p*"), (other, "a")):
        expected = fitted.transform(points)
        signs = np.sign((expected * placed[name]).sum(0))
        np.testing.assert_allclose(placed[name] * signs, expected, atol=1e-4)


def test_the_map_does_not_flip():
    real = np.random.default_rng(0).normal(size=(30, 5))
    one, _ = embedding_map.principal_components(real, {})
    other, _ = embedding_map.principal_components(real[::-1], {})
    np.testing.assert_allclose(one["p*"], other["p*"][::-1], atol=1e-9)
