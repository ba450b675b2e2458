"""Mean against NumPy."""

import jax.numpy as jnp
import numpy as np

from kd_jax.metrics import Mean


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
