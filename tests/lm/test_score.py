"""Scoring against the definition; cases L01 to L08 have their values from public reports."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model
from kd_jax.parallel import devices
from kd_jax.parallel import mesh as mesh_lib

SHAPE = Architecture(
    vocab_size=4, hidden_size=24, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
TINY = dataclasses.replace(model_lib.PRESETS["tiny"], vocab_size=23)


def after(logits):
    """A model with these logits [id, next id] after each id."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model_lib.abstract(SHAPE))
    params["norm"] += 1
    params["embedding"] += np.eye(4, 24, dtype=np.float32)
    # the norm makes sqrt(24) of the 1 in an embedding, but for its epsilon
    params["head"][:, :4] = np.transpose(logits) / np.sqrt(24 / (1 + 24 * SHAPE.rms_norm_eps))
    return Model(SHAPE, params, eos_ids=())


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def tiny():
    return Model(TINY, model_lib.init(jax.random.key(1), TINY), eos_ids=(2,))


def rows(count=7, longest=12, seed=0):
    random = np.random.RandomState(seed)
    return random.randint(0, TINY.vocab_size, (count, longest)), random.randint(1, longest + 1, count)


def expected_log_probs(model, tokens, temperature=1.0):
    logits = model_lib.logits(
        model.params, model.architecture, model_lib.forward(model.params, model.architecture, tokens)
    )
    scores = log_softmax(np.asarray(logits, np.float64)[:, :-1] / temperature)
    return np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0], scores


def test_a_token_is_scored_by_the_logits_before_it():  # L01
    logits = np.zeros((4, 4))
    logits[0, 1] = logits[1, 2] = 10
    log_probs, mask = score.log_prob(after(logits), np.array([[0, 1, 2]]), np.array([3]))
    np.testing.assert_allclose(log_probs, [[-0.0001361905, -0.0001361905]], atol=2e-7)
    assert mask.tolist() == [[True, True]]


def test_the_first_token_the_prefix_and_short_texts():  # L04
    uniform, tokens = after(np.zeros((4, 4))), np.array([[3, 1, 0, 2, 1]])
    for prefix, count, total in (((), 4, -5.5451774), ((1,), 5, -6.9314718), ((1, 2), 5, -6.9314718)):
        log_probs, mask = score.log_prob(uniform, tokens, np.array([5]), prefix=prefix)
        assert mask.sum() == count and log_probs.sum() == pytest.approx(total, abs=1e-5)
    log_probs, mask = score.log_prob(uniform, tokens, np.array([1]))
    assert not mask.any() and not log_probs.any()


def test_the_end_counts_where_it_came():  # L05
    prompt, first, second, end = 0, 1, 2, 3
    probabilities = np.full((4, 4), 0.25)
    for token, following, log_prob in ((prompt, first, -1.0), (first, second, -2.0), (second, end, -0.5)):
        probabilities[token] = (1 - np.exp(log_prob)) / 3
        probabilities[token, following] = np.exp(log_prob)
    model = after(np.log(probabilities))._replace(eos_ids=(end,))
    completions = {4: ([first, second, end], -3.5, True), 3: ([first, second], -3.0, False)}
    for max_length, (completion, total, finished) in completions.items():
        samples = next(iter(decode.stream(model, [prompt], 400, max_length=max_length, batch_size=400)))
        log_probs, mask = score.log_prob(model, samples.tokens, samples.lengths)
        lengths = samples.lengths
        ours = [ids[1:n].tolist() == completion for ids, n in zip(samples.tokens, lengths, strict=True)]
        assert sum(ours) >= 5 and (mask[ours].sum(axis=1) == len(completion)).all()
        np.testing.assert_allclose(log_probs[ours].sum(axis=1), total, atol=1e-5)
        np.testing.assert_allclose(samples.log_probs[ours].sum(axis=1), total, atol=1e-5)
        assert (samples.finished[ours] == finished).all()


@pytest.mark.slow
def test_padding_and_batches_do_not_enter():  # L02
    model, (tokens, lengths) = tiny(), rows()
    whole, mask = score.log_prob(model, tokens, lengths)
    assert mask.sum() == (lengths - 1).sum() and not whole[~mask].any()
    np.testing.assert_allclose(whole[mask], expected_log_probs(model, tokens)[0][mask], atol=1e-5)
    for batch_tokens in (1, 40):
        other, _ = score.log_prob(model, tokens, lengths, batch_tokens=batch_tokens)
        np.testing.assert_allclose(other, whole, atol=1e-5)
    padded = np.pad(tokens, ((0, 0), (0, 9)), constant_values=22)
    np.testing.assert_allclose(score.log_prob(model, padded, lengths)[0][:, :11], whole, atol=1e-5)


@pytest.mark.slow
def test_scores_at_a_temperature_are_of_the_logits_divided_by_it():  # L08
    known = after([[2, 1, 0, -1e9]] + [[0, 0, 0, -1e9]] * 3)
    for temperature, expected in ((1.0, -0.4076060), (0.5, -0.1429316)):
        log_probs, _ = score.log_prob(known, np.array([[0, 0]]), np.array([2]), sample_temperature=temperature)
        assert log_probs[0, 0] == pytest.approx(expected, abs=1e-6)
    for temperature in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            score.log_prob(known, np.array([[0, 0]]), np.array([2]), sample_temperature=temperature)
    model, (tokens, lengths) = tiny(), rows()
    log_probs, mask, entropy = score.log_prob(model, tokens, lengths, sample_temperature=0.6, entropy=True)
    expected, scores = expected_log_probs(model, tokens, 0.6)
    np.testing.assert_allclose(log_probs[mask], expected[mask], atol=1e-5)
    np.testing.assert_allclose(entropy[mask], -(np.exp(scores) * scores).sum(axis=-1)[mask], atol=1e-5)


@pytest.mark.slow
def test_a_padded_vocabulary_is_scored_over_the_real_ids():
    model = tiny()._replace(tokenizer=types.SimpleNamespace(vocab_size=20))
    tokens = np.random.RandomState(0).randint(0, 20, (3, 6))
    log_probs, mask = score.log_prob(model, tokens, np.full(3, 6))
    logits = np.asarray(model_lib.logits(model.params, TINY, model_lib.forward(model.params, TINY, tokens)), np.float64)
    expected = np.take_along_axis(log_softmax(logits[:, :-1, :20]), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    with pytest.raises(ValueError, match="row 0 has id 20"):
        score.log_prob(model, np.full((1, 3), 20), np.array([3]))


@pytest.mark.slow
def test_training_and_scoring_have_one_cross_entropy():
    model, (tokens, lengths) = tiny()._replace(tokenizer=types.SimpleNamespace(vocab_size=20)), rows()
    tokens = tokens % 20
    log_probs, mask = score.log_prob(model, tokens, lengths)
    # position j learns token j + 1; of the last one of a row nothing is learnt
    learnt = np.pad(mask, ((0, 0), (0, 1)))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    batch = batches.Batch(tokens=tokens.astype(np.int32), segments=None, positions=positions, mask=learnt)
    loss = distill.cross_entropy(TINY, model_lib.Compute(), num_tokens=model.num_tokens, packed=False)
    mean, _ = loss(model.params, batch)
    assert float(mean.mean) == pytest.approx(-log_probs.sum() / mask.sum(), abs=1e-5)


@pytest.mark.slow
def test_any_function_of_logits_and_ids():
    model, (tokens, lengths) = tiny(), rows()
    (top, shifted), mask = score.per_token(model, tokens, lengths, _top_and_shifted, np.float32(3))
    logits = np.asarray(model_lib.logits(model.params, TINY, model_lib.forward(model.params, TINY, tokens)))[:, :-1]
    np.testing.assert_array_equal(top[mask], logits.argmax(axis=-1)[mask])
    np.testing.assert_array_equal(shifted[mask], tokens[:, 1:][mask] + 3)
    assert not top[~mask].any() and top.dtype == np.int32
    (top, _), mask = score.per_token(model, tokens[:0], lengths[:0], _top_and_shifted, np.float32(3))
    assert top.shape == mask.shape == (0, 11)


def _top_and_shifted(logits, ids, by):
    return logits.argmax(axis=-1).astype(np.int32), ids + by


@pytest.mark.slow
def test_scores_under_x64_are_the_same():
    model, (tokens, lengths) = tiny(), rows()
    expected = score.log_prob(model, tokens, lengths, entropy=True, sample_temperature=0.7)
    with jax.enable_x64(True):
        got = score.log_prob(model, tokens, lengths, entropy=True, sample_temperature=0.7)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_similar_lengths_share_a_batch():
    ((chosen, shape),) = score.batches(np.array([5, 30, 9]), 96)
    assert chosen.tolist() == [1, 2, 0] and shape == (3, 32)


def test_tokens_at_once_are_those_that_memory_is_for():
    model = Model(PRESETS["smollm2-135m"], model_lib.abstract(PRESETS["smollm2-135m"]))
    # a CPU does not say what it has; a mesh has as many for each of its parts
    assert score.tokens_at_once(model) == 4096
    eight = mesh_lib.make(4, 1, 2, jax.devices()[:1] * 8)
    assert score.tokens_at_once(model, eight) == 4 * 4096
    sizes = [score.tokens_at_once(model, memory=gib * 2**30) for gib in (1, 2, 4, 8, 60)]
    assert sizes == sorted(sizes) and {512, 32768} < set(sizes) and all(size & (size - 1) == 0 for size in sizes)
    assert score.tokens_at_once(model, eight, memory=60 * 2**30) == 4 * 32768
    # weights take their part
    half = Model(model.architecture, model_lib.abstract(model.architecture, jnp.bfloat16))
    assert score.tokens_at_once(half, memory=1.5 * 2**30) > score.tokens_at_once(model, memory=1.5 * 2**30)


@pytest.mark.slow
def test_a_batch_of_so_many_tokens_needs_half_of_the_memory_at_most(monkeypatch):
    wide = dataclasses.replace(TINY, vocab_size=4000, hidden_size=96, intermediate_size=256)
    model, memory = Model(wide, model_lib.abstract(wide)), 2**28
    monkeypatch.setattr(devices, "limit", lambda: memory)
    tokens = score.tokens_at_once(model)
    assert score.LEAST < tokens < score.MOST
    batch = jax.ShapeDtypeStruct((tokens // 256, 256), np.int32)
    compiled = score.lower(model, batch, Compute(chunk_tokens=4096)).compile()
    # no more, and not so little that memory would lie idle
    assert 0.1 < compiled.memory_analysis().temp_size_in_bytes / memory <= 0.5


def test_scores_where_memory_is_known(monkeypatch):
    model, (tokens, lengths) = tiny(), rows()
    expected, _ = score.log_prob(model, tokens, lengths)
    monkeypatch.setattr(devices, "limit", lambda: 2**20)
    monkeypatch.setattr(score, "LEAST", 32)
    assert score.tokens_at_once(model) == 32
    got, _ = score.log_prob(model, tokens, lengths)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def products(lowered):
    return [line for line in lowered.as_text().splitlines() if "dot_general" in line]


@pytest.mark.parametrize("architecture", [TINY, dataclasses.replace(TINY, num_key_value_heads=1)])
def test_every_product_of_a_density_is_float32_on_every_device(architecture):
    # a GPU or TPU would take fewer bits unless asked; a CPU shows no difference, so the programs are read
    model = Model(architecture, model_lib.abstract(architecture), eos_ids=(2,))
    tokens = jax.ShapeDtypeStruct((2, 16), np.int32)
    found = {
        "scores": products(score.lower(model, tokens, Compute())),
        "samples": products(decode.lower(model, 1, max_length=16, batch_size=4)),
        "gradients": products(
            jax.jit(jax.grad(lambda params: distill.cross_entropy(architecture, Compute())(params, batch_of(), None)[0]
                             .mean)).lower(model.params)
        ),
    }  # fmt: skip
    for name, lines in found.items():
        assert lines and all("precision = [HIGHEST, HIGHEST]" in line for line in lines), name


def batch_of():
    """Two rows as a part of an update's batch."""
    layout = batches.Layout(2, max_length=12)
    whole = batches.arrange([np.arange(12, dtype=np.int32)] * 2, np.array([1, 1]), layout)
    return jax.tree.map(lambda leaf: leaf[0], whole)
