"""Everything that is checked before the first stage of a run, in --dry_run too.

What one setting may be is declared with it (kd_jax.runs.settings). Here is what depends on several settings (`check`),
and on the models and data that the config names (`check_sources`).
"""

from __future__ import annotations

import dataclasses

import jax

from kd_jax.lm import evaluation, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import compatibility
from kd_jax.lm.decode.chosen_text import Text
from kd_jax.lm.experiment import corpora, knobs
from kd_jax.lm.experiment.arms import arms
from kd_jax.lm.experiment.specs import LmSpec, architecture, make_mesh, planned_shape
from kd_jax.lm.instruct import prompts
from kd_jax.lm.model import PRESETS, Architecture, Model, frozen
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import trackers


def check(spec: LmSpec) -> None:
    """Raises ValueError, naming the key, for settings that cannot work together."""
    groups = arms(spec)
    # The direct arm is always there; alone it has nothing to be compared with.
    if len(groups) == 1:
        raise ValueError(f"config.taus={spec.taus} is empty, and there is no other arm (config.arms)")
    for arm in groups:
        if arm.policy == "on_policy" and spec.train_of("student").together > 1:
            raise ValueError(f"config.train.together: {arm.name} trains its students one by one; set it to 1")
        if spec.sampling.prompts and arm.text != Text():
            raise ValueError(f"{arm.name}: text_rows and text_choice need one prompt for all (config.sampling.prompts)")
        if arm.distill is not None and arm.distill.prompt_length >= spec.sampling.max_length:
            raise ValueError(
                f"{arm.name}: prompt_length={arm.distill.prompt_length} leaves no room in "
                f"config.sampling.max_length={spec.sampling.max_length}"
            )
    if spec.sampling.prompts and spec.num_samples > spec.num_recall * spec.evaluation.samples_per_prompt:
        raise ValueError(
            f"config.num_samples={spec.num_samples} is above num_recall={spec.num_recall} prompts with "
            f"config.evaluation.samples_per_prompt={spec.evaluation.samples_per_prompt} samples each"
        )
    names = [arm.name for arm in groups]
    _check_names(spec, names)
    knobs.check(spec.frontier, names)
    for role in ("teacher", "student"):
        trackers.check(spec.train_of(role).trackers)
    _check_meshes(spec, any(arm.distill is not None for arm in groups))


def _check_names(spec: LmSpec, names: list[str]) -> None:
    """That the arms named by other settings are arms of the run, and that the contrast can be made."""
    contrast = spec.contrast
    named = {"config.cooled_arms": spec.cooled_arms}
    if contrast.arm:
        named |= {"config.contrast.arm": (contrast.arm,), "config.contrast.other": (contrast.other,)}
    for key, arms_named in named.items():
        for name in arms_named:
            if name not in names:
                raise ValueError(f"{key}: {name!r} is not one of the run's arms ({', '.join(names)})")
    cooled = not spec.cooled_arms or contrast.other in spec.cooled_arms
    temperatures = len(spec.evaluation.sample_temperatures) if cooled else 1
    if contrast.arm and contrast.at_equal_precision and temperatures < 2:
        raise ValueError(
            f"config.contrast.at_equal_precision needs {contrast.other} at several sample temperatures "
            "(config.evaluation.sample_temperatures, config.cooled_arms)"
        )


def check_sources(spec: LmSpec) -> None:
    """Checks the models and data that the config names, from file headers alone: no weights are loaded.

    Raises: ValueError, FileNotFoundError or RunError for
        p*: a source that cannot be opened, fewer positions than sampling.max_length, no EOS (its samples would all have
            the maximal length), a prompt without ids, with ids beyond the vocabulary, or without room after it;
        the teacher: a source that cannot be opened, or that cannot be compared with p* (another vocabulary, tokenizer
            or EOS, too few positions);
        a model that training starts from: the same, or a frozen pattern that matches none of its weights;
        the model that embeds samples: a source that cannot be opened, or that cannot read p*'s ids;
        the data: a source that cannot be opened.
    """
    length = spec.sampling.max_length
    # Without a source p* has random weights, and id 0 ends its sequences (see roles).
    p_star = Model(PRESETS[spec.p_star.architecture], {}, eos_ids=(0,)) if not spec.p_star.source else None
    p_star = p_star or weights.describe(spec.p_star.source)
    compatibility.check_model("config.p_star", p_star, p_star, length)
    if not p_star.eos_ids:
        raise ValueError("config.p_star has no EOS id: every sample would have the maximal length")
    _check_prompt(spec, p_star)
    # A teacher that is p* has been checked as p*.
    if spec.teacher.source and spec.teacher.source != spec.p_star.source:
        teacher = weights.describe(spec.teacher.source)
        compatibility.check_model("config.teacher.source", teacher, p_star, length)
        compatibility.check_teacher(teacher, p_star)
    for role, shape in (("teacher", spec.teacher), ("student", spec.student)):
        if shape.start:
            key = "config.teacher.init" if role == "teacher" else "config.student.source"
            compatibility.check_model(key, weights.describe(shape.start), p_star, length)
            frozen.frozen_layers(spec.train_of(role).frozen, architecture(shape, p_star.architecture, role))
    # Without models: the temperatures, and the model that embeds.
    evaluation.check(p_star, {}, evaluation.EvaluationSpec(**vars(spec.evaluation)), length)
    if spec.data.source:
        corpora.data_identity(spec.data.source)


def _check_prompt(spec: LmSpec, p_star: Model) -> None:
    if spec.sampling.prompts:
        prompts.settings(spec.sampling, 0)
        if spec.p_star.source and p_star.tokenizer is None:
            raise ValueError("config.sampling.prompts needs a tokenizer, which p* does not have")
        return
    ids, text = spec.sampling.prompt_ids, spec.sampling.prompt
    if not ids and p_star.tokenizer is None:
        raise ValueError(f"config.sampling.prompt={text!r} needs a tokenizer, which p* does not have; set prompt_ids")
    ids = ids or p_star.tokenizer.encode(text)
    if not ids or len(ids) >= spec.sampling.max_length:
        raise ValueError(
            f"the prompt has {len(ids)} ids; it needs at least 1, and fewer than config.sampling.max_length="
            f"{spec.sampling.max_length}"
        )
    if max(ids) >= p_star.num_tokens:
        raise ValueError(f"config.sampling.prompt_ids has {max(ids)}; the ids of p* end at {p_star.num_tokens - 1}")


def _check_meshes(spec: LmSpec, distilled: bool) -> None:
    """That each model whose shape the config says can be split over the mesh that it will lie on."""
    mesh, teacher_mesh = make_mesh(spec.mesh), make_mesh(spec.teacher_mesh)
    if not spec.p_star.source:
        _check_split(PRESETS[spec.p_star.architecture], mesh, "config.p_star.architecture", "config.mesh")
    _check_split(_any_shape(spec, "student", mesh), mesh, "config.student", "config.mesh")
    if not spec.teacher.source:
        _check_split(_any_shape(spec, "teacher", mesh), mesh, "config.teacher", "config.mesh")
        if distilled:
            shape = _any_shape(spec, "teacher", teacher_mesh)
            _check_split(shape, teacher_mesh, "config.teacher", "config.teacher_mesh")


def _any_shape(spec: LmSpec, role: str, mesh: jax.sharding.Mesh | None) -> Architecture:
    """The shape of a role; while p*'s vocabulary is unknown, with one that can be split."""
    known = None if spec.p_star.source else planned_shape(spec, role)
    size = 1 if mesh is None else mesh.size
    return known or dataclasses.replace(architecture(getattr(spec, role), PRESETS["tiny"], role), vocab_size=size)


def _check_split(shape: Architecture, mesh: jax.sharding.Mesh | None, label: str, mesh_label: str) -> None:
    if mesh is None:
        return
    try:
        mesh_lib.shardings(model_lib.logical_axes(shape), model_lib.abstract(shape), mesh)
    except ValueError as error:
        raise ValueError(f"{label} cannot be split over {mesh_label}: {error}") from error
