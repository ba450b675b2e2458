"""Sampling in a batch of slots, where the next sample starts as soon as another ends (continuous batching).

Sample i depends on (seed, i) alone: the uniforms of its token at a position come from a key folded from the seed, i and
the position. With samples_per_prompt, sample j of prompt i depends on (seed, i, j) alone. Its slot, the samples beside
it, the number of devices and restarts change a sample only where the rounding of the model's arithmetic does.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import prefill
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode.next_token import WHOLE, SamplerSpec
from kd_jax.lm.decode.slots import Rows, Settings, State
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model, kv_cache
from kd_jax.lm.model.kv_cache import PAGE, Pages
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib

# A call of the device program takes about this long, so that progress is shown and Ctrl-C is answered.
_SECONDS_PER_CALL = 1.0
# FLOPs that take a CPU as long as loading one more compiled program from disk. An accelerator gains nothing from fewer
# slots: a step there takes as long as reading the weights.
_PROGRAM = 3e11


class Samples(NamedTuple):
    """Finished samples, as NumPy arrays, one row each.

    Attributes:
        index: int64 [n], which sample.
        tokens: int32 [n, max_length], prompt included, EOS kept; 0 beyond the length.
        lengths: int32 [n], prompt included.
        prompt_lengths: int32 [n].
        finished: bool [n]; ended with an EOS id, else cut at max_length.
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
    model: Model, prompt: Sequence[int] | Sequence[Sequence[int]], num_samples: int, *, max_length: int,
    sampler: SamplerSpec = WHOLE, seed: int = 0, samples_per_prompt: int | None = None, batch_size: int = 64,
    compute: Compute = DEFAULT, mesh: Mesh | None = None, **knobs: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Samples 0 .. num_samples - 1 in order; see `stream` for the arguments and for more than these three arrays.

    Args:
        sampler: how tokens are drawn.
        knobs: instead of it, settings of SamplerSpec such as sample_temperature=0.8 or top_k=50.

    Returns: tokens int32 [num_samples, max_length], lengths int32 [num_samples], log_probs float32
    [num_samples, max_length] under the model itself.
    """
    parts = stream(
        model, prompt, num_samples, max_length=max_length, sampler=sampler, seed=seed,
        samples_per_prompt=samples_per_prompt, batch_size=batch_size, compute=compute, mesh=mesh, **knobs,
    )  # fmt: skip
    tokens = np.zeros((num_samples, max_length), np.int32)
    lengths = np.zeros(num_samples, np.int32)
    log_probs = np.zeros((num_samples, max_length), np.float32)
    for part in parts:
        tokens[part.index], lengths[part.index], log_probs[part.index] = part.tokens, part.lengths, part.log_probs
    return tokens, lengths, log_probs


def stream(
    model: Model, prompt: Sequence[int] | Sequence[Sequence[int]], num_samples: int, *, max_length: int,
    sampler: SamplerSpec = WHOLE, seed: int = 0, samples_per_prompt: int | None = None, first: int = 0,
    batch_size: int = 64, compute: Compute = DEFAULT, mesh: Mesh | None = None, **knobs: float | None,
) -> Iterator[Samples]:  # fmt: skip
    """Yields samples first .. num_samples - 1 as they finish, about once a second.

    Args:
        prompt: ids that all samples start with, or a list of such lists; sample i starts with number i modulo their
            count, or as samples_per_prompt says.
        samples_per_prompt: k of these start with each prompt: sample i * k + j is sample j of prompt i, and a function
            of the seed, i and j.
        max_length: longest sample, prompt included.
        sampler: how tokens are drawn.
        knobs: instead of it, settings of SamplerSpec by name; None is off.
        seed, first: sample i is a function of the seed and i; those before `first` are left out.
        batch_size: samples that run at a time, rounded up to a multiple of the devices they are split over. On CPUs
            there are fewer once no more samples are left to start, if that is quicker.
        mesh: where the parameters lie, if on more than one device (see kd_jax.parallel.mesh.make).
    Raises: ValueError for a value that cannot work, before anything is run.
    """
    prompts = _check(model, prompt, num_samples, max_length, first, batch_size, seed)
    if samples_per_prompt is not None and not 0 < num_samples <= samples_per_prompt * len(prompts):
        raise ValueError(f"{len(prompts)} prompts with {samples_per_prompt} samples each are not {num_samples} samples")
    if samples_per_prompt is None and len(prompts) == 1:
        settings = _settings(model, prompts[0], num_samples, max_length, _sampler(sampler, knobs), seed)
    else:
        settings = _settings(model, [0], num_samples, max_length, _sampler(sampler, knobs), seed)
        settings = settings._replace(refill=jnp.int32(1), samples_per_prompt=jnp.int32(samples_per_prompt or 0))
    return _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh)


def _stream(model, prompts, settings, first, num_samples, max_length, batch_size, compute, mesh) -> Iterator[Samples]:
    left = num_samples - first
    if not left:
        return
    compute = dataclasses.replace(compute, mesh=mesh)
    params = model_lib.unstack(model.params) if mesh is None else _laid_out(model.params, model.architecture, mesh)
    each = int(settings.samples_per_prompt) or None
    state, settings, queue = _start(model, params, prompts, settings, first, batch_size, max_length, compute, mesh)
    common = None if queue is None else prefill.common(params, queue, model.architecture, compute)
    # The first call is short, as nobody knows yet how long a step takes.
    pages, num_steps = state.cache.num_pages // state.cache.num_slots, 8
    steps = slot_steps = active_steps = 0
    while left:
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
        taken = time.perf_counter() - began
        # Yielded after the clock is read: the time that a caller spends on samples is not the device's.
        if len(rows.index):
            yield _samples(rows, prompts, each, max_length, active_steps / slot_steps, steps)
        # At most doubled, since one quick call proves little (and the first one compiles). Clocks differ between
        # processes, and all of them have to run the same number of steps.
        num_steps = distributed.same(int(np.clip(num_steps * min(2.0, _SECONDS_PER_CALL / taken), 1, 4096)))


def _sampler(sampler: SamplerSpec, knobs: dict[str, float | None]) -> SamplerSpec:
    given = {name: value for name, value in knobs.items() if value is not None}
    return dataclasses.replace(sampler, **given)


def _check(model, prompt, num_samples, max_length, first, batch_size, seed):
    """The prompts as a list of lists of ids. Raises ValueError for arguments that cannot work."""
    # One prompt may be given as it is, without a list around it.
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
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    # Indices of samples are int32 on the device.
    if not 0 <= first <= num_samples or num_samples >= 2**31:
        raise ValueError(f"need 0 <= first={first} <= num_samples={num_samples} < 2**31")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 and below 2**32")
    return prompts


def _settings(model, prompt, num_samples, max_length, sampler: SamplerSpec, seed) -> Settings:
    # A token costs about 2 FLOPs a parameter, so `worth` is in steps of a slot.
    worth = _PROGRAM / (2 * model.architecture.num_parameters) if jax.default_backend() == "cpu" else np.inf
    # The number of EOS ids is a shape: padded, one compiled program serves models with one to four of them.
    eos = [*model.eos_ids, *[-1] * (-len(model.eos_ids) % 4)] or [-1] * 4
    return Settings(
        prompt=jnp.asarray(prompt, jnp.int32), start=jnp.int32(len(prompt) - 1), num_samples=jnp.int32(num_samples),
        refill=jnp.int32(0), samples_per_prompt=jnp.int32(0), max_length=jnp.int32(max_length),
        worth=jnp.int32(min(worth + 1, 2**31 - 1)), seed=jnp.uint32(seed), eos_ids=jnp.asarray(eos, jnp.int32),
        num_tokens=jnp.int32(model.num_tokens), knobs=sampler.arrays(),
    )  # fmt: skip


def lower(
    model: Model, prompt_length: int, *, max_length: int, batch_size: int, sampler: SamplerSpec = WHOLE,
    compute: Compute = DEFAULT, mesh: Mesh | None = None, **knobs: float | None,
) -> jax.stages.Lowered:  # fmt: skip
    """Lowers the device program of `stream` for a plan of its memory; nothing is run. Every slot has all of its pages.

    Args:
        model: `model.params` are shapes, with shardings over the mesh if there is one.
        prompt_length: ids of the one prompt that all samples share.
        max_length, batch_size, sampler, mesh, knobs: as in `stream`.
    """
    devices = mesh_lib.batch_devices(mesh)
    # As `_start` would: every device has the same number of slots.
    slots = -(-batch_size // devices) * devices
    width = -(-max_length // PAGE) * PAGE
    compute = dataclasses.replace(compute, mesh=mesh)

    def on(shardings, shapes):
        return jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
        )

    params = jax.eval_shape(model_lib.unstack, model.params)
    if mesh is not None:
        params = on(mesh_lib.shardings(_axes(model.architecture), params, mesh), params)

    def of_prompt(params, prompt):
        return _prefill(params, prompt, model.architecture, devices, slots // devices, width, 0, compute)

    pages = jax.eval_shape(of_prompt, params, jax.ShapeDtypeStruct((prompt_length,), jnp.int32))
    state = _empty(kv_cache.resized(pages, slots // devices * width // PAGE), slots, width, 0)
    if mesh is not None:
        state = on(slots_lib.shardings(state, mesh), state)
    settings = _settings(model, [0] * prompt_length, 1, max_length, _sampler(sampler, knobs), 0)
    return slots_lib.run.lower(state, params, settings, model.architecture, compute, 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _laid_out(params, architecture: Architecture, mesh: Mesh):
    """The weights as the loop reads them: layer by layer, whole on each device but for what tensor splits.

    Where fsdp splits weights, training gathers them for each layer; a sampling step has too few tokens for that.
    """
    return jax.tree.map(
        lambda leaf, axes: mesh_lib.constrain(leaf, axes, mesh), model_lib.unstack(params), _axes(architecture)
    )


def _axes(architecture: Architecture) -> dict[str, Any]:
    """Logical axes of the weights that `_laid_out` returns."""
    axes = model_lib.logical_axes(architecture)

    def whole(names):
        return tuple(None if name == "embed" else name for name in names)

    layer = {name: whole(names[1:]) for name, names in axes.pop("layers").items()}
    return {name: whole(names) for name, names in axes.items()} | {"layers": (layer,) * architecture.num_hidden_layers}


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
    prompt = np.asarray(settings.prompt)
    cache = _prefill(params, prompt, model.architecture, devices, slots // devices, width, pages, compute)
    state = _empty(cache, slots, width, first)
    # Committed to the parameters' devices, as what `run` returns is: otherwise the second call compiles again.
    where = next(iter(cache.owner.devices())) if mesh is None else slots_lib.shardings(state, mesh)
    if not distributed.several():
        return jax.device_put(state, where), settings, queue
    place = {True: jax.device_put, False: distributed.spread}  # arrays on devices; arrays that every host has
    state = jax.tree.map(lambda leaf, to: place[isinstance(leaf, jax.Array)](leaf, to), state, where)
    return state, settings, queue


def _empty(cache: Pages, slots: int, width: int, first: int) -> State:
    groups, each = cache.table.shape[:2]
    return State(
        cache=cache, slots=_rows(width, slots), active=np.zeros(slots, bool),
        done=_rows(width, groups, slots_lib.DONE * each), num_done=np.zeros(groups, np.int32),
        next_index=np.int32(first), steps=np.int32(0), active_steps=np.int32(0),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _prefill(
    params, prompt, architecture: Architecture, groups: int, slots: int, length: int, pages: int, compute: Compute
) -> Pages:  # fmt: skip
    """A pool whose slots all hold this prompt, but for its last token, which the first step writes.

    Each slot has room for `pages` pages more, and for one that the first step opens.
    """
    kept = slots_lib.prompt_pages(len(prompt) - 1)
    cache = model_lib.empty_cache(architecture, 1, kept * PAGE, jnp.dtype(compute.dtype))
    if len(prompt) > 1:
        positions = jnp.arange(len(prompt))[None]
        _, cache = model_lib.extend(params, architecture, cache, prompt[None], positions, compute=compute)
    return kv_cache.paged(cache, groups, slots, slots * min(kept + pages + 1, length // PAGE), length)


def _rows(length: int, *rows: int) -> Rows:
    def zeros(dtype, *shape):
        return np.zeros((*rows, *shape), dtype)  # an array each: donated buffers must not be shared

    wide = zeros(np.int32, length), zeros(np.float32, length), zeros(np.float32, length)
    return Rows(zeros(np.int32), *wide, zeros(np.int32), zeros(bool))


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
