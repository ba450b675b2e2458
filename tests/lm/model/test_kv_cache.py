import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm.model import attention, kv_cache
from kd_jax.lm.model.kv_cache import PAGE

LAYERS, HEADS, WIDTH, QUERIES = 2, 2, 4, 6  # three query heads share a kv head
GROUPS, SLOTS, LENGTH = 2, 3, 4 * PAGE


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def pool(prompt: int = 0, num_pages: int = 8):
    cache = kv_cache.empty(LAYERS, 1, HEADS, WIDTH, prompt)
    cache = jax.tree.map(lambda leaf: jnp.asarray(normal(0, *leaf.shape)), cache)
    return cache, kv_cache.paged(cache, GROUPS, SLOTS, num_pages, LENGTH)


def owned(pages):
    """For each slot its pages in order, as the two halves of the index say it; each by itself."""
    by_table = [[[p for p in slot if p < pages.num_pages] for slot in group] for group in np.asarray(pages.table)]
    by_owner = []
    for owner, order in zip(np.asarray(pages.owner), np.asarray(pages.order), strict=True):
        held = [np.flatnonzero(owner == slot) for slot in range(pages.num_slots)]
        by_owner.append([held[np.argsort(order[held])].tolist() for held in held])
    return by_table, by_owner


def assert_consistent(pages):
    by_table, by_owner = owned(pages)
    assert by_table == by_owner
    for group in by_table:
        flat = sum(group, [])
        assert len(flat) == len(set(flat))
    free = pages.num_pages - np.array([sum(map(len, group)) for group in by_table])
    np.testing.assert_array_equal(kv_cache.free(pages), free)


def reference(q, keys, values):
    """Attention in float64 of one query [head, width] to keys and values [position, kv head, width]."""
    out = []
    for head, query in enumerate(np.asarray(q, np.float64)):
        scores = keys[:, head // (QUERIES // HEADS)] @ query / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ values[:, head // (QUERIES // HEADS)])
    return np.concatenate(out)


step = jax.jit(
    lambda pages, layer, q, k, v, positions: pages.attend(layer, q, k, v, positions), static_argnums=1
)  # fmt: skip


@pytest.mark.long
def test_slots_grow_end_and_start_again():
    """Six slots of two groups through 400 steps, in a pool that is made larger and smaller, against lists in NumPy."""
    random = np.random.RandomState(1)
    _, pages = pool(num_pages=SLOTS)
    count = GROUPS * SLOTS
    seen = [[] for _ in range(count)]  # (key, value) of each position
    ends = random.randint(1, LENGTH, count)
    sizes = set()
    for at in range(400):
        idle = random.rand(count) < 0.1
        positions = np.where(idle, LENGTH, [len(rows) for rows in seen])
        wanted = kv_cache.missing(pages, positions).sum(axis=1)
        np.testing.assert_array_equal(wanted.sum(), sum(not idle[i] and len(seen[i]) % PAGE == 0 for i in range(count)))
        needed = int((pages.num_pages - kv_cache.free(pages) + wanted).max())
        if needed > pages.num_pages or at % 100 == 99:
            pages = kv_cache.resize(pages, max(needed, 1))
        sizes.add(pages.num_pages)
        pages = kv_cache.open_pages(pages, positions)
        assert_consistent(pages)
        q, k, v = normal(at, count, 1, QUERIES, WIDTH), *normal(1000 + at, 2, count, 1, HEADS, WIDTH)
        keys, values, out = step(pages, 1, q, k, v, positions[:, None])
        pages = pages._replace(keys=(pages.keys[0], keys), values=(pages.values[0], values))
        for i in np.flatnonzero(~idle):
            seen[i].append((k[i, 0], v[i, 0]))
            if at % 20 == 0 or len(seen[i]) % PAGE in (0, 1):
                expected = reference(q[i, 0], *(np.array(x, np.float64) for x in zip(*seen[i], strict=True)))
                np.testing.assert_allclose(out[i, 0], expected, atol=1e-5)
        done = np.array([len(rows) == end for rows, end in zip(seen, ends, strict=True)])
        pages = kv_cache.release(pages, done, 0)
        assert_consistent(pages)
        for i in np.flatnonzero(done):
            seen[i], ends[i] = [], random.randint(1, LENGTH)
    assert len(sizes) > 3


@pytest.mark.slow
def test_a_prompt_for_all_stays():
    cache, pages = pool(prompt=2 * PAGE, num_pages=8)
    by_table, _ = owned(pages)
    assert_consistent(pages)
    assert all(len(slot) == 2 for group in by_table for slot in group)
    for _ in range(2):  # what comes after the prompt is given back, and the prompt is there for the next one
        positions = np.full(GROUPS * SLOTS, 2 * PAGE)
        positions[1:] = LENGTH  # the others are idle
        pages = kv_cache.open_pages(pages, positions)
        q, k, v = normal(5, 6, 1, QUERIES, WIDTH), *normal(6, 2, 6, 1, HEADS, WIDTH)
        keys, values, out = step(pages, 0, q, k, v, positions[:, None])
        rows = [np.asarray(cache.keys[0])[0].transpose(2, 0, 1), np.asarray(cache.values[0])[0].transpose(1, 0, 2)]
        rows = [np.concatenate([old, new[0]]) for old, new in zip(rows, (k, v), strict=True)]
        np.testing.assert_allclose(out[0, 0], reference(q[0, 0], *rows), atol=1e-5)
        pages = pages._replace(keys=(keys, pages.keys[1]), values=(values, pages.values[1]))
        pages = kv_cache.release(pages, positions < LENGTH, 2)
        assert owned(pages)[0] == by_table
        assert_consistent(pages)


@pytest.mark.slow
def test_some_slots_are_kept():
    """Slots of known lengths, then some of them alone, in another order and in a smaller pool."""
    lengths = np.array([70, 1, 130, 64, 0, 200])
    _, pages = pool(num_pages=8)
    seen = [[] for _ in lengths]
    for at in range(lengths.max()):
        positions = np.where(at < lengths, at, LENGTH)
        pages = kv_cache.open_pages(pages, positions)
        k, v = normal(at, 2, GROUPS * SLOTS, 1, HEADS, WIDTH)
        q = np.zeros((GROUPS * SLOTS, 1, QUERIES, WIDTH), np.float32)
        keys, values, _ = step(pages, 1, q, k, v, positions[:, None])
        pages = pages._replace(keys=(pages.keys[0], keys), values=(pages.values[0], values))
        for i in np.flatnonzero(at < lengths):
            seen[i].append((k[i, 0], v[i, 0]))
    before, _ = owned(pages)
    assert [[len(slot) for slot in group] for group in before] == [[2, 1, 3], [1, 0, 4]]

    pages = kv_cache.keep(pages, np.array([[2, 0], [2, SLOTS]]))  # the last has none
    assert owned(pages)[0] == [[before[0][2], before[0][0]], [before[1][2], []]]
    assert_consistent(pages)
    pages = kv_cache.resize(pages, 6)
    assert_consistent(pages)
    kept, positions = [2, 0, 5], np.array([130, 70, 200, LENGTH])
    pages = kv_cache.open_pages(pages, positions)
    q, k, v = normal(5, 4, 1, QUERIES, WIDTH), *normal(6, 2, 4, 1, HEADS, WIDTH)
    _, _, out = step(pages, 1, q, k, v, positions[:, None])
    for place, slot in enumerate(kept):
        rows = [*seen[slot], (k[place, 0], v[place, 0])]
        expected = reference(q[place, 0], *(np.array(x, np.float64) for x in zip(*rows, strict=True)))
        np.testing.assert_allclose(out[place, 0], expected, atol=1e-5)
    assert not np.asarray(out[3]).any()


@pytest.mark.slow
def test_slot_without_pages_gets_zeros():
    _, pages = pool(num_pages=4)
    q, k, v = normal(5, 6, 1, QUERIES, WIDTH), *normal(6, 2, 6, 1, HEADS, WIDTH)
    keys, _, out = step(pages, 0, q, k, v, np.full((6, 1), LENGTH))
    assert not np.asarray(out).any() and not np.asarray(keys).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pages_of_half_precision(dtype):
    q, k, v = (jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate([(3, 6, 4), (4, 2, 4, 8), (4, 2, 8, 4)]))
    owner, visible, table = jnp.array([0, 1, 1, 3]), np.ones((4, 8), bool), np.array([[0, 4], [1, 2], [4, 4]])
    out = attention.paged(q, k, v, owner, visible, table)
    assert out.dtype == dtype
    keys, values = (np.asarray(x, np.float64) for x in (k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)))
    tolerance = {"bfloat16": 0.03, "float16": 0.005}[dtype]
    np.testing.assert_allclose(
        np.asarray(out[1], np.float64), reference(q[1], np.concatenate(keys[1:3]), np.concatenate(values[1:3])),
        atol=tolerance,
    )  # fmt: skip
    assert not np.asarray(out[2]).any()
