"""The language-model experiment (Cha & Cho, section 4): p* -> corpus -> teacher -> its corpora -> students -> scores.

Every corpus that is trained on has config.num_validation rows more, which no one trains on and which choose the
checkpoint. Recall is on a corpus of p* of its own. Seeds are those of the students; there is one teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import cache, stages
from kd_jax import mesh as mesh_lib
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import cost, estimates, evaluation, ingest, resumable, training, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model
from kd_jax.lm.tokenizer import Tokenizer
from kd_jax.run import RunError, Stop, read_json, read_rows, write_rows
from kd_jax.stages import Stage

# What a random key is for: seeds of corpora and models are config.seed + these, far apart.
TRAIN, VALIDATION, TEACHER, SAMPLES, STUDENT, EVALUATION = (1_000_000 * i for i in range(1, 7))
# Shares of the measured ceiling that the parts of a run reach, for the times of --dry_run.
SHARES = {"training": 0.4, "sampling": 0.2, "scoring": 0.4}


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    for name in ("seeds", "num_train", "num_validation", "num_recall", "num_samples"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    if not 0 <= config.seed < 2**20:
        raise ValueError(f"config.seed={config.seed} must be from 0 and below {2**20}")
    if not config.taus or len(set(config.taus)) < len(config.taus):
        raise ValueError(f"config.taus={tuple(config.taus)} must be at least one value, and none twice")
    for tau in config.taus:
        if not 0 < tau < math.inf:
            raise ValueError(f"config.taus: {tau} must be above 0 and finite")
    if config.sampling.max_length < 2:
        raise ValueError(f"config.sampling.max_length={config.sampling.max_length} must be at least 2")
    _check_p_star(config, config.p_star)
    if training_settings(config).batch_size > config.num_train:
        raise ValueError(
            f"config.train.batch_size={config.train.batch_size} is above config.num_train={config.num_train}"
        )
    for role in ("teacher", "student"):
        architecture(config[role], PRESETS["tiny"], f"config.{role}")
    Compute(**config.compute)
    mesh(config)


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


def training_settings(config) -> training.Settings:
    how = {key: value for key, value in config.train.items() if key != "together"}
    return training.Settings(num_validation=config.num_validation, **{**how, "trackers": tuple(config.train.trackers)})


def mesh(config) -> jax.sharding.Mesh | None:
    sizes = dict(config.mesh)
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


def run(config, folder: Path, *, only: tuple[str, ...] = (), dry_run: bool = False) -> dict[str, Any] | None:
    """Runs the chain into the run folder, or what is left of it; returns what to add to the manifest.

    With `only`, the stages of these groups; without "evaluation" among them there is no report yet, and None is
    returned. With `dry_run` the stages are shown, nothing is written, and None is returned.
    """
    if dry_run:
        show(config, folder)
        return None
    chain = plan(config, _identity(config))
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


# The chain


def plan(config, identity: str) -> list[Stage]:
    """The stages before the evaluation, inputs first. `identity` is that of p*'s weights."""
    chain = [
        _p_star_corpus(config, identity, "p_star/train", config.num_train + config.num_validation, TRAIN),
        _p_star_corpus(config, identity, "p_star/validation", config.num_recall, VALIDATION),
        _training(
            config, "teacher", "p_star/train", config.teacher, [Student("teacher", "teacher", None, None, TEACHER)]
        ),
    ]
    chain += _students(config, "direct", "p_star/train", None)
    for tau in config.taus:
        chain.append(_teacher_corpus(config, tau))
        chain += _students(config, f"tau-{tau:g}", f"samples/tau-{tau:g}", tau)
    return chain


def _p_star_corpus(config, identity: str, name: str, num_samples: int, purpose: int) -> Stage:
    settings = _sampling(config, num_samples, 1.0, purpose) | {"p_star": dict(config.p_star), "identity": identity}
    if config.data.source:
        path = Path(config.data.source).expanduser()
        settings |= {"data": dict(config.data), "data_identity": weights.identity(path) if path.is_file() else None}

    def work(folder: Path, _: dict[str, Path]) -> dict[str, Any]:
        model = _p_star(config)
        weights.save_about(model, folder)
        if config.data.source:
            # the two corpora of p* share no document: one begins where the other ends
            return _ingest(
                config, folder, 0 if purpose == TRAIN else config.num_train + config.num_validation, num_samples
            )
        return _sample(config, model, folder, settings, name)

    shape = PRESETS.get(config.p_star.architecture)
    return Stage(name, settings, (), work, _sampling_cost(config, shape, num_samples))


def _teacher_corpus(config, tau: float) -> Stage:
    # the same random numbers for every tau: differences between them are less noisy
    settings = _sampling(config, config.num_train + config.num_validation, tau, SAMPLES)
    name = f"samples/tau-{tau:g}"

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        model = weights.load(inputs["teacher"], mesh=mesh(config))
        return _sample(config, model, folder, settings, name)

    return Stage(
        name, settings, ("teacher",), work, _sampling_cost(config, _shape(config, "teacher"), settings["num_samples"])
    )


class Student(NamedTuple):
    """A model of the chain that is trained."""

    name: str
    arm: str
    tau: float | None
    seed: int | None
    purpose: int


def _students(config, arm: str, corpus: str, tau: float | None) -> list[Stage]:
    """The students of one corpus, config.train.together to a stage."""
    # one seed, one start and one order of the data, whatever the corpus
    kind = "direct" if tau is None else "distilled"
    each = [Student(f"{arm}/seed-{seed}", kind, tau, seed, STUDENT + seed) for seed in range(config.seeds)]
    size = config.train.together
    groups = [each[i : i + size] for i in range(0, len(each), size)]
    # a stage of one has the student's own name
    names = [group[0].name if len(group) == 1 else f"{arm}/seeds-{group[0].seed}-{group[-1].seed}" for group in groups]
    return [_training(config, name, corpus, config.student, group) for name, group in zip(names, groups, strict=True)]


def _training(config, name: str, corpus: str, shape, students: list[Student]) -> Stage:
    how = {key: value for key, value in config.train.items() if key not in ("together", "trackers")}
    settings = {
        "model": dict(shape), "train": {**how, "trackers": []}, "num_validation": config.num_validation,
        "seed": config.seed + students[0].purpose, "compute": dict(config.compute),
    }  # fmt: skip
    if len(students) > 1:
        settings["together"] = len(students)

    def work(folder: Path, inputs: dict[str, Path]) -> dict[str, Any]:
        like = _about(inputs["p_star/train"])
        model = like._replace(architecture=architecture(shape, like.architecture, "config"))
        held = corpus_lib.open(inputs[corpus] / "corpus")
        members = [
            training.Member(
                held, config.seed + student.purpose, _home(folder, students, student), student.name,
                {"arm": student.arm, "tau": student.tau, "seed": student.seed},
            )
            for student in students
        ]  # fmt: skip
        with Stop() as stop:
            results = training.train(
                training_settings(config),
                model,
                members,
                compute=Compute(**config.compute),
                mesh=mesh(config),
                stop=stop,
            )
        return (
            results[0]
            if len(results) == 1
            else {student.name: result for student, result in zip(students, results, strict=True)}
        )

    role = "teacher" if name == "teacher" else "student"
    price = _training_cost(config, _shape(config, role), len(students))
    return Stage(name, settings, tuple(dict.fromkeys(["p_star/train", corpus])), work, price, tuple(students))


def _home(folder: Path, students: Sequence[Student], student: Student) -> Path:
    """Where a student of a stage is."""
    return folder if len(students) == 1 else folder / f"seed-{student.seed}"


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
        "prompt": settings["prompt"] or None, "prompt_ids": ids, "eos_ids": sorted(model.eos_ids), "top_k": None,
        "top_p": None,
    }  # fmt: skip
    held = resumable.sample(
        model, folder / "corpus", about, command=f"stage {label}", label=label, batch_size=config.sampling.batch_size,
        compute=Compute(dtype=settings["dtype"]), mesh=mesh(config),
    )  # fmt: skip
    rows = held.rows()
    tokens = (rows.length - rows.prompt_length).astype(float)
    entropy = estimates.per_token(-rows.sample_log_prob, tokens)
    return {**held.manifest["counts"], "entropy": entropy[0], "entropy_se": entropy[1]}


def _ingest(config, folder: Path, first: int, num_samples: int) -> dict[str, Any]:
    """Rows of the data set as the corpus of a stage. What their entropy is, nobody knows."""
    data = config.data
    held = ingest.from_dataset(
        data.source, folder / "corpus", config.p_star.source, split=data.split, first=first, num_samples=num_samples,
        text_column=data.text_column or None, ids_column=data.ids_column or None, seed=config.seed,
        max_length=config.sampling.max_length, prompt_ids=config.sampling.prompt_ids,
        shard_size=config.sampling.shard_size,
    )  # fmt: skip
    return {**held.manifest["counts"], "entropy": None, "entropy_se": None}


# p*


def _p_star(config) -> Model:
    """p* with its weights; a random one where the config has no source."""
    return _load_p_star(
        config.p_star.source, config.p_star.architecture, config.seed, config.sampling.dtype, mesh(config)
    )


@functools.lru_cache(maxsize=1)
def _load_p_star(source: str, preset: str, seed: int, dtype: str, over) -> Model:
    if source:
        return weights.load(source, dtype=dtype, mesh=over)
    params = jax.jit(model_lib.init, static_argnums=(1, 2))(jax.random.key(seed), PRESETS[preset], jnp.dtype(dtype))
    # such a model says any id as soon as any other; one of them ends a sequence
    return Model(PRESETS[preset], params, eos_ids=(0,))


@functools.lru_cache(maxsize=1)
def _source_identity(source: str) -> str:
    return weights.identity(source)


def _identity(config) -> str:
    return _source_identity(config.p_star.source) if config.p_star.source else f"random, seed {config.seed}"


def _about(folder: Path) -> Model:
    """The model that `weights.save_about` has described in a folder, without weights."""
    said = read_json(folder / "model.json")
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    return Model(
        Architecture(**said["architecture"]), None, tuple(said["eos_ids"]), said["bos_id"], said["pad_id"], tokenizer
    )


# Evaluation


def evaluate(config, folder: Path, chain: list[Stage]) -> dict[str, Any]:
    """Scores every model, and gathers the rows of the whole run in its metrics.jsonl and samples.jsonl."""
    began = time.perf_counter()
    where = stages.folders(folder, chain)
    missing = [stage.name for stage in chain if not stages.finished(where[stage.name])]
    if missing:
        raise RunError(f"the evaluation needs {missing[0]}, which is not finished; run it first")
    p_star, entries = _p_star(config), {}
    for tau in config.taus:
        held = corpus_lib.open(where[f"samples/tau-{tau:g}"] / "corpus")
        entries[f"teacher/tau-{tau:g}"] = evaluation.Entry(where["teacher"], "teacher", tau, None, held)
    for student, home in _trained(chain, where):
        if student.arm != "teacher":
            entries[student.name] = evaluation.Entry(home, student.arm, student.tau, student.seed)
    settings = evaluation.Settings(
        num_samples=config.num_samples, seed=config.seed + EVALUATION, dtype=config.sampling.dtype,
        batch_size=config.sampling.batch_size, mesh=mesh(config),
    )  # fmt: skip
    validation = corpus_lib.open(where["p_star/validation"] / "corpus")
    rows = evaluation.evaluate(p_star, entries, validation, settings, folder / "evaluation")
    for row in rows:
        corpus = "p_star/train" if row["arm"] == "direct" else f"samples/tau-{row['tau']:g}"
        found = stages.about(where[corpus])["result"]
        row |= {"teacher_entropy": found["entropy"], "teacher_entropy_se": found["entropy_se"]}
    seconds = time.perf_counter() - began
    trained = [read_rows(home / "metrics.jsonl") for _, home in _trained(chain, where)]
    write_rows(folder / "metrics.jsonl", [*rows, *sum(trained, []), *_stage_rows(chain, where, seconds)])
    write_rows(folder / "samples.jsonl", _sample_rows(config, p_star, rows, where, folder))
    done = [
        {**stages.about(where[stage.name]), "folder": str(where[stage.name].relative_to(folder))} for stage in chain
    ]
    done = [{key: stage[key] for key in ("name", "folder", "seconds", "starts")} for stage in done]
    done.append({"name": "evaluation", "folder": "evaluation", "seconds": round(seconds, 3), "starts": 1})
    return {"stages": done, "overhead": _overhead(chain, where)}


def _trained(chain, where) -> list[tuple[Student, Path]]:
    """Every model that was trained, and where it is."""
    return [(one, _home(where[stage.name], stage.about, one)) for stage in chain for one in stage.about]


def _stage_rows(chain, where, evaluation_seconds: float) -> list[dict[str, Any]]:
    """What each stage took; of a training also the share of what is no training: data, logging, checkpoints."""
    rows = []
    for stage in chain:
        said = stages.about(where[stage.name])
        row = {"kind": "stage", "name": stage.name, "seconds": said["seconds"], "starts": said["starts"]}
        result = said["result"]
        if stage.about:
            result = _results(stage, result)
            homes = [_home(where[stage.name], stage.about, student) for student in stage.about]
            row["tokens"] = sum(_last(home)["tokens"] for home in homes)
            row["share_of_data_logging_checkpoints"] = _share(_total([one["seconds"] for one in result]))
        else:
            row |= {name: result[name] for name in ("tokens", "entropy", "entropy_se")}
        rows.append(row)
    return [*rows, {"kind": "stage", "name": "evaluation", "seconds": round(evaluation_seconds, 3)}]


def _last(home: Path) -> dict[str, Any]:
    return [row for row in read_rows(home / "metrics.jsonl") if row["kind"] == "training"][-1]


def _results(stage: Stage, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was said of each model that the stage trained."""
    return [result] if len(stage.about) == 1 else [result[student.name] for student in stage.about]


def _total(seconds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in seconds for name in each)
    return {name: round(sum(each.get(name, 0.0) for each in seconds), 3) for name in names}


def _share(seconds: dict[str, float]) -> float:
    return round(sum(seconds.get(name, 0.0) for name in ("data", "logging", "checkpoints")) / seconds["total"], 4)


def _overhead(chain, where) -> dict[str, float]:
    """Seconds of all trainings by what they were spent on, and the share of data, logging and checkpoints in them."""
    found = [_results(stage, stages.about(where[stage.name])["result"]) for stage in chain if stage.about]
    seconds = _total([one["seconds"] for results in found for one in results])
    return {**seconds, "share": _share(seconds)}


def _sample_rows(config, p_star: Model, rows, where, folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """The first samples of each model, and of p*, as text (or ids, where there is no tokenizer)."""
    corpora = [("p*", None, None, None, where["p_star/validation"] / "corpus")]
    for row in rows:
        if row["arm"] == "teacher":
            path = where[f"samples/tau-{row['tau']:g}"] / "corpus"
        else:
            path = folder / "evaluation" / row["name"] / "samples"
        corpora.append((row["name"], row["arm"], row["tau"], row["seed"], path))
    found = []
    for name, arm, tau, seed, path in corpora:
        held = corpus_lib.open(path).rows(0, min(count, config.num_samples, config.num_recall))
        for i, ids in enumerate(held.tokens):
            text = " ".join(map(str, ids)) if p_star.tokenizer is None else p_star.tokenizer.decode(ids)
            found.append({
                "name": name, "arm": arm or "p_star", "tau": tau, "seed": seed, "index": int(held.index[i]),
                "text": text, "finished": bool(held.finished[i]), "length": int(held.length[i]),
            })  # fmt: skip
    return found


# What it will cost


def _shape(config, role: str) -> Architecture | None:
    """The shape of teacher or student, as far as the config alone says it."""
    p_star = PRESETS.get(config.p_star.architecture)
    return None if p_star is None else architecture(config[role], p_star, f"config.{role}")


def _sampling_cost(config, shape: Architecture | None, num_samples: int) -> dict[str, Any]:
    tokens = num_samples * config.sampling.max_length
    # ids as int32, a few numbers a row; Parquet packs them somewhat
    return _cost("sampling", shape, tokens, 1, config, 4 * tokens + 40 * num_samples)


def _training_cost(config, shape: Architecture | None, count: int) -> dict[str, Any]:
    tokens = count * config.num_train * config.sampling.max_length * config.train.epochs
    held = count * (4 + 12 * (config.train.keep + 1) * config.train.keep_checkpoints)
    return _cost("training", shape, tokens, 3, config, 0 if shape is None else held * shape.num_parameters)


def _cost(kind: str, shape: Architecture | None, tokens: int, passes: int, config, disk: float) -> dict[str, Any]:
    if shape is None:
        return {"kind": kind, "tokens": tokens}
    flops = passes * cost.forward_flops(shape, config.sampling.max_length) * tokens
    return {"kind": kind, "parameters": shape.num_parameters, "tokens": tokens, "flops": flops, "disk": disk}


def show(config, folder: Path) -> None:
    """Prints the stages: what is done, and what the others cost at most (no sequence ends before max_length)."""
    try:
        identity = _identity(config)
    except (RunError, OSError) as error:
        print(f"p* is not here yet, so everything is shown as to do ({error})")
        identity = config.p_star.source
    chain = plan(config, identity)
    where = stages.folders(folder, chain)
    rate = cost.ceiling(config.compute.dtype)
    print(f"{'stage':24} {'parameters':>12} {'tokens':>14} {'FLOPs':>9} {'disk MB':>9} {'minutes':>8}  state")
    total = 0.0
    for stage in [*chain, _evaluation_cost(config)]:
        c = stage.cost
        seconds = c["flops"] / (rate * SHARES[c["kind"]]) if "flops" in c else math.nan
        done = stage.name in where and stages.finished(where[stage.name])
        total += 0 if done else seconds
        print(
            f"{stage.name:24} {c.get('parameters', math.nan):12,} {c['tokens']:14,} {c.get('flops', math.nan):9.2e} "
            f"{c.get('disk', math.nan) / 1e6:9.0f} {seconds / 60:8.1f}  {'finished' if done else 'to do'}"
        )
    print(
        f"at most {total / 60:.0f} minutes are left on {jax.device_count()} x {jax.devices()[0].device_kind}, which "
        f"does {rate / 1e9:.0f} GFLOP/s in large products; of that sampling is "
        f"taken to reach {SHARES['sampling']:.0%}, "
        f"training {SHARES['training']:.0%}, scoring {SHARES['scoring']:.0%}"
    )


def _evaluation_cost(config) -> Stage:
    """Samples of every student scored under p*, which is by far the most of it."""
    students = config.seeds * (1 + len(config.taus)) + len(config.taus)
    tokens = students * config.num_samples * config.sampling.max_length
    shape = PRESETS.get(config.p_star.architecture)
    return Stage("evaluation", {}, (), lambda *_: {}, _cost("scoring", shape, tokens, 1, config, 8 * tokens))
