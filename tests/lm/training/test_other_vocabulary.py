"""Trainings that learn from a teacher with another vocabulary: what they are equal to, and kills."""

import dataclasses

import jax
import numpy as np
import pytest

from kd_jax.lm import model as model_lib
from kd_jax.lm import training, weights
from kd_jax.lm.corpus import ingest
from kd_jax.lm.distill.loss import Distillation, DistillSpec
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.lm.training import Member
from kd_jax.storage.files import read_rows
from tests.lm.distill.test_alignment import OTHER, WORDS
from tests.lm.training.test_loop import StopAt, settings
from tests.lm.training.test_policies import numbers

VALUES = ("loss", "divergence", "cross_entropy", "gradient_norm")


def model(tokenizer, seed=None):
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    params = None if seed is None else model_lib.init(jax.random.key(seed), shape)
    if params is not None:  # not all tokens equally probable
        params = params | {"embedding": 3 * params["embedding"]}
    return Model(shape, params, (tokenizer.eos_id,), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts in OTHER's ids after its end of sequence."""
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = ["the", "cat", "that", "at", "a", "he", "é", "cathe"]
    texts = [" ".join(random.choice(words, random.integers(1, 4))) for _ in range(24)]
    (root / "texts.txt").write_text("\n".join(texts))
    OTHER.save(root / "tokenizer")
    return ingest.from_dataset(
        root / "texts.txt", root / "c", root / "tokenizer", max_length=16, prompt_ids=[OTHER.eos_id], command="test"
    )


def train(folder, corpus, teacher, stop=None, **how):
    distillation = Distillation(DistillSpec(**{"policy": "online", **how}), teacher)
    spec = settings(epochs=4, row_length=32)
    members = [Member(corpus, 8, 5, folder)]
    return training.train(spec, model(OTHER), members, compute=Compute(), stop=stop, distillation=distillation)[0]


@pytest.mark.long
def test_with_one_vocabulary_aligned_is_the_plain_loss(corpus, tmp_path):
    how = {"loss_temperature": 2.0, "teacher_temperature": 1.5, "hard_weight": 0.25}
    for vocabulary in ("same", "aligned"):
        train(tmp_path / vocabulary, corpus, model(OTHER, 9), vocabulary=vocabulary, **how)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("same", "aligned")]
    assert len(rows[0]) == len(rows[1]) == 12
    for plain, aligned in zip(*rows, strict=True):
        assert aligned["compared"] == pytest.approx(1)
        for name in VALUES if plain["kind"] == "training" else VALUES[:3]:
            # Adam divides by the root of the square of the gradient: where that is near 0, rounding shows
            assert aligned[name] == pytest.approx(plain[name], rel=1e-3 if plain["step"] > 1 else 1e-5), name


@pytest.mark.long
@pytest.mark.parametrize(
    "how", [{"vocabulary": "aligned"}, {"vocabulary": "uld", "hard_weight": 0.5},
            {"vocabulary": "aligned", "policy": "on_policy", "divergence": "reverse_kl"}],
)  # fmt: skip
def test_interrupted_it_ends_with_the_same_numbers(corpus, tmp_path, how):
    teacher, straight, killed = model(WORDS, 9), tmp_path / "straight", tmp_path / "killed"
    result = train(straight, corpus, teacher, **how)
    with pytest.raises(KeyboardInterrupt):
        train(killed, corpus, teacher, stop=StopAt(killed, 3), **how)
    again = train(killed, corpus, teacher, **how)
    assert again["fingerprint"] == result["fingerprint"] and numbers(killed) == numbers(straight)
    rows = read_rows(straight / "metrics.jsonl")
    if "policy" not in how:  # of the student's own samples, not all bytes are text
        losses = [row["loss"] for row in rows if row["kind"] == "validation"]
        assert losses[-1] < losses[0] and all(row["compared"] > 0.95 for row in rows)
    assert weights.load(straight / "model").num_tokens == OTHER.vocab_size


def test_another_vocabulary_is_an_error_without_a_choice(corpus, tmp_path):
    with pytest.raises(ValueError, match=f"the teacher has {WORDS.vocab_size} ids and the student {OTHER.vocab_size}"):
        train(tmp_path / "t", corpus, model(WORDS, 9))
    assert not (tmp_path / "t").exists()
    with pytest.raises(ValueError, match="vocabulary='uld' goes with policy='online' or 'on_policy', not 'offline'"):
        DistillSpec(policy="offline", vocabulary="uld")
