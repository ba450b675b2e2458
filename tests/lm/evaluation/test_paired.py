import numpy as np
import pytest
from scipy import stats

from kd_jax.lm import corpus, evaluation
from kd_jax.lm.decode import WHOLE, SamplerSpec
from kd_jax.lm.evaluation import Entry, paired
from kd_jax.metrics import statistics
from kd_jax.reporting import units
from kd_jax.storage import errors
from tests.lm.evaluation.test_precision_recall import drawn, log_prob, random_model, settings

COOL = SamplerSpec(sample_temperature=0.5)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with two arms of two seeds each at two temperatures, and the validation rows."""
    folder = tmp_path_factory.mktemp("paired")
    validation = drawn(random_model(0), folder / "data", 20)
    names = [f"{arm}/seed-{seed}" for arm in "ab" for seed in (0, 1)]
    models = {name: Entry(random_model(10 + i), seed=i % 2) for i, name in enumerate(names)}
    spec = settings(20, sample_temperatures=(1.0, 0.5))
    rows = evaluation.evaluate(random_model(0), models, validation, spec, folder / "out")
    return folder / "out", validation.rows(), rows


@pytest.mark.slow
def test_values_of_sequences_are_log_probabilities(evaluated):
    folder, data, rows = evaluated
    model = random_model(12)
    for sampler, temperature in ((WHOLE, 1.0), (COOL, 0.5)):
        got = paired.sequence_values(folder, "b/seed-0", "recall", sampler)
        np.testing.assert_allclose(got, log_prob(model, data.tokens, temperature), atol=1e-4)
    samples = corpus.open(evaluation.home(folder, "b/seed-0", COOL) / "samples").rows()
    got = paired.sequence_values(folder, "b/seed-0", "precision", COOL)
    np.testing.assert_allclose(got, log_prob(random_model(0), samples.tokens), atol=1e-4)
    with pytest.raises(errors.RunError, match="not evaluated at tau-0.7"):
        paired.sequence_values(folder, "b/seed-0", "recall", SamplerSpec(sample_temperature=0.7))


def test_differences_are_paired(evaluated):
    folder, data, rows = evaluated
    one, other = (["a/seed-0", "a/seed-1"], ["b/seed-0", "b/seed-1"])
    means = {(row["name"], row["sample_temperature"]): row["recall_per_sequence"] for row in rows}
    got = paired.difference(folder, one, other, "recall", samplers=(COOL, WHOLE))
    expected = np.mean([means[a, 0.5] - means[b, 1.0] for a, b in zip(one, other, strict=True)])
    assert got.mean == pytest.approx(expected, abs=1e-9) and got.low < got.mean < got.high
    values = np.stack([
        paired.sequence_values(folder, a, "recall", COOL) - paired.sequence_values(folder, b, "recall")
        for a, b in zip(one, other, strict=True)
    ])  # fmt: skip
    assert got == statistics.two_way(values)
    # one seed: Student's interval over the rows' differences
    single = paired.difference(folder, one[:1], other[:1], "recall")
    differences = paired.sequence_values(folder, one[0], "recall") - paired.sequence_values(folder, other[0], "recall")
    low, high = stats.t.interval(0.95, 19, differences.mean(), stats.sem(differences))
    assert (single.low, single.high) == (pytest.approx(low), pytest.approx(high))
    precision = paired.difference(folder, one, other, "precision")
    assert precision.dof == 1 and np.isfinite(precision.error)


def test_errors_over_prompts(evaluated):
    folder, data, rows = evaluated
    prompts = np.arange(20) // 4
    got = paired.difference(folder, ["a/seed-0"], ["b/seed-0"], "recall", prompts=prompts)
    apart = paired.sequence_values(folder, "a/seed-0", "recall") - paired.sequence_values(folder, "b/seed-0", "recall")
    means = apart.reshape(5, 4).mean(1)
    assert got.mean == pytest.approx(means.mean()) and got.error == pytest.approx(stats.sem(means)) and got.dof == 4


def test_what_is_kept_adds_up_to_the_metrics(evaluated, tmp_path):
    folder, data, rows = evaluated
    paired.keep(tmp_path / "recall.npz", folder, rows, data)
    rows = [dict(row) for row in rows]
    units.attach(rows, tmp_path)
    for metric in ("recall", "kl_data_model"):
        shares = units.by_sequence(rows, metric)
        np.testing.assert_allclose(shares.mean(1), [row[metric] for row in rows], atol=1e-5)
        # the standard errors of the rows are over the same sequences
        errors_of_rows = [row[f"{metric}_se"] for row in rows]
        np.testing.assert_allclose(stats.sem(shares, axis=1), errors_of_rows, rtol=1e-4)
    assert units.by_sequence(rows, "agreement") is None
