"""Samples of prompts that differ, on the small model of test_sampler."""

import jax
import numpy as np
import pytest

from kd_jax.lm import decode
from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import prefill
from kd_jax.lm.model import kv_cache
from tests.lm.decode.test_sampler import assert_same, generated_by, log_softmax, rows_of, run, small

# one of more than a page (64), one of a single id, the others in between; each of them begins differently
PROMPTS = [[3, 100, 159, 4, 0], [7], list(range(20, 100)), list(range(30, 60)), [9, 9]]
# the same after a shared beginning
SHARED = [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, *ids] for ids in PROMPTS]
EACH, LENGTH = 3, 120


def all_samples(prompts=PROMPTS, each=EACH, **options):
    options = {"samples_per_prompt": each, "max_length": LENGTH, "batch_size": 4} | options
    return run(small(), prompts, each * len(prompts), **options)


@pytest.fixture(scope="module")
def usual():
    return all_samples()


def logits(tokens):
    of = small()
    forward = jax.jit(
        lambda params, tokens: model_lib.logits(
            params, of.architecture, model_lib.forward(params, of.architecture, tokens)
        )
    )
    return np.asarray(forward(of.params, tokens), np.float64)


def assert_log_probs(samples):
    rows, at = generated_by(samples)
    expected = log_softmax(logits(samples.tokens))[rows, at - 1, samples.tokens[rows, at]]
    np.testing.assert_allclose(samples.log_probs[rows, at], expected, atol=1e-4)


def test_each_sample_begins_with_its_prompt_and_has_the_models_probabilities(usual):
    for i, (row, length) in enumerate(zip(usual.tokens, usual.prompt_lengths, strict=True)):
        assert row[:length].tolist() == PROMPTS[i // EACH]
    assert 0 < usual.finished.sum() < len(usual.finished)
    assert len({row.tobytes() for row in usual.tokens}) == EACH * len(PROMPTS)
    assert_log_probs(usual)
    assert 0.5 < usual.utilisation <= 1


@pytest.mark.long
def test_sample_j_of_prompt_i_depends_on_the_seed_i_and_j_alone(usual):
    assert_same(all_samples(batch_size=64), usual)
    # fewer prompts, fewer samples of each, and a start in the middle
    assert_same(all_samples(PROMPTS[:2]), rows_of(usual, slice(2 * EACH)))
    fewer = all_samples(each=2)
    kept = np.flatnonzero(np.arange(len(usual.index)) % EACH < 2)
    np.testing.assert_array_equal(fewer.tokens, usual.tokens[kept])
    assert_same(all_samples(first=7), rows_of(usual, slice(7, None)))
    # a prompt at another place has other random numbers, and so has another seed
    moved = all_samples(PROMPTS[::-1])
    assert (moved.tokens[:EACH] != usual.tokens[-EACH:]).any()
    assert (all_samples(seed=1).tokens != usual.tokens).any()


@pytest.mark.long
def test_what_prompts_have_in_common_runs_once(monkeypatch):
    ran = []
    monkeypatch.setattr(prefill, "_COMMON", 100)
    apart = all_samples(SHARED)
    monkeypatch.undo()
    of_ids = prefill._of_ids
    monkeypatch.setattr(prefill, "_of_ids", lambda params, ids, *more: ran.append(ids) or of_ids(params, ids, *more))
    assert_same(all_samples(SHARED), apart)
    assert [ids.tolist() for ids in ran] == [SHARED[0][:10]]
    assert_log_probs(apart)


@pytest.mark.slow
def test_long_prompts_run_in_chunks(usual, monkeypatch):
    monkeypatch.setattr(prefill, "_CHUNK", 16)
    prefill._begin.clear_cache()
    assert_same(all_samples(), usual)
    prefill._begin.clear_cache()


@pytest.mark.parametrize(
    "prompts", [[SHARED[2]], [[*SHARED[0], last] for last in (1, 2, 3, 4)]], ids=["one", "last id"]
)
def test_prompts_that_are_alike_but_for_their_last_id(prompts):
    assert_log_probs(all_samples(prompts, each=6))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PROMPTS, SHARED[:1]], ids=["several", "one"])
def test_new_tokens_are_counted_after_each_prompt(prompts):
    whole, cut = all_samples(prompts), all_samples(prompts, max_new_tokens=7)
    new = cut.lengths - cut.prompt_lengths
    assert new.max() == 7 and (cut.finished == (whole.lengths - whole.prompt_lengths <= 7) & whole.finished).all()
    for row, length, long in zip(cut.tokens, cut.lengths, whole.tokens, strict=True):
        np.testing.assert_array_equal(row[:length], long[:length])
        assert not row[length:].any()


@pytest.mark.slow
def test_one_prompt_of_several():
    one = run(small(), [3], 4, samples_per_prompt=4)
    assert_same(run(small(), [[3], [5]], 4, samples_per_prompt=4), one)


def test_more_samples_than_the_prompts_have():
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"num_samples={count} must be from 1 to 4"):
            next(decode.stream(small(), [3], count, samples_per_prompt=4, max_length=9))


def test_order_of_the_queue():
    prompts = [[1] * n for n in (2, 9, 4, 7)]
    queue = prefill.Queue(prompts, 2, first=1, num_samples=8, groups=2, slots=16)
    assert (queue.at_once, queue.num_rows, queue.common, queue.left) == (2, 2, [], 7)
    idle = np.ones((2, 16), bool)
    idle[1, :9] = False
    starts = queue.take(idle, 12, 16)
    # longest first, the samples of a prompt one after the other
    assert starts.index.tolist() == [[2, 3], [6, 7]] and starts.slot.tolist() == [[0, 1], [9, 10]]
    assert starts.lengths.tolist() == [9, 0, 7, 0] and starts.source.tolist() == [[0, 0], [0, 0]]
    assert starts.prompts.shape == (4, 12) and starts.prompts.sum() == 16
    last = queue.take(idle, 12, 16)
    assert last.index.tolist() == [[4, 5], [1, 0]] and last.slot[1].tolist() == [9, 16] and queue.left == 0


@pytest.mark.slow
def test_rows_of_a_cache_go_to_the_pages_of_slots():
    random = np.random.RandomState(0)
    shape = small().architecture
    cache = jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), model_lib.empty_cache(shape, 4, 128)
    )
    pages = kv_cache.paged(model_lib.empty_cache(shape, 1, 0), 2, 3, 7, 192)
    for start in (0, 64):  # slots 0 and 2 of the first group and 1 of the second; the last has one page alone
        wanted = np.array([start, 192, start, 192, 192 if start else 0, 192])
        pages = kv_cache.open_pages(pages, wanted)
    filled = kv_cache.fill(pages, cache, np.array([[1, 0], [1, 0]]), np.array([[0, 2], [1, 3]]))
    for layer in range(shape.num_hidden_layers):
        for group, slot, row, count in ((0, 0, 1, 2), (0, 2, 0, 2), (1, 1, 3, 1)):
            for n in range(count):
                page = pages.table[group, slot, n]
                at = slice(64 * n, 64 * n + 64)
                np.testing.assert_array_equal(filled.keys[layer][group, page], cache.keys[layer][row][..., at])
                np.testing.assert_array_equal(filled.values[layer][group, page], cache.values[layer][row][:, at])
    free = np.asarray(filled.owner) == 3
    assert not np.asarray(filled.keys[0])[free].any() and free.sum() == 14 - 5
