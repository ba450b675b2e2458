"""Sampling in a batch of slots, where the next sample starts as soon as another ends (continuous batching).

Sample i depends on (seed, i) alone: the uniforms of its token at a position come from a key folded from the seed, i and
the position. With samples_per_prompt, sample j of prompt i depends on (seed, i, j) alone. Its slot, the samples beside
it, the number of devices and restarts change a sample only where the rounding of the model's arithmetic does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import prefill
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode import start as start_lib
from kd_jax.lm.decode.slots import Rows, Settings, State
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.lm.model.kv_cache import PAGE
from kd_jax.lm.sampler_spec import WHOLE, SamplerSpec
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib

# A call of the device program takes about this long, so that progress is shown and Ctrl-C is answered.
_SECONDS_PER_CALL = 1.0
# A pool that takes less than this share of the weights' bytes has all its pages from the start, as each size of a pool
# is a program to compile. Attention reads the whole pool, but so little takes a small part of a step.
_SMALL_POOL = 1 / 8


class Samples(NamedTuple):
    """Finished samples, as NumPy arrays, one row each.

    Attributes:
        index: int64 [n], which sample.
        tokens: int32 [n, max_length], prompt included, EOS kept; 0 beyond the length.
        lengths: int32 [n], prompt included.
        prompt_lengths: int32 [n].
        finished: bool [n]; ended with an EOS id, else cut at max_length or max_new_tokens.
        log_probs: float32 [n, max_length], of each generated token under the model itself (temperature 1); else 0.
        sample_log_probs: the same under the distribution that it was drawn from.
        utilisation: share of the slots' steps so far that ran a sample; there are fewer slots towards the end.
        steps: number of steps so far.
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


def generate(
    model: Model, prompt: str | Sequence[int] | Sequence[str | Sequence[int]], num_samples: int, *, max_length: int,
    max_new_tokens: int | None = None, sampler: SamplerSpec = WHOLE, seed: int = 0,
    samples_per_prompt: int | None = None, batch_size: int = 64, compute: Compute = DEFAULT, mesh: Mesh | None = None,
    **knobs: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Samples 0 .. num_samples - 1 in order; see `stream` for the arguments and for more than these three arrays.

    Args:
        sampler: how tokens are drawn.
        knobs: instead of it, settings of SamplerSpec such as sample_temperature=0.8 or top_k=50.

    Returns: tokens int32 [num_samples, max_length], lengths int32 [num_samples], log_probs float32
    [num_samples, max_length] under the model itself.
    """
    parts = stream(
        model, prompt, num_samples, max_length=max_length, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed,
        samples_per_prompt=samples_per_prompt, batch_size=batch_size, compute=compute, mesh=mesh, **knobs,
    )  # fmt: skip
    tokens = np.zeros((num_samples, max_length), np.int32)
    lengths = np.zeros(num_samples, np.int32)
    log_probs = np.zeros((num_samples, max_length), np.float32)
    for part in parts:
        tokens[part.index], lengths[part.index], log_probs[part.index] = part.tokens, part.lengths, part.log_probs
    return tokens, lengths, log_probs


def stream(
    model: Model, prompt: str | Sequence[int] | Sequence[str | Sequence[int]], num_samples: int, *, max_length: int,
    max_new_tokens: int | None = None, sampler: SamplerSpec = WHOLE, seed: int = 0,
    samples_per_prompt: int | None = None, first: int = 0, batch_size: int = 64, compute: Compute = DEFAULT,
    mesh: Mesh | None = None, **knobs: float | None,
) -> Iterator[Samples]:  # fmt: skip
    """Yields samples first .. num_samples - 1 as they finish, about once a second, each a Samples of those finished.

    Args:
        model: to sample from.
        num_samples: one more than the number of the last sample.
        prompt: text or ids that all samples start with, or a list of such; sample i starts with number i modulo their
            count, or as samples_per_prompt says. A text begins with BOS where the model's tokenizer puts it there; it
            gets no chat template.
        samples_per_prompt: k of these start with each prompt: sample i * k + j is sample j of prompt i, and a function
            of the seed, i and j.
        max_length: longest sample, prompt included.
        max_new_tokens: most tokens after each prompt, whatever its length; None for as many as max_length leaves.
        sampler: how tokens are drawn.
        knobs: instead of it, settings of SamplerSpec by name; None is off.
        seed, first: sample i is a function of the seed and i; those before `first` are left out.
        batch_size: samples that run at a time, rounded up to a multiple of the devices they are split over. On CPUs
            there are fewer once no more samples are left to start, if that is quicker.
        mesh: where the parameters lie, if on more than one device (see kd_jax.parallel.mesh.make).
    Raises: ValueError for a value that cannot work, before anything is run.
    """
    prompts = _check(model, prompt, num_samples, max_length, max_new_tokens, first, batch_size, seed)
    if samples_per_prompt is not None and not 0 < num_samples <= samples_per_prompt * len(prompts):
        most = samples_per_prompt * len(prompts)
        raise ValueError(
            f"num_samples={num_samples} must be from 1 to {most}, samples_per_prompt={samples_per_prompt} times the "
            "number of prompts"
        )
    if samples_per_prompt is None and len(prompts) == 1:
        prompt, others = prompts[0], {}
    else:
        prompt, others = [0], {"refill": jnp.int32(1), "samples_per_prompt": jnp.int32(samples_per_prompt or 0)}
    sampler = _sampler(sampler, knobs)
    settings = start_lib.settings(model, prompt, num_samples, max_length, sampler, seed, max_new_tokens)
    settings = settings._replace(**others)
    return _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh)


def _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh) -> Iterator[Samples]:
    left = num_samples - first
    if not left:
        return
    compute = dataclasses.replace(compute, mesh=mesh)
    params, architecture = model.params, model.architecture
    params = model_lib.unstack(params) if mesh is None else start_lib.laid_out(params, architecture, mesh)
    each = int(settings.samples_per_prompt) or None
    state, settings, queue = _start(model, params, prompts, settings, first, batch_size, max_length, compute, mesh)
    common = None if queue is None else prefill.common(params, queue, model.architecture, compute)
    # The first call is short, as nobody knows yet how long a step takes.
    pages, num_steps = state.cache.num_pages // state.cache.num_slots, 8
    steps = slot_steps = active_steps = 0
    while left:
        size = state.cache.num_pages
        if queue is not None:
            state = prefill.start(state, params, queue, common, pages, model.architecture, compute)
        began, slots = time.perf_counter(), state.active.shape[0]
        state = slots_lib.run(state, params, settings, model.architecture, compute, num_steps)
        # int() waits for the device, so that `taken` below is the time of the steps and not of their launch.
        taken_steps, ran = int(state.steps), int(state.active_steps)
        steps, slot_steps, active_steps = steps + taken_steps, slot_steps + taken_steps * slots, active_steps + ran
        state, rows = _collect(state)
        left -= len(rows.index)
        if left:
            state = slots_lib.fit(state, settings, pages)
        if state.cache.num_pages != size:
            _give_back()
        taken = time.perf_counter() - began
        # Yielded after the clock is read: the time that a caller spends on samples is not the device's.
        if len(rows.index):
            yield _samples(rows, prompts, each, max_length, active_steps / slot_steps, steps)
        # At most doubled, since one quick call proves little (and the first one compiles). Clocks differ between
        # processes, and all of them have to run the same number of steps.
        num_steps = distributed.same(int(np.clip(num_steps * min(2.0, _SECONDS_PER_CALL / taken), 1, 4096)))
    del state
    _give_back()


def _give_back() -> None:
    """Returns freed memory to the system, where the C library is glibc."""
    # glibc keeps freed arrays of less than 32 MB: here two for each layer, of every size that the cache has had.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sampler(sampler: SamplerSpec, knobs: dict[str, float | None]) -> SamplerSpec:
    given = {name: value for name, value in knobs.items() if value is not None}
    return dataclasses.replace(sampler, **given)


def _check(model, prompt, num_samples, max_length, max_new_tokens, first, batch_size, seed):
    """The prompts as a list of lists of ids. Raises ValueError for arguments that cannot work."""
    # One prompt may be given as it is, without a list around it.
    several = not isinstance(prompt, str) and any(isinstance(p, str) or np.ndim(p) for p in prompt)
    given = prompt if several else [prompt]
    if model.tokenizer is None and any(isinstance(p, str) for p in given):
        raise ValueError("the model has no tokenizer, so prompts must be token ids, not text")
    prompts = [model.tokenizer.encode_prompt(p) if isinstance(p, str) else list(map(int, p)) for p in given]
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
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    # Indices of samples are int32 on the device.
    if not 0 <= first <= num_samples or num_samples >= 2**31:
        raise ValueError(f"need 0 <= first={first} <= num_samples={num_samples} < 2**31")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 and below 2**32")
    return prompts


def _start(
    model, params, prompts, settings, first, batch_size, max_length, compute, mesh
) -> tuple[State, Settings, prefill.Queue | None]:
    """Idle slots and no finished samples; settings for so many slots; and the queue of prompts of their own.

    A shared prompt's KV cache is resident in every slot.
    """
    devices = mesh_lib.batch_devices(mesh)
    each, wanted = (-(-rows // devices) for rows in (batch_size, int(settings.num_samples) - first))
    slots = devices * int(slots_lib.enough(each, wanted, max_length, settings.worth))
    # rounded up to whole pages, so that other lengths use the same compiled program
    width, queue, pages = -(-max_length // PAGE) * PAGE, None, 0
    if settings.refill:
        queue = prefill.Queue(
            prompts, int(settings.samples_per_prompt) or None, first=first, num_samples=int(settings.num_samples),
            groups=devices, slots=slots // devices,
        )  # fmt: skip
        settings = settings._replace(refill=jnp.int32(queue.at_once))
        pages = -(-max(map(len, prompts)) // PAGE)
    a = model.architecture
    position = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * jnp.dtype(compute.dtype).itemsize
    if slots // devices * width * position < _SMALL_POOL * mesh_lib.device_bytes(params):
        pages = width // PAGE
    prompt = np.asarray(settings.prompt)
    cache = start_lib.resident(params, prompt, model.architecture, devices, slots // devices, width, pages, compute)
    state = start_lib.idle(cache, slots, width, first, len(prompt))
    # Committed to the parameters' devices, as what `run` returns is: otherwise the second call compiles again.
    where = next(iter(cache.owner.devices())) if mesh is None else slots_lib.shardings(state, mesh)
    if not distributed.several():
        return jax.device_put(state, where), settings, queue
    place = {True: jax.device_put, False: distributed.spread}  # arrays on devices; arrays that every host has
    state = jax.tree.map(lambda leaf, to: place[isinstance(leaf, jax.Array)](leaf, to), state, where)
    return state, settings, queue


def _collect(state: State) -> tuple[State, Rows]:
    """Takes the finished samples out of the state, with its counts back at 0."""
    filled, done = distributed.fetch(state.num_done), state.done
    if len(filled) > 1:
        # Only the filled part is fetched; sizes are powers of two, since each is a compiled program.
        done = _first(done, min(1 << (int(filled.max()) - 1).bit_length(), done.index.shape[1]))
    done = distributed.fetch(done)
    rows = jax.tree.map(lambda leaf: np.concatenate([leaf[i, :n] for i, n in enumerate(filled)]), done)
    counts = {name: jnp.zeros_like(getattr(state, name)) for name in ("num_done", "steps", "active_steps")}
    return state._replace(**counts), rows


@functools.partial(jax.jit, static_argnums=1)
def _first(done: Rows, places: int) -> Rows:
    return jax.tree.map(lambda leaf: leaf[:, :places], done)


def _samples(
    rows: Rows, prompts: list[list[int]], each: int | None, width: int, utilisation: float, steps: int
) -> Samples:
    index = rows.index.astype(np.int64)
    which = prefill.of_sample(index, len(prompts), each)
    return Samples(
        index=index, tokens=rows.tokens[:, :width], lengths=rows.length,
        prompt_lengths=np.array([len(prompts[i]) for i in which], np.int32), finished=rows.finished,
        log_probs=rows.log_probs[:, :width], sample_log_probs=rows.sample_log_probs[:, :width],
        utilisation=utilisation, steps=steps,
    )  # fmt: skip
