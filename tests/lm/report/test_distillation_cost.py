"""What distillation cost in every metric, against np.interp, and models that are more precise than p* itself."""

import math

import numpy as np
import pytest

from kd_jax.lm.report import comparison, cooling
from tests.lm.report.test_cooling import TEMPERATURES, curve_of, direct, mean, rows_of

HEADS = {"recall": "recall", "entropy": "entropy", "agreement": "agreement with p*"}


def with_metrics(rows):
    rng = np.random.default_rng(1)
    return [row | {"entropy": 6.0 + rng.normal(), "agreement": 0.3 + 0.1 * rng.normal()} for row in rows]


def column(table, head):
    return [row[list(table.head).index(head)] for row in table.rows]


def test_differences_at_matched_precision():
    rows = with_metrics(rows_of(direct() | {"student": [(1.0, -6.5, -7.4)], "beyond": [(1.0, -4.0, -9.0)]}))
    table = comparison.cost_table(cooling.curves(rows))
    assert column(table, "students") == ["student", "beyond"]
    assert column(table, "direct sampled at") == ["0.9 to 0.8", "1, precision differs"]
    target = mean(rows, "student", 1.0, "precision")
    for metric, head in HEADS.items():
        matched, plain = column(table, head)
        at = np.interp(target, curve_of(rows, "precision"), curve_of(rows, metric))
        assert matched.mean == pytest.approx(mean(rows, "student", 1.0, metric) - at)
        assert plain.mean == pytest.approx(mean(rows, "beyond", 1.0, metric) - mean(rows, "direct", 1.0, metric))
        assert math.isfinite(matched.error) and math.isfinite(plain.error)
    assert str(column(table, "precision")[0]) == "0.000 (matched)" and "distinct-2" not in table.head


def test_models_above_p_star_are_flagged_with_their_variety():
    rows = rows_of(direct(), distinct_2=0.8, repetition_4=0.0, entropy=3.0, data_log_prob=-6.6)
    table = comparison.too_precise(rows)
    assert column(table, "sampled at") == ["1", "0.8", "0.7"]  # the first is the reference
    for t, excess in zip((1.0, 0.8, 0.7), column(table, "precision − p*'s own"), strict=True):
        assert excess.mean == pytest.approx(mean(rows, "direct", t, "precision") + 6.6)
    assert [cell.mean for cell in column(table, "distinct-2")] == pytest.approx([0.8] * 3)
    none = comparison.too_precise([row | {"data_log_prob": -1.0} for row in rows])
    assert not none.rows and none.texts == ["No model's samples are likelier under p* than its own validation samples."]
    assert len(TEMPERATURES) == 4 and not comparison.too_precise([]).texts
