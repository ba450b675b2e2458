"""p* and the teacher of a language-model experiment: from where the config says, or, of the teacher, a stage's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.experiment import specs as settings_lib
from kd_jax.lm.model import PRESETS, Model
from kd_jax.parallel import mesh as mesh_lib


def p_star(config) -> Model:
    """p* with its weights; a random one where the config has no source."""
    return _load_p_star(
        config.p_star.source, config.p_star.architecture, config.seed, config.sampling.dtype, settings_lib.mesh(config)
    )


@functools.lru_cache(maxsize=1)
def _load_p_star(source: str, preset: str, seed: int, dtype: str, over) -> Model:
    if source:
        return weights.load(source, dtype=dtype, mesh=over)
    shape, kind, where = PRESETS[preset], jnp.dtype(dtype), None
    if over is not None:
        where = mesh_lib.shardings(model_lib.logical_axes(shape), model_lib.abstract(shape, kind), over)
    init = jax.jit(model_lib.init, static_argnums=(1, 2), out_shardings=where)
    params = init(jax.random.key(seed), shape, kind)
    # such a model says any id as soon as any other; one of them ends a sequence
    return Model(PRESETS[preset], params, eos_ids=(0,))


@functools.lru_cache(maxsize=2)
def _source_identity(source: str) -> str:
    return weights.identity(source)


def p_star_identity(config) -> str:
    """What tells p*'s weights from others, found without loading them."""
    return _source_identity(config.p_star.source) if config.p_star.source else f"random, seed {config.seed}"


def teacher(config, inputs: dict[str, Path], dtype: str, over) -> Model:
    """The teacher with its weights, over the mesh `over`; p* itself where both have one source."""
    source = config.teacher.source
    if source and source == config.p_star.source:
        return _load_p_star(source, config.p_star.architecture, config.seed, dtype, over)
    return weights.load(source or inputs["teacher"], dtype=dtype, mesh=over)


def teacher_inputs(config) -> tuple[str, ...]:
    """The stages that a stage which uses the teacher needs for it."""
    return () if config.teacher.source else ("teacher",)


def teacher_identity(config) -> dict[str, Any]:
    """What such a stage's settings say of it; nothing where it is a stage itself, whose key says it all."""
    return {"teacher": _source_identity(config.teacher.source)} if config.teacher.source else {}
