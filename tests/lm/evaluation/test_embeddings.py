import dataclasses

import jax
import numpy as np
import pytest
import tokenizers

from kd_jax import metrics
from kd_jax.lm import corpus, evaluation, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.evaluation import Entry, embeddings
from kd_jax.lm.weights.tokenizer import Tokenizer
from tests.lm.evaluation.test_precision_recall import SMALL, drawn, random_model, settings


def hidden_means(model, rows, starts):
    """From the forward pass of one row at a time, over the tokens from `starts` on."""
    out = []
    for ids, start in zip(rows, starts, strict=True):
        hidden = model_lib.forward(model.params, model.architecture, np.asarray(ids)[None])
        out.append(np.asarray(hidden, np.float64)[0, start:].mean(axis=0))
    return np.array(out)


def letters(words):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, words[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


@pytest.mark.long
def test_a_text_is_the_mean_of_the_hidden_states_after_its_prompt(tmp_path):
    data = drawn(random_model(0), tmp_path / "data", 9).rows()
    model = random_model(5)
    points = embeddings.mean_hidden_states(tmp_path / "e.npz", {"a": 1}, lambda: model, data, None, label="test")
    np.testing.assert_allclose(points, hidden_means(model, data.tokens, data.prompt_length), atol=1e-5)
    # kept, by its key
    again = embeddings.mean_hidden_states(tmp_path / "e.npz", {"a": 1}, None, data, None, label="test")
    np.testing.assert_array_equal(again, points)


@pytest.mark.slow
def test_a_model_with_another_tokenizer_reads_the_text(tmp_path):
    data = drawn(random_model(0), tmp_path / "data", 9).rows()
    model = random_model(5)._replace(tokenizer=letters("ebcda"))
    points = embeddings.mean_hidden_states(tmp_path / "e.npz", {}, lambda: model, data, letters("abcde"), label="test")
    texts = [["ebcda".index("abcde"[i]) for i in ids] for ids in data.tokens]
    np.testing.assert_allclose(points, hidden_means(model, texts, data.prompt_length), atol=1e-5)


@pytest.mark.slow
def test_special_tokens_are_left_out_and_bos_put_in_front(tmp_path):
    """Ids a b a <end>, the first the prompt, for a model that has neither <end> nor the same ids, but a BOS."""
    own = letters(["a", "b", "c", "d", "<end>"])
    own.backend.add_special_tokens(["<end>"])
    other = dataclasses.replace(letters(["<s>", "c", "d", "b", "a"]), bos_id=0)
    template = {"single": "<s> $A", "special_tokens": [("<s>", 0)]}
    other.backend.post_processor = tokenizers.processors.TemplateProcessing(**template)
    model = random_model(5)._replace(tokenizer=other)
    data = drawn(random_model(0), tmp_path / "data", 2).rows()
    ids = [np.array([0, 1, 0, 4]), np.array([0, 2, 3, 3])]
    data = data._replace(tokens=ids, length=np.array([4, 4]), prompt_length=np.array([1, 1]))
    points = embeddings.mean_hidden_states(tmp_path / "e.npz", {}, lambda: model, data, own, label="test")
    expected = hidden_means(model, [[0, 4, 3, 4], [0, 4, 1, 2, 2]], [2, 2])
    np.testing.assert_allclose(points, expected, atol=1e-5)


@pytest.mark.long
def test_metrics_of_points_are_columns_with_their_bias(tmp_path):
    validation = drawn(random_model(0), tmp_path / "data", 60)
    weights.save(random_model(5), tmp_path / "embedder")
    spec = settings(30, embedding_model=str(tmp_path / "embedder"), num_points=25)
    (row,) = evaluation.evaluate(random_model(0), {"m": Entry(random_model(1))}, validation, spec, tmp_path / "out")
    samples, rows = corpus.open(tmp_path / "out/m/samples").rows(0, 25), validation.rows(0, 50)
    fake, real = (hidden_means(random_model(5), part.tokens, part.prompt_length) for part in (samples, rows))
    expected = metrics.knn_precision_recall(np.float32(real[:25]), np.float32(fake), 5)
    assert row["knn_precision"] == pytest.approx(float(expected.precision), abs=1e-6)
    assert row["knn_coverage"] == pytest.approx(float(expected.coverage), abs=1e-6)
    assert -1 < row["knn_recall_bias"] <= 0.1 and row["vendi_score_bias"] is None and row["vendi_score"] > 1
    names = {name for metric in metrics.SAMPLE_METRICS for name in (metric, f"{metric}_bias")}
    assert names <= set(row)
    # another number of points is another result, in the same folder
    fewer = settings(30, embedding_model=str(tmp_path / "embedder"), num_points=20)
    (other,) = evaluation.evaluate(random_model(0), {"m": Entry(random_model(1))}, validation, fewer, tmp_path / "out")
    assert other["vendi_score"] != row["vendi_score"] and other["recall"] == row["recall"]
    # without an embedding model these are absent, and all else is the same
    plain = settings(30)
    (other,) = evaluation.evaluate(random_model(0), {"m": Entry(random_model(1))}, validation, plain, tmp_path / "b")
    assert {other[name] for name in names} == {None} and other["recall"] == row["recall"]


def test_an_embedding_model_that_cannot_read_the_ids_is_refused(tmp_path):
    shape = SMALL.__class__(**{**vars(SMALL), "vocab_size": 4})
    weights.save(model_lib.Model(shape, model_lib.init(jax.random.key(0), shape), ()), tmp_path / "few")
    with pytest.raises(ValueError, match="embedding_model .* has 4 ids"):
        evaluation.check(random_model(0), {}, settings(embedding_model=str(tmp_path / "few")), 6)
