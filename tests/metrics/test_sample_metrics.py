"""The table of sample metrics: what each needs, and the bias of a model against itself."""

import dataclasses

import numpy as np
import pytest

from kd_jax.metrics import SAMPLE_METRICS, Samples, clipped_density_coverage, compute, knn_precision_recall, self_bias


def gaussian(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


def test_every_row_says_what_it_is():
    for name, row in SAMPLE_METRICS.items():
        assert row.name == name and row.summary and row.unit and row.larger
        assert set(row.needs) <= {field.name for field in dataclasses.fields(Samples)}


@pytest.mark.slow
def test_metrics_whose_needs_are_met():
    fake, real, prompts = gaussian(60), gaussian(60, 1), np.arange(60) // 4
    samples = Samples(fake, real, prompts, k=3)
    values = compute(samples)
    assert values.keys() == SAMPLE_METRICS.keys()
    plain, clipped = knn_precision_recall(real, fake, 3), clipped_density_coverage(real, fake, 3)
    assert [values[f"knn_{name}"] for name in plain._fields] == list(plain)
    assert [values[f"clipped_{name}"] for name in clipped._fields] == list(clipped)
    assert compute(Samples(fake)).keys() == {"vendi_score"}
    assert compute(Samples(fake, prompts=prompts)) == {
        name: values[name] for name in ("vendi_score", "prompt_diversity")
    }
    with pytest.raises(ValueError, match="only sets of the same number"):
        compute(Samples(fake[:50], real, k=3))


@pytest.mark.slow
def test_bias_of_a_model_against_itself():
    points = gaussian(400)
    samples = Samples(points, points, k=3, num_buckets=8)
    small, half = self_bias(samples, size=40), self_bias(samples)
    assert small.keys() == half.keys() == {name for name, row in SAMPLE_METRICS.items() if row.ideal is not None}
    for name, one in half.items():
        assert one.size == 200 and one.value.count == 4
        np.testing.assert_allclose(one.bias, one.value.mean - SAMPLE_METRICS[name].ideal, rtol=1e-6)
    # fewer points look further apart
    for name in ("knn_precision", "knn_recall", "mauve"):
        assert small[name].bias < half[name].bias < 0, name
    # of two sets of one distribution, a ball to the third neighbour stays empty with probability 2^-3
    np.testing.assert_allclose(half["knn_coverage"].bias, -1 / 8, atol=0.04)
    # these are calibrated
    for name in ("knn_density", "clipped_density", "clipped_coverage"):
        assert abs(half[name].bias) < 0.06, name
    again = self_bias(samples, size=40)
    assert {name: one.bias for name, one in again.items()} == {name: one.bias for name, one in small.items()}
