"""What sampling starts from: the numbers of the loop, the weights as it reads them, and idle slots with a prompt."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode.slots import Rows, Settings, State
from kd_jax.lm.model import Architecture, Compute, Model, kv_cache
from kd_jax.lm.model.kv_cache import PAGE, Pages
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.parallel import mesh as mesh_lib

# FLOPs that take a CPU as long as loading one more compiled program from disk. An accelerator gains nothing from fewer
# slots: a step there takes as long as reading the weights.
_PROGRAM = 3e11


def settings(
    model: Model,
    prompt: Sequence[int],
    num_samples: int,
    max_length: int,
    sampler: SamplerSpec,
    seed: int,
    max_new_tokens: int | None = None,
) -> Settings:
    """The loop's settings for samples that share a prompt; arguments as of kd_jax.lm.decode.stream."""
    # A token costs about 2 FLOPs a parameter, so `worth` is in steps of a slot.
    worth = _PROGRAM / (2 * model.architecture.num_parameters) if jax.default_backend() == "cpu" else np.inf
    # The number of EOS ids is a shape: padded, one compiled program serves models with one to four of them.
    eos = [*model.eos_ids, *[-1] * (-len(model.eos_ids) % 4)] or [-1] * 4
    return Settings(
        prompt=jnp.asarray(prompt, jnp.int32), start=jnp.int32(len(prompt) - 1), num_samples=jnp.int32(num_samples),
        refill=jnp.int32(0), samples_per_prompt=jnp.int32(0), max_length=jnp.int32(max_length),
        max_new=jnp.int32(max_new_tokens or max_length),
        worth=jnp.int32(min(worth + 1, 2**31 - 1)), seed=jnp.uint32(seed), eos_ids=jnp.asarray(eos, jnp.int32),
        num_tokens=jnp.int32(model.num_tokens), knobs=sampler.arrays(),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(1, 2))
def laid_out(params, architecture: Architecture, mesh: Mesh):
    """The weights as the loop reads them: layer by layer, whole on each device but for what tensor splits.

    Where fsdp splits weights, training gathers them for each layer; a sampling step has too few tokens for that.
    """
    return jax.tree.map(
        lambda leaf, axes: mesh_lib.constrain(leaf, axes, mesh), model_lib.unstack(params), weight_axes(architecture)
    )


def weight_axes(architecture: Architecture) -> dict[str, Any]:
    """Logical axes of the weights that `laid_out` returns."""
    axes = model_lib.logical_axes(architecture)

    def whole(names):
        return tuple(None if name == "embed" else name for name in names)

    layer = {name: whole(names[1:]) for name, names in axes.pop("layers").items()}
    return {name: whole(names) for name, names in axes.items()} | {"layers": (layer,) * architecture.num_hidden_layers}


def idle(cache: Pages, slots: int, width: int, first: int, prompt_length: int) -> State:
    """The loop's state before its first step.

    Args:
        cache: a pool of pages.
        slots: of all groups together.
        width: the most tokens of a sample.
        first: the sample that starts first.
        prompt_length: of the prompt that is resident.
    """
    groups, each = cache.table.shape[:2]
    return State(
        cache=cache, slots=_rows(width, slots), active=np.zeros(slots, bool),
        prompt_length=np.full(slots, prompt_length, np.int32),
        done=_rows(width, groups, slots_lib.DONE * each), num_done=np.zeros(groups, np.int32),
        next_index=np.int32(first), steps=np.int32(0), active_steps=np.int32(0),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def resident(
    params, prompt, architecture: Architecture, groups: int, slots: int, length: int, pages: int, compute: Compute
) -> Pages:  # fmt: skip
    """A pool whose slots all hold this prompt, but for its last token, which the first step writes.

    Args:
        groups, slots: groups of slots, and slots of each.
        length: the most positions of a slot.
        pages: of each slot beside the prompt's, and beside the one that the first step opens.
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
