"""Trainings that learn a teacher's distribution: the same numbers after a kill, and whose sequences they learn from."""

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models

from kd_jax.lm import training, weights
from kd_jax.lm.corpus.batches import Layout, Sequences
from kd_jax.lm.distill import rollouts as rollouts_lib
from kd_jax.lm.distill.loss import Distillation, DistillSpec
from kd_jax.lm.distill.rollouts import Rollouts
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.training import Member
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.storage.files import read_rows
from tests.lm.distill.test_recorded_top_k import TINY, VOCAB, recorded, tiny
from tests.lm.training.test_loop import StopAt, last_step, make_corpus, settings

COMPUTE = Compute()
STUDENT = Model(TINY, None, eos_ids=(2,))
TIMED = ("tokens_per_second", "share_of_ceiling", "share_of_rollouts")
HOW = {
    "online": {"loss_temperature": 2.0, "hard_weight": 0.2},
    "on_policy": {"divergence": "jensen_shannon", "parameter": 0.7, "prompt_length": 3},
    "offline": {"tail": "renormalise"},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus, one of other rows, and each with a teacher in it."""
    root = tmp_path_factory.mktemp("corpora")
    plain = [make_corpus(root / f"c{seed}", seed=seed) for seed in (0, 1)]
    return plain, [recorded(held, root / f"r{i}", 5, "uint16") for i, held in enumerate(plain)]


def train(folder, corpora, policy, *, changes=None, stop=None, **how):
    held, other = corpora[policy == "offline"]
    distillation = Distillation(
        DistillSpec(policy=policy, **{**HOW[policy], **how}), None if policy == "offline" else tiny(9)
    )
    return training.train(
        settings(epochs=2, **(changes or {})), STUDENT, [Member(held, 8, 5, folder, mixed=other)], compute=COMPUTE,
        stop=stop, distillation=distillation,
    )[0]  # fmt: skip


def numbers(folder):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture(scope="module", params=sorted(HOW))
def straight(request, corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "t"
    return request.param, folder, train(folder, corpora, request.param)


@pytest.mark.slow
def test_learns_and_says_what_it_sees(straight):
    policy, folder, result = straight
    rows = numbers(folder)
    training_rows = [row for row in rows if row["kind"] == "training"]
    validations = [row for row in rows if row["kind"] == "validation"]
    assert len(training_rows) == 8 and len(validations) == 4
    for row in rows:
        assert 0 <= row["agreement"] <= 1 and row["student_entropy"] > 0 and row["teacher_entropy"] > 0
        assert row["divergence"] >= 0 and row["cross_entropy"] > 0
    assert validations[-1]["loss"] < validations[0]["loss"]
    chosen = next(row for row in validations if row["chosen"])
    assert chosen["perplexity"] == pytest.approx(np.exp(chosen["cross_entropy"])) == result["perplexity"]
    assert ("on_policy" in training_rows[0]) == ("share_of_rollouts" in result) == (policy == "on_policy")


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3])
def test_interrupted_it_ends_with_the_same_numbers(straight, corpora, tmp_path, stop_at):
    policy, folder, result = straight
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "t", corpora, policy, stop=StopAt(tmp_path / "t", stop_at))
    assert not (tmp_path / "t" / "model").exists()
    again = train(tmp_path / "t", corpora, policy)
    assert again["fingerprint"] == result["fingerprint"]
    assert numbers(tmp_path / "t") == numbers(folder)
    a, b = (weights.fingerprint(weights.load(path / "checkpoints" / "8").params) for path in (folder, tmp_path / "t"))
    assert a == b and last_step(folder) == 8


@pytest.mark.slow
def test_offline_with_all_ids_is_online(corpora, tmp_path):
    (held, _), _ = corpora
    exact = recorded(held, tmp_path / "whole", VOCAB, "float32", tiny(9))
    found = {}
    for policy, corpus, teacher in (("online", held, tiny(9)), ("offline", exact, None)):
        distillation = Distillation(DistillSpec(policy=policy, loss_temperature=1.5, hard_weight=0.1), teacher)
        members = [Member(corpus, 8, 5, tmp_path / policy)]
        training.train(settings(epochs=2), STUDENT, members, compute=COMPUTE, distillation=distillation)
        found[policy] = numbers(tmp_path / policy), weights.load(tmp_path / policy / "checkpoints" / "8").params
    (rows, params), (others, theirs) = found.values()
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    for ours, other in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        # Adam divides by the root of the square of the gradient: where that is near 0, rounding shows
        np.testing.assert_allclose(ours, other, atol=5e-4)


@pytest.mark.slow
def test_a_mix_takes_its_share_of_both(corpora, tmp_path):
    one, two = (Sequences.of(held, str(tmp_path / "arrow")) for held in corpora[0])
    mixed = one.mixed(two, 0.25)
    assert len(mixed) == 40
    rows = mixed.tokens(np.arange(40))
    wanted = [*one.tokens(np.arange(30)), *two.tokens(np.arange(30, 40))]
    assert all(np.array_equal(a, b) for a, b in zip(rows, wanted, strict=True))
    losses = [
        train(tmp_path / f"{mix}", corpora, "online", data="mix", mix=mix, changes={"validations": 1})[
            "validation_loss"
        ]
        for mix in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_rollouts_are_of_the_parameters_of_their_update(corpora, tmp_path, monkeypatch):
    generate, seen = rollouts_lib.decode.generate, []

    def watched(model, prompts, count, **options):
        out = generate(model, prompts, count, **options)
        seen.append((weights.fingerprint(model.params), options["seed"]))
        return out

    monkeypatch.setattr(rollouts_lib.decode, "generate", watched)
    changes = {"save_every": 1, "keep": 100}
    train(tmp_path / "t", corpora, "on_policy", on_policy_fraction=1.0, changes=changes)
    assert len(seen) == 8 and len({seed for _, seed in seen}) == 8
    saved = [weights.fingerprint(weights.load(tmp_path / "t" / "checkpoints" / str(n)).params) for n in range(1, 8)]
    assert [fingerprint for fingerprint, _ in seen[1:]] == saved


@pytest.mark.slow
def test_own_samples_are_no_labels(corpora, tmp_path):
    losses = {}
    for share in (0.0, 0.5):
        train(tmp_path / f"{share}", corpora, "on_policy", on_policy_fraction=1.0, hard_weight=share)
        losses[share] = [row["loss"] for row in numbers(tmp_path / f"{share}") if row["kind"] == "training"]
    assert len(losses[0.0]) == 8 and losses[0.0] == losses[0.5]


@pytest.fixture(scope="module")
def prompts(corpora, tmp_path_factory):
    return Sequences.of(corpora[0][0], str(tmp_path_factory.mktemp("arrow")))


def rollouts(prompts, seed=5, **how):
    return Rollouts(
        DistillSpec(policy="on_policy", **how), STUDENT, Layout(8, max_length=16), seed, [1], prompts, 16, COMPUTE
    )


def test_rollouts_answer_the_prompts_of_their_rows():
    class Rows:  # of prompts of their own; the last row has nothing after its prompt but an EOS
        prompt_lengths = np.array([1, 2, 4, 3])

        def __len__(self):
            return 4

        def tokens(self, rows):
            return [np.arange(10 * row, 10 * row + self.prompt_lengths[row] + 1) for row in rows]

    made = Rollouts(
        DistillSpec(policy="on_policy"), STUDENT, Layout(8, max_length=16), 5, [], Rows(), 16, COMPUTE
    )  # fmt: skip
    begun = made.prompts_of(3)
    assert len(begun) == 8 and begun == made.prompts_of(3) != made.prompts_of(4)
    assert {tuple(ids) for ids in begun} <= {(0,), (10, 11), (20, 21, 22, 23), (30, 31, 32)}
    with pytest.raises(ValueError, match="a prompt of 4 ids"):
        Rollouts(DistillSpec(policy="on_policy"), STUDENT, Layout(8, max_length=4), 5, [], Rows(), 4, COMPUTE)


def often_ending():
    """A model that ends about a third of its sequences at each token."""
    params = tiny(3).params
    return params | {"embedding": params["embedding"].at[2].mul(4.0)}


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 3])
def test_what_follows_an_end_is_not_learnt(prompts, length):
    made = rollouts(prompts, prompt_length=length, rollout_batch_size=3)
    ended = 0
    for update in range(3):
        batch, begins = made.batch(often_ending(), update), made.prompts_of(update)
        assert batch.tokens.shape == (1, 8, 16)
        for i in range(8):
            prompt = begins[i % len(begins)]
            tokens, mask = batch.tokens[0, i], batch.mask[0, i]
            assert tokens[: len(prompt)].tolist() == prompt
            ends = np.flatnonzero(tokens[len(prompt) :] == 2)
            last = len(prompt) + ends[0] if len(ends) else 15
            # the end itself is learnt, by the position before it, and nothing after it
            assert np.flatnonzero(mask).tolist() == list(range(len(prompt) - 1, last))
            assert not tokens[last + 1 :].any()
            ended += bool(len(ends))
    assert ended > 3


def test_prompts_are_beginnings_of_rows(prompts):
    made = rollouts(prompts, prompt_length=3)
    beginnings = {tuple(ids[:3]) for ids in made.prompts.tokens(np.arange(40))}
    found = [tuple(prompt) for update in range(4) for prompt in made.prompts_of(update)]
    assert len(found) == 32 and set(found) <= beginnings and len(set(found)) > 16
    assert made.prompts_of(1) == rollouts(prompts, prompt_length=3).prompts_of(1)
    assert rollouts(prompts).prompts_of(1) == [[1]]


def test_the_share_of_updates_is_lambda(prompts):
    for share in (0.0, 0.3, 1.0):
        made = rollouts(prompts, on_policy_fraction=share)
        found = [made.wanted(update) for update in range(500)]
        assert abs(np.mean(found) - share) < 4 * np.sqrt(share * (1 - share) / 500) + 1e-12
        assert found == [made.wanted(update) for update in range(500)]
    assert found != [rollouts(prompts, seed=6, on_policy_fraction=0.3).wanted(u) for u in range(500)]


@pytest.mark.slow
def test_rollouts_of_other_parameters_compile_nothing(prompts):
    made, compiled = rollouts(prompts), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for update in range(4):
        batch = made.batch(tiny(update).params, update)
        if update == 1:
            compiled.clear()
            jax.jit(lambda x: x + 1).lower(1.0).compile()
            assert compiled  # the listener hears of compilations
            compiled.clear()
    assert not compiled and batch.mask.any()


@pytest.mark.slow
def test_students_together_have_the_numbers_they_have_alone(corpora, tmp_path):
    distillation = Distillation(DistillSpec(policy="online", divergence="reverse_kl"), tiny(9))
    chosen = list(zip(corpora[0], (5, 6), strict=True))

    def run(name, pairs):
        members = [Member(held, 8, seed, tmp_path / name / str(seed)) for held, seed in pairs]
        training.train(settings(epochs=1, row_length=32), STUDENT, members, compute=COMPUTE, distillation=distillation)
        return [[row["loss"] for row in numbers(tmp_path / name / str(seed))] for _, seed in pairs]

    alone = [run("alone", [pair])[0] for pair in chosen]
    np.testing.assert_allclose(run("together", chosen), alone, rtol=1e-4)


@pytest.mark.slow
def test_another_vocabulary_is_refused(corpora, tmp_path):
    def tokenizer(size, letter):
        return Tokenizer(tokenizers.Tokenizer(models.WordLevel({f"{letter}{i}": i for i in range(size)}, f"{letter}0")))

    student = STUDENT._replace(tokenizer=tokenizer(VOCAB, "a"))
    members = [Member(corpora[0][0], 8, 5, tmp_path / "t")]
    for size, message in ((300, "300 ids and the student 320"), (VOCAB, "320 of 320 ids are other tokens")):
        distillation = Distillation(DistillSpec(policy="online"), tiny()._replace(tokenizer=tokenizer(size, "b")))
        with pytest.raises(ValueError, match=message):
            training.train(settings(), student, members, compute=COMPUTE, distillation=distillation)


@pytest.mark.slow
def test_faults(corpora, tmp_path):
    members = [Member(corpora[0][0], 8, 5, tmp_path / "t")]

    def fails(message, how, teacher, members=members):
        with pytest.raises(ValueError, match=message):
            distillation = Distillation(DistillSpec(**how), teacher)
            training.train(settings(), STUDENT, members, compute=COMPUTE, distillation=distillation)

    with pytest.raises(ValueError, match="cannot be trained in float16"):
        training.train(settings(), STUDENT, members, compute=Compute(dtype="float16"))
    with pytest.raises(ValueError, match="record_top_k=1"):
        DistillSpec(policy="offline", tail="renormalise", record_top_k=1)
    fails("needs a teacher", {"policy": "online"}, None)
    fails("needs no teacher", {"policy": "offline"}, tiny())
    fails("no top-k columns", {"policy": "offline"}, None)
    fails("second corpus", {"policy": "online", "data": "mix"}, tiny())
    fails("trained alone", {"policy": "on_policy"}, tiny(), 2 * members)
    fails("a prompt of 16 ids", {"policy": "on_policy", "prompt_length": 16}, tiny())
