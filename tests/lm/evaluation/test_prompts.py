"""Precision and recall given prompts: against sums over all answers, and errors by prompt against NumPy."""

import numpy as np
import pytest

from kd_jax import metrics
from kd_jax.lm import corpus, evaluation, weights
from kd_jax.lm.corpus import prompt_files
from kd_jax.lm.decode import WHOLE, SamplerSpec, to_corpus
from kd_jax.lm.evaluation import Entry, EvaluationSpec, LazyModel, estimates, scores
from kd_jax.lm.evaluation.scores import Wanted
from tests.lm.evaluation.test_embeddings import hidden_means
from tests.lm.evaluation.test_precision_recall import EOS, VOCAB, log_prob, random_model, settings

PROMPTS = [[1], [2, 3], [3, 1, 1]]
# all answers of at most two tokens; a model that is cut there has no others
ANSWERS = [(EOS,), *((a, b) for a in range(VOCAB) if a != EOS for b in range(VOCAB))]
EACH = 300


def answers(model, folder, prompts, each, seed=77):
    """A corpus of the model's answers. Prompts are of one length, so that all answers are cut after as many tokens."""
    spec = EvaluationSpec(num_samples=each * len(prompts), samples_per_prompt=each)
    lazy = LazyModel(model, "float32", None, folder)
    length = len(prompts[0]) + 2
    about = evaluation.sampling_settings(lazy, "m", [], length, each * len(prompts), seed, WHOLE, spec, prompts)
    return to_corpus.sample(model, folder, about, command="test", label="test", prompts=prompts, batch_size=64)


@pytest.mark.long
def test_both_are_sums_over_all_answers_to_each_prompt(tmp_path):
    p_star, other, prompts = random_model(0), random_model(1), [[1, 2], [2, 3], [3, 1]]
    validation = answers(p_star, tmp_path / "data", prompts, EACH)
    spec = EvaluationSpec(num_samples=EACH * 3, samples_per_prompt=EACH)
    (row,) = evaluation.evaluate(p_star, {"other": Entry(other)}, validation, spec, tmp_path / "out")
    p, q = (
        np.array([log_prob(model, [(*prompt, *ids) for ids in ANSWERS]) for prompt in prompts])
        - np.array([log_prob(model, [prompt]) for prompt in prompts])
        for model in (p_star, other)
    )
    np.testing.assert_allclose(np.exp(p).sum(axis=1), 1, rtol=1e-5)
    lengths = np.array([len(ids) for ids in ANSWERS])
    for name, chances, values in (("precision", np.exp(q), p), ("recall", np.exp(p), q)):
        expected = (chances * values).sum() / (chances * lengths).sum()
        assert abs(row[name] - expected) < 0.1 and row[name] == pytest.approx(expected, rel=0.04), name
        assert abs(row[f"{name}_per_sequence"] - (chances * values).sum() / 3) < 0.2
    drawn = corpus.open(tmp_path / "out" / "other" / "samples").rows()
    assert prompt_files.of_rows(drawn) == [prompt for prompt in prompts for _ in range(EACH)]
    # errors are by prompt: three of them, however many answers
    values = scores.read_arrays(tmp_path / "out" / "other" / "precision.npz")["log_prob"].reshape(3, EACH)
    tokens = drawn.num_learnt.reshape(3, EACH)
    residuals = (values - row["precision"] * tokens).sum(axis=1)
    assert row["precision_se"] == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / tokens.sum(), rel=1e-6)
    means = values.mean(axis=1)
    assert row["precision_per_sequence_se"] == pytest.approx(means.std(ddof=1) / np.sqrt(3), rel=1e-6)


@pytest.mark.slow
def test_more_samples_than_prompts_have_are_refused(tmp_path):
    validation = answers(random_model(0), tmp_path / "data", PROMPTS[:1], 4)
    with pytest.raises(ValueError, match="has 1 prompts: num_samples=5 needs a larger samples_per_prompt"):
        evaluation.evaluate(
            random_model(0),
            {"m": Entry(random_model(1))},
            validation,
            settings(5, samples_per_prompt=4),
            tmp_path / "o",
        )


def test_clusters_by_hand():
    values, tokens = np.array([-1.0, -2.0, -6.0, -3.0]), np.array([1, 2, 2, 3])
    groups = np.array([0, 0, 1, 1])
    ratio, error = estimates.per_token(values, tokens, groups)
    # residuals: .5, 1, -3 and 1.5; by prompt 1.5 and -1.5
    assert ratio == -1.5 and error == pytest.approx(np.sqrt(2 * 2 * 1.5**2) / 8)
    mean, error = estimates.per_sequence(values, groups)
    assert mean == -3 and error == pytest.approx(np.std([-1.5, -4.5], ddof=1) / np.sqrt(2))
    assert estimates.share(np.array([1, 1, 0, 0]), groups) == (0.5, pytest.approx(0.5))
    # a cluster of one each is the plain error
    assert estimates.per_token(values, tokens, np.arange(4)) == pytest.approx(estimates.per_token(values, tokens))
    assert np.isnan(estimates.per_token(values, tokens, np.zeros(4, int))[1])


def test_rows_of_one_prompt_or_of_one_each_have_no_clusters():
    def rows(prompts):
        n = len(prompts)
        tokens = [np.array([*prompt, 9]) for prompt in prompts]
        lengths = np.array([len(prompt) for prompt in prompts])
        return corpus.Rows(np.arange(n), tokens, lengths + 1, lengths, *(np.zeros(n) for _ in range(3)))

    assert estimates.clusters(rows([[1], [1]])) is None and estimates.clusters(rows([[1], [2]])) is None
    assert estimates.clusters(rows([[1], [2, 1], [1], [2]])).tolist() == [0, 1, 0, 2]


def test_only_what_the_mask_says_is_scored(tmp_path):
    model = random_model(0)
    tokens = [np.array([1, 2, 3, 1, 3, 2]), np.array([2, 2, 3])]
    masks = [np.array([0, 0, 1, 0, 1, 1], bool), np.array([0, 1, 0], bool)]
    rows = corpus.Rows(
        np.arange(2), tokens, np.array([6, 3]), np.array([2, 1]), *(np.zeros(2) for _ in range(3)), loss_mask=masks
    )
    (got,) = scores.score_rows([Wanted(tmp_path / "s.npz", {}, SamplerSpec())], lambda: model, rows, label="rows")
    parts = [np.diff([log_prob(model, [ids[: i + 1]])[0] for i in range(len(ids))]) for ids in tokens]
    expected = [part[mask[1:]].sum() for part, mask in zip(parts, masks, strict=True)]
    np.testing.assert_allclose(got.log_prob, expected, atol=1e-5)
    assert got.calibration[:, 0].sum() == 4
    ids = scores.likeliest_ids(tmp_path / "ids.npz", {}, lambda: model, rows, label="rows")
    (same,) = scores.score_rows([Wanted(tmp_path / "t.npz", {})], lambda: model, rows, label="rows", other=ids)
    assert len(ids) == 4 and same.agreement.tolist() == [3, 1]


@pytest.mark.slow
def test_points_of_answers_are_one_a_prompt_and_all_of_them_for_diversity(tmp_path):
    prompts = [[1, a, b] for a in range(VOCAB) for b in range(VOCAB) if EOS not in (a, b)] + [
        [3, 1, a] for a in (0, 1, 3, 4)
    ]
    validation = answers(random_model(0), tmp_path / "data", prompts, 2)
    weights.save(random_model(5), tmp_path / "embedder")
    spec = settings(60, samples_per_prompt=3, embedding_model=str(tmp_path / "embedder"))
    (row,) = evaluation.evaluate(random_model(0), {"m": Entry(random_model(1))}, validation, spec, tmp_path / "out")
    samples, data = corpus.open(tmp_path / "out/m/samples").rows(), validation.rows()
    fake, real = (hidden_means(random_model(5), part.tokens, part.prompt_length) for part in (samples, data))
    expected = metrics.knn_precision_recall(np.float32(real[:20]), np.float32(fake[::3]), 5)
    assert (row["knn_recall"], row["knn_density"]) == pytest.approx((expected.recall, expected.density), abs=1e-6)
    units = fake / np.linalg.norm(fake, axis=1, keepdims=True)
    own = [1 - units[i : i + 3] @ units[i : i + 3].T for i in range(0, 60, 3)]
    assert row["prompt_diversity"] == pytest.approx(np.mean([one[np.triu_indices(3, 1)] for one in own]), abs=1e-5)
    # two sets of rows have different prompts, a model's samples and the rows the same ones
    assert row["knn_recall_bias"] is None
