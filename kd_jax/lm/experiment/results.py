"""The evaluation of a run, and the rows of its metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import evaluation
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.decode.chosen_text import Text
from kd_jax.lm.evaluation import Entry, embedding_map, paired
from kd_jax.lm.evaluation import scores as scores_lib
from kd_jax.lm.experiment import arms as arms_lib
from kd_jax.lm.experiment import corpora as corpora_lib
from kd_jax.lm.experiment import roles
from kd_jax.lm.experiment.arms import Arm, of_teacher
from kd_jax.lm.experiment.specs import LmSpec, make_mesh
from kd_jax.lm.instruct import pass_rate
from kd_jax.lm.model import Model
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.lm.training.log import ROW
from kd_jax.parallel import distributed
from kd_jax.runs import stages
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_rows, write_rows

# Added to config.seed for the samples of the evaluation.
_EVALUATION = 6_000_000


class Student(NamedTuple):
    """A model that the chain trains: a student, or the teacher, which has no seed.

    Attributes:
        name: of its folder in the evaluation, and in rows.
        arm: what it learns from.
        seed: which student of the arm.
        purpose: the part of its random seed that tells it from other models.
        teacher: which of the run's teachers it is, or learns from.
    """

    name: str
    arm: Arm
    seed: int | None
    purpose: int
    teacher: int = 0


class Evaluated(NamedTuple):
    """A model of the evaluation, and what its row says that it learnt from.

    Attributes:
        entry: see kd_jax.lm.evaluation.
        arm: of a student; None for the teacher.
        samples: the stage of a teacher's samples.
        home: the folder of a student's training.
    """

    entry: Entry
    arm: Arm | None = None
    samples: str | None = None
    home: Path | None = None


def evaluate(spec: LmSpec, folder: Path, chain: list[Stage]) -> dict[str, Any]:
    """Scores every model and writes the rows of the whole run.

    Args:
        chain: the stages, all of them finished.
    Returns: what to add to the manifest.
    Raises: RunError naming a stage that is not finished.
    """
    folders = stages.folders(folder, chain)
    missing = [stage.name for stage in chain if not stages.finished(folders[stage.name])]
    if missing:
        raise RunError(f"the evaluation needs {missing[0]}, which is not finished; run it first")
    p_star = roles.p_star(spec)
    validation = corpus_lib.open(folders["p_star/validation"] / "corpus")
    models = _teachers(spec, folders, validation)
    for student, home in trained(chain, folders):
        # The teacher is evaluated with each sampler that students learn from, not once: see `_teachers`.
        if student.seed is not None:
            entry = Entry(
                home, student.arm.kind, student.arm.tau, student.seed, teacher=student.teacher,
                sample_temperatures=_temperatures(spec, student.arm),
            )  # fmt: skip
            models[student.name] = Evaluated(entry, arm=student.arm, home=home)
    entries = {name: model.entry for name, model in models.items()}
    settings = evaluation.EvaluationSpec(
        **vars(spec.evaluation), num_samples=spec.num_samples, seed=spec.seed + _EVALUATION, dtype=spec.sampling.dtype,
        batch_size=spec.sampling.batch_size,
    )  # fmt: skip
    rows = evaluation.evaluate(p_star, entries, validation, settings, folder / "evaluation", make_mesh(spec.mesh))
    if spec.instruct.num_test:
        # Students alone: a teacher that is p* has p*'s answers, and another one costs as much as p* itself.
        students = {name: model.entry for name, model in models.items() if model.arm is not None}
        lazy = evaluation.LazyModel(p_star, spec.sampling.dtype, make_mesh(spec.mesh), folder / "evaluation")
        checked, answers = pass_rate.evaluate(
            spec.instruct, lazy, students, settings, folder / "evaluation", max_length=spec.sampling.max_length,
            mesh=make_mesh(spec.mesh),
        )  # fmt: skip
        rows = [*rows, *checked]
        if distributed.leads():
            write_rows(folder / "answers.jsonl", answers)
    texts = corpora_lib.reencoded_texts(spec, folders)
    shown = sample_rows(spec, p_star, models, validation, folder, texts=texts)
    # Process 0 alone writes the rows; the manifest's entries go to all.
    gather = functools.partial(_gather, spec, folder, chain, rows, shown, models, p_star, validation)
    return distributed.once(gather, "gathering the rows")


def _teachers(spec: LmSpec, folders: dict[str, Path], validation: Corpus) -> dict[str, Evaluated]:
    """Every teacher with each sampler whose text students learn; plain teachers if they learn none of it.

    A teacher with another vocabulary gives no probabilities to p*'s tokens and is not evaluated.
    """
    if roles.other_vocabulary(spec) is not None:
        return {}
    stage_of: dict[SamplerSpec, str] = {}
    # Where arms learn several amounts of one sampler's text, the largest corpus has rows enough.
    size = functools.partial(Text.num_samples, num_train=spec.num_train, num_validation=spec.num_validation)
    for arm in sorted(arms_lib.arms(spec), key=lambda arm: -size(arm.text)):
        if arm.sampler is not None:
            stage_of.setdefault(arm.sampler, arms_lib.samples_of(spec, arm))
    # in the order of the arms
    samplers = dict.fromkeys(arm.sampler for arm in arms_lib.arms(spec) if arm.sampler is not None)
    if spec.own_prompts:
        samplers = {}  # the teachers' corpora answer the prompts of training, and not those of the validation rows
    models = {}
    for teacher in range(spec.teachers):
        source = spec.teacher.source or folders[of_teacher("teacher", teacher)]
        for sampler in samplers:
            arm = f"teacher/{sampler.label}"
            truncated = any(value is not None for key, value in sampler.knobs().items() if key != "sample_temperature")
            stage = of_teacher(stage_of[sampler], teacher)
            samples = corpus_lib.open(folders[stage] / "corpus")
            # tau alone would not tell a truncated teacher from the plain one.
            entry = Entry(
                source, arm if truncated else "teacher", sampler.sample_temperature, None, samples, teacher=teacher
            )
            models[of_teacher(arm, teacher)] = Evaluated(entry, samples=stage)
        if not samplers and (teacher == 0 or not spec.teacher.source):
            # A teacher that is p* has samples already: those that recall is measured on.
            is_p_star = source == spec.p_star.source and spec.num_samples <= spec.num_recall
            # Embedding metrics would compare these samples with themselves.
            given = is_p_star and not spec.data.source and not spec.evaluation.embedding_model
            samples = validation if given else None
            name = of_teacher("teacher/tau-1", teacher)
            models[name] = Evaluated(Entry(source, "teacher", 1.0, None, samples, teacher=teacher))
    return models


def _temperatures(spec: LmSpec, arm: Arm) -> tuple[float, ...]:
    """The sample temperatures that an arm's students are evaluated at."""
    cooled = not spec.cooled_arms or arm.name in spec.cooled_arms
    return spec.evaluation.sample_temperatures if cooled else (1.0,)


def _gather(
    spec: LmSpec, folder: Path, chain: list[Stage], rows: list[dict[str, Any]], shown: list[dict[str, Any]],
    models: dict[str, Evaluated], p_star: Model, validation: Corpus,
) -> dict[str, Any]:  # fmt: skip
    """Writes metrics.jsonl and samples.jsonl of the run; returns what the manifest says of its stages."""
    folders = stages.folders(folder, chain)
    # What a model learnt from is joined here: the evaluation knows models by name only.
    checked = [row for row in rows if row["kind"] == "instruct"]
    rows = [row | learnt_from(models[row["name"]], folders) for row in rows if row["kind"] == "evaluation"]
    paired.keep(folder / "recall.npz", folder / "evaluation", rows, validation.rows(0, spec.num_recall))
    seconds = evaluation.seconds(folder / "evaluation", models)
    training_rows = [read_rows(home / "metrics.jsonl") for _, home in trained(chain, folders)]
    rows = [*rows, *checked, *sum(training_rows, []), *stage_rows(chain, folders, seconds)]
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", shown)
    if spec.evaluation.embedding_model:
        corpora = {"p*": (Entry(p_star, arm="p_star"), validation)} | {
            name: (model.entry, corpus_lib.open(folder / "evaluation" / name / "samples"))
            for name, model in models.items() if (model.entry.teacher, model.entry.seed) == (0, 0)
        }  # fmt: skip
        show = functools.partial(_shown, p_star)
        write_rows(folder / "embedding_map.jsonl", embedding_map.rows(folder / "evaluation", corpora, show, spec.seed))
    records = []
    for stage in chain:
        record = stages.record(folders[stage.name])
        place = str(folders[stage.name].relative_to(folder))
        records.append({"name": stage.name, "folder": place, **{key: record[key] for key in ("seconds", "starts")}})
    records.append({"name": "evaluation", "folder": "evaluation", "seconds": seconds})
    return {"stages": records, "overhead": overhead(chain, folders)}


def home(folder: Path, students: Sequence[Student], student: Student) -> Path:
    """The folder of one of a stage's students."""
    return folder if len(students) == 1 else folder / f"seed-{student.seed}"


def trained(chain: Sequence[Stage], folders: dict[str, Path]) -> list[tuple[Student, Path]]:
    """Every model that is trained, and its folder."""
    students = [(stage, student) for stage in chain for student in stage.students]
    return [(student, home(folders[stage.name], stage.students, student)) for stage, student in students]


def stage_rows(chain: Sequence[Stage], folders: dict[str, Path], evaluation_seconds: float) -> list[dict[str, Any]]:
    """A row for each stage: its time, and for a training the share of it that data, logging and checkpoints took.

    Args:
        chain: the stages, all of them finished.
        folders: of the stages, by name.
        evaluation_seconds: the evaluation's time.
    """
    rows = []
    for stage in chain:
        record = stages.record(folders[stage.name])
        row = {"kind": "stage", "name": stage.name, "seconds": record["seconds"], "starts": record["starts"]}
        result = record["result"]
        if stage.students:
            # Students that were trained together share the stage's time; their tokens add up.
            homes = [home(folders[stage.name], stage.students, student) for student in stage.students]
            row["tokens"] = sum(map(_num_tokens, homes))
            seconds = [one["seconds"] for one in _results(stage, result)]
            row["share_of_data_logging_checkpoints"] = _overhead_share(_added_up(seconds))
        else:
            row |= {name: result[name] for name in ("tokens", "entropy", "entropy_se")}
            if "reencoded" in result:
                row |= {"rows": result["rows"], "reencoded": result["reencoded"]}
        rows.append(row)
    return [*rows, {"kind": "stage", "name": "evaluation", "seconds": evaluation_seconds}]


def overhead(chain: Sequence[Stage], folders: dict[str, Path]) -> dict[str, float]:
    """Seconds of all trainings by activity, and the share of data, logging and checkpoints."""
    results = [_results(stage, stages.record(folders[stage.name])["result"]) for stage in chain if stage.students]
    seconds = _added_up([one["seconds"] for stage in results for one in stage])
    return {**seconds, "share": _overhead_share(seconds)}


def learnt_from(model: Evaluated, folders: dict[str, Path]) -> dict[str, Any]:
    """The fields of a row that say what its model learnt from: the entropy of that, and the settings of the arm.

    The entropy is that of the text, or, where a distribution is learnt, of that distribution on the validation rows:
    the teacher's at the loss temperature. It is unknown for a recorded top-k teacher, and for one with another
    vocabulary.

    Args:
        model: a student or the teacher.
        folders: of the stages, by name.
    """
    arm = model.arm
    if arm is None:  # the teacher
        return {} if model.samples is None else _text_entropy(folders[model.samples])
    settings = {**arm.knobs, **({} if arm.sampler is None else arm.sampler.knobs())}
    if arm.distill is not None:
        # Logged by the validation that chose the checkpoint.
        chosen = _rows(model.home, lambda row: row.get("chosen"), "the checkpoint that was chosen")[0]
        entropy = None if arm.policy == "offline" else chosen.get("teacher_entropy")
        return {"teacher_entropy": entropy, "distill": settings}
    text = of_teacher(arm.texts[-1], model.entry.teacher)
    return _text_entropy(folders[text]) | ({"distill": settings} if arm.knobs else {})


def sample_rows(
    spec: LmSpec, p_star: Model, models: dict[str, Evaluated], validation: Corpus, folder: Path, count: int = 16,
    texts: Sequence[tuple[str, Entry, Corpus]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The first samples of p* and of each model, as text (or ids, where there is no tokenizer), scored by p*.

    Args:
        models: of the evaluation, by name.
        validation: the corpus of p*.
        folder: of the run.
        count: samples of each.
        texts: of models that are not evaluated, with their names.
    """
    shown = [("p*", Entry(p_star, arm="p_star"), validation), *texts]
    for name, model in models.items():
        samples = model.entry.samples or corpus_lib.open(folder / "evaluation" / name / "samples")
        shown.append((name, model.entry, samples))
    # As many of each, so that the columns of the page are equally long.
    samples_of = [corpus.rows(0, min(count, spec.num_samples, spec.num_recall)) for _, _, corpus in shown]
    scores_of, rows = scores_lib.by_token(p_star, samples_of, make_mesh(spec.mesh)), []
    for (name, entry, _), samples, scores in zip(shown, samples_of, scores_of, strict=True):
        for i, ids in enumerate(samples.tokens):
            rows.append({
                "name": name, "arm": entry.arm, "tau": entry.tau, "teacher": entry.teacher, "seed": entry.seed,
                "index": int(samples.index[i]), "text": _shown(p_star, ids), "finished": bool(samples.finished[i]),
                "length": int(samples.length[i]), "prompt_length": int(samples.prompt_length[i]),
                "log_p_star": scores[i],
                "pieces": [f"{i} " for i in ids] if p_star.tokenizer is None else p_star.tokenizer.pieces(ids),
            })  # fmt: skip
    return rows


def _shown(p_star: Model, ids: np.ndarray) -> str:
    return " ".join(map(str, ids)) if p_star.tokenizer is None else p_star.tokenizer.decode(ids)


def _text_entropy(folder: Path) -> dict[str, Any]:
    result = stages.record(folder)["result"]
    return {"teacher_entropy": result["entropy"], "teacher_entropy_se": result["entropy_se"]}


def _rows(home: Path, wanted: Callable[[dict[str, Any]], bool], what: str) -> list[dict[str, Any]]:
    """The rows of a training that are wanted, at least one."""
    path = home / "metrics.jsonl"
    rows = [row for row in read_rows(path, ROW) if wanted(row)]
    if not rows:
        raise RunError(f"{path} is damaged: it has no row of {what}")
    return rows


def _num_tokens(home: Path) -> int:
    """How many tokens a model has learnt from."""
    return _rows(home, lambda row: row["kind"] == "training" and "tokens" in row, "a training")[-1]["tokens"]


def _results(stage: Stage, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The result of each model that a stage trained."""
    return [result] if len(stage.students) == 1 else [result[student.name] for student in stage.students]


def _added_up(seconds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in seconds for name in each)
    return {name: round(sum(each.get(name, 0.0) for each in seconds), 3) for name in names}


def _overhead_share(seconds: dict[str, float]) -> float:
    return round(sum(seconds.get(name, 0.0) for name in ("data", "logging", "checkpoints")) / seconds["total"], 4)
