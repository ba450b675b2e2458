"""Which sequences an update sees and how they lie in arrays."""

import datasets
import numpy as np
import pytest

from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Layout, Sequences, Updates


class Rows:
    """Sequences 0 .. n - 1: number i is i + 2 ids long and begins with i."""

    def __init__(self, count):
        self.lengths = np.arange(count, dtype=np.int32) + 2
        self.prompt_lengths = np.ones(count, np.int32)

    def __len__(self):
        return len(self.lengths)

    def targets(self, rows):
        return None

    def masks(self, rows):
        return None

    def tokens(self, rows):
        return [np.concatenate([[i], np.full(self.lengths[i] - 1, 7)]).astype(np.int32) for i in rows]


LAYOUT = Layout(4, max_length=64)


def seen(updates, start=0):
    return [batch.tokens[0, :, 0].tolist() for batch in updates.start(start)]


def test_each_row_once_an_epoch_in_another_order():
    updates = Updates(Rows(40), LAYOUT, seed=3, epochs=2)
    assert len(updates) == 20
    found = seen(updates)
    first, second = (sum(found[i : i + 10], []) for i in (0, 10))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second != list(range(40))


def test_a_number_of_updates_in_place_of_epochs_is_a_part_of_the_same_order():
    whole, part = Updates(Rows(40), LAYOUT, 3, epochs=2), Updates(Rows(40), LAYOUT, 3, epochs=0, count=13)
    assert len(part) == 13 and seen(part) == seen(whole)[:13]


def test_going_on_after_some_batches_is_the_rest_of_them():
    updates = Updates(Rows(40), LAYOUT, seed=3, epochs=1)
    assert seen(updates, 3) == seen(updates)[3:]
    assert seen(updates, 10) == []


def test_the_order_is_one_permutation_of_the_seed_whatever_the_batch():
    orders = [
        sum(seen(Updates(Rows(24), Layout(size, max_length=64), seed, 1)), [])
        for size, seed in ((4, 0), (6, 0), (4, 1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_rest_too_small_for_a_batch_is_another_each_epoch():
    updates = Updates(Rows(10), LAYOUT, seed=0, epochs=6)
    assert len(updates) == 12
    found = seen(updates)
    left_out = [set(range(10)) - set(sum(found[2 * e : 2 * e + 2], [])) for e in range(6)]
    assert {len(rest) for rest in left_out} == {2} and len(set(map(frozenset, left_out))) > 1


@pytest.mark.parametrize("first", [0, 1])
def test_conversations_mixed_with_samples(first):
    """Rows of a corpus without masks are learnt after their prompts, whichever corpus is the first."""
    talks = {
        "tokens": [[1, 5, 6, 7], [1, 5, 8]], "length": [4, 3], "prompt_length": [2, 2],
        "loss_mask": [[False, False, False, True], [False, False, True]],
    }  # fmt: skip
    samples = {"tokens": [[1, 4], [1, 9, 9, 9]], "length": [2, 4], "prompt_length": [1, 1]}
    pair = [Sequences(datasets.Dataset.from_dict(columns)) for columns in (talks, samples)]
    mixed = pair[first].mixed(pair[1 - first], 0.5)
    expected = ({(1, 5, 6, 7): [0, 0, 1], (1, 9, 9, 9): [1, 1, 1]}, {(1, 4): [1, 0, 0], (1, 5, 8): [0, 1, 0]})[first]
    for numbers in (np.arange(2), np.array([1, 0]), np.array([0]), np.array([1])):
        tokens = mixed.tokens(numbers)
        layout = Layout(len(numbers), max_length=4)
        batch = batches.arrange(tokens, mixed.prompt_lengths[numbers], layout, None, mixed.masks(numbers))
        for ids, mask in zip(tokens, batch.mask[0], strict=True):
            assert mask[:3].tolist() == expected[tuple(ids.tolist())] and not mask[3]


@pytest.mark.parametrize(("size", "share"), [(40, 0.25), (40, 0.5), (40, 1.0), (33, 0.7)])
def test_a_mix_has_each_prompt_once(size, share):
    """Row i of both corpora answers prompt i, as those of p* and of the teacher do."""

    def answers(of):
        tokens = [[1, prompt, of] for prompt in range(size)]
        columns = {"tokens": tokens, "length": [3] * size, "prompt_length": [2] * size}
        return Sequences(datasets.Dataset.from_dict(columns))

    rows = answers(100).mixed(answers(200), share).tokens(np.arange(size))
    assert [ids[1] for ids in rows] == list(range(size))
    assert sum(ids[2] == 200 for ids in rows) == round(share * size)


def test_padding():
    # an end that has the id of the padding is learnt all the same: lengths say what is there
    tokens = [np.array([1, 504, 378, 2]), np.array([1, 9])]
    batch = batches.arrange(tokens, np.array([1, 1]), Layout(2, max_length=6))
    np.testing.assert_array_equal(batch.tokens[0], [[1, 504, 378, 2, 0, 0], [1, 9, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segments[0], [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.mask[0], [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])


def test_mask_goes_by_lengths_where_the_pad_id_is_the_eos_id():
    """T01: the first EOS of [1, 504, 378, 2, 2, 2] of length 4 is learnt, padding is not, ids within the length are."""
    rows = [np.array(ids, np.int32) for ids in ([1, 504, 378, 2], [1, 2, 2, 504, 2])]
    batch = batches.arrange(rows, np.ones(2, int), Layout(2, max_length=6))
    assert batch.tokens[0, 0, 1:4].tolist() == [504, 378, 2]
    assert batch.mask[0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_packing():
    tokens = [np.arange(length) for length in (3, 6, 2, 5)]
    batch = batches.arrange(tokens, np.array([1, 4, 1, 1]), Layout(4, max_length=6, row_length=8))
    np.testing.assert_array_equal(batch.tokens[0, :2], [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]])
    np.testing.assert_array_equal(batch.segments[0, :2], [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch.positions[0], batch.tokens[0])
    # of the first, the prompt of four is not learnt
    np.testing.assert_array_equal(batch.mask[0, :2], [[0, 0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0]])


@pytest.mark.parametrize("row_length", [0, 32])
@pytest.mark.parametrize("parts, multiple", [(1, 1), (2, 1), (2, 3)])
def test_every_token_is_in_some_part(row_length, parts, multiple):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 100, rng.integers(2, 20)) for _ in range(23)]
    layout = Layout(23, max_length=20, row_length=row_length, parts=parts, row_multiple=multiple)
    batch = batches.arrange(tokens, np.ones(23, int), layout)
    assert batch.tokens.shape[0] == parts and batch.tokens.shape[1] % multiple == 0
    assert batch.mask.sum() == sum(len(ids) - 1 for ids in tokens)
    assert sorted(batch.tokens[batch.segments > 0]) == sorted(np.concatenate(tokens))


def test_packing_has_few_shapes():
    rng = np.random.default_rng(0)
    layout = Layout(64, max_length=20, row_length=40, row_multiple=2)
    shapes = set()
    for _ in range(50):
        tokens = [np.ones(rng.integers(2, 21), int) for _ in range(64)]
        shapes.add(batches.arrange(tokens, np.ones(64, int), layout).tokens.shape)
    assert len(shapes) <= 3


def test_corpus_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="the corpus has 3"):
        Updates(Rows(3), LAYOUT, 0, 1)
