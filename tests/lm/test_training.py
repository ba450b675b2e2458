"""The training loop on corpora on disk: what it learns, what it leaves, and that it goes on where it was."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import training, weights
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.lm.training import Settings
from kd_jax.run import read_rows

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
    return Settings(**{
        "epochs": 3, "batch_size": 8, "num_validation": 8, "learning_rate": 3e-3, "validations": 4, "log_every": 1,
        "keep_checkpoints": True, **changes,
    })  # fmt: skip


def model():
    return Model(TINY, None, eos_ids=(2,))


def train(folder, corpus, **options):
    changes = options.pop("changes", {})
    return training.train(settings(**changes), model(), corpus, 5, folder, compute=COMPUTE, **options)


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


def test_another_seed_is_another_model_and_no_continuation(straight, corpus, tmp_path):
    folder, result = straight
    with pytest.raises(Exception, match="another training"):
        training.train(settings(), model(), corpus, 6, folder, compute=COMPUTE)
    other = training.train(settings(epochs=1), model(), corpus, 6, tmp_path / "t", compute=COMPUTE)
    assert other["fingerprint"] != result["fingerprint"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match="batch is in") as error:
        train(tmp_path / "t", corpus, changes={"learning_rate": 1e30, "clip": 0.0, "warmup": 0.0})
    path = str(error.value).split("batch is in ")[1]
    with np.load(path) as batch:
        assert batch["tokens"].shape[0] == 1 and len(batch["rows"]) == 8
    assert not (tmp_path / "t" / "model").exists()


def test_checkpoints_go_when_they_are_not_wanted(corpus, tmp_path):
    train(tmp_path / "t", corpus, changes={"epochs": 1, "keep_checkpoints": False})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["metrics.jsonl", "model", "training.json"]


def test_tensorboard_files(corpus, tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path / "t", corpus, changes={"epochs": 1, "trackers": ("tensorboard",)})
    assert any((tmp_path / "t" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("change, message", [
    ({"epochs": 0}, "config.train.epochs=0"),
    ({"learning_rate": 0.0}, "config.train.learning_rate"),
    ({"warmup": 0.6, "decay": 0.6}, "more than 1 together"),
    ({"trackers": ("mlflow",)}, "'mlflow' is not one of"),
])  # fmt: skip
def test_settings_faults(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_corpus_too_small_for_its_validation(corpus, tmp_path):
    with pytest.raises(ValueError, match="40 rows"):
        train(tmp_path / "t", corpus, changes={"num_validation": 40})
