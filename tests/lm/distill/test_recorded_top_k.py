"""A teacher recorded on disk: what is written is what it says, within the error that is claimed, and comes back."""

import dataclasses
import functools
import types

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import sample, teacher
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.corpus import batches, shards
from kd_jax.lm.corpus.batches import Layout, Sequences
from kd_jax.lm.distill import recorded_top_k
from kd_jax.lm.model import PRESETS, Model
from kd_jax.storage.errors import RunError
from tests.lm.training.test_loop import make_corpus

TINY = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)  # compiles quicker
VOCAB = TINY.vocab_size


@functools.cache
def tiny(seed=0):
    params = model_lib.init(jax.random.key(seed), TINY)
    return Model(TINY, params | {"embedding": 3 * params["embedding"]}, eos_ids=(2,))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


def recorded(source, folder, k, form, model=None):
    model = model or tiny()
    about = recorded_top_k.settings(model, "tiny", k, form, "float32", corpus_lib.fingerprint(source))
    return recorded_top_k.score_corpus(source, folder, model, about, command="test", label="test")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Every id of the vocabulary at every position, exactly."""
    return recorded(corpus, tmp_path_factory.mktemp("whole") / "c", VOCAB, "float32")


def columns(held):
    return datasets.load_dataset(str(held.folder), split="train").with_format("numpy")


@functools.cache
def forward():
    return jax.jit(model_lib.forward, static_argnums=1)


def dense(tokens):
    """float64 log-probabilities [position, vocab] of what follows each token, run in a row filled up with zeros."""
    row = np.zeros((1, 16), np.int32)
    row[0, : len(tokens)] = tokens
    hidden = np.asarray(forward()(tiny().params, TINY, row)[0, : len(tokens)], np.float64)
    logits = hidden @ np.asarray(model_lib.head(tiny().params), np.float64).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_codes_are_as_near_as_claimed():
    values = -np.concatenate([[0.0], np.geomspace(1e-6, 64, 20001)])
    found = np.asarray(recorded_top_k.decode(jnp.asarray(recorded_top_k.encode(values))))
    error = np.abs(found - values)
    bound = np.sqrt(64 * -values) / 65534 + 64 / 65534**2
    assert (error <= bound + 1e-6 * np.abs(values)).all()  # float32 itself
    assert error[values >= -1].max() < 1.3e-4 and error[values >= -10].max() < 4e-4 and error.max() < 1.1e-3
    assert found[0] == 0 and (np.diff(found) <= 0).all()


def test_codes_of_what_cannot_be_or_nearly():
    found = np.asarray(recorded_top_k.decode(jnp.asarray(recorded_top_k.encode(np.array([-np.inf, -1e9, 1e-7])))))
    assert found[0] == -np.inf and found[1] == -64 and found[2] == 0


@pytest.mark.long
@pytest.mark.parametrize("form, atol", [("float32", 1e-5), ("uint16", 4e-4)])
def test_recorded_is_what_a_sort_of_the_logits_gives(corpus, tmp_path, form, atol):
    held = recorded(corpus, tmp_path / "c", 7, form)
    table = columns(held)
    assert held.finished and held.num_rows == len(table) == 40
    for row in table:
        wanted = dense(row["tokens"])[row["prompt_length"] - 1 : row["length"] - 1]
        order = np.argsort(-wanted, axis=-1, kind="stable")
        best = np.take_along_axis(wanted, order, axis=-1)
        ids, values, tail = (np.asarray(row[name]) for name in shards.TOP_K)
        assert ids.shape == values.shape == (row["length"] - row["prompt_length"], 7)
        np.testing.assert_array_equal(ids, order[:, :7])
        if form == "uint16":
            values, tail = (np.asarray(recorded_top_k.decode(jnp.asarray(x.astype(np.uint16)))) for x in (values, tail))
        np.testing.assert_allclose(values, best[:, :7], atol=atol)
        np.testing.assert_allclose(tail, np.log(np.exp(best[:, 7:]).sum(-1)), atol=atol)


def test_the_rest_of_the_corpus_is_the_same(corpus, whole):
    ours, theirs = whole.rows(), corpus.rows()
    for name in shards.SCHEMA.names:
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            np.testing.assert_array_equal(a, b)
    assert corpus_lib.open(whole.folder).manifest["settings"]["teacher"]["top_k"] == VOCAB
    assert corpus_lib.fingerprint(whole) != corpus_lib.fingerprint(corpus)


@pytest.mark.slow
def test_an_entry_takes_at_most_four_bytes_on_disk(tmp_path):
    source = make_corpus(tmp_path / "large", rows=600)
    held = recorded(source, tmp_path / "c", 64, "uint16")
    before, after = (sum(shard["bytes"] for shard in c.manifest["shards"]) for c in (source, held))
    assert recorded_top_k.num_entries(held) == 64 * int((source.rows().length - 1).sum())
    assert 1 < (after - before) / recorded_top_k.num_entries(held) <= 4


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch):
    straight = recorded(corpus, tmp_path / "straight", 5, "uint16")
    write, calls = shards.write, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(shards, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        recorded(corpus, tmp_path / "cut", 5, "uint16")
    monkeypatch.undo()
    assert corpus_lib.open(tmp_path / "cut").num_rows == 16
    again = recorded(corpus, tmp_path / "cut", 5, "uint16")
    assert [s["sha256"] for s in again.manifest["shards"]] == [s["sha256"] for s in straight.manifest["shards"]]


def test_a_folder_of_other_things_is_refused(corpus, whole, tmp_path):
    with pytest.raises(RunError, match="other settings.*teacher"):
        recorded(corpus, whole.folder, 5, "float32")
    about = {key: value for key, value in whole.manifest["settings"].items() if key != "teacher"}
    with pytest.raises(RunError, match="other settings.*teacher"):
        corpus_lib.create_or_resume(whole.folder, about, command="test")


def test_faults(corpus, tmp_path):
    for k in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=f"top_k={k}"):
            recorded(corpus, tmp_path / "c", k, "uint16")
    with pytest.raises(ValueError, match="'float16' must be one of"):
        recorded(corpus, tmp_path / "c", 5, "float16")
    broken = tiny()._replace(params=tiny().params | {"norm": tiny().params["norm"].at[0].set(jnp.nan)})
    for form in recorded_top_k.FORMS:
        with pytest.raises(ValueError, match="NaN for row"):
            recorded(corpus, tmp_path / f"nan-{form}", 5, form, broken)
    with pytest.raises(ValueError, match="no top-k columns"):
        Sequences.of(corpus, str(tmp_path / "arrow"), targets=True)


def test_another_tokenizer_is_refused(corpus, tmp_path):
    settings = {**corpus.manifest["settings"], "tokenizer_fingerprint": "a"}
    other = corpus._replace(manifest={**corpus.manifest, "settings": settings})
    model = tiny()._replace(tokenizer=types.SimpleNamespace(vocab_size=VOCAB, fingerprint="b"))
    with pytest.raises(ValueError, match="another tokenizer"):
        recorded(other, tmp_path / "c", 5, "uint16", model)


@pytest.mark.parametrize("layout", [{}, {"row_length": 24, "parts": 2}])
def test_targets_lie_where_their_tokens_are_learnt(whole, tmp_path, layout):
    sequences = Sequences.of(whole, str(tmp_path / "arrow"), targets=True)
    rows = np.array([3, 17, 20, 39])
    tokens, prompts = sequences.tokens(rows), sequences.prompt_lengths[rows]
    batch = batches.arrange(tokens, prompts, Layout(4, max_length=16, **layout), sequences.targets(rows))
    ids, log_probs, tail = (np.asarray(array) for array in recorded_top_k.read(batch.targets))
    found = 0
    for place in np.argwhere(batch.mask):
        part, row, column = place
        segment = batch.segments[part, row] == batch.segments[part, row, column]
        wanted = dense(batch.tokens[part, row][segment])[batch.positions[part, row, column]]
        np.testing.assert_allclose(log_probs[tuple(place)], wanted[ids[tuple(place)]], atol=1e-5)
        assert sorted(ids[tuple(place)]) == list(range(VOCAB)) and tail[tuple(place)] == -np.inf
        found += 1
    assert found == sum(map(len, tokens)) - prompts.sum()
    assert not batch.targets.ids[~batch.mask].any()


def test_codes_are_made_a_distribution_again():
    exact = np.log(np.array([[0.5, 0.3, 0.1999]], np.float32))
    targets = batches.Targets(
        np.zeros((1, 3), np.uint16), recorded_top_k.encode(exact), recorded_top_k.encode(np.log([1e-4]))
    )
    _, log_probs, tail = recorded_top_k.read(jax.tree.map(jnp.asarray, targets))
    np.testing.assert_allclose(np.exp(log_probs).sum(-1) + np.exp(tail), 1, atol=1e-6)


@pytest.mark.long
def test_command_lines(tmp_path, capsys):
    weights.save(tiny(), tmp_path / "model")
    words = ["--model", tmp_path / "model", "--num_samples", 6, "--prompt_ids", 1, "--max_length", 9, "--shard_size", 4]
    make = [*words, "--batch_size", 4]
    assert sample.main(["sample", *map(str, [*make, "--out", tmp_path / "plain"])]) == 0
    recording = ["--record_top_k", 3, "--out", tmp_path / "recorded"]
    assert sample.main(["sample", *map(str, [*make, *recording])]) == 0
    words = ["--corpus", tmp_path / "plain", "--model", tmp_path / "model", "--top_k", 3, "--out", tmp_path / "scored"]
    assert teacher.main(["teacher", *map(str, words)]) == 0
    assert "bytes, tails included" in capsys.readouterr().out
    one, two = (columns(corpus_lib.open(tmp_path / name)) for name in ("recorded", "scored"))
    for a, b in zip(one, two, strict=True):
        for name in ("tokens", *shards.TOP_K):
            np.testing.assert_array_equal(a[name], b[name])
    # the same command again has nothing to do; another K is another corpus
    assert teacher.main(["teacher", *map(str, words)]) == 0
    assert teacher.main(["teacher", *map(str, [*words, "--top_k", 4])]) == 2
    assert "teacher" in capsys.readouterr().err
