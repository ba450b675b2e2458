"""Everything that is checked before the first stage of a run, in --dry_run too.

What one setting may be is declared with it (kd_jax.runs.settings). Here is what depends on several settings (`check`),
and on the models and data that the config names (`check_sources`). Whether there is room for a run is checked in
kd_jax.lm.experiment.cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from kd_jax.lm import evaluation
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import compatibility, ingest, prompt_files
from kd_jax.lm.distill import alignment
from kd_jax.lm.experiment import knobs, roles
from kd_jax.lm.experiment.arms import Arm, arms
from kd_jax.lm.experiment.specs import LmSpec, architecture, described, make_mesh
from kd_jax.lm.instruct import pass_rate, prompts, templates
from kd_jax.lm.model import PRESETS, Architecture, Model, frozen
from kd_jax.metrics import Samples
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import packages, trackers


def check(spec: LmSpec) -> None:
    """Raises ValueError, naming the key, for settings that cannot work together, or have no effect under the others."""
    groups = arms(spec)
    _check_effect(spec, groups)
    # The direct arm is always there; alone it has nothing to be compared with.
    if len(groups) == 1:
        raise ValueError(f"config.taus={spec.taus} is empty, and there is no other arm (config.arms)")
    for arm in groups:
        alone = arm.policy == "on_policy" or (arm.distill is not None and arm.distill.vocabulary != "same")
        if alone and spec.train_of("student").together > 1:
            raise ValueError(f"config.train.together: {arm.name} trains its students one by one; set it to 1")
        if 0 < arm.text.rows < spec.train_of("student").batch_size:
            raise ValueError(
                f"{arm.name}: text_rows={arm.text.rows} is below "
                f"train.batch_size={spec.train_of('student').batch_size}, the rows of an update"
            )
        if spec.own_prompts and arm.text.choice != "all":
            raise ValueError(
                f"{arm.name}: text_choice needs one prompt for all rows, and here they have their own "
                "(config.sampling.prompts, or conversations as data)"
            )
        if arm.distill is not None and arm.distill.prompt_length >= spec.sampling.max_length:
            raise ValueError(
                f"{arm.name}: prompt_length={arm.distill.prompt_length} leaves no room in "
                f"config.sampling.max_length={spec.sampling.max_length}"
            )
    if spec.own_prompts and spec.num_samples > spec.num_recall * spec.evaluation.samples_per_prompt:
        raise ValueError(
            f"config.num_samples={spec.num_samples} is above num_recall={spec.num_recall} prompts with "
            f"config.evaluation.samples_per_prompt={spec.evaluation.samples_per_prompt} samples each"
        )
    _check_evaluation(spec)
    names = [arm.name for arm in groups]
    _check_names(spec, names)
    if spec.cooled_arms and len(spec.evaluation.sample_temperatures) == 1:
        raise ValueError(
            f"config.cooled_arms={spec.cooled_arms} has no effect: config.evaluation.sample_temperatures has one value"
        )
    knobs.check(spec.frontier, names)
    for role in ("teacher", "student"):
        trackers.check(spec.train_of(role).trackers)
    _check_meshes(spec, None if spec.p_star.source else PRESETS[spec.p_star.architecture])


def _check_evaluation(spec: LmSpec) -> None:
    """That the settings of the evaluation, which comes last, go together."""
    temperatures = spec.evaluation.sample_temperatures
    if 1.0 not in temperatures:
        raise ValueError(
            f"config.evaluation.sample_temperatures={temperatures} must have 1.0 among them: all models are compared "
            "there"
        )
    each = spec.evaluation.samples_per_prompt if spec.own_prompts else 1
    points = min(spec.evaluation.num_points, spec.num_samples // each, spec.num_recall // 2)
    if spec.evaluation.embedding_model and points <= Samples.k:
        raise ValueError(
            f"config.evaluation.embedding_model needs more than {Samples.k} points, and there are {points}: the "
            "smallest of evaluation.num_points, num_samples (one of each prompt) and half of num_recall"
        )


def _check_effect(spec: LmSpec, groups: Sequence[Arm]) -> None:
    """Raises ValueError for a setting that was changed and that nothing uses: a result would seem to depend on it."""
    # part of the config, the settings in it (all where there are none), and why they have no effect
    unused: list[tuple[str, tuple[str, ...], str]] = []
    for part, used, why in (
        ("data", spec.data.source, "config.data.source is empty"),
        ("contrast", spec.contrast.arm, "config.contrast.arm is empty"),
        ("frontier", spec.frontier.knobs, "config.frontier.knobs is empty"),
        ("teacher_mesh", any(arm.distill is not None for arm in groups), "no student learns a teacher's distributions"),
    ):
        unused += [] if used else [(part, (), why)]
    if not spec.instruct.num_test:
        kinds = {"kinds"} if prompts.TEMPLATES in spec.sampling.prompts else set()  # these choose what is learnt, too
        names = tuple(field.name for field in dataclasses.fields(spec.instruct) if field.name not in kinds)
        unused.append(("instruct", names, "config.instruct.num_test is 0"))
    if not spec.sampling.prompts:
        unused.append(("sampling", ("prompts_column",), "config.sampling.prompts is empty"))
    if not spec.own_prompts:
        unused.append(("evaluation", ("samples_per_prompt",), "all samples have one prompt"))
    if not spec.evaluation.embedding_model:
        unused.append(("evaluation", ("num_points",), "config.evaluation.embedding_model is empty"))
    if spec.sampling.prompts:
        one = ("prompt_ids", "prompt") if spec.sampling.prompt else ("prompt_ids",)
        unused.append(("sampling", one, "config.sampling.prompts are the prompts"))
    elif spec.sampling.prompt and spec.sampling.prompt_ids:
        unused.append(("sampling", ("prompt",), "config.sampling.prompt_ids is the prompt"))
    # Its shape in numbers is that of the config file; whoever names a teacher, or a preset, need not take it back.
    if spec.teacher.source:
        trained = ("layers_kept", "lora", "train")
        unused.append(("teacher", trained, f"config.teacher.source={spec.teacher.source!r} is the teacher"))
    for part, names, why in unused:
        value = getattr(spec, part)
        for field in dataclasses.fields(value):
            chosen = getattr(value, field.name)
            if (not names or field.name in names) and chosen != getattr(type(value)(), field.name):
                raise ValueError(f"config.{part}.{field.name}={_short(chosen)} has no effect: {why}")


def _short(value: Any) -> str:
    """A setting's value in a message; of a group of settings, those that were changed."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    names = [field.name for field in dataclasses.fields(value)]
    changed = [name for name in names if getattr(value, name) != getattr(type(value)(), name)]
    return "(" + ", ".join(f"{name}={getattr(value, name)!r}" for name in changed) + ")"


def _check_names(spec: LmSpec, names: list[str]) -> None:
    """That the arms named by other settings are arms of the run, and that the contrast can be made."""
    contrast, instruct = spec.contrast, spec.instruct
    if contrast.arm and instruct.arm:
        raise ValueError(
            f"config.contrast.arm={contrast.arm!r} and config.instruct.arm={instruct.arm!r}: "
            "a run declares one comparison; leave one of them empty"
        )
    named = {"config.cooled_arms": spec.cooled_arms}
    if instruct.arm:
        named |= {"config.instruct.arm": (instruct.arm,), "config.instruct.control": (instruct.control,)}
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
        the teacher: a source that cannot be opened, or that cannot be compared with p* (another EOS, too few
            positions; another vocabulary in a run that cannot go through text, see `_check_other_vocabulary`);
        the teacher's text: fewer rows than are measured;
        a model that training starts from: the same, or frozen patterns that match none of its weights, or all;
        the model that embeds samples: a source that cannot be opened, or that cannot read p*'s ids;
        the data: a source that cannot be opened, or lacks the split or a column; an EOS that is not one of p*'s;
        every model: a shape that cannot be split over its mesh;
        an arm: more recorded tokens than p* has ids;
        checked instructions: one that leaves less than a quarter of sampling.max_length for its answer.
    """
    length = spec.sampling.max_length
    # Without a source p* has random weights, and id 0 ends its sequences (see roles).
    p_star = Model(PRESETS[spec.p_star.architecture], {}, eos_ids=(0,)) if not spec.p_star.source else None
    p_star = p_star or described(spec.p_star.source)
    compatibility.check_model("config.p_star", p_star, p_star, length)
    if not p_star.eos_ids:
        raise ValueError("config.p_star has no EOS id: every sample would have the maximal length")
    _check_prompt(spec, p_star)
    problem = roles.other_vocabulary(spec)
    # A teacher that is p* has been checked as p*.
    if spec.teacher.source and spec.teacher.source != spec.p_star.source:
        if problem is None:
            compatibility.check_model("config.teacher.source", described(spec.teacher.source), p_star, length)
        else:
            _check_other_vocabulary(spec, problem, p_star, described(spec.teacher.source))
    for role, shape in (("teacher", spec.teacher), ("student", spec.student)):
        if shape.start:
            key = "config.teacher.init" if role == "teacher" else "config.student.source"
            compatibility.check_model(key, described(shape.start), p_star, length)
            _check_frozen(spec.train_of(role).frozen, architecture(shape, p_star.architecture, role), role)
    if problem is None and not spec.own_prompts:
        _check_teacher_rows(spec)
    if spec.instruct.num_test:
        _check_instructions(spec, p_star)
    # Without models: the temperatures, and the model that embeds.
    evaluation.check(p_star, {}, evaluation.EvaluationSpec(**vars(spec.evaluation)), length)
    if spec.data.source:
        _check_data(spec, p_star)
    if spec.p_star.source:
        _check_meshes(spec, p_star.architecture)
    for arm in arms(spec):
        if arm.distill is not None and arm.distill.vocabulary != "same":
            alignment.check_bytes(f"config.p_star, for {arm.name},", p_star.tokenizer)
        if arm.recording is not None and arm.recording.top_k > p_star.num_tokens:
            raise ValueError(f"{arm.name}: record_top_k={arm.recording.top_k}, and p* has {p_star.num_tokens} ids")


def _check_teacher_rows(spec: LmSpec) -> None:
    """That a teacher, which is measured with the text that students learn, has as much of it as is measured."""
    learnt: dict[Any, int] = {}
    for arm in arms(spec):
        if arm.sampler is not None:
            rows = arm.text.num_samples(spec.num_train, spec.num_validation)
            learnt[arm.sampler] = max(rows, learnt.get(arm.sampler, 0))
    for sampler, rows in learnt.items():
        if rows < spec.num_samples:
            raise ValueError(
                f"config.num_samples={spec.num_samples} is above the {rows} samples that the teacher draws at "
                f"{sampler.label} (num_train and num_validation): the teacher is measured with them"
            )


def _check_instructions(spec: LmSpec, p_star: Model) -> None:
    instruct, room = spec.instruct, prompts.room(spec.sampling.max_length)
    for split, count in zip(pass_rate.SPLITS, (instruct.num_validation, instruct.num_test), strict=True):
        for one in templates.instructions(split, count, instruct.kinds):
            size = len(prompt_files.encode(one.prompt, p_star.tokenizer or prompts.Bytes()))
            if size > room:
                raise ValueError(
                    f"config.sampling.max_length={spec.sampling.max_length} leaves less than a quarter for the answer "
                    f"to a {split} instruction of {size} ids ({one.kind}): raise it to {-(-4 * size // 3)} or more, or "
                    "choose other config.instruct.kinds"
                )


def _check_frozen(patterns: tuple[str, ...], shape: Architecture, role: str) -> None:
    layers = frozen.frozen_layers(patterns, shape)
    trained = jax.eval_shape(lambda params: frozen.split(params, layers)[0], model_lib.abstract(shape))
    if not trained:
        raise ValueError(f"config.{role}.train.frozen={patterns} leaves nothing to train")


def _check_other_vocabulary(spec: LmSpec, problem: str, p_star: Model, teacher: Model) -> None:
    """Raises ValueError, naming the key, where a teacher with another vocabulary cannot be learnt from.

    Args:
        problem: how the vocabularies differ.
        p_star, teacher: without weights.
    """
    for label, model in (("config.p_star", p_star), ("config.teacher.source", teacher)):
        alignment.check_bytes(f"{label} ({problem})", model.tokenizer)
    if not teacher.eos_ids:
        raise ValueError(f"config.teacher.source has no EOS id, which ends a text in another vocabulary ({problem})")
    limit = teacher.architecture.max_position_embeddings
    if spec.sampling.max_length > limit:
        raise ValueError(f"config.teacher.source has {limit} positions, fewer than config.sampling.max_length")
    for arm in arms(spec):
        if arm.distill is not None and arm.distill.vocabulary == "same":
            raise ValueError(
                f"{arm.name}: the vocabulary of config.teacher.source={spec.teacher.source} is not that of "
                f"config.p_star.source={spec.p_star.source} ({problem}). Choose vocabulary='aligned' or 'uld' "
                "(config.distill.vocabulary), or let it learn the teacher's text (policy='sequence')"
            )
    for key in ("sampling.prompts", "data.messages_column", "data.prompt_column"):
        group, name = key.split(".")
        if getattr(getattr(spec, group), name):
            raise ValueError(f"config.{key} needs a teacher that can read p*'s ids: {problem}")


def _check_data(spec: LmSpec, p_star: Model) -> None:
    data = spec.data
    # What a package of texts holds is known, and a plan does not fetch it.
    if data.source not in packages.PACKAGES:
        ingest.check_source(data.source, **data.reading)
    if p_star.tokenizer is None:
        raise ValueError("config.p_star has no tokenizer, and the data's ids have to be its tokens")
    eos_id = p_star.tokenizer.eos_id if data.eos_id is None else data.eos_id
    if eos_id not in p_star.eos_ids:
        raise ValueError(
            f"documents would end with id {eos_id}, p* ends a sequence with {sorted(p_star.eos_ids)}: set "
            "config.data.eos_id to one of them"
        )


def _check_prompt(spec: LmSpec, p_star: Model) -> None:
    if spec.sampling.prompts:
        prompts.settings(spec.sampling, 0)
        if spec.p_star.source and p_star.tokenizer is None:
            raise ValueError("config.sampling.prompts needs a tokenizer, which p* does not have")
        return
    ids, text = spec.sampling.prompt_ids, spec.sampling.prompt
    if not ids and p_star.tokenizer is None:
        raise ValueError(f"config.sampling.prompt={text!r} needs a tokenizer, which p* does not have; set prompt_ids")
    ids = ids or p_star.tokenizer.encode_prompt(text)
    if not ids or len(ids) >= spec.sampling.max_length:
        raise ValueError(
            f"the prompt has {len(ids)} ids; it needs at least 1, and fewer than config.sampling.max_length="
            f"{spec.sampling.max_length}"
        )
    if max(ids) >= p_star.num_tokens:
        raise ValueError(f"config.sampling.prompt_ids has {max(ids)}; the ids of p* end at {p_star.num_tokens - 1}")


def _check_meshes(spec: LmSpec, p_star: Architecture | None) -> None:
    """That each model can be split over the mesh that it will lie on; p_star is None until its source is opened."""
    mesh, teacher_mesh = make_mesh(spec.mesh), make_mesh(spec.teacher_mesh)
    if p_star is not None:
        _check_split(p_star, mesh, "config.p_star", "config.mesh")
    # while p*'s vocabulary is unknown, one that can be split
    known = p_star or dataclasses.replace(PRESETS["tiny"], vocab_size=1 if mesh is None else mesh.size)
    _check_split(architecture(spec.student, known, "student"), mesh, "config.student", "config.mesh")
    if spec.teacher.source and p_star is None:
        return
    source = spec.teacher.source
    teacher = described(source).architecture if source else architecture(spec.teacher, known, "teacher")
    _check_split(teacher, mesh, "config.teacher", "config.mesh")
    if any(arm.distill is not None for arm in arms(spec)):
        if p_star is None and teacher_mesh is not None:
            teacher = dataclasses.replace(teacher, vocab_size=teacher_mesh.size)
        _check_split(teacher, teacher_mesh, "config.teacher", "config.teacher_mesh")


def _check_split(shape: Architecture, mesh: jax.sharding.Mesh | None, label: str, mesh_label: str) -> None:
    if mesh is None:
        return
    try:
        mesh_lib.shardings(model_lib.logical_axes(shape), model_lib.abstract(shape), mesh)
    except ValueError as error:
        raise ValueError(f"{label} cannot be split over {mesh_label}: {error}") from error
