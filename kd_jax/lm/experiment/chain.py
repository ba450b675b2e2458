"""The language-model experiment (Cha & Cho, section 4): p* -> corpus -> teacher -> its corpora -> students -> scores.

Every corpus that is trained on has config.num_validation rows more, which no one trains on and which choose the
checkpoint. Recall is on a corpus of p* of its own. Seeds are those of the students; there is one teacher.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import evaluation, training, weights
from kd_jax.lm.corpus import Corpus, documents, ingest
from kd_jax.lm.decode import to_corpus
from kd_jax.lm.distill import loss, recorded_top_k
from kd_jax.lm.evaluation import estimates
from kd_jax.lm.experiment import arms, cost, planning, roles
from kd_jax.lm.experiment import results as results_lib
from kd_jax.lm.experiment import specs as settings_lib
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel.devices import Target
from kd_jax.runs import cache, stages
from kd_jax.runs.run import Stop
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_rows, write_rows

# What a random key is for: seeds of corpora and models are config.seed + these, far apart.
TRAIN, VALIDATION, TEACHER, SAMPLES, STUDENT, EVALUATION = (1_000_000 * i for i in range(1, 7))


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    settings_lib.validate(config)


def run(
    config, folder: Path, *, only: tuple[str, ...] = (), dry_run: bool = False, target: Target | None = None
) -> dict[str, Any] | None:
    """Runs the chain into the run folder, or what is left of it; returns what to add to the manifest.

    With `only`, the stages of these groups; without "evaluation" among them there is no report yet, and None is
    returned. With `dry_run` the stages are shown, nothing is written, and None is returned; `target` are the devices to
    reckon with, of which kd_jax.parallel.devices.pretend has been told.
    """
    if dry_run:
        _show(config, folder, target)
        return None
    settings_lib.check_teacher(config)
    chain = plan(config, roles.p_star_identity(config))
    cache.enable_compilation_cache()
    groups = {stage.group for stage in chain}
    unknown = set(only) - groups - {"evaluation"}
    if unknown:
        raise ValueError(f"--stages: {unknown.pop()!r} is not one of {', '.join([*groups, 'evaluation'])}")
    if not only or set(only) & groups:
        stages.run(folder, chain, [name for name in only if name != "evaluation"])
    if only and "evaluation" not in only:
        return None
    return evaluate(config, folder, chain)


def _show(config, folder: Path, target: Target | None) -> None:
    try:
        identity = roles.p_star_identity(config)
    except (RunError, OSError) as error:
        print(f"p* is not here yet, so everything is shown as to do ({error})")
        identity = config.p_star.source
    chain = plan(config, identity)
    where = stages.folders(folder, chain)
    costs = {stage.name: stage.cost for stage in chain}
    costs["evaluation"] = cost.evaluation(config, PRESETS.get(config.p_star.architecture))

    def finished(name: str) -> bool:
        return name in where and stages.finished(where[name])

    if target is None:
        cost.show(config.compute.dtype, costs, finished)
    else:
        planning.show(config, costs, finished, target)


# The chain


def plan(config, identity: str) -> list[Stage]:
    """The stages before the evaluation, inputs first. `identity` is that of p*'s weights."""
    chain = [
        _p_star_corpus(config, identity, arms.TRAIN, config.num_train + config.num_validation, TRAIN),
        _p_star_corpus(config, identity, "p_star/validation", config.num_recall, VALIDATION),
    ]
    if not config.teacher.source:
        teacher = results_lib.Student("teacher", "teacher", None, None, TEACHER)
        chain.append(
            _training(config, "teacher", arms.Arm("teacher", "teacher", p_star=True), config.teacher, [teacher])
        )
    for arm in arms.arms(config):
        names = {stage.name for stage in chain}
        if arm.samples is not None and arm.samples.name not in names:
            chain.append(_teacher_corpus(config, arm.samples))
        for text, corpus in zip(arm.texts, arm.corpora, strict=True):
            if corpus not in (text, *names):
                chain.append(_recorded(config, arm.recording, text))
        chain += _students(config, arm)
    return chain


def _p_star_corpus(config, identity: str, name: str, num_samples: int, purpose: int) -> Stage:
    settings = _sampling(config, num_samples, 1.0, purpose) | {"p_star": dict(config.p_star), "identity": identity}
    if config.data.source:
        settings |= {"data": dict(config.data), "data_identity": documents.identity(config.data.source)}

    def work(folder: Path, _: dict[str, Path]) -> dict[str, Any]:
        model = roles.p_star(config)
        weights.save_about(model, folder)
        if config.data.source:
            # the two corpora of p* share no document: one begins where the other ends
            return _ingest(
                config, folder, 0 if purpose == TRAIN else config.num_train + config.num_validation, num_samples
            )
        return _sample(config, model, folder, settings, name)

    shape = PRESETS.get(config.p_star.architecture)
    return Stage(name, settings, (), work, cost.sampling(config, shape, num_samples))


def _teacher_corpus(config, samples: arms.Samples) -> Stage:
    # the same random numbers for every tau: differences between them are less noisy
    settings = _sampling(config, config.num_train + config.num_validation, samples.sample_temperature, SAMPLES)
    # what is off is not said
    settings |= {key: getattr(samples, key) for key in ("top_k", "top_p") if getattr(samples, key) is not None}

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        model = roles.teacher(config, inputs, config.sampling.dtype, settings_lib.mesh(config))
        return _sample(config, model, folder, settings, samples.name)

    price = cost.sampling(config, settings_lib.shape(config, "teacher"), settings["num_samples"])
    return Stage(samples.name, settings | roles.teacher_identity(config), roles.teacher_inputs(config), work, price)


def _recorded(config, recording: arms.Recording, text: str) -> Stage:
    """A corpus once more, with the teacher's likeliest tokens at each position."""
    settings = recording._asdict() | roles.teacher_identity(config)
    name, dtype = recording.name(text), recording.teacher_dtype

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        over = settings_lib.teacher_mesh(config)
        model, source = roles.teacher(config, inputs, dtype, over), corpus_lib.open(inputs[text] / "corpus")
        about = recorded_top_k.settings(
            model, config.teacher.source or "teacher", recording.top_k, recording.log_prob_format, dtype,
            corpus_lib.fingerprint(source),
        )  # fmt: skip
        held = recorded_top_k.score_corpus(
            source, folder / "corpus", model, about, command=f"stage {name}", label=name,
            compute=Compute(dtype=dtype), mesh=over,
        )  # fmt: skip
        return {**held.manifest["counts"], "entropy": None, "entropy_se": None}

    price = cost.scoring(config, settings_lib.shape(config, "teacher"), recording.top_k)
    return Stage(name, settings, (text, *roles.teacher_inputs(config)), work, price)


def _students(config, arm: arms.Arm) -> list[Stage]:
    """The students of an arm, config.train.together to a stage."""
    # one seed, one start and one order of the data, whatever the corpus
    each = [
        results_lib.Student(f"{arm.name}/seed-{seed}", arm.kind, arm.tau, seed, STUDENT + seed)
        for seed in range(config.seeds)
    ]
    size = config.train.together
    groups = [each[i : i + size] for i in range(0, len(each), size)]
    # a stage of one has the student's own name
    names = [
        group[0].name if len(group) == 1 else f"{arm.name}/seeds-{group[0].seed}-{group[-1].seed}" for group in groups
    ]
    return [_training(config, name, arm, config.student, group) for name, group in zip(names, groups, strict=True)]


def _training(config, name: str, arm: arms.Arm, shape, students: list[results_lib.Student]) -> Stage:
    how = {key: value for key, value in config.train.items() if key not in ("together", "trackers")}
    settings = {
        "model": {key: value for key, value in shape.items() if key != "source"}, "train": {**how, "trackers": []},
        "num_validation": config.num_validation, "seed": config.seed + students[0].purpose,
        "compute": dict(config.compute),
    }  # fmt: skip
    if len(students) > 1:
        settings["together"] = len(students)
    taught = arm.settings is not None and arm.policy != "offline"
    if arm.settings is not None:
        settings["distill"] = arm.knobs
        settings |= roles.teacher_identity(config) if taught else {}

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        like = weights.about(inputs[arms.TRAIN])
        model = like._replace(architecture=settings_lib.architecture(shape, like.architecture, "config"))
        corpora = [corpus_lib.open(inputs[corpus] / "corpus") for corpus in arm.corpora]
        members = [
            training.Member(
                corpora[0], config.seed + student.purpose, results_lib.home(folder, students, student), student.name,
                {"arm": student.arm, "tau": student.tau, "seed": student.seed}, *corpora[1:],
                prompts=corpus_lib.open(inputs[arms.TRAIN] / "corpus"),
            )
            for student in students
        ]  # fmt: skip
        with Stop() as stop:
            results = training.train(
                settings_lib.training_settings(config), model, members, compute=Compute(**config.compute),
                mesh=settings_lib.mesh(config), stop=stop, distillation=_distillation(config, arm, inputs),
            )  # fmt: skip
        named = {student.name: result for student, result in zip(students, results, strict=True)}
        return results[0] if len(results) == 1 else named

    role = "teacher" if name == "teacher" else "student"
    teacher = settings_lib.shape(config, "teacher") if taught else None
    price = cost.training(config, settings_lib.shape(config, role), len(students), teacher, arm.rollouts)
    inputs = dict.fromkeys([arms.TRAIN, *arm.corpora, *(roles.teacher_inputs(config) if taught else ())])
    return Stage(name, settings, tuple(inputs), work, price, tuple(students))


def _distillation(config, arm: arms.Arm, inputs: dict[str, Path]) -> loss.Distillation | None:
    if arm.settings is None:
        return None
    if arm.policy == "offline":
        return loss.Distillation(arm.settings)
    dtype = arm.knobs["teacher_dtype"]
    teacher = roles.teacher(config, inputs, dtype, settings_lib.teacher_mesh(config))
    return loss.Distillation(arm.settings, teacher, Compute(**{**config.compute, "dtype": dtype, "remat": False}))


# Corpora: drawn from a model, or read


def _sampling(config, num_samples: int, tau: float, purpose: int) -> dict[str, Any]:
    s = config.sampling
    return {
        "prompt": s.prompt, "prompt_ids": list(s.prompt_ids), "max_length": s.max_length, "shard_size": s.shard_size,
        "num_samples": num_samples, "sample_temperature": tau, "seed": config.seed + purpose, "dtype": s.dtype,
    }  # fmt: skip


def _sample(config, model: Model, folder: Path, settings: dict[str, Any], label: str) -> dict[str, Any]:
    """The corpus of a stage; some numbers of it."""
    tokenizer = model.tokenizer
    ids = settings["prompt_ids"] or tokenizer.encode(settings["prompt"])
    about = {name: settings[name] for name in ("max_length", "shard_size", "num_samples", "sample_temperature", "seed")}
    about |= {
        "source": label, "model_fingerprint": weights.fingerprint(model.params),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint, "dtype": settings["dtype"],
        "prompt": settings["prompt"] or None, "prompt_ids": ids, "eos_ids": sorted(model.eos_ids),
        "top_k": settings.get("top_k"), "top_p": settings.get("top_p"),
    }  # fmt: skip
    held = to_corpus.sample(
        model, folder / "corpus", about, command=f"stage {label}", label=label, batch_size=config.sampling.batch_size,
        compute=Compute(dtype=settings["dtype"]), mesh=settings_lib.mesh(config),
    )  # fmt: skip
    rows = held.rows()
    tokens = (rows.length - rows.prompt_length).astype(float)
    entropy = estimates.per_token(-rows.sample_log_prob, tokens)
    return {**held.manifest["counts"], "entropy": entropy[0], "entropy_se": entropy[1]}


def _ingest(config, folder: Path, first: int, num_samples: int) -> dict[str, Any]:
    """Rows of the data set as the corpus of a stage. What their entropy is, nobody knows."""
    data = config.data

    def read() -> dict[str, Any]:
        held = ingest.from_dataset(
            data.source, folder / "corpus", config.p_star.source, split=data.split, first=first,
            num_samples=num_samples, text_column=data.text_column or None, ids_column=data.ids_column or None,
            seed=config.seed, max_length=config.sampling.max_length, prompt_ids=config.sampling.prompt_ids,
            shard_size=config.sampling.shard_size,
        )  # fmt: skip
        return held.manifest["counts"]

    return {**distributed.once(read, f"reading {data.source}"), "entropy": None, "entropy_se": None}


# Evaluation


def _teachers(config, where: dict[str, Path], validation: Corpus) -> dict[str, evaluation.Entry]:
    """The teacher at each way of sampling it that a student learnt from; without any, as it is."""
    source = config.teacher.source or where["teacher"]
    entries = {}
    for samples in dict.fromkeys(arm.samples for arm in arms.arms(config) if arm.samples is not None):
        name = f"teacher/{samples.label}"
        whole = samples.top_k is None and samples.top_p is None
        held = corpus_lib.open(where[samples.name] / "corpus")
        entries[name] = evaluation.Entry(source, "teacher" if whole else name, samples.sample_temperature, None, held)
    if not entries:
        is_p_star = source == config.p_star.source and config.num_samples <= config.num_recall
        held = validation if is_p_star and not config.data.source else None
        entries["teacher/tau-1"] = evaluation.Entry(source, "teacher", 1.0, None, held)
    return entries


def evaluate(config, folder: Path, chain: list[Stage]) -> dict[str, Any]:
    """Scores every model, and gathers the rows of the whole run in its metrics.jsonl and samples.jsonl."""
    where = stages.folders(folder, chain)
    missing = [stage.name for stage in chain if not stages.finished(where[stage.name])]
    if missing:
        raise RunError(f"the evaluation needs {missing[0]}, which is not finished; run it first")
    p_star = roles.p_star(config)
    validation = corpus_lib.open(where["p_star/validation"] / "corpus")
    entries = _teachers(config, where, validation)
    for student, home in results_lib.trained(chain, where):
        if student.arm != "teacher":
            entries[student.name] = evaluation.Entry(home, student.arm, student.tau, student.seed)
    settings = evaluation.Settings(
        num_samples=config.num_samples, seed=config.seed + EVALUATION, dtype=config.sampling.dtype,
        batch_size=config.sampling.batch_size, mesh=settings_lib.mesh(config),
    )  # fmt: skip
    rows = evaluation.evaluate(p_star, entries, validation, settings, folder / "evaluation")
    gather = functools.partial(_gather, config, folder, chain, rows, entries, p_star, validation)
    return distributed.once(gather, "gathering the rows")


def _gather(config, folder: Path, chain: list[Stage], rows, entries, p_star: Model, validation: Corpus):
    """Writes the rows of the whole run; returns what the manifest is to say of its stages."""
    where = stages.folders(folder, chain)
    rows = [row | results_lib.learnt_from(config, row, chain, where) for row in rows]
    seconds = evaluation.seconds(folder / "evaluation", entries)
    trained = [read_rows(home / "metrics.jsonl") for _, home in results_lib.trained(chain, where)]
    write_rows(folder / "metrics.jsonl", [*rows, *sum(trained, []), *results_lib.stage_rows(chain, where, seconds)])
    there = {name: entry.samples for name, entry in entries.items()}
    write_rows(folder / "samples.jsonl", results_lib.sample_rows(config, p_star, rows, validation, there, folder))
    done = [
        {**stages.about(where[stage.name]), "folder": str(where[stage.name].relative_to(folder))} for stage in chain
    ]
    done = [{key: stage[key] for key in ("name", "folder", "seconds", "starts")} for stage in done]
    done.append({"name": "evaluation", "folder": "evaluation", "seconds": seconds})
    return {"stages": done, "overhead": results_lib.overhead(chain, where)}
