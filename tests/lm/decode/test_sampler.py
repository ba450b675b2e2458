import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from scipy import stats

from kd_jax.lm import decode, model
from kd_jax.lm.decode import sampler as sampler_lib
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode import start as start_lib
from kd_jax.lm.model import PRESETS, Architecture, Model, kv_cache

# two layers compile quicker; two blocks of 128 ids
SMALL = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=2, vocab_size=160)
# each maps a token to one with a margin that leaves no chance to any other
CHAIN = Architecture(
    vocab_size=24, hidden_size=24, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
MAX_LENGTH = 30
# sample i of 20, by seed 7 from id 3; about half of them end with an EOS before MAX_LENGTH
NUM_SAMPLES, SEED, PROMPT, EOS = 20, 7, [3], (5, 6, 90, 150)


@functools.cache
def small():
    return Model(SMALL, jax.jit(model.init, static_argnums=1)(jax.random.key(0), SMALL), eos_ids=EOS)


def flat():
    """All logits are 0."""
    return Model(SMALL, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.abstract(SMALL)))


def chain(following, eos_ids=()):
    """A model that follows token j by following[j]."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.abstract(CHAIN))
    params["norm"] += 1
    params["embedding"] += np.eye(24, dtype=np.float32)
    params["head"][following, np.arange(24)] = 100
    return Model(CHAIN, params, eos_ids=eos_ids)


COUNT_UP = (np.arange(24) + 1) % 24


def run(of, prompt=PROMPT, num_samples=NUM_SAMPLES, *, first=0, **options):
    """All samples of a stream in order of their index, and its last utilisation and number of steps."""
    options = {"max_length": MAX_LENGTH, "seed": SEED, "batch_size": 8} | options
    parts = list(decode.stream(of, prompt, num_samples, first=first, **options))
    *arrays, _, _ = (np.concatenate(field) if np.ndim(field[0]) else field for field in zip(*parts, strict=True))
    order = np.argsort(arrays[0])
    samples = decode.Samples(*(array[order] for array in arrays), parts[-1].utilisation, parts[-1].steps)
    # each sample once
    np.testing.assert_array_equal(samples.index, np.arange(first, num_samples))
    assert samples.tokens.shape == samples.log_probs.shape == (num_samples - first, options["max_length"])
    generated = np.arange(options["max_length"])
    generated = (generated >= samples.prompt_lengths[:, None]) & (generated < samples.lengths[:, None])
    for array in (samples.log_probs, samples.sample_log_probs):
        assert array.dtype == np.float32 and not array[~generated].any() and (array[generated] <= 0).all()
    beyond = np.arange(options["max_length"]) >= samples.lengths[:, None]
    assert samples.tokens.dtype == np.int32 and not samples.tokens[beyond].any()
    return samples


def assert_same(a, b):
    for name in ("index", "tokens", "lengths", "prompt_lengths", "finished"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    np.testing.assert_allclose(a.sample_log_probs, b.sample_log_probs, atol=1e-4)


def rows_of(samples, rows):
    return decode.Samples(*(field[rows] if np.ndim(field) else field for field in samples))


@functools.cache
def usual():
    return run(small())


@jax.jit
def _logits(params, tokens):
    return model.logits(params, SMALL, model.forward(params, SMALL, tokens))


def forward_logits(tokens):
    """float64 logits [row, position, vocab] of up to NUM_SAMPLES rows, by a forward pass over all of them at once."""
    # one shape for all is one program
    padded = np.pad(tokens, ((0, NUM_SAMPLES - tokens.shape[0]), (0, 40 - tokens.shape[1])))
    return np.asarray(_logits(small().params, padded), np.float64)[: tokens.shape[0]]


def next_logits(samples):
    """The logits that each generated token was drawn from [token, vocab], and these tokens."""
    rows, at = generated_by(samples)
    return forward_logits(samples.tokens)[rows, at - 1], samples.tokens[rows, at]


def generated_by(samples):
    at = np.arange(samples.tokens.shape[1])
    return np.nonzero((at >= samples.prompt_lengths[:, None]) & (at < samples.lengths[:, None]))


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def assert_log_probs_of_forward(samples):
    logits, tokens = next_logits(samples)
    expected = log_softmax(logits)[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(samples.log_probs[generated_by(samples)], expected, atol=1e-4)


@pytest.mark.slow
def test_samples_are_of_both_kinds():
    samples = usual()
    last = samples.tokens[np.arange(NUM_SAMPLES), samples.lengths - 1]
    np.testing.assert_array_equal(samples.finished, np.isin(last, EOS))
    assert 5 <= samples.finished.sum() <= 15 and (samples.lengths[~samples.finished] == MAX_LENGTH).all()
    assert (samples.tokens[:, 0] == 3).all() and len({row.tobytes() for row in samples.tokens}) == NUM_SAMPLES
    for row, length in zip(samples.tokens, samples.lengths, strict=True):
        assert not np.isin(row[1 : length - 1], EOS).any()


@pytest.mark.slow
@pytest.mark.fast(1)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sample_does_not_depend_on_the_batch(batch_size):
    assert_same(run(small(), batch_size=batch_size), usual())


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 13])
def test_samples_carry_on_where_they_stopped(first):
    assert_same(run(small(), first=first), rows_of(usual(), slice(first, None)))
    assert_same(run(small(), num_samples=first), rows_of(usual(), slice(first)))


@pytest.mark.slow
def test_generate_is_the_stream_in_order():
    tokens, lengths, log_probs = decode.generate(
        small(), PROMPT, NUM_SAMPLES, max_length=MAX_LENGTH, seed=SEED, batch_size=8
    )
    samples = usual()
    np.testing.assert_array_equal(tokens, samples.tokens)
    np.testing.assert_array_equal(lengths, samples.lengths)
    np.testing.assert_array_equal(log_probs, samples.log_probs)


def test_prompts_as_text():
    letters = types.SimpleNamespace(
        encode_prompt=lambda text: [ord(letter) - ord("a") for letter in text], vocab_size=24
    )
    counts = chain(COUNT_UP)._replace(tokenizer=letters)
    tokens, lengths, _ = decode.generate(counts, "fg", 2, max_length=6)
    assert tokens.tolist() == [[5, 6, 7, 8, 9, 10]] * 2 and lengths.tolist() == [6, 6]
    tokens, _, _ = decode.generate(counts, ["fg", [2], "b"], 3, max_length=4)
    assert tokens.tolist() == [[5, 6, 7, 8], [2, 3, 4, 5], [1, 2, 3, 4]]
    with pytest.raises(ValueError, match="the model has no tokenizer, so prompts must be token ids"):
        decode.generate(chain(COUNT_UP), "fg", 2, max_length=6)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        decode.generate(counts, "", 2, max_length=6)


def test_nothing_to_do():
    assert list(decode.stream(small(), PROMPT, 4, first=4, max_length=9)) == []
    tokens, lengths, log_probs = decode.generate(small(), PROMPT, 0, max_length=9)
    assert (tokens.shape, lengths.shape, log_probs.shape) == ((0, 9), (0,), (0, 9))


DEVICES = """
import sys
import jax
import numpy as np
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.lm import decode, model
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode import start as start_lib
from tests.lm.decode import test_sampler as here

assert jax.device_count() == 8
one = np.load(sys.argv[1])
inner, held = slots_lib.run, []

def watch(state, *rest):
    state = inner(state, *rest)
    held.append([leaf.sharding.shard_shape(leaf.shape)[0] for leaf in (state.cache.keys[0], state.slots.tokens)])
    assert state.cache.keys[0].shape[0] * held[-1][1] == state.active.shape[0]
    return state

slots_lib.run = watch
# the slots are 8 on every mesh, since they are rounded up to a multiple of the devices they are split over
for sizes, embedding, batch_size, slots in [
    ((8, 1, 1), (160, 48), 5, 1), ((2, 2, 2), (80, 24), 8, 2), ((4, 1, 2), (80, 48), 8, 2)
]:
    mesh = mesh_lib.make(*sizes)
    params = here.small().params
    shardings = mesh_lib.shardings(model.logical_axes(here.SMALL), params, mesh)
    params = jax.device_put(params, shardings)
    assert params["embedding"].sharding.shard_shape((160, 48)) == embedding
    held.clear()
    samples = here.run(here.small()._replace(params=params), batch_size=batch_size, mesh=mesh)
    assert held and all(each == [1, slots] for each in held), held  # a group of pages on each
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(samples, name), one[name], err_msg=str(sizes))
    for name in ("log_probs", "sample_log_probs"):
        np.testing.assert_allclose(getattr(samples, name), one[name], atol=1e-4, err_msg=str(sizes))
    print("same", *sizes)

# Ten samples in each of two groups: from the tenth step on eight slots of each are enough, as the lengths say.
start_lib._PROGRAM = 0
ends = np.sort(one["lengths"].reshape(2, 10) - 1, axis=1)
assert ends[:, 1].max() == 9
sizes = (2, 1, 4)
mesh = mesh_lib.make(*sizes)
params = here.small().params
params = jax.device_put(params, mesh_lib.shardings(model.logical_axes(here.SMALL), params, mesh))
held.clear()
samples = here.run(here.small()._replace(params=params), batch_size=20, mesh=mesh)
assert {slots for _, slots in held} == {10, 8}, held
np.testing.assert_allclose(samples.utilisation, (one["lengths"] - 1).sum() / (9 * 20 + (samples.steps - 9) * 16))
for name in ("tokens", "lengths", "finished"):
    np.testing.assert_array_equal(getattr(samples, name), one[name], err_msg=str(sizes))
print("same with fewer slots", *sizes)

# Prompts that differ: four slots in each of two groups, so that samples begin in turns.
prompts = [[3, 100, 159, 5, 0], [7], list(range(20, 100))]
alone = here.run(here.small(), prompts, 12, samples_per_prompt=4, max_length=110)
sizes = (2, 2, 2)
mesh = mesh_lib.make(*sizes)
params = jax.device_put(here.small().params, mesh_lib.shardings(model.logical_axes(here.SMALL), params, mesh))
of = here.small()._replace(params=params)
here.assert_same(here.run(of, prompts, 12, samples_per_prompt=4, max_length=110, mesh=mesh), alone)
print("same answers", *sizes)
"""


@pytest.mark.long
def test_sample_does_not_depend_on_the_devices(tmp_path):
    samples = usual()
    names = ("tokens", "lengths", "finished", "log_probs", "sample_log_probs")
    np.savez(tmp_path / "one.npz", **{name: getattr(samples, name) for name in names})
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, tmp_path / "one.npz"], env=os.environ | flags, capture_output=True, text=True,
        timeout=900, cwd=pathlib.Path(__file__).parents[3],
    )  # fmt: skip
    lines = ["same 8 1 1", "same 2 2 2", "same 4 1 2", "same with fewer slots 2 1 4", "same answers 2 2 2"]
    assert done.stdout.splitlines() == lines, done.stderr


def test_seeds_rows_positions_and_batches_differ():
    samples = run(flat(), num_samples=24)
    assert (samples.lengths == MAX_LENGTH).all() and not samples.finished.any()
    tokens = samples.tokens[:, 1:]
    np.testing.assert_allclose(samples.log_probs[:, 1:], -np.log(160), rtol=1e-6)
    # 29 of 160 ids at random: about 26.5 different ones
    assert all(len(set(row)) > 18 for row in tokens.tolist())
    assert all(len(set(column)) > 15 for column in tokens.T.tolist())
    same = (tokens[:, None] == tokens[None]).mean(axis=-1)
    assert (same[~np.eye(24, dtype=bool)] < 0.2).all()
    # nor does one row repeat another shifted by a position
    assert ((tokens[:, None, 1:] == tokens[None, :, :-1]).mean(axis=-1) < 0.2).all()
    other = run(flat(), num_samples=24, seed=SEED + 1).tokens[:, 1:]
    assert (other[:, None] == tokens[None]).mean(axis=-1).max() < 0.2


def test_log_probs_are_those_of_forward():
    samples = usual()
    assert_log_probs_of_forward(samples)
    np.testing.assert_allclose(samples.log_probs, samples.sample_log_probs, atol=1e-5)

    tempered = run(small(), sample_temperature=0.7)
    assert_log_probs_of_forward(tempered)
    logits, tokens = next_logits(tempered)
    expected = log_softmax(logits / 0.7)[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(tempered.sample_log_probs[generated_by(tempered)], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.fast(1)
@pytest.mark.parametrize("top_k, top_p", [(20, 0.8), (160, 0.5), (4, 1.0)])
def test_log_probs_under_truncation(top_k, top_p):
    samples = run(small(), sample_temperature=0.7, top_k=top_k, top_p=top_p)
    assert_log_probs_of_forward(samples)
    ranks = []
    for row, token, log_prob in zip(
        *next_logits(samples), samples.sample_log_probs[generated_by(samples)], strict=True
    ):
        order = np.argsort(-row, kind="stable")[:top_k]
        probs = np.exp(log_softmax(row[order] / 0.7))
        kept = order[: 1 + (np.cumsum(probs)[:-1] < top_p).sum()]
        assert token in kept
        ranks.append(kept.tolist().index(token))
        np.testing.assert_allclose(log_prob, log_softmax(row[kept] / 0.7)[ranks[-1]], atol=1e-4)
    assert max(ranks) >= min(top_k, 10) - 1  # it does draw, from all that is kept


def test_greedy_takes_the_argmax():
    samples = run(small()._replace(eos_ids=()), num_samples=3, max_length=17, sample_temperature=0)
    assert (samples.tokens == samples.tokens[0]).all() and (samples.lengths == 17).all()
    logits, tokens = next_logits(samples)
    assert len(tokens) == 3 * 16
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    assert not samples.sample_log_probs.any() and (samples.log_probs[:, 1:] < 0).all()


@pytest.mark.slow
def test_prompts_of_several_ids():
    five = [3, 100, 159, 5, 0]  # an EOS in a prompt does not end it
    shared = run(small(), five)
    assert (shared.tokens[:, :5] == five).all() and (shared.prompt_lengths == 5).all() and (shared.lengths > 5).all()
    assert_log_probs_of_forward(shared)

    # sample i uses prompt i modulo 3, with the randomness of sample i
    several = run(small(), [five, [3], np.arange(40, 69)])
    np.testing.assert_array_equal(several.prompt_lengths, np.resize([5, 1, 29], NUM_SAMPLES))
    assert_same(rows_of(several, slice(0, None, 3)), rows_of(shared, slice(0, None, 3)))
    assert_same(rows_of(several, slice(1, None, 3)), rows_of(usual(), slice(1, None, 3)))
    full = rows_of(several, slice(2, None, 3))
    assert (full.tokens[:, :29] == np.arange(40, 69)).all() and (full.lengths == 30).all()
    assert_log_probs_of_forward(several)


@pytest.mark.long
def test_a_prompt_keeps_its_positions_beside_a_longer_one():  # S05
    short, long = [7, 8, 9], list(range(7, 15))
    options = {"num_samples": 2, "max_length": 24, "sample_temperature": 0, "batch_size": 2}
    model_without_end = small()._replace(eos_ids=())
    together = run(model_without_end, [short, long], **options)
    assert_log_probs_of_forward(together)
    for row, prompt in enumerate((short, long)):
        alone = run(model_without_end, prompt, **options)
        new = slice(len(prompt), len(prompt) + 16)
        np.testing.assert_array_equal(together.tokens[row, new], alone.tokens[0, new])
        np.testing.assert_allclose(together.log_probs[row, new], alone.log_probs[0, new], atol=1e-4)


def test_longer_samples_begin_alike():
    longer = run(small(), max_length=40)
    assert (longer.lengths > 34).any()
    for short, long in zip(usual().tokens, longer.tokens, strict=True):
        np.testing.assert_array_equal(short, long[:MAX_LENGTH])
    assert_log_probs_of_forward(longer)


@pytest.mark.slow
def test_pages_come_and_go(monkeypatch):
    sizes, resize = [], kv_cache.resize
    monkeypatch.setattr(kv_cache, "resize", lambda pages, n: sizes.append((pages.num_pages, n)) or resize(pages, n))
    # the pool is looked at after each step, whatever the machine's speed
    monkeypatch.setattr(sampler_lib, "_SECONDS_PER_CALL", 0)
    samples = run(small()._replace(eos_ids=(5,)), num_samples=8, max_length=140, batch_size=2)
    assert 0.2 < samples.finished.mean() < 1
    assert any(after > before for before, after in sizes) and any(after < before for before, after in sizes)
    rows, at = generated_by(samples)
    logits = jax.jit(lambda params, tokens: model.logits(params, SMALL, model.forward(params, SMALL, tokens)))
    expected = log_softmax(np.asarray(logits(small().params, samples.tokens), np.float64))
    expected = expected[rows, at - 1, samples.tokens[rows, at]]
    np.testing.assert_allclose(samples.log_probs[rows, at], expected, atol=1e-4)


@pytest.mark.slow
def test_a_pool_that_is_small_beside_the_weights_has_all_pages_at_once(monkeypatch):
    options = {"num_samples": 3, "max_length": 140, "batch_size": 2}
    expected, sizes = run(small(), **options), []
    monkeypatch.setattr(kv_cache, "resize", lambda pages, n: sizes.append(n))  # not called
    monkeypatch.setattr(sampler_lib, "_SECONDS_PER_CALL", 0)
    monkeypatch.setattr(sampler_lib, "_SMALL_POOL", 1000)
    assert_same(run(small(), **options), expected)
    assert not sizes


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_copies_no_keys_or_values(batch_size):
    shapes = Model(SMALL, model.abstract(SMALL))
    program = decode.lower(shapes, 1, max_length=64, batch_size=batch_size).compile().as_text()
    pool = f"f32[1,{batch_size},{SMALL.num_key_value_heads},"
    copies = [line for line in program.splitlines() if f"= {pool}" in line and " copy(" in line]
    # once into the loop, and not in it
    assert len(copies) <= 2 * SMALL.num_hidden_layers


def counted(start, stop):
    return [i % 24 for i in range(start, stop + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 8], ids=["more samples than slots", "fewer"])
def test_rows_stop_at_their_own_eos(batch_size):
    prompts = [[1], [6, 3], [6], [20], [10], [5], [11, 4]]
    samples = run(chain(COUNT_UP, eos_ids=(5, 11)), prompts, 7, batch_size=batch_size, max_length=12)
    expected = [
        counted(1, 5), [6, *counted(3, 5)], counted(6, 11), counted(20, 29), [10, 11], counted(5, 11), [11, 4, 5]
    ]  # fmt: skip
    for row, length, prompt, generated in zip(samples.tokens, samples.lengths, prompts, expected, strict=True):
        assert row[:length].tolist() == generated and row[: len(prompt)].tolist() == prompt
    assert samples.finished.all() and samples.lengths.tolist() == [5, 4, 6, 10, 2, 7, 3]


@pytest.mark.fast(1)
@pytest.mark.parametrize(
    "eos_ids, max_length, stop, finished",
    [
        ((5,), 12, 5, True),
        ((9, 5, 7, 8, 6), 12, 5, True),
        ((5,), 5, 5, True),  # the EOS is the last token there is room for
        ((5,), 4, 4, False),
        ((), 12, 12, False),
        ((), 2, 2, False),
        ((0,), 30, 24, True),
        ((1,), 30, 25, True),  # that of the prompt does not count
    ],
)
def test_where_a_sample_ends(eos_ids, max_length, stop, finished):
    samples = run(chain(COUNT_UP, eos_ids), [1], 3, max_length=max_length)
    assert samples.lengths.tolist() == [stop] * 3 and samples.finished.tolist() == [finished] * 3
    for row in samples.tokens:
        assert row[:stop].tolist() == counted(1, stop)
    np.testing.assert_allclose(samples.log_probs, 0, atol=1e-6)


@pytest.mark.parametrize("sample_temperature, ids", [(0, {0}), (1, set(range(16)))])
def test_ids_that_the_tokenizer_has_not_are_never_drawn(sample_temperature, ids):
    padded = chain(np.full(24, 20))._replace(tokenizer=types.SimpleNamespace(vocab_size=16))
    samples = run(padded, [2], sample_temperature=sample_temperature)
    assert set(samples.tokens[:, 1:].ravel().tolist()) == ids  # of the rest, all logits are 0
    np.testing.assert_allclose(samples.log_probs[:, 1:], -np.log(16), rtol=1e-6)
    with pytest.raises(ValueError, match="prompt 0 has id 16; the model's ids are 0 to 15"):
        run(padded, [16])


def test_slots_are_kept_busy():
    samples = run(small(), num_samples=400)
    lengths = samples.lengths - 1
    assert 0.3 < samples.finished.mean() < 0.7 and lengths.std() > 8
    assert 0.95 <= samples.utilisation <= 1
    np.testing.assert_allclose(samples.utilisation, lengths.sum() / (8 * samples.steps), rtol=1e-6)
    assert_same(rows_of(samples, slice(NUM_SAMPLES)), usual())


@pytest.fixture
def slots_held(monkeypatch):
    """How many slots each step had, in a list that grows; here fewer of them always pay."""
    held, inner = [], slots_lib.run

    def watch(state, *rest):
        slots = state.active.shape[0]
        state = inner(state, *rest)
        held.extend([slots] * int(state.steps))
        return state

    monkeypatch.setattr(slots_lib, "run", watch)
    monkeypatch.setattr(start_lib, "_PROGRAM", 0)
    return held


@pytest.mark.slow
def test_slots_become_fewer_when_no_more_samples_start(slots_held):
    # From token t it is 5 - t steps to the EOS, modulo 24. All but two samples begin at once.
    steps = [4] * 16 + [10] * 8 + [20] * 8 + [23] * 2
    prompts = [[(5 - count) % 24] for count in steps]
    samples = run(chain(COUNT_UP, eos_ids=(5,)), prompts, 34, batch_size=32, max_length=50)
    assert (samples.lengths - 1).tolist() == steps and samples.finished.all()
    # 32 run for 4 steps, when 16 of them end and the last two begin: 18 are left. 8 end after 10 steps and 8 after 20,
    # when there are 10 and 2; the last two after 4 + 23.
    assert slots_held == [32] * 4 + [24] * 6 + [12] * 10 + [8] * 7 and samples.steps == 27
    np.testing.assert_allclose(samples.utilisation, sum(steps) / (4 * 32 + 6 * 24 + 10 * 12 + 7 * 8), rtol=1e-9)


@pytest.mark.slow
def test_no_more_slots_than_samples_where_that_pays(slots_held, monkeypatch):
    run(chain(COUNT_UP), [1], 9, batch_size=32, max_length=30)
    assert slots_held == [12] * 29
    slots_held.clear()
    # 20 slots saved for 30 steps, each of two operations with every weight
    monkeypatch.setattr(start_lib, "_PROGRAM", 600 * 2 * CHAIN.num_parameters)
    run(chain(COUNT_UP), [1], 9, batch_size=32, max_length=30)
    assert slots_held == [32] * 29


SEVERAL = [np.arange(40, 69), [3], [3, 100, 159, 5, 0]]


@pytest.mark.long
@pytest.mark.parametrize(
    "prompt, eos_ids, max_length",
    [(PROMPT, tuple(range(0, 160, 8)), 40), (np.arange(70) + 40, EOS, 140), (SEVERAL, (), 40)],
    ids=["mostly ended early", "a shared prompt of two pages", "full length, of several prompts"],
)
def test_same_samples_in_fewer_slots(prompt, eos_ids, max_length, slots_held):
    of = small()._replace(eos_ids=eos_ids)
    expected = run(of, prompt, 36, batch_size=8, max_length=max_length)
    assert set(slots_held) == {8}
    slots_held.clear()
    assert_same(run(of, prompt, 36, batch_size=24, max_length=max_length), expected)
    assert slots_held[0] == 24 and slots_held[-1] < 24


@pytest.mark.slow
def test_active_slots_are_what_is_left():
    """Two groups of 12 slots, cut down to 8 each, beside loops in NumPy."""
    random = np.random.RandomState(0)
    cache = model.empty_cache(SMALL, 1, 64)
    cache = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), cache)
    cache = kv_cache.open_pages(kv_cache.paged(cache, 2, 12, 30, 192), np.full(24, 64))
    rows, done = (
        slots_lib.Rows(
            index=random.randint(0, 99, n), tokens=random.randint(0, 160, (*n, 192)), length=random.randint(0, 9, n),
            log_probs=random.rand(*n, 192), sample_log_probs=random.rand(*n, 192), finished=random.rand(*n) < 0.5,
        )
        for n in ((24,), (2, 8 * 12))
    )  # fmt: skip
    active = np.isin(np.arange(24), [1, 4, 5, 11, 12, 13, 17, 19, 20, 22, 23])
    lengths = np.arange(24)
    state = slots_lib.State(cache, rows, active, lengths, done, np.zeros(2, int), *(np.int32(i) for i in (7, 3, 70)))
    state = jax.device_put(state)
    less = jax.device_get(slots_lib._shrink(state, 8))

    expected = [1, 4, 5, 11], [12, 13, 17, 19, 20, 22, 23]
    assert less.active.tolist() == [True] * 4 + [False] * 4 + [True] * 7 + [False]
    assert less.prompt_length[less.active].tolist() == sum(expected, [])
    for name in slots_lib.Rows._fields:
        there = np.asarray(getattr(state.slots, name))
        np.testing.assert_array_equal(getattr(less.slots, name)[less.active], [there[i] for i in sum(expected, [])])
        np.testing.assert_array_equal(getattr(less.done, name), np.asarray(getattr(state.done, name))[:, : 8 * 8])
    for group, slots in enumerate(expected):
        for place in range(8):
            pages = cache.table[group, slots[place] % 12] if place < len(slots) else [30] * 3
            np.testing.assert_array_equal(less.cache.table[group, place], pages)
        assert (less.cache.owner[group] == 8).sum() == 30 - 2 * len(slots)
    assert (less.next_index, less.steps, less.active_steps) == (7, 3, 70)


@pytest.mark.slow
def test_frequencies_of_the_first_token():
    samples = run(small(), num_samples=4000, batch_size=64, max_length=2, seed=0)
    logits = forward_logits(np.array([PROMPT]))[0, 0]
    expected = 4000 * np.exp(log_softmax(logits))
    counts = np.bincount(samples.tokens[:, 1], minlength=160)
    bins = np.where(expected < 5, 160, np.arange(160))
    found, expected = (np.bincount(bins, weights=x) for x in (counts, expected))
    assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-4


@pytest.mark.slow
def test_other_values_do_not_compile_again(monkeypatch):
    traced, advance = [], slots_lib._advance
    monkeypatch.setattr(slots_lib, "_advance", lambda *args: traced.append(1) or advance(*args))
    # no other test has this many slots
    run(chain(COUNT_UP), [1], 9, batch_size=7, top_k=5, top_p=0.9)
    once, programs = len(traced), slots_lib.run._cache_size()
    assert once > 0
    for _ in range(2):
        run(
            chain(COUNT_UP[::-1], eos_ids=(3, 4)), [2], 17, batch_size=7, first=2, seed=SEED + 1, max_length=20,
            sample_temperature=0.5, top_k=2, top_p=0.3,
        )  # fmt: skip
    assert len(traced) == once and slots_lib.run._cache_size() == programs


@pytest.mark.slow
def test_second_call_compiles_nothing():
    # among them the program that fills the cache with a shared prompt
    compiled = []

    def listen(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(chain(COUNT_UP), [1, 2, 3], batch_size=6)
        assert compiled  # no other test has this many slots
        compiled.clear()
        run(chain(COUNT_UP), [3, 2, 1], batch_size=6, seed=SEED + 1, sample_temperature=0.5)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt 0 is empty"),
        ([[3], []], {}, "prompt 1 is empty"),
        ([3, 160], {}, "prompt 0 has id 160; the model's ids are 0 to 159"),
        ([[3], [4, -1]], {}, "prompt 1 has id -1"),
        (range(30), {}, "max_length=30 leaves no room after prompt 0 of 30 ids"),
        ([3], {"max_length": 1}, "max_length=1 leaves no room"),
        ([3], {"max_length": 513}, "max_length=513 is beyond the model's 512 positions"),
        ([3], {"sample_temperature": -0.1}, "sample_temperature=-0.1"),
        ([3], {"sample_temperature": float("nan")}, "sample_temperature=nan"),
        ([3], {"sample_temperature": float("inf")}, "sample_temperature=inf"),
        ([3], {"top_k": -1}, "top_k=-1"),
        ([3], {"min_p": 1.5}, "min_p=1.5"),
        ([3], {"top_p": 0.0}, "top_p=0.0"),
        ([3], {"top_p": 1.5}, "top_p=1.5"),
        ([3], {"top_p": float("nan")}, "top_p=nan"),
        ([3], {"batch_size": 0}, "batch_size=0"),
        ([3], {"seed": -1}, "seed=-1"),
        ([3], {"seed": 2**32}, "seed=4294967296"),
        ([3], {"num_samples": -1}, "num_samples=-1"),
    ],
)
def test_faults_are_named_before_anything_runs(prompt, options, message, monkeypatch):
    monkeypatch.setattr(sampler_lib, "_start", None)
    options = {"num_samples": 4, "max_length": MAX_LENGTH} | options
    with pytest.raises(ValueError, match=message):
        decode.generate(small(), prompt, **options)


def test_first_beyond_the_last_sample_is_named():
    for first in (-1, 5):
        with pytest.raises(ValueError, match=f"first={first} <= num_samples=4"):
            list(decode.stream(small(), [3], 4, first=first, max_length=9))
