"""What the stages of a run have left, as the rows of its metrics.jsonl and samples.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.experiment import arms
from kd_jax.lm.model import Model
from kd_jax.lm.training.log import ROW
from kd_jax.runs import stages
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_rows


class Student(NamedTuple):
    """A model of the chain that is trained."""

    name: str
    arm: str
    tau: float | None
    seed: int | None
    purpose: int


def home(folder: Path, students: Sequence[Student], student: Student) -> Path:
    """Where a student of a stage is."""
    return folder if len(students) == 1 else folder / f"seed-{student.seed}"


def trained(chain, where) -> list[tuple[Student, Path]]:
    """Every model that was trained, and where it is."""
    return [(one, home(where[stage.name], stage.about, one)) for stage in chain for one in stage.about]


def stage_rows(chain, where, evaluation_seconds: float) -> list[dict[str, Any]]:
    """What each stage took; of a training also the share of what is no training: data, logging, checkpoints."""
    rows = []
    for stage in chain:
        said = stages.about(where[stage.name])
        row = {"kind": "stage", "name": stage.name, "seconds": said["seconds"], "starts": said["starts"]}
        result = said["result"]
        if stage.about:
            result = _results(stage, result)
            homes = [home(where[stage.name], stage.about, student) for student in stage.about]
            row["tokens"] = sum(_last(one)["tokens"] for one in homes)
            row["share_of_data_logging_checkpoints"] = _share(_total([one["seconds"] for one in result]))
        else:
            row |= {name: result[name] for name in ("tokens", "entropy", "entropy_se")}
        rows.append(row)
    return [*rows, {"kind": "stage", "name": "evaluation", "seconds": evaluation_seconds}]


def _last(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    rows = [row for row in read_rows(path, ROW) if row["kind"] == "training" and "tokens" in row]
    if not rows:
        raise RunError(f"{path} is damaged: it has no row of a training")
    return rows[-1]


def _results(stage: Stage, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was said of each model that the stage trained."""
    return [result] if len(stage.about) == 1 else [result[student.name] for student in stage.about]


def _total(seconds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in seconds for name in each)
    return {name: round(sum(each.get(name, 0.0) for each in seconds), 3) for name in names}


def _share(seconds: dict[str, float]) -> float:
    return round(sum(seconds.get(name, 0.0) for name in ("data", "logging", "checkpoints")) / seconds["total"], 4)


def overhead(chain, where) -> dict[str, float]:
    """Seconds of all trainings by what they were spent on, and the share of data, logging and checkpoints in them."""
    found = [_results(stage, stages.about(where[stage.name])["result"]) for stage in chain if stage.about]
    seconds = _total([one["seconds"] for results in found for one in results])
    return {**seconds, "share": _share(seconds)}


def learnt_from(config, row: dict[str, Any], chain, where) -> dict[str, Any]:
    """What a row is to say of what its model learnt from: the entropy of that, and the arm's settings if it has any.

    The entropy is that of the text, or, where a distribution is learnt, of the distribution itself: the teacher's at
    the loss temperature, on the validation rows. That of one of which only the likeliest tokens are known is not known.
    """
    found = arms.arms(config)
    arm = next((arm for arm in found if row["name"].startswith(f"{arm.name}/seed-")), None)
    if arm is None:  # the teacher: what it was sampled with
        samples = {f"teacher/{arm.samples.label}": arm.samples.name for arm in found if arm.samples is not None}
        if row["name"] not in samples:
            return {}
        text = samples[row["name"]]
    else:
        text = arm.texts[-1]
    if arm is not None and arm.settings is not None:
        home = next(home for student, home in trained(chain, where) if student.name == row["name"])
        chosen = _chosen(home / "metrics.jsonl")
        entropy = None if arm.policy == "offline" else chosen["teacher_entropy"]
        return {"teacher_entropy": entropy, "distill": {**arm.knobs, **_sampled(arm)}}
    about = stages.about(where[text])["result"]
    more = {"distill": {**arm.knobs, **_sampled(arm)}} if arm is not None and arm.knobs else {}
    return {"teacher_entropy": about["entropy"], "teacher_entropy_se": about["entropy_se"], **more}


def _chosen(path: Path) -> dict[str, Any]:
    """The validation by which a training's checkpoint was chosen."""
    rows = [row for row in read_rows(path, ROW) if row.get("chosen")]
    if not rows:
        raise RunError(f"{path} is damaged: it has no row of the checkpoint that was chosen")
    return rows[0]


def _sampled(arm: arms.Arm) -> dict[str, Any]:
    return {} if arm.samples is None else arm.samples._asdict()


def sample_rows(
    config, p_star: Model, rows, validation: Corpus, there: dict[str, Corpus | None], folder: Path, count: int = 8
) -> list[dict[str, Any]]:
    """The first samples of each model, and of p*, as text (or ids, where there is no tokenizer).

    `there` are samples, by the name of their model, that were there before the evaluation drew any.
    """
    corpora = [("p*", None, None, None, validation)]
    for row in rows:
        held = there.get(row["name"]) or corpus_lib.open(folder / "evaluation" / row["name"] / "samples")
        corpora.append((row["name"], row["arm"], row["tau"], row["seed"], held))
    found = []
    for name, arm, tau, seed, corpus in corpora:
        held = corpus.rows(0, min(count, config.num_samples, config.num_recall))
        for i, ids in enumerate(held.tokens):
            text = " ".join(map(str, ids)) if p_star.tokenizer is None else p_star.tokenizer.decode(ids)
            found.append({
                "name": name, "arm": arm or "p_star", "tau": tau, "seed": seed, "index": int(held.index[i]),
                "text": text, "finished": bool(held.finished[i]), "length": int(held.length[i]),
            })  # fmt: skip
    return found
