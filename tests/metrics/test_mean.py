"""Means, their errors and their merges against NumPy in float64 and exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.metrics import Mean
from kd_jax.metrics.mean import BLOCK


def exact(field, mean):
    """A member with what its rounding lost, in float64."""
    return np.float64(getattr(mean, field)) + np.float64(mean.lost[Mean._fields.index(field)])


def test_mean_and_standard_error_far_from_zero():
    values = (1e4 + np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    got = Mean.of(jnp.asarray(values))
    np.testing.assert_allclose(got.mean, values.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(got.standard_error, values.astype(np.float64).std(ddof=1) / np.sqrt(1000), rtol=1e-3)


@pytest.mark.slow
def test_merge_is_the_mean_of_everything():
    values = np.random.default_rng(1).normal(size=100).astype(np.float32)
    merged = Mean.of(jnp.asarray(values[:7])).merge(Mean.of(jnp.asarray(values[7:])))
    whole = Mean.of(jnp.asarray(values))
    for a, b in zip(merged[:4], whole[:4], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    empty = Mean.of(jnp.zeros(3), jnp.zeros(3, bool))
    assert np.isnan(empty.mean) and np.isnan(empty.merge(empty).mean)
    for merged in (empty.merge(whole), whole.merge(empty)):
        np.testing.assert_allclose(merged[:4], whole[:4], rtol=1e-6)


def test_masked_values_are_never_read():
    got = Mean.of(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
    assert (got.mean, got.count) == (2.0, 2)


def test_one_far_value_is_kept_and_zero_density_is_counted():
    far = jnp.array([-5000.9189385] + [-0.9189385] * 9)
    np.testing.assert_allclose(Mean.of(far).mean, -500.9189385, rtol=1e-6)
    zero = Mean.of(far.at[3].set(-jnp.inf))
    assert zero.mean == -np.inf and zero.num_infinite == 1
    for merged in (zero.merge(zero), zero.merge(Mean.of(far)), Mean.of(far).merge(zero)):
        assert merged.mean == -np.inf and np.isnan(merged.standard_error)
    assert zero.merge(zero).num_infinite == 2
    assert np.isnan(zero.merge(Mean.of(-far.at[0].set(-jnp.inf))).mean)


@pytest.mark.slow
def test_any_axis():
    values = np.random.default_rng(0).normal(size=(3, BLOCK + 5, 2)).astype(np.float32)
    for axis in (0, 1, -1):
        got = Mean.of(jnp.asarray(values), axis=axis)
        np.testing.assert_allclose(got.mean, values.mean(axis, np.float64), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got.m2, values.shape[axis] * values.var(axis, np.float64), rtol=1e-5, atol=1e-7)


def test_half_precision_is_summed_in_float32():
    got = Mean.of(jnp.full(10_000, 0.1, jnp.bfloat16))
    assert got.mean.dtype == jnp.float32 and got.count == 10_000
    np.testing.assert_allclose(got.mean, np.float32(jnp.bfloat16(0.1)), rtol=1e-6)


# --- more values than float32 can count -------------------------------------------------------------------------------


def test_a_mean_of_more_than_2_to_the_24_values():
    size = 2**25 + 3
    # a quarter of 3 and the rest of 1: mean 1.5, variance 0.75; a running sum in float32 stops at 2^24
    mean = jax.jit(lambda: Mean.of(jnp.where(jnp.arange(size) % 4 == 0, 3.0, 1.0)))()
    values, counts = np.array([3.0, 1.0]), np.array([2**23 + 1, size - 2**23 - 1])
    wanted = (values * counts).sum() / size
    assert exact("count", mean) == size
    np.testing.assert_allclose(mean.mean, wanted, rtol=2e-7)
    np.testing.assert_allclose(mean.m2, (counts * (values - wanted) ** 2).sum(), rtol=1e-6)


def test_merges_go_on_beyond_2_to_the_24():
    # 1000 single values of 1.5 added to 2^24 ones: each moves the mean by a quarter of a float32 step
    start = Mean(*map(jnp.float32, (2**24, 1.0, 0.0, 2**24)))
    one = Mean(*map(jnp.float32, (1, 1.5, 0.0, 1)))
    end, _ = jax.jit(lambda: jax.lax.scan(lambda mean, _: (mean.merge(one), None), start.merge(one), length=999))()
    share = 1000 / (2**24 + 1000)
    assert exact("count", end) == exact("num_infinite", end) == 2**24 + 1000
    np.testing.assert_allclose(exact("mean", end), 1 + share / 2, rtol=1e-12)
    np.testing.assert_allclose(exact("m2", end), 0.25 * 2**24 * share, rtol=1e-6)


def test_a_mean_that_doubles_40_times():
    mean = Mean.of(jnp.array([1.0, 2.0, 3.0]))
    for _ in range(40):
        mean = mean.merge(mean)
    assert (mean.count, mean.mean, mean.m2) == (3 * 2.0**40, 2.0, 2 * 2.0**40)
    np.testing.assert_allclose(mean.standard_error, np.sqrt(2 / 3 / (3 * 2.0**40)), rtol=1e-6)


@pytest.mark.slow
def test_merging_has_the_gradient_of_the_whole_mean():
    values, others = jnp.array([1.0, 3.0]), jnp.array([0.5, 1.5, 4.0, 2.0])
    for one, two in ((values, others), (values, values)):  # equal means too

        def merged(one, two):
            return Mean.of(one).merge(Mean.of(two)).mean

        for gradient in jax.jit(jax.grad(merged, (0, 1)))(one, two):
            np.testing.assert_allclose(gradient, 1 / (len(one) + len(two)), rtol=1e-6)
        tangent = jax.jvp(merged, (one, two), (one, two))[1]
        np.testing.assert_allclose(tangent, merged(one, two), rtol=1e-6)


def test_float64_stays():
    with jax.enable_x64(True):
        mean = Mean.of(jnp.asarray(np.array([1.0, 1.0 + 1e-12])))
        assert {leaf.dtype for leaf in jax.tree.leaves(mean.merge(mean))} == {np.dtype("float64")}
        np.testing.assert_allclose(mean.merge(mean).m2, 1e-24, rtol=1e-3)
        assert Mean.of(jnp.ones(3, jnp.float32)).mean.dtype == jnp.float32
