"""Sampling: a batch of slots that a finished sample leaves to the next one at once, on the device.

Sample i depends on (seed, i) alone: the uniforms of its token at a position come from a key folded from the seed, i and
the position. Which slot it ran in, beside what, on how many devices or after how many restarts does not enter (but
through the rounding of the model's own float arithmetic).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import distributed
from kd_jax import mesh as mesh_lib
from kd_jax.lm import kv_cache, sampling
from kd_jax.lm import model as model_lib
from kd_jax.lm.kv_cache import PAGE, Pages
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model

# One call of the device program is to take about so long: progress moves, and Ctrl-C answers.
_SECONDS_PER_CALL = 1.0


class Samples(NamedTuple):
    """Samples that are done, as NumPy arrays, one row each.

    Attributes:
        index: int64 [n], which sample.
        tokens: int32 [n, max_length], prompt included, EOS kept; 0 beyond the length.
        lengths: int32 [n], prompt included.
        prompt_lengths: int32 [n].
        finished: bool [n]; ended with an EOS id, else cut at max_length.
        log_probs: float32 [n, max_length], of each generated token under the model itself (temperature 1); else 0.
        sample_log_probs: the same under the distribution it was drawn from.
        utilisation: share of the slots' steps so far that ran a sample.
        steps: how many steps were run so far.
    """

    index: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    finished: np.ndarray
    log_probs: np.ndarray
    sample_log_probs: np.ndarray
    utilisation: float
    steps: int


class _Rows(NamedTuple):
    """Samples on the device: those in the slots, or those that are done. [row, ...]"""

    index: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    sample_log_probs: jax.Array
    length: jax.Array
    finished: jax.Array


class _State(NamedTuple):
    cache: Pages
    slots: _Rows
    active: jax.Array  # bool [slot]
    done: _Rows  # the first num_done rows are filled
    num_done: jax.Array
    next_index: jax.Array  # the next sample to start
    steps: jax.Array
    active_steps: jax.Array  # of all slots together


class _Settings(NamedTuple):
    """What a run of the loop depends on beside the state; all traced."""

    prompts: jax.Array  # int32 [prompt, longest]
    prompt_lengths: jax.Array
    start: jax.Array  # the position where samples start: what is before, of a prompt for all, is in every slot for good
    num_samples: jax.Array
    max_length: jax.Array
    seed: jax.Array
    temperature: jax.Array
    eos_ids: jax.Array  # padded with -1
    num_tokens: jax.Array  # ids from here on do not exist
    top_k: jax.Array | None
    top_p: jax.Array | None


def generate(
    model: Model, prompt: Sequence[int] | Sequence[Sequence[int]], num_samples: int, *, max_length: int,
    sample_temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    batch_size: int = 64, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Samples 0 .. num_samples - 1 in order; see `stream` for the arguments and for more than these three arrays.

    Returns: tokens int32 [num_samples, max_length], lengths int32 [num_samples], log_probs float32
    [num_samples, max_length] under the model itself.
    """
    parts = stream(
        model, prompt, num_samples, max_length=max_length, sample_temperature=sample_temperature, top_k=top_k,
        top_p=top_p, seed=seed, batch_size=batch_size, compute=compute, mesh=mesh,
    )  # fmt: skip
    tokens = np.zeros((num_samples, max_length), np.int32)
    lengths = np.zeros(num_samples, np.int32)
    log_probs = np.zeros((num_samples, max_length), np.float32)
    for part in parts:
        tokens[part.index], lengths[part.index], log_probs[part.index] = part.tokens, part.lengths, part.log_probs
    return tokens, lengths, log_probs


def stream(
    model: Model, prompt: Sequence[int] | Sequence[Sequence[int]], num_samples: int, *, max_length: int,
    sample_temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0,
    first: int = 0, batch_size: int = 64, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> Iterator[Samples]:  # fmt: skip
    """Yields samples first .. num_samples - 1 as they finish, about once a second.

    Args:
        prompt: ids that all samples start with, or a list of such lists; sample i starts with number i modulo their
            count.
        max_length: longest sample, prompt included.
        sample_temperature: tau; 0 takes the most probable token.
        top_k, top_p: None for off. Both are exact, and top_p applies after top_k.
        batch_size: how many samples run at a time; rounded up to a multiple of the devices they are split over.
        mesh: where the parameters lie, if on more than one device (see kd_jax.mesh.make).
    Raises: ValueError for a value that cannot work, before anything is run.
    """
    prompts = _check(model, prompt, num_samples, max_length, sample_temperature, top_k, top_p, first, batch_size, seed)
    settings = _settings(model, prompts, num_samples, max_length, sample_temperature, top_k, top_p, seed)
    return _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh)


def _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh) -> Iterator[Samples]:
    if first == num_samples:
        return
    params = model_lib.unstack(model.params)
    state = _start(model, params, prompts, first, batch_size, max_length, compute, mesh)
    least, num_steps = state.cache.num_pages, 8
    while True:
        began = time.perf_counter()
        state = _run(state, params, settings, model.architecture, compute, num_steps)
        state = _fit(state, settings, least)
        state, part = _collect(state, prompts, max_length)
        if len(part.index):
            yield part
        elif not bool(state.active.any()):
            return
        taken = time.perf_counter() - began
        # the clocks of several processes differ, what they run must not
        num_steps = distributed.same(int(np.clip(num_steps * min(2.0, _SECONDS_PER_CALL / taken), 1, 4096)))


def _fit(state: _State, settings: _Settings, least: int) -> _State:
    """Makes the pool of pages larger where the next step could find too few, and smaller where many are idle.

    Attention reads all of it. Each size is a program of its own, so there are few, and none is left for the next one.
    """
    pages, needed = state.cache, int(_needed(state, settings))
    _, slots, most = pages.table.shape
    step = -(-slots * most // 8)
    enough = max(least, min(-(-needed // step) * step, slots * most))
    if needed > pages.num_pages or enough < pages.num_pages - 2 * step:
        state = state._replace(cache=kv_cache.resize(pages, enough))
    return state


def _check(model, prompt, num_samples, max_length, temperature, top_k, top_p, first, batch_size, seed):
    """The prompts as a list of lists of ids; raises ValueError for what cannot work."""
    prompts = [list(map(int, p)) for p in ([prompt] if not len(prompt) or np.ndim(prompt[0]) == 0 else prompt)]
    for number, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {number} is empty; start with a BOS id or a text")
        outside = [i for i in ids if not 0 <= i < model.num_tokens]
        if outside:
            raise ValueError(f"prompt {number} has id {outside[0]}; the model's ids are 0 to {model.num_tokens - 1}")
        if len(ids) >= max_length:
            raise ValueError(f"max_length={max_length} leaves no room after prompt {number} of {len(ids)} ids")
    if max_length > model.architecture.max_position_embeddings:
        raise ValueError(
            f"max_length={max_length} is beyond the model's {model.architecture.max_position_embeddings} positions"
        )
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise ValueError(f"sample_temperature={temperature} must be finite and 0 or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; None turns it off")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; None turns it off")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= first <= num_samples or num_samples >= 2**31:
        raise ValueError(f"need 0 <= first={first} <= num_samples={num_samples} < 2**31")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 and below 2**32")
    return prompts


def _settings(model, prompts, num_samples, max_length, temperature, top_k, top_p, seed) -> _Settings:
    longest = max(map(len, prompts))
    eos = [*model.eos_ids, *[-1] * (-len(model.eos_ids) % 4)] or [-1] * 4
    return _Settings(
        prompts=jnp.asarray([ids + [0] * (longest - len(ids)) for ids in prompts], jnp.int32),
        prompt_lengths=jnp.asarray([len(ids) for ids in prompts], jnp.int32),
        start=jnp.int32(longest - 1 if len(prompts) == 1 else 0),
        num_samples=jnp.int32(num_samples), max_length=jnp.int32(max_length), seed=jnp.uint32(seed),
        temperature=jnp.float32(temperature), eos_ids=jnp.asarray(eos, jnp.int32),
        num_tokens=jnp.int32(model.num_tokens),
        top_k=None if top_k is None else jnp.int32(min(top_k, 2**31 - 1)),
        top_p=None if top_p is None else jnp.float32(top_p),
    )  # fmt: skip


def _start(model, params, prompts, first, batch_size, max_length, compute, mesh) -> _State:
    """Idle slots, and nothing done; with one prompt, its keys and values already lie in every slot."""
    devices = mesh_lib.batch_devices(mesh)
    slots = -(-batch_size // devices) * devices
    # a prompt for all is run through once; of several, each slot runs its own, and starts with nothing
    prompt = np.asarray(prompts[0] if len(prompts) == 1 else prompts[0][:1], np.int32)
    # rows are rounded up so that other lengths find the same program compiled
    width = -(-max_length // PAGE) * PAGE
    cache = _prefill(params, prompt, model.architecture, devices, slots // devices, width, compute)
    state = _State(
        cache=cache, slots=_rows(slots, width), active=np.zeros(slots, bool), done=_rows(8 * slots, width),
        num_done=np.int32(0), next_index=np.int32(first), steps=np.int32(0), active_steps=np.int32(0),
    )  # fmt: skip
    # Committed to where the parameters are, as what `_run` returns is: otherwise the second call compiles again.
    where = next(iter(cache.owner.devices())) if mesh is None else _shardings(mesh, state)
    if not distributed.several():
        return jax.device_put(state, where)
    place = {True: jax.device_put, False: distributed.spread}  # from the devices, from every host
    return jax.tree.map(lambda leaf, to: place[isinstance(leaf, jax.Array)](leaf, to), state, where)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _prefill(
    params, prompt, architecture: Architecture, groups: int, slots: int, length: int, compute: Compute
) -> Pages:  # fmt: skip
    """A pool whose slots all hold this prompt (but for its last token, which is written again)."""
    kept = _prompt_pages(len(prompt) - 1)
    cache = model_lib.empty_cache(architecture, 1, kept * PAGE, jnp.dtype(compute.dtype))
    if len(prompt) > 1:
        positions = jnp.arange(len(prompt))[None]
        _, cache = model_lib.extend(params, architecture, cache, prompt[None], positions, compute=compute)
    # a page more for each slot: all begin at once
    return kv_cache.paged(cache, groups, slots, slots * min(kept + 1, length // PAGE), length)


def _prompt_pages(start):
    """How many pages hold the positions before `start`."""
    return -(-start // PAGE)


def _rows(rows: int, length: int) -> _Rows:
    def zeros(dtype, *shape):
        return np.zeros((rows, *shape), dtype)  # each its own: donated buffers must not be shared

    wide = zeros(np.int32, length), zeros(np.float32, length), zeros(np.float32, length)
    return _Rows(zeros(np.int32), *wide, zeros(np.int32), zeros(bool))


def _shardings(mesh: Mesh, state: _State) -> _State:
    """Slots are split over the devices, what is done lies on all."""
    replicated = mesh_lib.sharding((), mesh)
    everywhere = jax.tree.map(lambda _: replicated, state)

    def split(tree):
        return jax.tree.map(lambda leaf: mesh_lib.sharding(("batch",) + (None,) * (leaf.ndim - 1), mesh), tree)

    return everywhere._replace(cache=split(state.cache), slots=split(state.slots), active=split(state.active))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _run(
    state: _State, params, settings: _Settings, architecture: Architecture, compute: Compute,
    num_steps: jax.Array,
) -> _State:  # fmt: skip
    """Up to num_steps steps; fewer where all is done, or where the next could find no room or too few pages."""
    slots, pool = state.active.shape[0], state.done.index.shape[0]
    last = state.steps + num_steps

    def goes_on(state: _State):
        left = state.active.any() | (state.next_index < settings.num_samples)
        fits = (state.num_done + slots <= pool) & (_needed(state, settings) <= state.cache.num_pages)
        return left & (state.steps < last) & fits

    def step(state: _State) -> _State:
        state = _refill(state, settings)
        state = _advance(state, params, settings, architecture, compute)
        return _retire(state, settings)

    return jax.lax.while_loop(goes_on, step, state)


@jax.jit
def _needed(state: _State, settings: _Settings) -> jax.Array:
    """How many pages a group has in use after the next step, at the most: an idle slot may start and need one."""
    runs = state.active | (state.next_index < settings.num_samples)
    positions = jnp.where(state.active, state.slots.length - 1, settings.start)
    new = kv_cache.missing(state.cache, jnp.where(runs, positions, state.cache.length)).sum(axis=1)
    return (state.cache.num_pages - kv_cache.free(state.cache) + new).max()


def _refill(state: _State, settings: _Settings) -> _State:
    """Gives idle slots the next samples."""
    wanted = ~state.active
    index = state.next_index + jnp.cumsum(wanted) - 1
    begins = wanted & (index < settings.num_samples)
    which = index % settings.prompts.shape[0]
    # A shared prompt's keys are in the slot already, and stay: what a sample writes comes after them. All but its last
    # token is thereby done. With several prompts, a slot runs through its own.
    length = jnp.full_like(index, settings.start + 1)
    prompt = settings.prompts[which]
    width = state.slots.tokens.shape[1]
    tokens = jnp.pad(prompt, ((0, 0), (0, width - prompt.shape[1])))
    slots = state.slots
    slots = _Rows(
        index=jnp.where(begins, index, slots.index),
        tokens=jnp.where(begins[:, None], tokens, slots.tokens),
        log_probs=jnp.where(begins[:, None], 0, slots.log_probs),
        sample_log_probs=jnp.where(begins[:, None], 0, slots.sample_log_probs),
        length=jnp.where(begins, length, slots.length),
        finished=slots.finished,  # of each step: `_advance` sets it
    )
    return state._replace(
        slots=slots, active=state.active | begins, next_index=state.next_index + begins.sum(dtype=jnp.int32)
    )


def _advance(state: _State, params, settings: _Settings, architecture: Architecture, compute: Compute) -> _State:
    """One token for every slot; what idle slots compute is thrown away."""
    slots = state.slots
    rows = jnp.arange(slots.length.shape[0])
    newest = slots.tokens[rows, slots.length - 1]  # the input of this step
    positions = jnp.where(state.active, slots.length - 1, state.cache.length)  # of an idle slot: none
    cache = kv_cache.open_pages(state.cache, positions)
    hidden, cache = model_lib.extend(
        params, architecture, cache, newest[:, None], positions[:, None], compute=compute
    )  # fmt: skip
    logits = model_lib.logits(params, hidden[:, 0])
    logits = jnp.where(jnp.arange(logits.shape[-1]) < settings.num_tokens, logits, -jnp.inf)
    drawn = sampling.sample(
        _uniforms(settings.seed, slots.index, slots.length), logits, settings.temperature, settings.top_k,
        settings.top_p,
    )  # fmt: skip

    # inside the prompt the next token is known
    given = slots.length < settings.prompt_lengths[slots.index % settings.prompts.shape[0]]
    put = jnp.where(state.active, slots.length, slots.tokens.shape[1])  # beyond the row: dropped
    token = jnp.where(given, slots.tokens[rows, jnp.minimum(put, slots.tokens.shape[1] - 1)], drawn.token)
    slots = slots._replace(
        tokens=slots.tokens.at[rows, put].set(token, mode="drop"),
        log_probs=slots.log_probs.at[rows, put].set(jnp.where(given, 0, drawn.log_prob), mode="drop"),
        sample_log_probs=slots.sample_log_probs.at[rows, put].set(
            jnp.where(given, 0, drawn.sample_log_prob), mode="drop"
        ),
        length=slots.length + state.active,
        finished=~given & (token[:, None] == settings.eos_ids).any(axis=-1),
    )
    return state._replace(
        cache=cache, slots=slots, steps=state.steps + 1, active_steps=state.active_steps + state.active.sum()
    )


def _uniforms(seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
    """Two uniforms [slot, 2] for the token of sample `index` at `position`."""

    def one(index, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position), (2,))

    return jax.vmap(one)(index, position)


def _retire(state: _State, settings: _Settings) -> _State:
    """Moves samples that are done from their slots to those that are, and gives their pages back."""
    done = state.active & (state.slots.finished | (state.slots.length >= settings.max_length))
    # a place beyond the pool is dropped
    place = jnp.where(done, state.num_done + jnp.cumsum(done) - 1, state.done.index.shape[0])
    pool = jax.tree.map(lambda pool, slot: pool.at[place].set(slot, mode="drop"), state.done, state.slots)
    cache = kv_cache.release(state.cache, done, _prompt_pages(settings.start))
    num_done = state.num_done + done.sum(dtype=jnp.int32)
    return state._replace(cache=cache, done=pool, active=state.active & ~done, num_done=num_done)


def _collect(state: _State, prompts: list[list[int]], width: int) -> tuple[_State, Samples]:
    """Empties the pool."""
    count, steps, active_steps = (int(x) for x in (state.num_done, state.steps, state.active_steps))
    rows = jax.tree.map(lambda leaf: leaf[:count, ...], distributed.fetch(state.done))
    index = rows.index.astype(np.int64)
    part = Samples(
        index=index, tokens=rows.tokens[:, :width], lengths=rows.length,
        prompt_lengths=np.array([len(prompts[i % len(prompts)]) for i in index], np.int32), finished=rows.finished,
        log_probs=rows.log_probs[:, :width], sample_log_probs=rows.sample_log_probs[:, :width],
        utilisation=active_steps / max(1, steps * state.active.shape[0]), steps=steps,
    )  # fmt: skip
    return state._replace(num_done=jnp.zeros_like(state.num_done)), part
