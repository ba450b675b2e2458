"""The training loop on corpora on disk: what it learns, what it leaves, and that it goes on where it was."""

import dataclasses
import json
import shutil
import types
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import model as model_lib
from kd_jax.lm import training, weights
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.lm.training import Member, TrainSpec, loop
from kd_jax.lm.training.log import Log
from kd_jax.lm.training.update import Metrics
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs.run import Clock
from kd_jax.storage.files import read_json, read_rows

TINY = PRESETS["tiny"]
COMPUTE = Compute()


def make_corpus(folder, rows: int = 40, seed: int = 0):
    """Rows of counting up by 3 from a random start, of random lengths: easily learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 17, rows)
    tokens = np.zeros((rows, 16), np.int32)
    for i, length in enumerate(lengths):
        tokens[i, :length] = rng.integers(3, 100) + 3 * np.arange(length)
        tokens[i, 0], tokens[i, length - 1] = 1, 2  # the prompt, the end
    settings = {
        "source": "test", "model_fingerprint": "0", "tokenizer_fingerprint": None, "dtype": "float32", "prompt": None,
        "prompt_ids": [1], "eos_ids": [2], "sample_temperature": 1.0, "top_k": None, "top_p": None, "seed": seed,
        "max_length": 16, "num_samples": rows, "shard_size": 16,
    }  # fmt: skip
    zeros = np.zeros((rows, 16), np.float32)
    batch = SimpleNamespace(
        index=np.arange(rows), tokens=tokens, lengths=lengths.astype(np.int32),
        prompt_lengths=np.ones(rows, np.int32), finished=np.ones(rows, bool), log_probs=zeros, sample_log_probs=zeros,
        utilisation=1.0, steps=1,
    )  # fmt: skip
    held = corpus_lib.create_or_resume(folder, settings, command="test")
    return corpus_lib.write(held, [batch])


def settings(**changes):
    return TrainSpec(**{
        "epochs": 3, "batch_size": 8, "learning_rate": 3e-3, "validations": 4, "log_every": 1,
        "keep_checkpoints": True, **changes,
    })  # fmt: skip


def model():
    return Model(TINY, None, eos_ids=(2,))


def train(folder, corpus, *, seed=5, num_validation=8, changes=None, **options):
    members = [Member(corpus, num_validation, seed, folder)]
    return training.train(settings(**(changes or {})), model(), members, compute=COMPUTE, **options)[0]


class StopAt:
    """Asked to stop once a number of updates is logged."""

    def __init__(self, folder, update):
        self._path, self._update = folder / "metrics.jsonl", update

    @property
    def asked(self):
        return any(row["step"] >= self._update for row in read_rows(self._path))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "t"
    return folder, train(folder, corpus)


def numbers(folder):
    timed = ("tokens_per_second", "share_of_ceiling")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(folder / "metrics.jsonl")]


def test_learns_and_leaves_the_best_model(straight):
    folder, result = straight
    losses = {row["step"]: row["loss"] for row in numbers(folder) if row["kind"] == "validation"}
    assert list(losses) == [3, 6, 9, 12]  # 32 rows in batches of 8, three times; four validations
    assert losses[12] < losses[3] - 0.1
    best = min(losses, key=losses.get)
    assert (result["chosen"], result["validation_loss"]) == (best, losses[best])
    loaded = weights.load(folder / "model")
    assert weights.fingerprint(loaded.params) == result["fingerprint"]
    assert json.loads((folder / "training.json").read_text())["rule"] == training.RULE


def test_a_checkpoint_is_a_model(straight):
    folder, _ = straight
    last = weights.load(folder / "checkpoints" / "12")
    assert last.architecture == TINY and last.eos_ids == (2,)
    assert jax.tree.structure(last.params) == jax.tree.structure(weights.load(folder / "model").params)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at, changes", [(2, {}), (7, {}), (5, {"save_every": 2})])
def test_interrupted_it_ends_with_the_same_numbers(straight, corpus, tmp_path, stop_at, changes):
    straight_folder, result = straight
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "t", corpus, stop=StopAt(tmp_path / "t", stop_at), changes=changes)
    assert not (tmp_path / "t" / "model").exists()
    again = train(tmp_path / "t", corpus, changes=changes)
    assert again["fingerprint"] == result["fingerprint"]
    assert numbers(tmp_path / "t") == numbers(straight_folder)
    kept = straight_folder / "checkpoints" / "12", tmp_path / "t" / "checkpoints" / "12"
    a, b = (weights.fingerprint(weights.load(path).params) for path in kept)
    assert a == b


def test_what_is_finished_does_nothing_more(straight, corpus):
    folder, result = straight
    before = (folder / "metrics.jsonl").read_text()
    again = train(folder, corpus)
    assert again["fingerprint"] == result["fingerprint"]
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_another_seed_is_another_model_and_no_continuation(straight, corpus, tmp_path):
    folder, result = straight
    with pytest.raises(Exception, match="another training"):
        train(folder, corpus, seed=6)
    other = train(tmp_path / "t", corpus, seed=6, changes={"epochs": 1})
    assert other["fingerprint"] != result["fingerprint"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match="batch is in") as error:
        train(tmp_path / "t", corpus, changes={"learning_rate": 1e30, "clip": 0.0, "warmup": 0.0})
    path = str(error.value).split("batch is in ")[1]
    with np.load(path) as batch:
        assert batch["tokens"].shape[0] == 1 and len(batch["rows"]) == 8
    assert not (tmp_path / "t" / "model").exists()


@pytest.mark.slow
def test_checkpoints_go_when_they_are_not_wanted(corpus, tmp_path):
    train(tmp_path / "t", corpus, changes={"epochs": 1, "keep_checkpoints": False})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["metrics.jsonl", "model", "training.json"]


@pytest.mark.slow
def test_a_number_of_updates_in_place_of_epochs(corpus, tmp_path):
    # three epochs are so many updates
    train(tmp_path / "epochs", corpus)
    rows = [row for row in read_rows(tmp_path / "epochs/metrics.jsonl") if row["kind"] == "training"]
    train(tmp_path / "updates", corpus, changes={"epochs": 0, "updates": rows[-1]["step"]})
    results = [read_json(tmp_path / name / "training.json")["fingerprint"] for name in ("epochs", "updates")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_tensorboard_files(corpus, tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path / "t", corpus, changes={"epochs": 1, "trackers": ("tensorboard",)})
    assert any((tmp_path / "t" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("change, message", [
    ({"epochs": 0}, "epochs=0 and updates=0: exactly one of them is above 0"),
    ({"updates": 30}, "epochs=3 and updates=30: exactly one"),
    ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ({"warmup": 0.6, "decay": 0.6}, "must not be above 1 together"),
    ({"trackers": ("mlflow",)}, "'mlflow' must be one of"),
])  # fmt: skip
def test_settings_faults(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_corpus_too_small_for_its_validation(corpus, tmp_path):
    with pytest.raises(ValueError, match="40 rows"):
        train(tmp_path / "t", corpus, num_validation=40)


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Two members on two corpora, and each of them alone."""
    other = make_corpus(tmp_path_factory.mktemp("other") / "c", seed=1)
    root = tmp_path_factory.mktemp("pair")
    members = [(corpus, 5), (other, 6)]
    alone = [train(root / f"alone-{seed}", held, seed=seed, changes=PACKED) for held, seed in members]
    return root, members, alone


PACKED = {"row_length": 32}


def together(root, members, **options):
    chosen = [Member(held, 8, seed, root / f"seed-{seed}", f"seed-{seed}") for held, seed in members]
    return training.train(settings(**PACKED), model(), chosen, compute=COMPUTE, **options)


@pytest.mark.slow
def test_together_each_has_the_numbers_it_has_alone(pair):
    root, members, alone = pair
    found = together(root / "together", members)
    for (_, seed), result, wanted in zip(members, found, alone, strict=True):
        folders = root / f"alone-{seed}", root / "together" / f"seed-{seed}"
        a, b = ([row["loss"] for row in numbers(folder)] for folder in folders)
        np.testing.assert_allclose(b, a, rtol=1e-4)
        assert result["chosen"] == wanted["chosen"]
        weights.load(folders[1] / "checkpoints" / "12")


@pytest.mark.slow
def test_together_interrupted_it_ends_with_the_same_numbers(pair):
    root, members, _ = pair
    straight = together(root / "straight", members)
    with pytest.raises(KeyboardInterrupt):
        together(root / "cut", members, stop=StopAt(root / "cut" / "seed-5", 5))
    # as if the kill had come before the last checkpoint of one of them was whole
    shutil.rmtree(root / "cut" / "seed-6" / "checkpoints" / str(last_step(root / "cut" / "seed-6")))
    again = together(root / "cut", members)
    assert [result["fingerprint"] for result in again] == [result["fingerprint"] for result in straight]
    for _, seed in members:
        assert numbers(root / "cut" / f"seed-{seed}") == numbers(root / "straight" / f"seed-{seed}")


def last_step(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_a_second_training_of_a_kind_compiles_nothing(corpus, tmp_path):
    """Two shapes of models, each trained twice with other seeds: two programs."""
    loop._programs.cache_clear()
    wide = dataclasses.replace(TINY, intermediate_size=48)
    for architecture in (TINY, wide):
        for seed in (0, 1):
            members = [Member(corpus, 8, seed, tmp_path / f"{architecture.intermediate_size}-{seed}")]
            one = Model(architecture, None, eos_ids=(2,))
            training.train(settings(epochs=1, validations=1), one, members, compute=COMPUTE)
    used = loop._programs.cache_info()
    assert (used.misses, used.hits) == (2, 2)


@pytest.mark.slow
def test_an_update_is_compiled_once_for_each_shape(corpus, tmp_path, monkeypatch, caplog):
    """Packed batches of several sizes, a training that is stopped and resumed, and one with another seed."""
    loop._programs.cache_clear()
    shapes, compiled = set(), loop.update_lib.compiled

    def noting(*arguments):
        update = compiled(*arguments)
        return lambda state, batch, guide: shapes.add(batch.tokens.shape) or update(state, batch, guide)

    monkeypatch.setattr(loop.update_lib, "compiled", noting)
    packed = {"row_length": 16}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "t", corpus, changes=packed, stop=StopAt(tmp_path / "t", 5))
        train(tmp_path / "t", corpus, changes=packed)
        train(tmp_path / "u", corpus, changes=packed, seed=6)
    lines = [record.getMessage() for record in caplog.records]
    assert len(shapes) >= 2
    assert sum("Finished XLA compilation of jit(update)" in line for line in lines) == len(shapes)


def test_a_loss_beyond_what_exp_holds_is_logged(tmp_path):
    log = Log(tmp_path, {"name": "a"}, 0, 1, 1, (), tokens_at_ceiling=1.0, clock=Clock(), quiet=True)
    log.validation(1, {"loss": 800.0})
    log.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] == 800.0 and row["perplexity"] == float("inf")


def test_prompts_count_as_work_and_not_as_learnt(tmp_path, monkeypatch):
    times = iter([10.0, 14.0])
    clock = types.SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr("kd_jax.lm.training.log.time", clock)
    log = Log(tmp_path, {"name": "a"}, 0, 2, 1, (), tokens_at_ceiling=100.0, clock=Clock(), quiet=True)
    for done, learnt in ((1, 20), (2, 60)):
        log.update(done, learnt, 120, Metrics(1.0, 9, 1.0, 1.0))
    log.close()
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert first["tokens_per_second"] is first["share_of_ceiling"] is None
    # in 4 seconds, 40 tokens are learnt, and 120 run through the model: 0.3 of what it could do
    assert second["tokens_per_second"] == 10.0 and second["share_of_ceiling"] == 0.3


@pytest.mark.slow
def test_a_start_is_where_training_begins(corpus, tmp_path):
    """At a learning rate of (nearly) nothing the model is what it started from, and the start itself is untouched."""
    start = model_lib.init(jax.random.key(9), TINY)
    before = weights.fingerprint(start)
    members = [Member(corpus, 8, 5, tmp_path / "t", start=start)]
    spec = settings(epochs=1, validations=1, learning_rate=1e-30)
    result = training.train(spec, model(), members, compute=COMPUTE)[0]
    assert result["fingerprint"] == before == weights.fingerprint(start)


def test_ids_that_the_model_has_no_weights_for(tmp_path):
    """The tokenizer has them, as added tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(50)}, "t0"))
    backend.add_special_tokens([f"<{i}>" for i in range(50, 160)])
    small = Model(dataclasses.replace(TINY, vocab_size=50), None, eos_ids=(2,), tokenizer=Tokenizer(backend))
    corpus = make_corpus(tmp_path / "c")
    largest = max(int(ids.max()) for ids in corpus.rows().tokens[:32])
    members = [Member(corpus, 8, 5, tmp_path / "m", name="student")]
    with pytest.raises(ValueError, match=f"the text of student has id {largest} .'<{largest}>'.; .* are 0 to 49"):
        training.train(settings(), small, members, compute=COMPUTE)
