"""Keys and values of the positions that a batch of sequences has been through: what the next tokens attend to.

`Cache` has a row for each sequence, all of one length: for prompts, and for tokens that come several at a time. `Pages`
is for sampling one token at a time from sequences of many lengths: a pool of pages that sequences take as they grow and
give back when they end, so that a step reads what is there and not every row to the length of the longest. Both hold an
array for each layer; layers are not stacked, since taking one out of a stack would copy it.

(Paged attention is Kwon et al. 2023, arXiv 2309.06180. Here the pool is read from end to end, in place, and only
queries and results are gathered.)
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm.model import attention

# Positions of a page: less is lost at the end of sequences with few, but the products then are too small to be quick.
PAGE = 64


class Cache(NamedTuple):
    """A row for each sequence.

    Attributes:
        keys: [row, kv head, head_dim, position] for each layer.
        values: [row, kv head, position, head_dim]. In these orders the products of one query with both run along the
            last axis, at the speed of memory.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[-1]

    def attend(self, layer: int, q, k, v, positions):
        """Writes new keys and values of a layer and attends to it -> its keys, values, and [row, new, head * width]."""
        keys, values = self.keys[layer], self.values[layer]
        rows = jnp.arange(q.shape[0])[:, None]
        keys = keys.at[rows, :, :, positions].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, :, positions].set(v.astype(values.dtype), mode="drop")
        return keys, values, attention.cached(q, keys, values, positions)


def empty(layers: int, rows: int, heads: int, width: int, length: int, dtype=jnp.float32) -> Cache:
    """A cache of zeros with room for `length` positions in each of `rows` rows; of `heads` kv heads of `width` each."""
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
        return self.owner.shape[1]

    @property
    def num_slots(self) -> int:
        """Of a group."""
        return self.table.shape[1]

    @property
    def length(self) -> int:
        """Positions that a slot can have; one from here on is none, and is not written."""
        return self.table.shape[2] * PAGE

    def attend(self, layer: int, q, k, v, positions):
        """As `Cache.attend`, for slots [group * slot, 1, ...], whose positions have a page (see `open_pages`)."""

        def split(x):
            return x[:, 0].reshape(*self.table.shape[:2], *x.shape[2:])

        keys, values, out = jax.vmap(_attend)(
            self.keys[layer], self.values[layer], self.owner, self.order, self.table, split(q), split(k), split(v),
            split(positions),
        )  # fmt: skip
        return keys, values, out.reshape(q.shape[0], 1, -1)


def paged(cache: Cache, groups: int, slots: int, num_pages: int, length: int) -> Pages:
    """A pool in which each of `slots` slots of each group holds what the one row of `cache` does, and room to grow.

    Args:
        cache: of one row; its length is that of whole pages.
        num_pages: of a group; enough for the slots' first ones.
        length: the most positions that a slot will have.
    """
    first, most = cache.length // PAGE, -(-length // PAGE)
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
    """How many pages of each group no slot has."""
    return (pages.owner == pages.num_slots).sum(axis=1, dtype=jnp.int32)


def missing(pages: Pages, positions: jax.Array) -> jax.Array:
    """bool [group, slot]: whether there is no page yet for this position [group * slot]."""
    nth = positions.reshape(pages.table.shape[:2]) // PAGE
    page = jnp.take_along_axis(pages.table, jnp.minimum(nth, pages.table.shape[2] - 1)[..., None], axis=2)[..., 0]
    return (page == pages.num_pages) & (nth < pages.table.shape[2])


def open_pages(pages: Pages, positions: jax.Array) -> Pages:
    """Gives a page to each slot that has none for its position [group * slot]; `free` says whether there are enough."""
    nth = positions.reshape(pages.table.shape[:2]) // PAGE
    owner, order, table = jax.vmap(_open)(pages.owner, pages.order, pages.table, nth, missing(pages, positions))
    return pages._replace(owner=owner, order=order, table=table)


def release(pages: Pages, done: jax.Array, keep: jax.Array) -> Pages:
    """Takes back the pages of the slots that are done [group * slot], but for the first `keep` of each."""
    done = done.reshape(pages.table.shape[:2])
    held = jnp.take_along_axis(done, jnp.minimum(pages.owner, pages.num_slots - 1), axis=1)
    given_back = held & (pages.order >= keep)
    later = jnp.arange(pages.table.shape[2]) >= keep
    return pages._replace(
        owner=jnp.where(given_back, pages.num_slots, pages.owner),
        table=jnp.where(done[..., None] & later, pages.num_pages, pages.table),
    )


def resize(pages: Pages, num_pages: int) -> Pages:
    """The same in a pool of another size, which has to hold those in use; what it was given is used up.

    Not for use under jit: it goes layer by layer, so that no more than one of them is held twice.
    """
    *index, source = _renumber(pages, num_pages)

    def move(arrays):
        moved = []
        for array in arrays:
            moved.append(jax.device_put(_move(array, source), array.sharding))
            array.delete()
        return tuple(moved)

    index = (jax.device_put(new, pages.owner.sharding) for new in index)
    return Pages(move(pages.keys), move(pages.values), *index)


def keep(pages: Pages, slots: jax.Array) -> Pages:
    """The same with these slots alone [group, slot], in this order; the pages of all others are free.

    Args:
        slots: int, the number of slots now for one that is to have no pages. Others come once.
    """
    owner, table = _keep(pages.owner, pages.table, slots)
    return pages._replace(
        owner=jax.device_put(owner, pages.owner.sharding), table=jax.device_put(table, pages.table.sharding)
    )


def resized(pages: Pages, num_pages: int) -> Pages:
    """The shapes of a pool of another size, from the shapes of one."""

    def one(leaf):
        return jax.ShapeDtypeStruct((leaf.shape[0], num_pages, *leaf.shape[2:]), leaf.dtype)

    return jax.tree.map(one, pages)._replace(table=pages.table)


def _attend(keys, values, owner, order, table, q, k, v, position):
    """`Pages.attend` in one group; q, k, v [slot, head, width], position [slot]."""
    nth = position // PAGE
    page = table[jnp.arange(len(table)), jnp.minimum(nth, table.shape[1] - 1)]
    page = jnp.where(nth < table.shape[1], page, len(owner))  # none: dropped
    keys = keys.at[page, :, :, position % PAGE].set(k.astype(keys.dtype), mode="drop")
    values = values.at[page, :, position % PAGE].set(v.astype(values.dtype), mode="drop")
    last = jnp.where(owner < len(table), position[jnp.minimum(owner, len(table) - 1)], -1)
    visible = order[:, None] * PAGE + jnp.arange(PAGE) <= last[:, None]
    return keys, values, attention.paged(q, keys, values, owner, visible, table)


def _open(owner, order, table, nth, wanted):
    slots, most = table.shape
    # the lowest free pages, in order, for the slots that want one
    lowest = jnp.nonzero(owner == slots, size=slots, fill_value=len(owner))[0]
    # int32 said, since indices are int64 under JAX_ENABLE_X64
    page = jnp.where(wanted, lowest[jnp.cumsum(wanted) - 1], len(owner)).astype(jnp.int32)
    owner = owner.at[page].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
    order = order.at[page].set(nth, mode="drop")
    table = table.at[jnp.arange(slots), jnp.where(wanted, nth, most)].set(page, mode="drop")
    return owner, order, table


@jax.jit
def _keep(owner, table, slots):
    (_, pages), (_, old, _), new = owner.shape, table.shape, slots.shape[1]

    def one(owner, table, slots):
        # where each went; no slot's pages stay no slot's
        place = jnp.full(old + 1, new).at[slots].set(jnp.where(slots < old, jnp.arange(new), new))
        return place[owner], jnp.take(table, slots, axis=0, mode="fill", fill_value=pages)

    return jax.tree.map(lambda index: index.astype(jnp.int32), jax.vmap(one)(owner, table, slots))


@functools.partial(jax.jit, static_argnums=1)
def _renumber(pages: Pages, num_pages: int):
    """The pool's index with those in use first, in a pool of another size; and where each page comes from."""
    old = pages.num_pages
    used = pages.owner < pages.num_slots
    source = jnp.argsort(~used, axis=1, stable=True)
    place = jnp.argsort(source, axis=1).astype(jnp.int32)  # where each went
    source = jnp.pad(source, ((0, 0), (0, max(0, num_pages - old))), constant_values=old)[:, :num_pages]

    def take(index, fill):
        return jax.vmap(lambda row, at: jnp.take(row, at, mode="fill", fill_value=fill))(index, source)

    moved = jax.vmap(lambda table, place: place[jnp.minimum(table, old - 1)])(pages.table, place)
    table = jnp.where(pages.table < old, moved, num_pages)
    return take(pages.owner, pages.num_slots), take(pages.order, 0), table, source


@jax.jit
def _move(array, source):
    return jax.vmap(lambda pages, at: jnp.take(pages, at, axis=0, mode="fill", fill_value=0))(array, source)
