"""The sampling loop on the device, with one sample in each slot, and what the host does between two calls of it.

A step computes a row for every slot. While samples are left to start, a slot takes the next one when its own ends.
After that idle slots are removed, many at a time, and the pool of pages shrinks with them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import next_token
from kd_jax.lm.model import Architecture, Compute, kv_cache
from kd_jax.lm.model.kv_cache import PAGE, Pages
from kd_jax.parallel import mesh as mesh_lib

# Fewest slots of a group: with this few rows a step is bound by reading the weights, and fewer would not be quicker.
_LEAST = 8
# Finished samples that there is room for, for each slot.
DONE = 8


class Rows(NamedTuple):
    """Samples on the device: those in the slots [slot, ...], or finished ones [group, place, ...]."""

    index: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    sample_log_probs: jax.Array
    length: jax.Array
    finished: jax.Array


class State(NamedTuple):
    """The loop's state. Slots are those of all groups of the cache, one group after another."""

    cache: Pages
    slots: Rows
    active: jax.Array  # bool [slot]
    prompt_length: jax.Array  # int32 [slot]
    done: Rows  # finished samples: the first num_done places of each group
    num_done: jax.Array  # [group]
    next_index: jax.Array  # the next sample to start
    steps: jax.Array  # since the host last fetched finished samples
    active_steps: jax.Array  # the same, counted once for each slot that ran a sample


class Settings(NamedTuple):
    """What the loop depends on beside its state; all traced, so that other values do not compile again."""

    prompt: jax.Array  # int32 [length], of samples that the loop starts itself
    start: jax.Array  # where samples start: a shared prompt's KV cache before it is resident in every slot
    num_samples: jax.Array  # State.next_index counts up to it
    refill: jax.Array  # idle slots of a group that end a call, so that the host starts samples; 0: the loop does
    samples_per_prompt: jax.Array  # 0 where samples are numbered without regard to their prompts
    max_length: jax.Array
    max_new: jax.Array  # most ids of a sample after its prompt
    worth: jax.Array  # slot steps that a program with fewer slots has to save to be worth loading
    seed: jax.Array
    eos_ids: jax.Array  # padded with -1
    num_tokens: jax.Array  # ids from here on do not exist
    knobs: dict[str, jax.Array | None]  # of next_token.sample


def prompt_pages(start):
    """Number of pages that hold the positions before `start` (an int or a traced scalar)."""
    return -(-start // PAGE)


def shardings(state: State, mesh: Mesh) -> State:
    """The state's layout: each group on the devices of its rows, its keys and values split by heads there.

    Args:
        state: arrays or shapes.
        mesh: of data x fsdp x tensor.
    """

    def rows(leaf):
        return mesh_lib.sharding(("batch",) + (None,) * (leaf.ndim - 1), mesh)

    def heads(leaf):
        # KV heads that the tensor axis does not divide are whole on each of its devices.
        axis = "heads" if leaf.shape[2] % mesh.shape["tensor"] == 0 else None
        return mesh_lib.sharding(("batch", None, axis, None, None), mesh)

    everywhere, cache = mesh_lib.sharding((), mesh), state.cache
    pages = jax.tree.map(rows, cache)._replace(
        keys=tuple(map(heads, cache.keys)), values=tuple(map(heads, cache.values))
    )
    return State(
        cache=pages, slots=jax.tree.map(rows, state.slots), active=rows(state.active),
        prompt_length=rows(state.prompt_length), done=jax.tree.map(rows, state.done), num_done=rows(state.num_done),
        next_index=everywhere, steps=everywhere, active_steps=everywhere,
    )  # fmt: skip


# --- between two calls ------------------------------------------------------------------------------------------------


def sizes(slots: int) -> list[int]:
    """The numbers of slots that a group may shrink to, its own included: 2**k and 1.5 * 2**k.

    Each number is a compiled program; these few are shared by all starting sizes.
    """
    powers = [_LEAST << i for i in range(slots.bit_length())]
    return [size for power in powers for size in (power, power * 3 // 2) if size < slots] + [slots]


def fit(state: State, settings: Settings, first_pages: int) -> State:
    """The state with fewer slots where that pays, and with the pages that these need; `done` must be empty.

    Attention reads the whole pool of pages, so the pool grows only when the next step could run out, and shrinks when
    many pages are idle. Each size of the pool is a compiled program: sizes are steps of an eighth, kept for a while.

    Args:
        first_pages: least number of pages of the pool for each slot.
    """
    slots, spare = int(_slots_needed(state, settings)), 2
    if slots < state.cache.num_slots:
        state, spare = _shrink(state, slots), 0
    return with_pages(state, int(_pages_needed(state, settings)), first_pages, spare)


def with_pages(state: State, needed: int, first_pages: int, spare: int) -> State:
    """The state with a pool of at least `needed` pages in a group, and not many more.

    Args:
        first_pages: see `fit`.
        spare: how many steps of its size the pool may be too large.
    """
    pages, slots = state.cache, state.cache.num_slots
    most = slots * pages.table.shape[2]
    step = -(-most // 8)
    # While the slots stay the same, the pool shrinks only when more than two steps of it are idle: a pool that grew
    # and shrank in turn would be copied each time.
    size = max(first_pages * slots, min(-(-needed // step) * step, most))
    if min(needed, most) > pages.num_pages or size < pages.num_pages - spare * step:
        state = state._replace(cache=kv_cache.resize(pages, size))
    return state


def enough(slots: int, wanted: jax.Array, longest: jax.Array, worth: jax.Array) -> jax.Array:
    """The fewest slots of a group for `wanted` samples of at most `longest` steps, if changing to it pays.

    Args:
        slots: of the group now.
        wanted: samples that still have to run.
        longest: most steps that any of them may take.
        worth: slot steps to save, at least.
    """
    fewer = jnp.asarray(sizes(slots))
    fewer = jnp.where(fewer >= wanted, fewer, slots).min()
    saved = slots - fewer
    # compared by a quotient, since the product could overflow int32
    return jnp.where((saved > 0) & (longest >= -(-worth // jnp.maximum(1, saved))), fewer, slots)


@jax.jit
def _slots_needed(state: State, settings: Settings) -> jax.Array:
    """Slots that a group needs from now on: fewer once no samples are left to start, if that pays."""
    slots = state.cache.num_slots
    active = state.active.reshape(-1, slots).sum(axis=1).max()
    longest = jnp.where(state.active, _most_ids(state, settings) - state.slots.length, 0).max()
    fewer = enough(slots, active, longest, settings.worth)
    return jnp.where(state.next_index >= settings.num_samples, fewer, slots)


def _most_ids(state: State, settings: Settings) -> jax.Array:
    """How long each slot's sample may be, prompt included: int32 [slot]."""
    return jnp.minimum(settings.max_length, state.prompt_length + settings.max_new)


def _shrink(state: State, slots: int) -> State:
    """The state in fewer slots of each group, at least as many as are active."""
    old = (state.slots, state.prompt_length), state.active, state.done
    new, which = _gather(*old, state.cache.table.shape[0], slots)
    # Back to the layout that `run` was compiled for: the outputs of `_gather` have the one that XLA chose.
    (rows, lengths), active, done = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), new, old)
    cache = kv_cache.keep(state.cache, which)
    return state._replace(cache=cache, slots=rows, prompt_length=lengths, active=active, done=done)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gather(slots: tuple[Rows, jax.Array], active: jax.Array, done: Rows, groups: int, size: int):
    """These three with `size` slots in each group, and the old slot of each new one [group, slot]; idle: one beyond."""
    old = len(active) // groups
    which = jax.vmap(lambda row: jnp.nonzero(row, size=size, fill_value=old)[0])(active.reshape(groups, old))

    def take(array):
        rows = array.reshape(groups, old, *array.shape[1:])
        # An idle slot takes some row: it is inactive, so nobody reads it.
        taken = jax.vmap(lambda rows, at: jnp.take(rows, at, axis=0, mode="clip"))(rows, which)
        return taken.reshape(groups * size, *array.shape[1:])

    done = jax.tree.map(lambda array: array[:, : DONE * size], done)
    return (jax.tree.map(take, slots), (which < old).reshape(-1), done), which


@jax.jit
def _pages_needed(state: State, settings: Settings) -> jax.Array:
    """The most pages that a group can use after the next step, in which an idle slot may start and need one."""
    runs = state.active | ((state.next_index < settings.num_samples) & (settings.refill == 0))
    positions = jnp.where(state.active, state.slots.length - 1, settings.start)
    new = kv_cache.missing(state.cache, jnp.where(runs, positions, state.cache.length)).sum(axis=1)
    return (state.cache.num_pages - kv_cache.free(state.cache) + new).max()


# --- a call -----------------------------------------------------------------------------------------------------------


# The state is donated: its cache is the largest array of sampling and is updated in place.
@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def run(
    state: State, params, settings: Settings, architecture: Architecture, compute: Compute,
    num_steps: jax.Array,
) -> State:  # fmt: skip
    """Runs steps of sampling on the device; fewer than asked where no sample is left or the host has to act first.

    Args:
        state: donated; its arrays cannot be used again.
        params: the weights, layer by layer (see kd_jax.lm.model.unstack).
        num_steps: the most steps to run.
    Returns: the state after them; `fit` and fetching the finished samples make room for more steps.
    """
    slots, pool, mesh = state.cache.num_slots, state.done.index.shape[1], compute.mesh
    last = state.steps + num_steps

    def goes_on(state: State):
        # The loop stops where only the host can go on: the finished samples might not fit (all slots can end in one
        # step), pages might run out, fewer slots would pay, or prompts have to run.
        left = state.active.any() | ((state.next_index < settings.num_samples) & (settings.refill == 0))
        fits = (state.num_done + slots <= pool).all() & (_pages_needed(state, settings) <= state.cache.num_pages)
        enough = _slots_needed(state, settings) == state.cache.num_slots
        return left & (state.steps < last) & fits & enough & ~_host_starts(state, settings)

    def step(state: State) -> State:
        state = _refill(state, settings)
        state = _retire(_advance(state, params, settings, architecture, compute), settings)
        # The carry's layout is stated, so that the partitioner cannot choose another one for the loop.
        return state if mesh is None else jax.lax.with_sharding_constraint(state, shardings(state, mesh))

    return jax.lax.while_loop(goes_on, step, state)


def _host_starts(state: State, settings: Settings) -> jax.Array:
    """Whether a group has so many idle slots that the host should start samples in them."""
    to_start = settings.num_samples - state.next_index
    idle = (~state.active).reshape(-1, state.cache.num_slots).sum(axis=1).max()
    return (settings.refill > 0) & (to_start > 0) & (idle >= jnp.minimum(settings.refill, to_start))


def _refill(state: State, settings: Settings) -> State:
    """Gives idle slots the next samples, where the loop starts them."""
    wanted = ~state.active
    # int32 said here and below: sums of booleans are int64 under JAX_ENABLE_X64, and a loop's carry keeps its types
    index = state.next_index + jnp.cumsum(wanted, dtype=jnp.int32) - 1
    begins = wanted & (index < settings.num_samples) & (settings.refill == 0)
    # the prompt's KV cache is resident in every slot, all but its last token
    length = jnp.full_like(index, settings.start + 1)
    tokens = jnp.pad(settings.prompt, (0, state.slots.tokens.shape[1] - len(settings.prompt)))
    slots = state.slots
    slots = Rows(
        index=jnp.where(begins, index, slots.index),
        tokens=jnp.where(begins[:, None], tokens, slots.tokens),
        log_probs=jnp.where(begins[:, None], 0, slots.log_probs),
        sample_log_probs=jnp.where(begins[:, None], 0, slots.sample_log_probs),
        length=jnp.where(begins, length, slots.length),
        finished=slots.finished,  # set by `_advance` in each step
    )
    return state._replace(
        slots=slots, active=state.active | begins, next_index=state.next_index + begins.sum(dtype=jnp.int32)
    )


def _advance(state: State, params, settings: Settings, architecture: Architecture, compute: Compute) -> State:
    """One token for every slot; what idle slots compute is discarded."""
    slots = state.slots
    newest = _pick(slots.tokens, slots.length - 1)  # the input of this step
    positions = jnp.where(state.active, slots.length - 1, state.cache.length)  # an idle slot writes nowhere
    cache = kv_cache.open_pages(state.cache, positions)
    hidden, cache = model_lib.extend(
        params, architecture, cache, newest[:, None], positions[:, None], compute=compute
    )  # fmt: skip
    logits = model_lib.logits(params, architecture, hidden[:, 0])
    logits = mesh_lib.constrain(logits, ("batch", "vocab"), compute.mesh)
    # A padded vocabulary has logits that belong to no token: they are never drawn.
    logits = jnp.where(jnp.arange(logits.shape[-1]) < settings.num_tokens, logits, -jnp.inf)
    uniforms = _uniforms(settings, slots.index, slots.length)
    drawn = next_token.sample(uniforms, logits, **settings.knobs, mesh=compute.mesh)

    put = jnp.where(state.active, slots.length, slots.tokens.shape[1])  # beyond the row, where writes are dropped
    slots = slots._replace(
        tokens=_put(slots.tokens, put, drawn.token),
        log_probs=_put(slots.log_probs, put, drawn.log_prob),
        sample_log_probs=_put(slots.sample_log_probs, put, drawn.sample_log_prob),
        length=slots.length + state.active,
        finished=(drawn.token[:, None] == settings.eos_ids).any(axis=-1),
    )
    return state._replace(
        cache=cache,
        slots=slots,
        steps=state.steps + 1,
        active_steps=state.active_steps + state.active.sum(dtype=jnp.int32),
    )


def _uniforms(settings: Settings, index: jax.Array, position: jax.Array) -> jax.Array:
    """Two uniforms [slot, 2] for the token of sample `index` at `position`."""
    each, seed = settings.samples_per_prompt, jax.random.key(settings.seed)

    def one(index, position):
        # A key for each sample and position, not for each step: neither batch size nor devices nor restarts change it.
        # Sample j of prompt i keeps its numbers when there are more prompts, or more samples of each
        prompt, sample = index // jnp.maximum(each, 1), index % jnp.maximum(each, 1)
        of_prompt = jax.random.fold_in(jax.random.fold_in(seed, prompt), sample)
        key = jnp.where(each > 0, of_prompt, jax.random.fold_in(seed, index))
        return jax.random.uniform(jax.random.fold_in(key, position), (2,), jnp.float32)

    return jax.vmap(one)(index, position)


def _retire(state: State, settings: Settings) -> State:
    """Moves finished samples from their slots to the pool of finished ones, and frees their pages."""
    done = state.active & (state.slots.finished | (state.slots.length >= _most_ids(state, settings)))
    groups = len(state.num_done)
    ended = done.reshape(groups, -1)
    # a place beyond the pool is dropped
    place = jnp.where(ended, state.num_done[:, None] + jnp.cumsum(ended, axis=1) - 1, state.done.index.shape[1])
    pool = jax.tree.map(
        lambda pool, slot: _put(pool, place, slot.reshape(groups, -1, *slot.shape[1:])), state.done, state.slots
    )
    cache = kv_cache.release(state.cache, done, prompt_pages(settings.start))
    num_done = state.num_done + ended.sum(axis=1, dtype=jnp.int32)
    return state._replace(cache=cache, done=pool, active=state.active & ~done, num_done=num_done)


# Mapped over rows, so that rows stay on the devices they are split over.
_pick = jax.vmap(lambda row, place: row[place])
_put = jax.vmap(lambda row, place, value: row.at[place].set(value, mode="drop"))
