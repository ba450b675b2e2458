"""Samples with prompts of their own: prompts run in batches, and their samples start in slots that are idle.

A call of the device program (slots.run) ends when enough slots are idle. Then the next prompts run together, many
tokens at a time, and their keys and values go into pages of those slots. What all prompts have in common at their
beginning, such as a chat template's system message, runs once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode.slots import State
from kd_jax.lm.model import Architecture, Compute, kv_cache
from kd_jax.lm.model.kv_cache import PAGE, Cache
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib

# Ids of a prompt that run at a time: attention keeps scores [row, head, new, position].
_CHUNK = 512
# Fewer ids in common are not worth a program of their own.
_COMMON = 8
# A group's slots start this many samples at a time: with an eighth, a sixteenth of the slots is idle on average.
_PARTS = 8
# Prompts are taken longest first among so many slots' worth of samples: those of a batch are of about one length.
_WINDOW = 16


class Starts(NamedTuple):
    """Samples to start, by group of slots; rows and places that are not needed are 0 or out of range.

    Attributes:
        prompts: int32 [group * prompt, width], ids of the prompts.
        lengths: int32 [group * prompt].
        source: int32 [group, start], which of the group's prompts.
        slot: int32 [group, start], the slot; the number of slots for none.
        index: int32 [group, start], which sample.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    source: np.ndarray
    slot: np.ndarray
    index: np.ndarray


def of_sample(index: int | np.ndarray, num_prompts: int, samples_per_prompt: int | None) -> int | np.ndarray:
    """The number of a sample's prompt: sample i has prompt i modulo their count, or i // samples_per_prompt."""
    return index % num_prompts if samples_per_prompt is None else index // samples_per_prompt


class Queue:
    """The samples first .. num_samples - 1 of a stream, in the order in which they start.

    Args:
        prompts: ids of each.
        samples_per_prompt: see `of_sample`.
        first, num_samples: which samples.
        groups, slots: groups of slots, and slots of each.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int | None, *, first: int, num_samples: int,
        groups: int, slots: int,
    ):  # fmt: skip
        self.prompts, self.groups, self.at_once = prompts, groups, max(1, slots // _PARTS)
        self._lengths = np.array([len(ids) for ids in prompts])
        # sorted within windows alone, so that a corpus is written while its later samples are still to start
        window, order = _WINDOW * groups * slots, np.arange(first, num_samples)
        self._prompt_of = of_sample(order, len(prompts), samples_per_prompt)
        windows = np.arange(len(order)) // window
        place = np.lexsort((order, self._prompt_of, -self._lengths[self._prompt_of], windows))
        self._order, self._prompt_of, self._next = order[place], self._prompt_of[place], 0
        each = samples_per_prompt or 1
        # prompts of a batch, where samples of one prompt follow each other
        self.num_rows = self.at_once if each == 1 else min(self.at_once, (self.at_once - 1) // each + 2)
        common = len(os.path.commonprefix(list(prompts)))
        common = min(common, int(self._lengths.min()) - 1)  # the last id of a prompt is a step of its own
        self.common = list(prompts[0][:common]) if common >= _COMMON else []

    @property
    def left(self) -> int:
        """How many samples are still to start."""
        return len(self._order) - self._next

    def take(self, idle: np.ndarray, width: int, no_slot: int) -> Starts:
        """The next samples to start, for a batch of prompts.

        Args:
            idle: bool [group, slot].
            width: ids of a row.
            no_slot: the number of a slot that does not exist.
        """
        rows, starts = (self.groups, self.num_rows), (self.groups, self.at_once)
        prompts, lengths = np.zeros((*rows, width), np.int32), np.zeros(rows, np.int32)
        source, slot, index = np.zeros(starts, np.int32), np.full(starts, no_slot, np.int32), np.zeros(starts, np.int32)
        for group in range(self.groups):
            number: dict[int, int] = {}  # the row of each prompt
            for place, free in enumerate(np.flatnonzero(idle[group])[: self.at_once]):
                prompt = None if self.left == 0 else int(self._prompt_of[self._next])
                # All rows of this batch have their prompt: another one waits for the next batch.
                if prompt is None or (prompt not in number and len(number) == self.num_rows):
                    break
                row = number.setdefault(prompt, len(number))
                prompts[group, row, : self._lengths[prompt]] = self.prompts[prompt]
                lengths[group, row] = self._lengths[prompt]
                source[group, place], slot[group, place] = row, free
                index[group, place] = self._order[self._next]
                self._next += 1
        return Starts(prompts.reshape(-1, width), lengths.reshape(-1), source, slot, index)


def common(params, queue: Queue, architecture: Architecture, compute: Compute) -> Cache | None:
    """Keys and values of what the prompts have in common, a row of whole pages; None where that is nothing."""
    return _of_ids(params, np.asarray(queue.common, np.int32), architecture, compute) if queue.common else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _of_ids(params, ids, architecture: Architecture, compute: Compute) -> Cache:
    cache = model_lib.empty_cache(architecture, 1, -(-len(ids) // PAGE) * PAGE, jnp.dtype(compute.dtype))
    return model_lib.extend(params, architecture, cache, ids[None], jnp.arange(len(ids))[None], compute=compute)[1]


def start(
    state: State, params, queue: Queue, common: Cache | None, first_pages: int, architecture: Architecture,
    compute: Compute,
) -> State:  # fmt: skip
    """The state with samples of the queue in all slots that are idle, if those are enough for a batch.

    Args:
        common: what `common` returns.
        first_pages: least number of pages of the pool for each slot.
    """
    groups, slots = state.cache.table.shape[:2]
    idle = ~distributed.fetch(state.active).reshape(groups, slots)
    while queue.left and idle.sum(axis=1).max() >= min(queue.at_once, queue.left):
        starts = queue.take(idle, state.slots.tokens.shape[1], slots)
        for group, taken in enumerate(starts.slot):
            idle[group, taken[taken < slots]] = False
        state = slots_lib.with_pages(state, int(_pages_after(state, starts).max()), first_pages, spare=2)
        state = _begin(
            state, params, common, _spread(starts, compute), np.int32(len(queue.common)),
            _bucket(int(starts.lengths.max()) - 1 - len(queue.common)), architecture, compute,
        )  # fmt: skip
    return state


def _bucket(length: int) -> int:
    """A few numbers of ids, as each is a compiled program: 0, 32, 48, 64, 96, ... 512, 1024, 1536, ..."""
    if length > _CHUNK:
        return -(-length // _CHUNK) * _CHUNK
    size = 32 if length > 0 else 0
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _pages_after(state: State, starts: Starts) -> np.ndarray:
    """Pages of each group [group] once these samples have started and each slot has opened one page more."""
    groups, slots = state.cache.table.shape[:2]
    used = state.cache.num_pages - distributed.fetch(kv_cache.free(state.cache))
    lengths = np.take_along_axis(starts.lengths.reshape(groups, -1), starts.source, axis=1)
    new = np.where(starts.slot < slots, -(-(lengths - 1) // PAGE), 0).sum(axis=1)
    return used + new + slots


def _spread(starts: Starts, compute: Compute) -> Starts:
    if compute.mesh is None:
        return starts
    axes = Starts(("batch", None), ("batch",), *(("batch", None),) * 3)
    return Starts(
        *(
            distributed.spread(array, mesh_lib.sharding(names, compute.mesh))
            for array, names in zip(starts, axes, strict=True)
        )
    )


def lower(
    state: State, params, longest: int, architecture: Architecture, compute: Compute, platform: str | None = None
) -> jax.stages.Lowered:  # fmt: skip
    """Lowers the program of `start` for a batch of prompts with nothing in common; nothing is run.

    Args:
        state, params: shapes, with their shardings.
        longest: ids of the longest prompt.
        platform: "cuda", "tpu" or "cpu"; None for that of the devices.
    """
    groups, slots = state.cache.table.shape[:2]
    at_once = max(1, slots // _PARTS)
    sizes = Starts((groups * at_once, state.cache.length), (groups * at_once,), *[(groups, at_once)] * 3)
    starts = Starts(*(jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes))
    if compute.mesh is not None:
        starts = jax.tree.map(
            lambda leaf: leaf.update(sharding=mesh_lib.sharding(("batch",) + (None,) * (leaf.ndim - 1), compute.mesh)),
            starts,
        )
    traced = _begin.trace(state, params, None, starts, np.int32(0), _bucket(longest - 1), architecture, compute)
    return traced.lower(lowering_platforms=platform and (platform,))


# The state is donated: the pages, its largest arrays, are then written in place.
@functools.partial(jax.jit, static_argnums=(5, 6, 7), donate_argnums=0)
def _begin(
    state: State, params, common: Cache | None, starts: Starts, num_common: jax.Array, new: int,
    architecture: Architecture, compute: Compute,
) -> State:  # fmt: skip
    """Runs prompts from position num_common on, `new` ids of each at most, and starts their samples."""
    # Prompts that differ in their last id alone have nothing new to run, but they need what they have in common.
    if new or common is not None:
        rows = len(starts.lengths)
        length = -(-((common.length if common is not None else 0) + new) // PAGE) * PAGE
        length = min(length, state.cache.length)  # rounded up twice: no prompt is longer than a slot
        cache = model_lib.empty_cache(architecture, rows, length, jnp.dtype(compute.dtype))
        if common is not None:
            cache = jax.tree.map(
                lambda all_rows, one: jax.lax.dynamic_update_slice(
                    all_rows, jnp.broadcast_to(one, (rows, *one.shape[1:])), (0,) * one.ndim
                ),
                cache,
                common,
            )
        if new:
            cache = _extend(params, cache, starts, num_common, new, architecture, compute)
        state = state._replace(cache=_fill(state.cache, cache, starts))
    state = _occupy(state, starts)
    # Laid out as before, or the loop would be compiled again for another layout.
    return state if compute.mesh is None else jax.lax.with_sharding_constraint(
        state, slots_lib.shardings(state, compute.mesh)
    )  # fmt: skip


def _extend(params, cache: Cache, starts: Starts, num_common, new: int, architecture, compute) -> Cache:
    """The cache with the prompts' keys and values, all but those of each prompt's last id, which its first step has."""
    ids = jnp.pad(starts.prompts, ((0, 0), (0, new)))  # a slice that is cut at the end would start earlier
    ids = jax.lax.dynamic_slice_in_dim(ids, num_common, new, axis=1)
    positions = jnp.broadcast_to(num_common + jnp.arange(new), ids.shape)
    positions = jnp.where(positions < starts.lengths[:, None] - 1, positions, cache.length)

    def step(cache, chunk):
        return model_lib.extend(params, architecture, cache, *chunk, compute=compute)[1], None

    if new <= _CHUNK:
        return step(cache, (ids, positions))[0]
    chunks = (x.reshape(len(x), -1, _CHUNK).swapaxes(0, 1) for x in (ids, positions))
    return jax.lax.scan(step, cache, tuple(chunks))[0]


def _fill(pages: kv_cache.Pages, cache: Cache, starts: Starts) -> kv_cache.Pages:
    """Gives the slots pages for their prompts, and copies the prompts there."""
    groups, slots = pages.table.shape[:2]
    lengths = jnp.take_along_axis(starts.lengths.reshape(groups, -1), starts.source, axis=1)
    last = _put(jnp.zeros((groups, slots), jnp.int32), starts.slot, lengths - 1)
    for start in range(0, cache.length, PAGE):
        pages = kv_cache.open_pages(pages, jnp.where(start < last, start, pages.length).reshape(-1))
    return kv_cache.fill(pages, cache, starts.source, starts.slot)


def _occupy(state: State, starts: Starts) -> State:
    """The state with the samples in their slots."""
    groups, slots = state.cache.table.shape[:2]

    def put(array, values):
        return _put(array.reshape(groups, slots, *array.shape[1:]), starts.slot, values).reshape(array.shape)

    def of_prompt(array):  # [group * prompt, ...] -> [group, start, ...]
        return jax.vmap(lambda rows, at: rows[at])(array.reshape(groups, -1, *array.shape[1:]), starts.source)

    old = state.slots
    lengths = of_prompt(starts.lengths)
    new = old._replace(
        index=put(old.index, starts.index), tokens=put(old.tokens, of_prompt(starts.prompts)),
        log_probs=put(old.log_probs, 0.0), sample_log_probs=put(old.sample_log_probs, 0.0),
        length=put(old.length, lengths),
    )  # fmt: skip
    count = (starts.slot < slots).sum(dtype=jnp.int32)
    active, lengths = put(state.active, True), put(state.prompt_length, lengths)
    return state._replace(slots=new, active=active, prompt_length=lengths, next_index=state.next_index + count)


# Mapped over groups, so that each group's slots stay on their devices.
def _put(array, places, values):
    if jnp.ndim(values) == 0:
        return jax.vmap(lambda row, at: row.at[at].set(values, mode="drop"))(array, places)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(array, places, values)
