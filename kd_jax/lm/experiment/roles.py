"""p* and the teacher: loaded from the sources that the config names, or the teacher from its stage."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.corpus import compatibility
from kd_jax.lm.experiment.arms import of_teacher
from kd_jax.lm.experiment.specs import LmSpec, described, make_mesh, shallower
from kd_jax.lm.model import PRESETS, Model
from kd_jax.parallel import mesh as mesh_lib


def p_star(spec: LmSpec) -> Model:
    """p* with its weights; random weights where the config has no source."""
    return _load_p_star(
        spec.p_star.source, spec.p_star.architecture, spec.seed, spec.sampling.dtype, make_mesh(spec.mesh)
    )


# Kept, so that p* is loaded once for all stages; only one, since its weights may be most of the memory.
@functools.lru_cache(maxsize=1)
def _load_p_star(source: str, preset: str, seed: int, dtype: str, mesh: Mesh | None) -> Model:
    if source:
        return weights.load(source, dtype=dtype, mesh=mesh)
    shape, kind, shardings = PRESETS[preset], jnp.dtype(dtype), None
    if mesh is not None:
        shardings = mesh_lib.shardings(model_lib.logical_axes(shape), model_lib.abstract(shape, kind), mesh)
    # Each device draws its own part: p* need not fit on one.
    init = jax.jit(model_lib.init, static_argnums=(1, 2), out_shardings=shardings)
    params = init(jax.random.key(seed), shape, kind)
    # random weights make all ids about equally probable; id 0 ends a sequence
    return Model(shape, params, eos_ids=(0,))


def other_vocabulary(spec: LmSpec) -> str | None:
    """How the ids of a teacher that the config names differ from p*'s, in words; None where they do not."""
    sources = spec.teacher.source, spec.p_star.source
    if not all(sources) or sources[0] == sources[1]:
        return None
    return compatibility.other_vocabulary("the teacher", described(sources[0]), "p*", described(sources[1]))


# Kept: the bytes of all files are hashed for it.
@functools.lru_cache(maxsize=4)
def source_identity(source: str) -> str:
    """A fingerprint of a model, found without loading it."""
    return weights.identity(source)


def p_star_identity(spec: LmSpec) -> str:
    """A fingerprint of p*'s weights, found without loading them."""
    return source_identity(spec.p_star.source) if spec.p_star.source else f"random, seed {spec.seed}"


def teacher(spec: LmSpec, inputs: dict[str, Path], dtype: str, mesh: Mesh | None, number: int = 0) -> Model:
    """The teacher with its weights on a mesh; p* itself, loaded once, where both have the same source.

    Args:
        inputs: folders of the stages that are inputs, by name.
        dtype: of the weights.
        mesh: where they lie; None for one device.
        number: which of the run's teachers.
    """
    source = spec.teacher.source
    if source and source == spec.p_star.source:
        return _load_p_star(source, spec.p_star.architecture, spec.seed, dtype, mesh)
    return weights.load(source or inputs[of_teacher("teacher", number)], dtype=dtype, mesh=mesh)


def start(spec: LmSpec, role: str, running_teacher: Model | None) -> Any:
    """The weights that the training of a role starts from; None for random ones.

    Args:
        running_teacher: the teacher inside the updates. Where students start from the same weights, these are shared.
    """
    shape, mesh = getattr(spec, role), make_mesh(spec.mesh)
    if not shape.start:
        return None
    same = shape.start == spec.teacher.source and mesh == make_mesh(spec.teacher_mesh)
    if same and running_teacher is not None and running_teacher.params["embedding"].dtype == jnp.float32:
        return shallower(shape, running_teacher).params
    return shallower(shape, weights.load(shape.start, mesh=mesh)).params


def teacher_inputs(spec: LmSpec, number: int = 0) -> tuple[str, ...]:
    """The stages that have to be finished before a teacher can be loaded."""
    return () if spec.teacher.source else (of_teacher("teacher", number),)


def teacher_identity(spec: LmSpec) -> dict[str, Any]:
    """The teacher's part of a stage's settings; nothing where the teacher is a stage, whose key is an input's."""
    return {"teacher": source_identity(spec.teacher.source)} if spec.teacher.source else {}
