"""The language-model experiment (Cha & Cho, arXiv 2505.13111, section 4) as a chain of stages.

    p*'s corpora -> teacher -> the teacher's corpora -> students -> evaluation

Every corpus that is trained on has config.num_validation more rows, which no model is trained on and which choose the
checkpoint. Recall is measured on one corpus of p*, the same for all models. With config.teachers above 1, each teacher
has its own corpus of p*, and its own students: seeds are nested in teachers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import training, weights
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.experiment import arms as arms_lib
from kd_jax.lm.experiment import checks, corpora, cost, planning, results, roles
from kd_jax.lm.experiment.arms import TRAIN, Arm, of_teacher
from kd_jax.lm.experiment.corpora import APART, STUDENT_SEED, TEACHER_SEED
from kd_jax.lm.experiment.results import Student
from kd_jax.lm.experiment.specs import (
    LmSpec,
    StudentSpec,
    TeacherSpec,
    architecture,
    make_mesh,
    planned_shape,
    source_shape,
)
from kd_jax.lm.model import Compute
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import distributed
from kd_jax.parallel.devices import Target
from kd_jax.runs import cache, stages
from kd_jax.runs.run import Stop
from kd_jax.runs.settings import to_dict
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError

Spec = LmSpec


def validate(spec: LmSpec) -> None:
    """Raises ValueError, naming the key, for settings that cannot work together."""
    checks.check(spec)


def run(
    spec: LmSpec, folder: Path, *, only: tuple[str, ...] = (), dry_run: bool = False, target: Target | None = None
) -> dict[str, Any] | None:
    """Runs the stages that are not finished; returns what to add to the manifest.

    Args:
        spec: of the run.
        folder: of the run.
        only: groups of stages to run or to show. Without "evaluation" among them there is no report yet, and None is
            returned.
        dry_run: show the stages, write nothing, and return None.
        target: the devices that a dry run plans for; kd_jax.parallel.devices.pretend has been told of them.
    Raises: ValueError, RunError or OSError for what cannot be used, before the first stage.
    """
    if dry_run:
        _show(spec, folder, only, target)
        return None
    # One process looks, so that all of them go on or stop together.
    distributed.once(lambda: checks.check_sources(spec), "checking models and data")
    chain = plan(spec, roles.p_star_identity(spec), roles.other_vocabulary(spec) is not None)
    _check_names(chain, only)
    distributed.once(lambda: cost.check_room(spec, folder, chain, only), "checking disk and memory")
    cache.enable_compilation_cache()
    before = [name for name in only if name != "evaluation"]
    if before or not only:
        stages.run(folder, chain, before)
    if only and "evaluation" not in only:
        return None
    return results.evaluate(spec, folder, chain)


def _check_names(chain: list[Stage], only: tuple[str, ...]) -> None:
    groups = [*dict.fromkeys(stage.group for stage in chain), "evaluation"]
    for name in only:
        if name not in groups:
            raise ValueError(f"--stages: {name!r} is not one of {', '.join(groups)}")


def _show(spec: LmSpec, folder: Path, only: tuple[str, ...], target: Target | None) -> None:
    spec = spec if target is None else planning.over_slices(spec, target.devices)
    try:
        checks.check_sources(spec)
        identity, other_vocabulary = roles.p_star_identity(spec), roles.other_vocabulary(spec) is not None
    except (RunError, OSError) as error:
        print(f"not available here yet, so all stages are shown as to do: {error}")
        # A name in place of the unknown content makes keys that no folder has.
        identity, other_vocabulary = spec.p_star.source, False
    if spec.p_star.source and spec.p_star.architecture and source_shape(spec.p_star.source) is None:
        print(f"p*: planned as {spec.p_star.architecture}; {spec.p_star.source} cannot be read here")
    chain = plan(spec, identity, other_vocabulary)
    _check_names(chain, only)
    folders = stages.folders(folder, chain)
    costs = {stage.name: stage.cost for stage in chain if not only or stage.group in only}
    if not only or "evaluation" in only:
        costs["evaluation"] = cost.evaluation(spec, planned_shape(spec, "p_star"), planned_shape(spec, "student"))

    def finished(name: str) -> bool:
        return name in folders and stages.finished(folders[name])

    if target is None:
        cost.show(spec.compute.dtype, costs, finished)
        cost.show_room(spec, folder, chain, only)
    else:
        planning.show(spec, costs, finished, target)


def plan(spec: LmSpec, identity: str, other_vocabulary: bool = False) -> list[Stage]:
    """The stages before the evaluation, each after its inputs.

    Args:
        identity: the fingerprint of p*'s weights.
        other_vocabulary: the teacher's ids are not p*'s, so that its samples become text and then p*'s ids.
    """
    chain = []
    for teacher in range(spec.teachers):
        chain.append(corpora.p_star(spec, identity, teacher))
        if teacher == 0:
            chain.append(corpora.validation(spec, identity))
        chain += _from_teacher(spec, teacher, identity if other_vocabulary else None)
    return chain


def _from_teacher(spec: LmSpec, teacher: int, vocabulary: str | None) -> list[Stage]:
    """A teacher's training, its corpora, and its students."""
    chain = []
    if not spec.teacher.source:
        name = of_teacher("teacher", teacher)
        model = Student(name, Arm("teacher", "teacher", p_star=True), None, TEACHER_SEED + APART * teacher, teacher)
        chain.append(_training(spec, name, spec.teacher, [model]))
    for arm in arms_lib.arms(spec):
        # Arms that learn the same text, or the same recording, share its stage.
        names = {stage.name for stage in chain}
        if arm.sampler is not None and of_teacher(arms_lib.samples_of(spec, arm), teacher) not in names:
            chain.append(corpora.samples(spec, arm, teacher, vocabulary))
        if arm.text.choice != "all" and of_teacher(arm.texts[-1], teacher) not in names:
            chain.append(corpora.chosen(spec, arm, teacher, vocabulary))
        # A corpus with a recorded teacher is a stage of its own, after the stage of its text.
        for text, corpus in zip(arm.texts, arm.corpora, strict=True):
            if corpus != text and of_teacher(corpus, teacher) not in names:
                chain.append(corpora.recorded(spec, arm.recording, text, teacher))
        chain += _students(spec, arm, teacher)
    return chain


def _students(spec: LmSpec, arm: Arm, teacher: int) -> list[Stage]:
    """The students of an arm and a teacher, config.train.together in a stage."""
    # a seed has one start and one order of the data, whatever the arm: differences between arms are less noisy
    folder = of_teacher(arm.name, teacher)
    students = [
        Student(f"{folder}/seed-{seed}", arm, seed, STUDENT_SEED + APART * teacher + seed, teacher)
        for seed in range(spec.seeds)
    ]
    # Only students of one arm share a program: their loss has to be the same.
    size = spec.train_of("student").together
    groups = [students[i : i + size] for i in range(0, len(students), size)]
    stages_of_arm = []
    for group in groups:
        name = group[0].name if len(group) == 1 else f"{folder}/seeds-{group[0].seed}-{group[-1].seed}"
        stages_of_arm.append(_training(spec, name, spec.student, group))
    return stages_of_arm


def _training(spec: LmSpec, name: str, shape: StudentSpec | TeacherSpec, students: list[Student]) -> Stage:
    arm, role = students[0].arm, "teacher" if shape is spec.teacher else "student"
    teacher = students[0].teacher
    p_star_text, texts = of_teacher(TRAIN, teacher), [of_teacher(corpus, teacher) for corpus in arm.corpora]
    # These settings are the stage's key. Trackers change no result, so the key has none.
    train_spec = spec.train_of(role)
    train = {key: value for key, value in to_dict(train_spec).items() if key not in ("together", "trackers")}
    part = spec.part_of(role)
    for key in ("frozen", "updates"):
        if not train[key]:  # what is off is not said
            del train[key]
    # Nor does the key depend on what changes the log, the files, the memory or the speed alone; it has fixed values.
    train |= {key: getattr(TrainSpec(), key) for key in ("log_every", "save_every", "keep", "keep_checkpoints")}
    compute = to_dict(spec.compute) | {"remat": False, "query_block": 128}
    unsaid = ("source", "init", "train") if part.lora else ("source", "init", "train", "lora")
    settings = {
        "model": {key: value for key, value in to_dict(shape).items() if key not in unsaid},
        "train": {**train, "trackers": []}, "num_validation": spec.num_validation,
        "seed": spec.seed + students[0].purpose, "compute": compute,
    }  # fmt: skip
    if shape.start:
        # The content counts, not the name: a folder that was moved is the same start.
        settings["start"] = roles.source_identity(shape.start)
    if len(students) > 1:
        settings["together"] = len(students)
    if arm.distill is not None:
        settings["distill"] = arm.knobs
        if arm.distill.share_of_samples:
            settings["mixed"] = batches.MIXED
        # A teacher that is a stage enters as an input, by its key.
        settings |= roles.teacher_identity(spec) if arm.teacher_runs else {}

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        # From the description beside p*'s corpus: a training does not load p*'s weights.
        p_star = weights.load_description(inputs[p_star_text])
        model = p_star._replace(architecture=architecture(shape, p_star.architecture, "config"))
        distillation = _distillation(spec, arm, inputs, teacher)
        start = roles.start(spec, role, distillation and distillation.teacher)
        # of a shallower copy, adapters would be of a model that is nowhere
        base = "" if shape.layers_kept else shape.start
        learnt = [corpus_lib.open(inputs[text] / "corpus") for text in texts]
        members = [
            training.Member(
                corpus=learnt[0], num_validation=spec.num_validation, seed=spec.seed + student.purpose,
                folder=results.home(folder, students, student), name=student.name,
                tags={"arm": arm.kind, "tau": arm.tau, "teacher": teacher, "seed": student.seed},
                # p*'s text comes first (Arm.texts), the teacher's second.
                mixed=learnt[1] if len(learnt) > 1 else None,
                prompts=corpus_lib.open(inputs[p_star_text] / "corpus"), start=start,
                base=base,
            )
            for student in students
        ]  # fmt: skip
        with Stop() as stop:
            finished = training.train(
                train_spec, model, members, compute=Compute(**vars(spec.compute)), mesh=make_mesh(spec.mesh),
                stop=stop, distillation=distillation, lora=part.lora,
            )  # fmt: skip
        # The names of a group's students tell their results apart; a single one has no need of them.
        named = {student.name: result for student, result in zip(students, finished, strict=True)}
        return finished[0] if len(finished) == 1 else named

    price = cost.training(
        spec, planned_shape(spec, role), count=len(students), arm=arm, train=train_spec,
        teacher=planned_shape(spec, "teacher") if arm.teacher_runs else None, part=part,
    )  # fmt: skip
    loaded = roles.teacher_inputs(spec, teacher) if arm.teacher_runs else ()
    # p*'s corpus always: a training reads p*'s ids and shape there.
    inputs = dict.fromkeys([p_star_text, *texts, *loaded])
    return Stage(name, settings, tuple(inputs), work, price, tuple(students))


def _distillation(spec: LmSpec, arm: Arm, inputs: dict[str, Path], number: int) -> distill.Distillation | None:
    if arm.distill is None:
        return None
    if not arm.teacher_runs:
        return distill.Distillation(arm.distill)
    dtype = arm.distill.teacher_dtype
    teacher = roles.teacher(spec, inputs, dtype, make_mesh(spec.teacher_mesh), number)
    # A teacher has no backward pass, so there is nothing to recompute in it.
    compute = Compute(**{**vars(spec.compute), "dtype": dtype, "remat": False})
    return distill.Distillation(arm.distill, teacher, compute)
