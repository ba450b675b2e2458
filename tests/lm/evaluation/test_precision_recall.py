import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest
import tokenizers

from kd_jax.lm import corpus, decode, evaluation, score, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import SamplerSpec, to_corpus
from kd_jax.lm.evaluation import Entry, EvaluationSpec, LazyModel, metric_rows, scores, tasks, work
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.storage import errors

EOS, PROMPT, VOCAB = 2, 3, 5
SMALL = dataclasses.replace(model_lib.PRESETS["tiny"], vocab_size=VOCAB, max_position_embeddings=32)
PAIRS = ("precision", "recall", "entropy", "kl_model_data", "kl_data_model")


def random_model(seed, architecture=SMALL):
    return model_lib.Model(architecture, model_lib.init(jax.random.key(seed), architecture), (EOS,))


def unigram(probabilities):
    """A model that gives each next token these probabilities, whatever went before; 0 may be one of them."""
    architecture = dataclasses.replace(SMALL, vocab_size=len(probabilities), tie_word_embeddings=False)
    width = architecture.hidden_size
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model_lib.abstract(architecture))
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities)
    # the hidden state is all ones, but for the norm's epsilon; the sum of a row of these overflows to -inf
    head = np.where(np.isneginf(logits), -3e38, logits * math.sqrt(1 + architecture.rms_norm_eps) / width)
    params |= {"embedding": params["embedding"] + 1, "norm": params["norm"] + 1}
    params["head"] = np.repeat(head[:, None], width, 1).astype(np.float32)
    return model_lib.Model(architecture, jax.tree.map(jax.numpy.asarray, params), (EOS,))


def settings(num_samples=40, **changes):
    return EvaluationSpec(num_samples=num_samples, batch_size=8, **changes)


def drawn(model, folder, num_samples=40, max_length=6, seed=77, temperature=1.0, **changes):
    """A corpus of the model's samples."""
    sampler = SamplerSpec(sample_temperature=temperature)
    about = evaluation.sampling_settings(
        LazyModel(model, "float32", None, folder), "m", [PROMPT], max_length, num_samples, seed, sampler, settings()
    )
    return to_corpus.sample(model, folder, about | changes, command="test", label="test", batch_size=8)


def written(folder, rows, max_length, **changes):
    """A corpus of given ids, as (ids after the prompt, log-probability) pairs."""
    n = len(rows)
    tokens, log_probs = np.zeros((n, max_length), np.int32), np.zeros((n, max_length), np.float32)
    for i, (ids, log_prob) in enumerate(rows):
        tokens[i, : len(ids) + 1] = [PROMPT, *ids]
        log_probs[i, 1] = log_prob
    batch = decode.Samples(
        index=np.arange(n), tokens=tokens, lengths=np.array([len(ids) + 1 for ids, _ in rows], np.int32),
        prompt_lengths=np.ones(n, np.int32), finished=np.array([ids[-1] == EOS for ids, _ in rows]),
        log_probs=log_probs, sample_log_probs=log_probs, utilisation=1.0, steps=1,
    )  # fmt: skip
    about = {
        "source": "data", "model_fingerprint": None, "tokenizer_fingerprint": None, "dtype": "float32", "prompt": None,
        "prompt_ids": [PROMPT], "eos_ids": [EOS], "sample_temperature": 1.0, "top_k": None, "top_p": None, "seed": 0,
        "max_length": max_length, "num_samples": n, "shard_size": 16, **changes,
    }  # fmt: skip
    return corpus.write(corpus.create_or_resume(folder, about, command="test"), [batch])


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, architecture, tokens):
    return model_lib.logits(params, architecture, model_lib.forward(params, architecture, tokens))


def log_prob(model, rows, temperature=1.0):
    """Of the ids after the first of each row, their log-probability together: from the logits, by the definition."""
    out = []
    for ids in rows:
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(_logits(model.params, model.architecture, tokens), np.float64)[0] / temperature
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        out.append(sum(logits[i - 1, ids[i]] for i in range(1, len(ids))))
    return np.array(out)


def enumerated(model, temperature=1.0):
    return log_prob(model, [(PROMPT, *ids) for ids in SEQUENCES], temperature)


# All sequences of at most two tokens after the prompt
SEQUENCES = [(EOS,), *((a, b) for a, b in itertools.product(range(VOCAB), repeat=2) if a != EOS)]
TOKENS = np.array([len(ids) for ids in SEQUENCES])


def exact(name, values, probability, count):
    """Both averages of values that are drawn with these probabilities, and their standard errors for `count` draws."""
    mean, length = probability @ values, probability @ TOKENS
    ratio = mean / length
    return {
        name: ratio, f"{name}_se": math.sqrt(probability @ (values - ratio * TOKENS) ** 2 / count) / length,
        f"{name}_per_sequence": mean,
        f"{name}_per_sequence_se": math.sqrt(probability @ (values - mean) ** 2 / count),
    }  # fmt: skip


def assert_near(got, expected, name):
    for average in (name, f"{name}_per_sequence"):
        error = expected[f"{average}_se"]
        assert abs(got[average] - expected[average]) < 4 * error, average
        assert got[f"{average}_se"] == pytest.approx(error, rel=0.15), average


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("wanted, rows", [(24, 32), (40, 40)])
def test_fewer_samples_than_a_killed_run_wanted_keep_those_it_drew(tmp_path, wanted, rows):
    """Two shards of 16 are there, of 64 samples that were wanted."""
    before = drawn(random_model(0), tmp_path, 32, shard_size=16).rows().tokens
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["num_samples"] = 64
    path.write_text(json.dumps(manifest | {"status": "running", "finished": None}))
    shards = {file: file.stat().st_ino for file in (tmp_path / "data").iterdir()}
    now = drawn(random_model(0), tmp_path, wanted, shard_size=16)
    assert now.finished and now.num_rows == rows
    assert shards == {file: file.stat().st_ino for file in shards}
    assert [row.tolist() for row in now.rows(0, 32).tokens] == [row.tolist() for row in before]


def test_estimates_are_the_sums_over_all_sequences(tmp_path):
    p_star, other, count = random_model(0), random_model(1), 1500
    validation = drawn(p_star, tmp_path / "data", count, max_length=3)
    (row,) = evaluation.evaluate(p_star, {"other": Entry(other)}, validation, settings(count), tmp_path / "out")
    p, q = enumerated(p_star), enumerated(other)
    assert np.exp(p).sum() == pytest.approx(1) and np.exp(q).sum() == pytest.approx(1)
    model, data = np.exp(q), np.exp(p)
    for name, values, probability in (
        ("precision", p, model), ("recall", q, data), ("entropy", -q, model), ("kl_model_data", q - p, model),
        ("kl_data_model", p - q, data), ("data_log_prob", p, data),
    ):  # fmt: skip
        assert_near(row, exact(name, values, probability, count), name)
    ends = np.array([ids[-1] == EOS for ids in SEQUENCES])
    assert abs(row["finished"] - model @ ends) < 4 * row["finished_se"]
    assert row["finished_se"] == pytest.approx(math.sqrt(model @ ends * (1 - model @ ends) / count), rel=0.15)
    assert row["length_mean"] == pytest.approx(model @ TOKENS, abs=4 * row["length_sd"] / math.sqrt(count))
    assert row["num_tokens"] == round(row["length_mean"] * count) and row["num_recall"] == count


@pytest.mark.slow
def test_every_number_is_of_the_model_as_it_is_sampled(tmp_path):
    """A row for each temperature; recall and KL(p* || model) too are of softmax(logits / temperature)."""
    p_star, other, count = random_model(0), random_model(1), 1500
    validation = drawn(p_star, tmp_path / "data", count, max_length=3)
    spec = settings(count, sample_temperatures=(1.0, 0.5))
    rows = evaluation.evaluate(p_star, {"other": Entry(other)}, validation, spec, tmp_path / "out")
    assert [row["sample_temperature"] for row in rows] == [1.0, 0.5] and {row["name"] for row in rows} == {"other"}
    p, data = enumerated(p_star), np.exp(enumerated(p_star))
    for row in rows:
        q = enumerated(other, row["sample_temperature"])
        for name, values, probability in (
            ("precision", p, np.exp(q)), ("recall", q, data), ("entropy", -q, np.exp(q)),
            ("kl_model_data", q - p, np.exp(q)), ("kl_data_model", p - q, data),
        ):  # fmt: skip
            assert_near(row, exact(name, values, probability, count), name)
    # the same numbers, but for rounding, where a temperature is asked for alone; to the bit where one is added later
    (alone,) = evaluation.evaluate(
        p_star, {"other": Entry(other)}, validation, settings(count, sample_temperatures=(0.5,)), tmp_path / "alone"
    )
    assert numbers(alone) == pytest.approx(numbers(rows[1]), rel=1e-5, abs=1e-6, nan_ok=True)
    more = settings(count, sample_temperatures=(1.0, 0.5, 0.8))
    again = evaluation.evaluate(p_star, {"other": Entry(other)}, validation, more, tmp_path / "out")
    for before, now in zip(rows, again, strict=False):
        assert numbers(now) == pytest.approx(numbers(before), rel=0, abs=0, nan_ok=True)
    assert [row["sample_temperature"] for row in again] == [1.0, 0.5, 0.8]


def numbers(row):
    return {name: value for name, value in row.items() if isinstance(value, float)}


@pytest.mark.slow
def test_calibration_and_agreement_against_numpy(tmp_path):
    p_star, other = random_model(0), random_model(1)
    validation = drawn(p_star, tmp_path / "data", 30)
    spec = settings(10, sample_temperatures=(1.0, 0.5), agreement=True)
    rows = evaluation.evaluate(p_star, {"m": Entry(other)}, validation, spec, tmp_path / "out")
    probs, theirs, targets = [], [], []
    for ids in validation.rows().tokens:
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(ids)] = ids
        both = [np.asarray(_logits(m.params, SMALL, tokens), np.float64)[0, : len(ids) - 1] for m in (other, p_star)]
        probs.append(both[0])
        theirs.append(both[1].argmax(axis=-1))
        targets.append(ids[1:])
    logits, theirs, targets = map(np.concatenate, (probs, theirs, targets))
    for row in rows:
        p = np.exp(logits / row["sample_temperature"])
        p /= p.sum(axis=-1, keepdims=True)
        confidence, right = p.max(axis=-1), p.argmax(axis=-1) == targets
        bins = np.ceil(confidence * 15) - 1  # a value on an edge is unlikely
        error = sum(abs((right - confidence)[bins == b].sum()) for b in range(15)) / len(right)
        assert row["calibration_error"] == pytest.approx(error, abs=1e-5)
        assert row["agreement"] == pytest.approx((p.argmax(axis=-1) == theirs).mean()) and row["agreement_se"] > 0
    (own, _) = evaluation.evaluate(p_star, {"own": Entry(p_star)}, validation, spec, tmp_path / "out")
    assert own["agreement"] == 1


@pytest.mark.slow
def test_given_samples_are_evaluated_as_they_were_drawn(tmp_path):
    p_star, teacher, count = random_model(0), random_model(1), 1500
    validation = drawn(p_star, tmp_path / "data", 50, max_length=3)
    cool = drawn(teacher, tmp_path / "cool", count + 7, max_length=3, temperature=0.5)
    entry = Entry(teacher, "teacher", 0.5, samples=cool)
    (row,) = evaluation.evaluate(p_star, {"teacher": entry}, validation, settings(count), tmp_path / "out")
    p, q = enumerated(p_star), enumerated(teacher, 0.5)
    for name, values in (("precision", p), ("entropy", -q), ("kl_model_data", q - p)):
        assert_near(row, exact(name, values, np.exp(q), count), name)
    recall = log_prob(teacher, validation.rows().tokens, 0.5)
    assert row["recall_per_sequence"] == pytest.approx(recall.mean(), abs=1e-5) and row["recall_num_infinite"] == 0
    assert (row["num_samples"], row["tau"], row["sample_temperature"]) == (count, 0.5, 0.5)
    assert not (tmp_path / "out/teacher/samples").exists()

    # other samples of the same model are something else to evaluate
    entry = entry._replace(samples=drawn(teacher, tmp_path / "again", count, max_length=3, seed=3, temperature=0.5))
    (other,) = evaluation.evaluate(p_star, {"teacher": entry}, validation, settings(count), tmp_path / "out")
    assert other["entropy"] != row["entropy"] and other["precision"] != row["precision"]
    assert other["recall"] == row["recall"]


@pytest.mark.slow
def test_a_truncated_model_never_gives_some_of_the_data(tmp_path):
    p_star, teacher = random_model(0), random_model(1)
    validation = drawn(p_star, tmp_path / "data", 60, max_length=3)
    greedy = drawn(teacher, tmp_path / "top", 40, max_length=3, top_k=2)
    (row,) = evaluation.evaluate(
        p_star, {"teacher": Entry(teacher, samples=greedy)}, validation, settings(40), tmp_path / "out"
    )
    # from the definition: a row has a token that is not among the two likeliest
    never = 0
    for ids in validation.rows().tokens:
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(_logits(teacher.params, SMALL, tokens))[0]
        never += any(ids[i] not in np.argsort(-logits[i - 1])[:2] for i in range(1, len(ids)))
    assert 0 < never < 60 and row["recall_num_infinite"] == never and row["recall"] == -math.inf


@pytest.mark.slow
def test_a_longer_model_against_numpy(tmp_path):
    architecture = dataclasses.replace(model_lib.PRESETS["tiny"], vocab_size=23)
    p_star, other = random_model(3, architecture), random_model(4, architecture)
    validation = drawn(p_star, tmp_path / "data", 12, max_length=9)
    entry = Entry(other, "distilled", 0.8, 5)
    (row,) = evaluation.evaluate(p_star, {"tau-0.8/seed-5": entry}, validation, settings(10), tmp_path / "out")
    samples = corpus.open(tmp_path / "out/tau-0.8/seed-5/samples")
    for name, model, rows in (("precision", p_star, samples.rows()), ("recall", other, validation.rows())):
        total = log_prob(model, rows.tokens)
        count = sum(len(ids) - 1 for ids in rows.tokens)
        assert row[name] == pytest.approx(total.sum() / count, abs=1e-5), name
        assert row[f"{name}_per_sequence"] == pytest.approx(total.mean(), abs=1e-4), name
    assert (row["arm"], row["tau"], row["seed"], row["kind"]) == ("distilled", 0.8, 5, "evaluation")
    assert samples.manifest["settings"]["seed"] == 5 and samples.manifest["settings"]["prompt_ids"] == [PROMPT]


@pytest.mark.slow
def test_a_model_against_itself(tmp_path):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 30)
    (row,) = evaluation.evaluate(p_star, {"same": Entry(p_star)}, validation, settings(30), tmp_path / "out")
    # what the sampler said of its samples is what the scorer says
    assert row["precision_per_sequence"] == pytest.approx(-row["entropy_per_sequence"], abs=1e-4)
    assert row["kl_model_data_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert row["recall"] == pytest.approx(row["data_log_prob"], abs=1e-5)


@pytest.mark.slow
def test_the_end_is_scored_where_it_came_and_the_prompt_is_not(tmp_path):
    p_star, student = unigram([0.1, 0.1, 0.2, 0.3, 0.3]), unigram([0.05, 0.15, 0.5, 0.2, 0.1])
    # two finished, one of them at once, and one cut
    rows = [([4, EOS], -50.0), ([EOS], -60.0), ([0, 1, 3], -70.0)]
    data = written(tmp_path / "data", rows, max_length=4)
    (row,) = evaluation.evaluate(p_star, {"student": Entry(student)}, data, settings(20), tmp_path / "out")
    sums = np.log([0.1 * 0.5, 0.5, 0.05 * 0.15 * 0.2])
    assert row["recall"] == pytest.approx(sums.sum() / 6, abs=1e-5)
    assert row["recall_per_sequence"] == pytest.approx(sums.mean(), abs=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "out/student/recall.npz")["log_prob"], sums, atol=1e-5)
    # of data, p* says the log-probability and the corpus does not; and KL to what they are from is not known
    assert row["data_log_prob"] == pytest.approx(np.log([0.3 * 0.2, 0.2, 0.1 * 0.1 * 0.3]).sum() / 6, abs=1e-5)
    assert row["kl_data_model"] is None and row["kl_model_data"] is not None
    assert (row["num_recall"], row["num_recall_tokens"]) == (3, 6)


@pytest.mark.slow
def test_probability_zero_is_counted_and_makes_no_nan(tmp_path):
    p_star, student = unigram([0.1, 0.1, 0.2, 0.3, 0.3]), unigram([0.0, 0.2, 0.3, 0.3, 0.2])
    validation = drawn(p_star, tmp_path / "data", 60)
    never = sum(0 in ids for ids in validation.rows().tokens)
    assert 0 < never < 60
    models = {"student": Entry(student), "p_star": Entry(p_star)}
    for _ in range(2):  # also from the files
        row, own = evaluation.evaluate(p_star, models, validation, settings(30), tmp_path / "out")
        assert row["recall_num_infinite"] == never and row["precision_num_infinite"] == 0
        assert row["recall"] == row["recall_per_sequence"] == -math.inf and row["kl_data_model"] == math.inf
        assert math.isnan(row["recall_se"])
        assert math.isfinite(row["precision"]) and math.isfinite(row["kl_model_data"]) and math.isfinite(own["recall"])
    # the other way round: samples that the reference says cannot be
    validation = drawn(student, tmp_path / "narrow", 20)
    (row,) = evaluation.evaluate(student, {"wide": Entry(p_star)}, validation, settings(60), tmp_path / "other")
    assert row["precision_num_infinite"] > 0 and row["precision"] == -math.inf and row["kl_model_data"] == math.inf
    assert math.isfinite(row["entropy"]) and math.isfinite(row["recall"])


@pytest.mark.slow
def test_weights_that_give_nan_stop_it(tmp_path):
    p_star, broken = random_model(0), random_model(1)
    validation = drawn(p_star, tmp_path / "data", 10)
    samples = drawn(broken, tmp_path / "samples", 10)
    params = {**broken.params, "norm": broken.params["norm"].at[0].set(np.nan)}
    broken = broken._replace(params=params)
    samples.manifest["settings"]["model_fingerprint"] = weights.fingerprint(params)
    with pytest.raises(errors.RunError, match="broken: recall: the model gives NaN for row"):
        evaluation.evaluate(
            p_star, {"broken": Entry(broken, samples=samples)}, validation, settings(10), tmp_path / "out"
        )
    assert not (tmp_path / "out/broken/result.json").exists()


# Interrupted, and asked again


class Counted:
    """Passes calls on, counts them, and raises instead of the one with a given number."""

    def __init__(self, monkeypatch, module, name):
        self.calls, self.killed_at, function = 0, None, getattr(module, name)

        def call(*args, **options):
            self.calls += 1
            if self.calls - 1 == self.killed_at:
                raise KeyboardInterrupt
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)


@pytest.fixture
def counted(monkeypatch):
    # many small parts: shards of 16 samples, batches of a few rows, each saved at once
    monkeypatch.setattr(tasks, "_SHARD_ROWS", 16)
    monkeypatch.setattr(tasks, "_SHARD_BATCHES", 2)
    monkeypatch.setattr(scores, "_SAVE_SECONDS", 0.0)
    return {name: Counted(monkeypatch, *where) for name, where in {
        "sample": (decode, "stream"), "score": (score, "per_token"), "result": (work, "write_rows"),
    }.items()}  # fmt: skip


# 40 samples are 3 shards; 30 and 40 rows of at most 16 ids are 4 and 5 batches of 8
@pytest.mark.slow
@pytest.mark.parametrize(("where", "when"), [("sample", 1), ("score", 2), ("score", 6), ("result", 0)])
def test_killed_and_continued_is_the_same_to_the_bit(counted, tmp_path, where, when):
    p_star, other = random_model(0), random_model(1)
    validation = drawn(p_star, tmp_path / "data", 30)
    many = settings(40, batch_tokens=8 * 16)
    models = {"other": Entry(other), "p_star": Entry(p_star, "model", None, 3)}
    for counter in counted.values():
        counter.calls = 0
    whole = evaluation.evaluate(p_star, models, validation, many, tmp_path / "whole")
    steps = {name: counter.calls for name, counter in counted.items()}
    assert steps == {"sample": 6, "score": 18, "result": 2}

    counted[where].calls, counted[where].killed_at = 0, when
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(p_star, models, validation, many, tmp_path / "killed")
    before = {name: counter.calls - steps[name] for name, counter in counted.items() if name != where}
    counted[where].killed_at = None
    again = evaluation.evaluate(p_star, models, validation, many, tmp_path / "killed")
    assert again == whole
    # beside the part that was under way, nothing is done twice
    assert counted[where].calls == steps[where] + 1
    for name in before:
        assert counted[name].calls == 2 * steps[name]
    for name in models:
        for file in ("precision.npz", "recall.npz"):
            a, b = (np.load(tmp_path / run / name / file)["log_prob"] for run in ("whole", "killed"))
            assert np.array_equal(a, b) and a.dtype == np.float64
        a, b = (corpus.open(tmp_path / run / name / "samples").rows() for run in ("whole", "killed"))
        assert np.array_equal(a.log_prob, b.log_prob) and np.array_equal(a.length, b.length)


@pytest.mark.slow
def test_only_what_has_changed_is_done_again(counted, tmp_path):
    p_star, one, two = random_model(0), random_model(1), random_model(2)
    validation = drawn(p_star, tmp_path / "data", 30)

    def evaluated(models=None, p_star=p_star, validation=validation, **changes):
        for counter in counted.values():
            counter.calls = 0
        models = models or {"one": Entry(one), "a/b": Entry(two, seed=1)}
        return evaluation.evaluate(p_star, models, validation, settings(**changes), tmp_path / "out")

    def calls():
        return counted["sample"].calls, counted["score"].calls, counted["result"].calls

    first = evaluated()
    assert calls() == (6, 4, 2)
    assert evaluated() == first and calls() == (0, 0, 0)
    # a label is not what the numbers are a function of
    assert evaluated({"one": Entry(one, "direct")})[0] == {**first[0], "arm": "direct"} and calls() == (0, 0, 0)
    # fewer validation rows: the samples and what p* says of them stay
    (fewer, _) = evaluated(num_recall=20)
    assert calls() == (0, 2, 2) and fewer["num_recall"] == 20 and fewer["precision"] == first[0]["precision"]
    assert evaluated() == first
    # other weights in one of the two places
    (_, changed) = evaluated({"one": Entry(one), "a/b": Entry(random_model(9), seed=1)})
    assert calls() == (3, 2, 1) and changed["entropy"] != first[1]["entropy"]
    evaluated()
    # the samples' own seed
    (other, _) = evaluated(seed=5)
    assert calls() == (6, 2, 2) and other["recall"] == first[0]["recall"] and other["entropy"] != first[0]["entropy"]
    assert evaluated() == first
    # more samples go on from those that are there, and are those that would have been drawn at once
    more = evaluated(num_samples=50)
    assert counted["sample"].calls == 4  # the 3rd shard is whole now, and there is a 4th; of two models
    whole = evaluation.evaluate(
        p_star, {"one": Entry(one), "a/b": Entry(two, seed=1)}, validation, settings(50), tmp_path / "at once"
    )
    assert more == whole
    # and fewer are the first of them: none is drawn again
    (fewer, _) = evaluated()
    assert counted["sample"].calls == 0 and fewer["num_samples"] == 40 and fewer["recall"] == first[0]["recall"]
    assert fewer["precision"] == pytest.approx(first[0]["precision"], rel=1e-5)
    # another p*
    other = drawn(two, tmp_path / "other", 30)
    (row, same) = evaluated(p_star=two, validation=other)
    assert row["precision"] != first[0]["precision"] and same["kl_model_data"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_models_of_one_seed_share_random_numbers_and_other_seeds_do_not(tmp_path):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 10)
    models = {f"{arm}/seed-{seed}": Entry(p_star, arm, None, seed) for arm in "ab" for seed in (0, 1)}
    evaluation.evaluate(p_star, models, validation, settings(20, seed=4), tmp_path / "out")
    ids = {name: corpus.open(tmp_path / "out" / name / "samples").rows().tokens for name in models}
    same = {name: all(map(np.array_equal, ids["a/seed-0"], tokens)) for name, tokens in ids.items()}
    assert same == {"a/seed-0": True, "a/seed-1": False, "b/seed-0": True, "b/seed-1": False}


@pytest.fixture
def loads(monkeypatch):
    """The sources that were loaded, in a list that grows."""
    sources, load = [], weights.load
    monkeypatch.setattr(weights, "load", lambda source, **kw: sources.append(str(source)) or load(source, **kw))
    return sources


@pytest.mark.slow
def test_each_model_is_loaded_once_and_the_second_time_none(tmp_path, loads):
    paths = {name: str(tmp_path / name) for name in ("p_star", "one", "two")}
    for seed, path in enumerate(paths.values()):
        weights.save(random_model(seed), path)
    validation = drawn(random_model(0), tmp_path / "data", 10)

    def evaluated(**changes):
        loads.clear()
        models = {name: Entry(paths[name]) for name in ("one", "two")}
        return evaluation.evaluate(paths["p_star"], models, validation, settings(10, **changes), tmp_path / "out")

    rows = evaluated()
    assert sorted(loads) == sorted(paths.values())
    assert evaluated() == rows and loads == []
    # all temperatures of a model in one load
    evaluated(sample_temperatures=(1.0, 0.8, 0.6))
    assert sorted(loads) == sorted(paths.values())
    # numbers are those of models that are given as they are
    given = evaluation.evaluate(
        random_model(0), {"one": Entry(random_model(1))}, validation, settings(10), tmp_path / "given"
    )
    assert given == [{**rows[0], "source": "one"}]


@pytest.mark.slow
def test_weights_that_change_meanwhile_are_named(tmp_path, monkeypatch):
    weights.save(random_model(1), tmp_path / "m")
    validation = drawn(random_model(0), tmp_path / "data", 10)
    identities = iter(["a", "b"])
    monkeypatch.setattr(weights, "identity", lambda _: next(identities))
    with pytest.raises(errors.RunError, match="weights of .*m have changed"):
        evaluation.evaluate(random_model(0), {"m": Entry(tmp_path / "m")}, validation, settings(10), tmp_path / "out")


def test_a_new_metric_is_computed_for_old_runs_and_a_changed_one_again(tmp_path, monkeypatch, request):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 20)

    def evaluated():
        return evaluation.evaluate(p_star, {"m": Entry(random_model(1))}, validation, settings(20), tmp_path / "out")

    (row,) = evaluated()
    request.getfixturevalue("no_work")
    table = metric_rows
    new = table.Metric(
        "longest", ("samples",), table.NUMBER, "tokens", "longer", "max length", lambda s: (int(s.length.max()),)
    )
    old = table.METRICS["repetition_4"]
    changed = old._replace(values=lambda s: (-1.0,), version=old.version + 1)
    monkeypatch.setattr(table, "METRICS", {**table.METRICS, "longest": new, "repetition_4": changed})
    (again,) = evaluated()
    longest = max(len(ids) for ids in corpus.open(tmp_path / "out/m/samples").rows().tokens)
    assert again == {**row, "longest": longest, "repetition_4": -1.0}


# What is refused


def tokenizer(*words):
    ids = {word: i for i, word in enumerate(words)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=words[0])))


LETTERS = tokenizer(*"abcde")


@pytest.fixture
def no_work(monkeypatch):
    for module, name in ((decode, "stream"), (score, "per_token")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work is done"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_ids": (2, 4)}, r"odd ends a sequence with ids \[2, 4\], p\* with \[2\]"),
        ({"eos_ids": ()}, "odd ends a sequence"),
        ({"tokenizer": tokenizer(*"abdce")}, "odd has another tokenizer"),
        ({"tokenizer": tokenizer(*"abcd")}, "odd has 4 ids and p\\* 5"),
        ({"architecture": dataclasses.replace(SMALL, max_position_embeddings=5)}, "odd has 5 positions, .* 6 ids"),
    ],
)
def test_a_model_that_does_not_go_together_with_p_star(tmp_path, request, changes, message):
    p_star = random_model(0)._replace(tokenizer=LETTERS)
    validation = drawn(p_star, tmp_path / "data", 10)
    request.getfixturevalue("no_work")
    models = {"fine": Entry(p_star), "odd": Entry(random_model(1)._replace(**changes))}
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(p_star, models, validation, settings(10), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", "a//b", "a/samples", "a/at", "a b", "a:b"])
def test_a_name_that_cannot_be_a_folder(tmp_path, name):
    p_star = random_model(0)
    with pytest.raises(ValueError, match="cannot name a model"):
        evaluation.check(p_star, {"a": Entry(p_star), name: Entry(p_star)}, settings(), 6)


def test_a_source_that_is_not_there_is_found_before_any_work(tmp_path, request):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 10)
    request.getfixturevalue("no_work")
    models = {"fine": Entry(p_star), "gone": Entry(tmp_path / "gone")}
    with pytest.raises(FileNotFoundError, match="gone"):
        evaluation.evaluate(p_star, models, validation, settings(10), tmp_path / "out")
    with pytest.raises(ValueError, match="num_samples=0"):
        evaluation.evaluate(p_star, {"fine": Entry(p_star)}, validation, settings(0), tmp_path / "out")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model_fingerprint": "ab"}, "another model than p*"),
        ({"sample_temperature": 0.8}, "sampled at tau-0.8"),
        ({"top_p": 0.9}, "sampled at tau-1-top_p-0.9"),
        ({"tokenizer_fingerprint": "cd"}, "another tokenizer"),
        ({"eos_ids": [4]}, r"end with ids \[4\]"),
        ({"prompt_ids": []}, "no prompt"),
    ],
)
def test_a_validation_corpus_that_is_not_of_p_star(tmp_path, about, message):
    p_star = random_model(0)._replace(tokenizer=LETTERS)
    validation = drawn(p_star, tmp_path / "data", 10)
    validation.manifest["settings"] |= about
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(p_star, {"m": Entry(p_star)}, validation, settings(10), tmp_path / "out")


def test_corpora_that_are_too_short_or_of_something_else(tmp_path):
    p_star, other = random_model(0), random_model(1)
    validation = drawn(p_star, tmp_path / "data", 10)

    def refused(message, samples=None, **changes):
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(
                p_star, {"m": Entry(other, samples=samples)}, validation, settings(**changes), tmp_path / "out"
            )

    refused("has 10 rows, and 11 of them", num_recall=11)
    refused("m: .* has 10 rows, and 40 of them", samples=drawn(other, tmp_path / "few", 10))
    refused("m: .* of another model", samples=drawn(p_star, tmp_path / "wrong"))
    refused("max_length 5, the validation corpus 6", samples=drawn(other, tmp_path / "short", max_length=5))
    refused(r"prompt_ids \[4\]", samples=drawn(other, tmp_path / "prompt", prompt_ids=[4]))
    unfinished = drawn(other, tmp_path / "half")
    unfinished.manifest["status"] = "running"
    refused("m: .* not finished", samples=unfinished)
    outside = written(tmp_path / "ids", [([7, EOS], -1.0)], max_length=6)
    with pytest.raises(ValueError, match="id 7"):
        evaluation.evaluate(p_star, {"m": Entry(other)}, outside, settings(10), tmp_path / "out")


def test_a_damaged_file_is_named(tmp_path):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 10)
    home = tmp_path / "out/m"
    evaluation.evaluate(p_star, {"m": Entry(p_star)}, validation, settings(10), tmp_path / "out")
    result = json.loads((home / "result.json").read_text())
    assert result["row"]["name"] == "m" and result["key"]["p_star"] == weights.fingerprint(p_star.params)
    (home / "result.json").unlink()
    (home / "recall.npz").write_bytes(b"PK")
    with pytest.raises(errors.RunError, match="recall.npz is damaged"):
        evaluation.evaluate(p_star, {"m": Entry(p_star)}, validation, settings(10), tmp_path / "out")


def test_samples_in_a_folder_of_other_things_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(errors.RunError, match="thesis.txt"):
        drawn(random_model(0), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.parity
def test_transformers_says_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture = dataclasses.replace(model_lib.PRESETS["tiny"], vocab_size=97)
    models = {"p_star": random_model(5, architecture), "student": random_model(6, architecture)}
    validation = drawn(models["p_star"], tmp_path / "data", 30, max_length=24)
    spec = settings(30, sample_temperatures=(1.0, 0.7))
    row, cool = evaluation.evaluate(
        models["p_star"], {"student": Entry(models["student"])}, validation, spec, tmp_path / "out"
    )
    samples = corpus.open(tmp_path / "out/student/samples").rows()
    for name, by, rows, got, temperature in (
        ("precision", "p_star", samples, row, 1.0), ("recall", "student", validation.rows(), row, 1.0),
        ("recall", "student", validation.rows(), cool, 0.7),
    ):  # fmt: skip
        weights.export(models[by], tmp_path / by, overwrite=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / by, dtype=torch.float32)
        sums = []
        for ids in rows.tokens:
            with torch.inference_mode():
                logits = theirs(torch.tensor(ids.tolist())[None]).logits[0].double()
            scored = torch.log_softmax(logits / temperature, -1)[range(len(ids) - 1), ids[1:].tolist()]
            sums.append(float(scored.sum()))
        assert got[name] == pytest.approx(sum(sums) / sum(len(ids) - 1 for ids in rows.tokens), abs=1e-4)
        assert got[f"{name}_per_sequence"] == pytest.approx(np.mean(sums), abs=1e-3)


@pytest.mark.slow
def test_evaluation_under_x64_is_the_same(tmp_path):
    p_star = random_model(0)
    validation = drawn(p_star, tmp_path / "data", 40)
    spec = settings(20, sample_temperatures=(0.7,), agreement=True)
    (expected,) = evaluation.evaluate(p_star, {"m": Entry(random_model(1))}, validation, spec, tmp_path / "a")
    with jax.enable_x64(True):
        (row,) = evaluation.evaluate(p_star, {"m": Entry(random_model(1))}, validation, spec, tmp_path / "b")
    assert numbers(row) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-4, nan_ok=True)
