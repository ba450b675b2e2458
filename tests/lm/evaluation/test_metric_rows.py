import math

import numpy as np
import pytest

from kd_jax import metrics
from kd_jax.lm import corpus
from kd_jax.lm.evaluation import metric_rows
from kd_jax.lm.evaluation.metric_rows import METRICS

SAMPLES = corpus.Rows(
    index=np.arange(2), tokens=[np.array([9, 4, 5, 4, 5, 4, 2]), np.array([9, 4, 4])], length=np.array([7, 3]),
    prompt_length=np.array([1, 1]), finished=np.array([True, False]), log_prob=np.array([-6.0, -3.0]),
    sample_log_prob=np.array([-4.0, -2.0]),
)  # fmt: skip
DATA = SAMPLES._replace(length=np.array([3, 4]))
MEASURED = {
    "samples": SAMPLES, "p_star_of_samples": np.array([-9.0, -1.0]), "data": DATA,
    "model_of_data": np.array([-5.0, -np.inf]), "p_star_of_data": np.array([-3.0, -4.0]),
    "own_data": np.array([-3.0, -4.0]), "calibration": np.array([[4, 0.8, 1], [6, 5.4, 3]]),
    "agreement": np.array([1.0, 3.0]),
}  # fmt: skip


def test_all_metrics_of_a_few_rows():
    got = metric_rows.row(metric_rows.compute(metric_rows.computable(MEASURED), MEASURED))
    assert (got["num_samples"], got["num_tokens"], got["num_recall"], got["num_recall_tokens"]) == (2, 8, 2, 5)
    assert (got["precision"], got["precision_per_sequence"]) == (-10 / 8, -5)
    # of the distribution the samples are from, whatever the model itself gives them
    assert (got["entropy"], got["entropy_per_sequence"]) == (6 / 8, 3)
    assert (got["kl_model_data"], got["kl_model_data_per_sequence"]) == (4 / 8, 2)
    assert got["kl_model_data_per_sequence_se"] == pytest.approx(3)  # of the differences 5 and -1
    assert (got["recall"], got["recall_num_infinite"], got["precision_num_infinite"]) == (-math.inf, 1, 0)
    assert got["kl_data_model"] == math.inf and math.isnan(got["kl_data_model_se"])
    assert (got["data_log_prob"], got["data_log_prob_per_sequence"]) == (-7 / 5, -3.5)
    assert got["precision_excess"] == pytest.approx(-10 / 8 + 7 / 5)
    # the prompt is no part of what is counted: 1-grams 4 5 2 of eight; 4-grams 4545 5454 4542 of one row
    assert (got["distinct_1"], got["distinct_4"], got["repetition_4"]) == (3 / 8, 1, 0)
    assert got["length_mean"] == 4 and got["finished"] == 0.5
    assert got["calibration_error"] == pytest.approx(0.26) and got["agreement"] == 4 / 5


def test_what_cannot_be_measured_is_absent_and_not_computed():
    names = set(MEASURED) - {"own_data", "agreement"}
    versions = metric_rows.computable(names)
    absent = {"kl_data_model", "precision_excess", "agreement", *metrics.SAMPLE_METRICS}
    assert set(METRICS) - set(versions) == absent
    row = metric_rows.row(metric_rows.compute(versions, {name: MEASURED[name] for name in names}))
    assert row["kl_data_model"] is None and row["agreement_se"] is None and row["precision"] == -10 / 8


def test_every_row_of_the_table_says_what_it_is():
    for name, metric in METRICS.items():
        assert metric.name == name and set(metric.needs) <= set(metric_rows.MEASURED)
        assert metric.unit and metric.larger and metric.formula and metric.version >= 1
    columns = [column for metric in METRICS.values() for column in metric.columns]
    assert len(set(columns)) == len(columns)
