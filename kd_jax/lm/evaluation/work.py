"""The work of an evaluation: samples, log-probabilities and metrics of a model that is sampled in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax import metrics
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.decode import WHOLE, SamplerSpec, to_corpus
from kd_jax.lm.evaluation import embeddings, metric_rows, scores
from kd_jax.lm.evaluation.lazy_models import LazyModel
from kd_jax.lm.evaluation.scores import Wanted
from kd_jax.lm.evaluation.tasks import Data, Plan, Task, fingerprint, row_of
from kd_jax.parallel import distributed
from kd_jax.storage.files import write_rows


def work(plan: Plan, model: LazyModel, tasks: list[Task], bias: Callable[[], Any]) -> None:
    """Carries out tasks of one model: it is loaded at most once, and released before p* scores its samples.

    Args:
        tasks: of this model; each gets its new columns, and a result file.
        bias: gives the bias of the metrics of points, see `bias_of`; called only if one is needed.
    """
    if not tasks:
        return
    start = time.perf_counter()
    for task in tasks:
        task.home.mkdir(parents=True, exist_ok=True)
    # All that needs the model comes first, and one pass over the validation rows serves all temperatures: it is loaded
    # once, and its memory is free again while p*, often far larger, scores the samples.
    corpora = [_samples(plan, model, task) for task in tasks]
    # Of p* and the validation rows alone: computed for the first model, read from its file for the others.
    other = _p_star_ids(plan) if plan.spec.agreement else None
    wanted, label = [(task.home / "recall.npz", task.sampler) for task in tasks], f"{tasks[0].name}: recall"
    of_data = _scores(plan, model, wanted, plan.data, label, other)
    model.release()
    reference = _log_p_star_of_data(plan)
    for task, corpus, recall in zip(tasks, corpora, of_data, strict=True):
        # Only the first samples count: a given corpus may have more.
        count = plan.spec.num_samples
        samples = plan.data._replace(rows=corpus.rows(0, count), fingerprint=fingerprint(corpus, count))
        path, label = task.home / "precision.npz", f"{task.name}: precision"
        # p* is scored as it is, whatever temperature the samples were drawn at
        (precision,) = _scores(plan, plan.p_star, [(path, WHOLE)], samples, label)
        measured = {
            "samples": samples.rows, "p_star_of_samples": precision.log_prob, "data": plan.data.rows,
            "model_of_data": recall.log_prob, "p_star_of_data": reference, "own_data": reference,
            "calibration": recall.calibration, "agreement": recall.agreement,
        }  # fmt: skip
        if plan.embedder is not None:
            measured["points"] = metric_rows.Points(_points(plan, task, samples), bias)
        task.row["columns"] |= metric_rows.compute(task.missing, measured)
        task.row["metrics"] |= {metric: metric_rows.METRICS[metric].version for metric in task.missing}
    # the models of a group share their passes, so their time is split evenly
    took = round((time.perf_counter() - start) / len(tasks), 3)
    for task in tasks if distributed.leads() else ():
        result = {"key": task.key, "row": row_of(task), "metrics": task.row["metrics"], "seconds": took}
        write_rows(task.home / "result.json", [result])


def _samples(plan: Plan, model: LazyModel, task: Task) -> Corpus:
    if task.entry.samples is not None:
        return task.entry.samples
    label = f"{task.name}: samples" + ("" if task.sampler == WHOLE else f" at {task.sampler.label}")
    return to_corpus.sample(
        model.load, task.home / "samples", task.drawn, command=f"evaluation of {task.name}", label=label,
        prompts=plan.data.prompts, batch_size=plan.spec.batch_size, **plan.run,
    )  # fmt: skip


def _scores(
    plan: Plan, model: LazyModel, wanted: list[tuple[Path, SamplerSpec]], data: Data, label: str,
    other: np.ndarray | None = None,
) -> list[scores.Scores]:  # fmt: skip
    key = _scores_key(plan, model, data) | ({} if other is None else {"other": plan.p_star.fingerprint})
    return scores.score_rows(
        [Wanted(path, key, sampler) for path, sampler in wanted], model.load, data.rows, label=label, other=other,
        batch_tokens=plan.spec.batch_tokens, **plan.run,
    )  # fmt: skip


def _scores_key(plan: Plan, model: LazyModel, data: Data) -> dict[str, Any]:
    return {"model": model.fingerprint, "rows": data.fingerprint, "dtype": plan.spec.dtype}


def _p_star_ids(plan: Plan) -> np.ndarray:
    return scores.likeliest_ids(
        plan.folder / "p_star_ids.npz", _scores_key(plan, plan.p_star, plan.data), plan.p_star.load, plan.data.rows,
        label="p*: likeliest ids", batch_tokens=plan.spec.batch_tokens, **plan.run,
    )  # fmt: skip


def _points(plan: Plan, task: Task, samples: Data) -> metrics.Samples:
    """Points of samples and validation rows; of samples with prompts of their own, one of each prompt beside a row."""
    size, each = _num_points(plan), _samples_per_prompt(plan)
    fake = _embeddings(plan, task.home / "embeddings.npz", samples, size * each, f"{task.name}: embeddings")
    # Metrics of groups (one a prompt) need the prompts as numbers; equal prompts get the same one.
    starts = [tuple(ids[:end]) for ids, end in zip(samples.rows.tokens, samples.rows.prompt_length, strict=True)]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(starts))}
    prompts = np.array([number[prompt] for prompt in starts[: len(fake)]])
    # Samples of one prompt lie in a row, and are alike: together they would seem to cover few of the data.
    return metrics.Samples(
        fake=fake[::each], real=_data_points(plan)[:size], grouped=fake, prompts=prompts, seed=plan.spec.seed
    )


def bias_of(plan: Plan) -> dict[str, metrics.Bias]:
    """The metrics of points between two sets of validation rows, each as large as a model's set.

    None where rows have prompts of their own: a model's samples share the rows' prompts, two sets of rows do not.
    """
    if plan.data.prompts is not None:
        return {}
    points = _data_points(plan)
    return metrics.self_bias(metrics.Samples(fake=points, real=points, seed=plan.spec.seed))


def _data_points(plan: Plan) -> np.ndarray:
    return _embeddings(plan, plan.folder / "embeddings.npz", plan.data, 2 * _num_points(plan), "data: embeddings")


def _num_points(plan: Plan) -> int:
    # half of the validation rows at most: the bias is that of one half against the other
    samples = plan.spec.num_samples // _samples_per_prompt(plan)
    return min(plan.spec.num_points, samples, len(plan.data.rows.length) // 2)


def _samples_per_prompt(plan: Plan) -> int:
    return 1 if plan.data.prompts is None else plan.spec.samples_per_prompt


def _embeddings(plan: Plan, path: Path, data: Data, size: int, label: str) -> np.ndarray:
    """Those of the first `size` rows."""
    rows = data.rows._replace(**{n: column[:size] for n, column in data.rows._asdict().items() if column is not None})
    key = _scores_key(plan, plan.embedder, data) | {"num_rows": size, "of": "generated tokens, special ones left out"}
    return embeddings.mean_hidden_states(
        path, key, plan.embedder.load, rows, plan.p_star.metadata.tokenizer, label=label,
        batch_tokens=plan.spec.batch_tokens, **plan.run,
    )  # fmt: skip


def _log_p_star_of_data(plan: Plan) -> np.ndarray:
    if plan.data.from_p_star:
        return np.asarray(plan.data.rows.log_prob, np.float64)
    (reference,) = _scores(plan, plan.p_star, [(plan.folder / "p_star.npz", WHOLE)], plan.data, "p*: data")
    return reference.log_prob
