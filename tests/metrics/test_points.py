"""Points of few bits give the numbers of float32, and points that are not finite or have no direction are refused."""

import numpy as np
import pytest

from kd_jax.metrics import (
    Samples,
    clipped_density_coverage,
    compute,
    knn_precision_recall,
    prompt_diversity,
    vendi_score,
)
from kd_jax.metrics.mauve import compare


@pytest.mark.parametrize("dtype, spread, apart", [(np.uint8, 30, 120), (np.float16, 12, 20), (np.int16, 3000, 9000)])
def test_few_bits(dtype, spread, apart):
    random = np.random.default_rng(0)
    # far apart in every coordinate, so that no metric sees an overlap
    real, fake = (np.clip(centre + spread * random.uniform(size=(60, 300)), 0, 30000) for centre in (0, apart))
    narrow = [points.astype(dtype) for points in (real, fake)]
    wide = [points.astype(np.float32) for points in narrow]
    for metric in (knn_precision_recall, clipped_density_coverage):
        assert metric(*narrow, 5) == metric(*wide, 5)
    assert knn_precision_recall(*narrow, 5)[:2] == (0, 0)
    same, expected = compute(Samples(*narrow[::-1])), compute(Samples(*wide[::-1]))
    assert same == pytest.approx(expected, rel=1e-6) and "mauve" in same


def test_what_is_not_finite_or_has_no_direction():
    good, bad = np.random.default_rng(0).normal(size=(2, 20, 3))
    bad[4] = np.nan
    with pytest.raises(ValueError, match="row 4 of the fake points is not finite"):
        knn_precision_recall(good, bad, 5)
    with pytest.raises(ValueError, match="row 4 of the real points"):
        clipped_density_coverage(bad, good, 5)
    with pytest.raises(ValueError, match="row 4 of the points of a is not finite"):
        compare(good, {"a": bad})
    with pytest.raises(ValueError, match="row 4 of the points is not finite"):
        vendi_score(bad)
    bad[4] = 0
    with pytest.raises(ValueError, match="row 4 of the points is zero"):
        prompt_diversity(bad, np.arange(20) // 2)
