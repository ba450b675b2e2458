"""The KV cache: keys and values of past positions, which the next tokens attend to.

`Cache` has a row for each sequence, all of one length: for prompts, and for tokens that come several at a time. `Pages`
is for sampling one token at a time from sequences of many lengths: a pool of pages that sequences take as they grow and
give back when they end, so that a step reads the pages in use and not every row to the length of the longest. Both hold
an array for each layer; layers are not stacked, since taking one out of a stack would copy it.

Paged attention is Kwon et al. 2023, arXiv 2309.06180. Here the whole pool is read, in place, and only queries and
results are gathered. Layers with a sliding window keep all pages too: keys before the window are masked.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm.model import attention

# Positions of a page. Smaller pages waste less at the end of sequences, but their products are too small to be fast.
PAGE = 64


class Cache(NamedTuple):
    """A row for each sequence.

    Attributes:
        keys: [row, kv head, head_dim, position] for each layer.
        values: [row, kv head, position, head_dim] for each layer. In these orders the products of one query with both
            run along the last axis, at the speed of memory.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[-1]

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array,
        rule: attention.Rule = attention.LLAMA,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """Writes a layer's new keys and values, then attends to all of them.

        Args:
            layer: its number in this cache.
            q, k, v: [row, new, head, width].
            positions: [row, new].
        Returns: the layer's keys, its values, and the attention [row, new, head * width].
        """
        keys, values = self.keys[layer], self.values[layer]
        rows = jnp.arange(q.shape[0])[:, None]
        # Dropped where a position is outside the cache: padding and idle slots write nothing.
        keys = keys.at[rows, :, :, positions].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, :, positions].set(v.astype(values.dtype), mode="drop")
        return keys, values, attention.cached(q, keys, values, positions, rule)


def empty(layers: int, rows: int, heads: int, width: int, length: int, dtype=jnp.float32) -> Cache:
    """A cache of zeros for `rows` rows of `length` positions, with `heads` kv heads of `width` dimensions.

    Args:
        layers: number of layers.
        dtype: of keys and values.
    """
    return Cache(
        tuple(jnp.zeros((rows, heads, width, length), dtype) for _ in range(layers)),
        tuple(jnp.zeros((rows, heads, length, width), dtype) for _ in range(layers)),
    )


class Pages(NamedTuple):
    """A pool of pages for slots that each run a sequence, in groups: one for each device that slots are split over.

    Attributes:
        keys: [group, page, kv head, head_dim, position of the page] for each layer.
        values: [group, page, kv head, position of the page, head_dim].
        owner: int32 [group, page], the slot of the group that has it; the number of slots where it is free.
        order: int32 [group, page], which of its slot's pages it is: positions from PAGE * order on.
        table: int32 [group, slot, order], the page; the number of pages where there is none.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    owner: jax.Array
    order: jax.Array
    table: jax.Array

    @property
    def num_pages(self) -> int:
        """Pages of each group, free ones included."""
        return self.owner.shape[1]

    @property
    def num_slots(self) -> int:
        """Slots of each group."""
        return self.table.shape[1]

    @property
    def length(self) -> int:
        """The most positions of a slot; a position from here on is not written."""
        return self.table.shape[2] * PAGE

    def attend(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array,
        rule: attention.Rule = attention.LLAMA,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        """As `Cache.attend`, for slots [group * slot, 1, ...] whose positions have a page (see `open_pages`)."""

        def split(x):
            return x[:, 0].reshape(*self.table.shape[:2], *x.shape[2:])

        keys, values, out = jax.vmap(functools.partial(_attend, rule))(
            self.keys[layer], self.values[layer], self.owner, self.order, self.table, split(q), split(k), split(v),
            split(positions),
        )  # fmt: skip
        return keys, values, out.reshape(q.shape[0], 1, -1)


def paged(cache: Cache, groups: int, slots: int, num_pages: int, length: int) -> Pages:
    """A pool in which every slot starts with a copy of the one row of `cache`, such as a prompt that all samples share.

    Args:
        cache: of one row; its length is a multiple of PAGE.
        groups, slots: groups, and slots of each.
        num_pages: of a group; at least those that the copies take.
        length: the most positions that a slot will have.
    """
    first, most = cache.length // PAGE, -(-length // PAGE)
    # The copies take the first pages of the pool, slot after slot.
    taken = np.arange(num_pages) < slots * first

    def spread(rows):  # [page, ...] -> [group, page of the pool, ...]
        pool = jnp.tile(rows, (slots,) + (1,) * (rows.ndim - 1))
        pool = jnp.pad(pool, [(0, num_pages - len(pool))] + [(0, 0)] * (rows.ndim - 1))
        return jnp.broadcast_to(pool, (groups, *pool.shape))

    def keys(rows):
        _, heads, width, _ = rows.shape
        return spread(rows.reshape(heads, width, first, PAGE).transpose(2, 0, 1, 3))

    def values(rows):
        _, heads, _, width = rows.shape
        return spread(rows.reshape(heads, first, PAGE, width).transpose(1, 0, 2, 3))

    owner = np.where(taken, np.arange(num_pages) // max(1, first), slots)
    order = np.where(taken, np.arange(num_pages) % max(1, first), 0)
    table = np.full((slots, most), num_pages)
    table[:, :first] = np.arange(slots * first).reshape(slots, first)
    index = (jnp.asarray(np.broadcast_to(x, (groups, *x.shape)), jnp.int32) for x in (owner, order, table))
    return Pages(tuple(map(keys, cache.keys)), tuple(map(values, cache.values)), *index)


def free(pages: Pages) -> jax.Array:
    """int32 [group]: how many pages are free."""
    return (pages.owner == pages.num_slots).sum(axis=1, dtype=jnp.int32)


def missing(pages: Pages, positions: jax.Array) -> jax.Array:
    """bool [group, slot]: whether the slot has no page yet for its position, of int `positions` [group * slot]."""
    nth = positions.reshape(pages.table.shape[:2]) // PAGE
    page = jnp.take_along_axis(pages.table, jnp.minimum(nth, pages.table.shape[2] - 1)[..., None], axis=2)[..., 0]
    return (page == pages.num_pages) & (nth < pages.table.shape[2])


def open_pages(pages: Pages, positions: jax.Array) -> Pages:
    """Gives a free page to each slot that is `missing` one for its position [group * slot].

    The caller makes sure that there are enough (`free`): a slot that gets none would write nothing.

    Args:
        pages: the pool.
        positions: int [group * slot]; the pool's length for a slot that needs none.
    """
    nth = positions.reshape(pages.table.shape[:2]) // PAGE
    owner, order, table = jax.vmap(_open)(pages.owner, pages.order, pages.table, nth, missing(pages, positions))
    return pages._replace(owner=owner, order=order, table=table)


def fill(pages: Pages, cache: Cache, rows: jax.Array, slots: jax.Array) -> Pages:
    """Copies rows of a cache into the pages of slots, as far as the slots have pages (see `open_pages`).

    Args:
        cache: of [group * row]; its length is a multiple of PAGE.
        rows, slots: int [group, copy], which of the group's rows, and to which slot; the number of slots for none.
    """
    groups, count = len(pages.table), cache.length // PAGE
    # a slot that does not exist has no pages, and what goes to no page is dropped
    to = jax.vmap(lambda table, at: jnp.take(table, at, axis=0, mode="fill", fill_value=pages.num_pages))
    to = to(pages.table, slots)[:, :, :count].reshape(groups, -1)

    def copy(pool, parts):  # parts: [group * row, page of the row, ...]
        parts = parts.reshape(groups, -1, *parts.shape[1:])

        def one(pool, parts, rows, to):
            chosen = parts[rows]
            return pool.at[to].set(chosen.reshape(-1, *chosen.shape[2:]), mode="drop")

        return jax.vmap(one)(pool, parts, rows, to)

    def keys(row):
        return row.reshape(*row.shape[:3], count, PAGE).transpose(0, 3, 1, 2, 4)

    def values(row):
        return row.reshape(*row.shape[:2], count, PAGE, row.shape[3]).transpose(0, 2, 1, 3, 4)

    return pages._replace(
        keys=tuple(copy(pool, keys(row)) for pool, row in zip(pages.keys, cache.keys, strict=True)),
        values=tuple(copy(pool, values(row)) for pool, row in zip(pages.values, cache.values, strict=True)),
    )


def release(pages: Pages, done: jax.Array, keep: jax.Array) -> Pages:
    """Frees the pages of the slots that are done, bool [group * slot], except the first `keep` of each slot.

    Args:
        pages: the pool.
        done: bool [group * slot].
        keep: pages of a shared prompt.
    """
    # A freed page keeps its old keys. Its next owner writes each position before its mask lets that position through.
    done = done.reshape(pages.table.shape[:2])
    # A free page looks at the last slot; to free it again changes nothing.
    owner_done = jnp.take_along_axis(done, jnp.minimum(pages.owner, pages.num_slots - 1), axis=1)
    freed = owner_done & (pages.order >= keep)
    later = jnp.arange(pages.table.shape[2]) >= keep
    return pages._replace(
        owner=jnp.where(freed, pages.num_slots, pages.owner),
        table=jnp.where(done[..., None] & later, pages.num_pages, pages.table),
    )


def resize(pages: Pages, num_pages: int) -> Pages:
    """The same pages in a pool of another size, which must hold all pages in use. It deletes the arrays it is given.

    Not for use under jit: it moves one layer at a time, so that at most one layer is in memory twice.

    Args:
        pages: the pool; its arrays cannot be used afterwards.
        num_pages: of each group, at least as many as are in use.
    """
    *index, source = _renumber(pages, num_pages)

    def move(arrays):
        moved = []
        for array in arrays:
            moved.append(jax.device_put(_move(array, source), array.sharding))
            # At once, not when Python finds the time: the pool may be most of the memory.
            array.delete()
        return tuple(moved)

    index = (jax.device_put(new, pages.owner.sharding) for new in index)
    return Pages(move(pages.keys), move(pages.values), *index)


def keep(pages: Pages, slots: jax.Array) -> Pages:
    """A pool with a selection of the slots, in a new order; the pages of all others become free.

    Args:
        slots: int [group, slot], the old number of each new slot, at most once each; the old number of slots for a new
            slot without pages.
    """
    owner, table = _keep(pages.owner, pages.table, slots)
    return pages._replace(
        owner=jax.device_put(owner, pages.owner.sharding), table=jax.device_put(table, pages.table.sharding)
    )


def resized(pages: Pages, num_pages: int) -> Pages:
    """The shapes of a pool of another size; `pages` is a tree of shapes too."""

    def one(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0], num_pages, *leaf.shape[2:]), leaf.dtype)

    return jax.tree.map(one, pages)._replace(table=pages.table)


def _attend(rule, keys, values, owner, order, table, q, k, v, position):
    """`Pages.attend` in one group; q, k, v [slot, head, width], position [slot]."""
    nth = position // PAGE
    page = table[jnp.arange(len(table)), jnp.minimum(nth, table.shape[1] - 1)]
    page = jnp.where(nth < table.shape[1], page, len(owner))  # out of bounds: dropped by the writes below
    place = position % PAGE
    if len(table) == 1:
        # With a second write, which is dropped: XLA's CPU code does a single write several times, each in a new copy of
        # the pool.
        page, place = jnp.append(page, len(owner)), jnp.append(place, 0)
        k, v = jnp.repeat(k, 2, axis=0), jnp.repeat(v, 2, axis=0)
    keys = keys.at[page, :, :, place].set(k.astype(keys.dtype), mode="drop")
    values = values.at[page, :, place].set(v.astype(values.dtype), mode="drop")
    # No position of a free page is visible: its last one is -1.
    last = jnp.where(owner < len(table), position[jnp.minimum(owner, len(table) - 1)], -1)
    visible = rule.visible(last[:, None], order[:, None] * PAGE + jnp.arange(PAGE))
    return keys, values, attention.paged(q, keys, values, owner, visible, table, rule)


def _open(owner, order, table, nth, wanted):
    slots, most = table.shape
    # the lowest free pages, in order, for the slots that want one
    lowest = jnp.nonzero(owner == slots, size=slots, fill_value=len(owner))[0]
    # The k-th slot that wants a page gets the k-th free one: no two slots get the same.
    # int32 stated, since indices are int64 under JAX_ENABLE_X64
    page = jnp.where(wanted, lowest[jnp.cumsum(wanted) - 1], len(owner)).astype(jnp.int32)
    owner = owner.at[page].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
    order = order.at[page].set(nth, mode="drop")
    table = table.at[jnp.arange(slots), jnp.where(wanted, nth, most)].set(page, mode="drop")
    return owner, order, table


@jax.jit
def _keep(owner, table, slots):
    (_, pages), (_, old, _), new = owner.shape, table.shape, slots.shape[1]

    def one(owner, table, slots):
        # the new number of each old slot; free pages stay free
        # One entry more than old slots, for free pages and new slots without an old one.
        place = jnp.full(old + 1, new).at[slots].set(jnp.where(slots < old, jnp.arange(new), new))
        return place[owner], jnp.take(table, slots, axis=0, mode="fill", fill_value=pages)

    return jax.tree.map(lambda index: index.astype(jnp.int32), jax.vmap(one)(owner, table, slots))


@functools.partial(jax.jit, static_argnums=1)
def _renumber(pages: Pages, num_pages: int):
    """The index (owner, order, table) of the resized pool, pages in use first; and each page's old number."""
    old = pages.num_pages
    used = pages.owner < pages.num_slots
    # A stable sort of booleans moves the pages in use to the front and keeps their order.
    source = jnp.argsort(~used, axis=1, stable=True)
    place = jnp.argsort(source, axis=1).astype(jnp.int32)  # the new number of each old page
    # New pages come from `old`, which is out of bounds and so is filled.
    source = jnp.pad(source, ((0, 0), (0, max(0, num_pages - old))), constant_values=old)[:, :num_pages]

    def take(index, fill):
        return jax.vmap(lambda row, at: jnp.take(row, at, mode="fill", fill_value=fill))(index, source)

    moved = jax.vmap(lambda table, place: place[jnp.minimum(table, old - 1)])(pages.table, place)
    table = jnp.where(pages.table < old, moved, num_pages)
    return take(pages.owner, pages.num_slots), take(pages.order, 0), table, source


@jax.jit
def _move(array, source):
    return jax.vmap(lambda pages, at: jnp.take(pages, at, axis=0, mode="fill", fill_value=0))(array, source)
