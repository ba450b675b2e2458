"""What a config of the language-model experiment says, checked."""

from __future__ import annotations

import dataclasses
import math

import jax

from kd_jax.lm import model as model_lib
from kd_jax.lm import training, weights
from kd_jax.lm.corpus import compatibility
from kd_jax.lm.experiment import arms as arms_lib
from kd_jax.lm.experiment import knobs
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model
from kd_jax.parallel import mesh as mesh_lib


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    for name in ("seeds", "num_train", "num_validation", "num_recall", "num_samples"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    if not 0 <= config.seed < 2**20:
        raise ValueError(f"config.seed={config.seed} must be from 0 and below {2**20}")
    if len(set(config.taus)) < len(config.taus):
        raise ValueError(f"config.taus={tuple(config.taus)} must have none twice")
    for tau in config.taus:
        if not 0 < tau < math.inf:
            raise ValueError(f"config.taus: {tau} must be above 0 and finite")
    if config.sampling.max_length < 2:
        raise ValueError(f"config.sampling.max_length={config.sampling.max_length} must be at least 2")
    _check_arms(config)
    _check_p_star(config, config.p_star)
    if training_settings(config).batch_size > config.num_train:
        raise ValueError(
            f"config.train.batch_size={config.train.batch_size} is above config.num_train={config.num_train}"
        )
    for role in ("teacher", "student"):
        architecture(config[role], PRESETS["tiny"], f"config.{role}")
    Compute(**config.compute)
    _check_meshes(config)


def _check_arms(config) -> None:
    found = arms_lib.arms(config)
    if len(found) == 1:
        raise ValueError(f"config.taus={tuple(config.taus)} is empty, and there is no other arm (config.arms)")
    Compute(dtype=config.distill.teacher_dtype)
    for arm in found:
        if arm.policy == "on_policy" and config.train.together > 1:
            raise ValueError(f"config.train.together={config.train.together}: {arm.name} needs its students alone (1)")
        if arm.settings is not None and arm.settings.prompt_length >= config.sampling.max_length:
            raise ValueError(
                f"{arm.name}: prompt_length={arm.settings.prompt_length} leaves no room in "
                f"config.sampling.max_length={config.sampling.max_length}"
            )
    knobs.check(config, [arm.name for arm in found])


def _check_meshes(config) -> None:
    """That the models whose shapes the config says can be split over their devices: all but those of a source."""
    p_star, over = PRESETS.get(config.p_star.architecture), mesh(config)
    learnt_from = any(arm.settings is not None for arm in arms_lib.arms(config))
    if not config.p_star.source:
        _check_split(p_star, over, "config.p_star.architecture", "config.mesh")
    _check_split(_shape(config, "student", over), over, "config.student", "config.mesh")
    lies = teacher_mesh(config)
    if not config.teacher.source:
        _check_split(_shape(config, "teacher", over), over, "config.teacher", "config.mesh")
        if learnt_from:
            _check_split(_shape(config, "teacher", lies), lies, "config.teacher", "config.distill.teacher_mesh")


def _shape(config, role: str, over: jax.sharding.Mesh | None) -> Architecture:
    """Of a role; where p*'s vocabulary is not known yet it is one that can be split."""
    known = None if config.p_star.source else shape(config, role)
    size = 1 if over is None else over.size
    return known or dataclasses.replace(architecture(config[role], PRESETS["tiny"], role), vocab_size=size)


def _check_split(shape: Architecture, over: jax.sharding.Mesh | None, label: str, where: str) -> None:
    if over is not None:
        try:
            mesh_lib.shardings(model_lib.logical_axes(shape), model_lib.abstract(shape), over)
        except ValueError as error:
            raise ValueError(f"{label} does not go with {where}: {error}") from error


def _check_p_star(config, p_star) -> None:
    if p_star.architecture and p_star.architecture not in PRESETS:
        raise ValueError(f"config.p_star.architecture={p_star.architecture!r} is not one of {', '.join(PRESETS)}")
    if config.data.source and not (p_star.source and config.sampling.prompt_ids):
        raise ValueError(
            "config.data.source needs config.p_star.source (the model that scores samples and has the tokenizer) and "
            "config.sampling.prompt_ids (what each row, and each sample, begins with: BOS, say)"
        )
    if not p_star.source and not p_star.architecture:
        raise ValueError("config.p_star needs a source, or an architecture to draw random weights for")


def check_teacher(config) -> None:
    """Raises ValueError for a teacher of another vocabulary than p*'s, as far as the tokenizers alone say it."""
    source, p_star = config.teacher.source, config.p_star.source
    if source and p_star and source != p_star:
        tokenizers = weights.tokenizer(source), weights.tokenizer(p_star)
        if None not in tokenizers:
            compatibility.check_teacher(*(Model(PRESETS["tiny"], {}, tokenizer=one) for one in tokenizers))


def training_settings(config) -> training.Settings:
    how = {key: value for key, value in config.train.items() if key != "together"}
    return training.Settings(num_validation=config.num_validation, **{**how, "trackers": tuple(config.train.trackers)})


def mesh(config) -> jax.sharding.Mesh | None:
    return _mesh(config.mesh)


def teacher_mesh(config) -> jax.sharding.Mesh | None:
    """Where the teacher lies while a student learns from its distribution: the same devices, perhaps otherwise."""
    return _mesh(config.distill.teacher_mesh)


def _mesh(axes) -> jax.sharding.Mesh | None:
    sizes = dict(axes)
    return None if sizes == {"data": -1, "fsdp": 1, "tensor": 1} and jax.device_count() == 1 else mesh_lib.make(**sizes)


def architecture(settings, p_star: Architecture, label: str) -> Architecture:
    """The shape that a config's `teacher` or `student` says, with the vocabulary of p* and, unless it is a preset, its
    rotary embedding; a preset has its own."""
    if settings.preset:
        if settings.preset not in PRESETS:
            raise ValueError(f"{label}.preset={settings.preset!r} is not one of {', '.join(PRESETS)}")
        found = PRESETS[settings.preset]
    else:
        if settings.heads < 1 or settings.width % settings.heads:
            raise ValueError(f"{label}.width={settings.width} is not a multiple of {label}.heads={settings.heads}")
        try:
            found = Architecture(
                vocab_size=p_star.vocab_size, hidden_size=settings.width, intermediate_size=settings.mlp,
                num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
                num_key_value_heads=settings.kv_heads, head_dim=settings.width // settings.heads,
                rope_theta=p_star.rope_theta, max_position_embeddings=p_star.max_position_embeddings,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return dataclasses.replace(found, vocab_size=p_star.vocab_size)


def shape(config, role: str) -> Architecture | None:
    """The shape of teacher or student, as far as the config alone says it."""
    p_star = PRESETS.get(config.p_star.architecture)
    return None if p_star is None else architecture(config[role], p_star, f"config.{role}")
