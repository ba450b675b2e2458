"""The device programs of sampling, lowered from shapes: to plan their memory, and for devices that are not here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.decode import prefill
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode import start as start_lib
from kd_jax.lm.model import DEFAULT, Compute, Model, kv_cache
from kd_jax.lm.model.kv_cache import PAGE
from kd_jax.lm.sampler_spec import WHOLE, SamplerSpec
from kd_jax.parallel import mesh as mesh_lib


def lower(
    model: Model, prompt_length: int, *, max_length: int, batch_size: int, sampler: SamplerSpec = WHOLE,
    compute: Compute = DEFAULT, mesh: Mesh | None = None, platform: str | None = None, **knobs: float | None,
) -> jax.stages.Lowered:  # fmt: skip
    """Lowers the device program of `stream` for a plan of its memory; nothing is run. Every slot has all of its pages.

    Args:
        model: `model.params` are shapes, with shardings over the mesh if there is one.
        prompt_length: ids of the one prompt that all samples share.
        max_length, batch_size, sampler, mesh, knobs: as in `stream`.
        platform: "cuda", "tpu" or "cpu"; None for that of the devices.
    """
    sampler = dataclasses.replace(sampler, **knobs)
    settings = start_lib.settings(model, [0] * prompt_length, 1, max_length, sampler, 0)
    compute = dataclasses.replace(compute, mesh=mesh)
    state, params = _shapes(model, prompt_length, max_length, batch_size, compute)
    traced = slots_lib.run.trace(state, params, settings, model.architecture, compute, 1)
    return traced.lower(lowering_platforms=platform and (platform,))


def lower_prompts(
    model: Model, longest: int, *, max_length: int, batch_size: int, compute: Compute = DEFAULT,
    mesh: Mesh | None = None, platform: str | None = None,
) -> jax.stages.Lowered:  # fmt: skip
    """Lowers the program that runs prompts of their own and starts their samples; arguments as of `lower`.

    Args:
        longest: ids of the longest prompt.
    """
    compute = dataclasses.replace(compute, mesh=mesh)
    state, params = _shapes(model, 1, max_length, batch_size, compute)
    return prefill.lower(state, params, longest, model.architecture, compute, platform)


def _shapes(model: Model, prompt_length: int, max_length: int, batch_size: int, compute: Compute):
    """Shapes of the loop's state and weights, with their shardings."""
    mesh = compute.mesh
    devices = mesh_lib.batch_devices(mesh)
    # As the sampler would: every device has the same number of slots.
    slots = -(-batch_size // devices) * devices
    width = -(-max_length // PAGE) * PAGE

    def on(shardings, shapes):
        return jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, shardings
        )

    params = jax.eval_shape(model_lib.unstack, model.params)
    if mesh is not None:
        params = on(mesh_lib.shardings(start_lib.weight_axes(model.architecture), params, mesh), params)

    def of_prompt(params, prompt):
        return start_lib.resident(params, prompt, model.architecture, devices, slots // devices, width, 0, compute)

    pages = jax.eval_shape(of_prompt, params, jax.ShapeDtypeStruct((prompt_length,), jnp.int32))
    state = start_lib.idle(kv_cache.resized(pages, slots // devices * width // PAGE), slots, width, 0, prompt_length)
    return state if mesh is None else on(slots_lib.shardings(state, mesh), state), params
