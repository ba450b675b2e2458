"""Log-probabilities of rows under a model, at several ways of sampling it: kept in files, and resumed from them.

One pass over the rows serves all temperatures and truncations. Rows are scored in batches that depend on their lengths
alone: what runs beside a row changes how its numbers are rounded, and the same batches give the same numbers after a
restart. With several processes all of them score, each on its own devices, and process 0 writes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import score
from kd_jax.lm.corpus import Rows
from kd_jax.lm.decode import WHOLE, SamplerSpec, next_token
from kd_jax.lm.evaluation.estimates import CALIBRATION_BINS
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import progress
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_arrays, replacing

# What has been scored is saved about this often.
_SAVE_SECONDS = 10.0


class Wanted(NamedTuple):
    """A file of scores that is wanted.

    Attributes:
        path: the .npz that keeps them.
        key: says which model and which rows they are of.
        sampler: how the model is sampled.
    """

    path: Path
    key: dict[str, Any]
    sampler: SamplerSpec = WHOLE

    @property
    def text(self) -> str:
        """The whole key, as it is kept in the file."""
        return json.dumps({**self.key, "sampler": self.sampler.knobs()}, sort_keys=True, allow_nan=False)


class Scores(NamedTuple):
    """What is known of n rows under a model.

    Attributes:
        log_prob: log model(row) in nats, summed over what was generated (the EOS included), float64 [n].
        calibration: of these tokens, float64 [bin, 3]; see estimates.calibration_error.
        agreement: at how many of a row's tokens the likeliest id is that of another model, float64 [n]; 0 where there
            is no other.
    """

    log_prob: np.ndarray
    calibration: np.ndarray
    agreement: np.ndarray


def score_rows(
    wanted: Sequence[Wanted], load: Callable[[], Model], rows: Rows, *, label: str, other: np.ndarray | None = None,
    batch_tokens: int | None = None, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> list[Scores]:  # fmt: skip
    """The scores of the rows in one pass, those that are in the files already taken from there.

    Args:
        wanted: at least one; all of the model that `load` returns.
        load: called only if something has to be scored.
        label: of the progress bar, and in errors.
        other: another model's likeliest id at each generated token, as `likeliest_ids` gives them.
        batch_tokens: about how many tokens run at a time; by default score.tokens_at_once.
    Raises: RunError where a row's log-probability is NaN, or a file is damaged.
    """
    # several processes read the same: process 0 does not write before all have scored a batch
    kept = [_read(one, len(rows.index)) for one in wanted]
    # A temperature that is added later is the only one of its pass; those that are complete are not computed again.
    todo = [i for i, scores in enumerate(kept) if np.isnan(scores.log_prob).any()]
    if not todo:
        return kept
    model = load()
    batch_tokens = score.tokens_at_once(model, mesh) if batch_tokens is None else batch_tokens
    # One forward pass, then each sampler's distribution from the same logits.
    knobs = tuple(wanted[i].sampler.arrays() for i in todo)
    # A row counts as unscored if any of the samplers lacks it: one forward pass then serves them all.
    unscored = np.any([np.isnan(kept[i].log_prob) for i in todo], axis=0)
    tokens, lengths = corpus_lib.padded(rows)
    generated = rows.num_learnt
    # a view for each row
    others = None if other is None else np.split(other, np.cumsum(generated)[:-1])
    saved = time.monotonic()
    with progress.bar(label, int(generated[~unscored].sum()), int(generated.sum()), "token") as bar:
        for chosen, _ in score.batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
            # Batches are skipped as a whole, so that the others are the same in every start.
            if not unscored[chosen].any():
                continue
            (values, top_ids), _ = score.per_token(
                model, tokens[chosen], lengths[chosen], _at_samplers if other is None else _at_samplers_and_top, knobs,
                batch_tokens=batch_tokens, compute=compute, mesh=mesh,
            )  # fmt: skip
            agreement = np.zeros(len(chosen))
            if others is not None:
                agreement = _agreement(top_ids, [others[i] for i in chosen], rows.learnt(chosen, top_ids.shape[1]))
            for i, (log_probs, top) in zip(todo, values, strict=True):
                _add(kept[i], chosen, log_probs, top, agreement, rows.learnt(chosen, log_probs.shape[1]), label)
            bar.update(int(generated[chosen[unscored[chosen]]].sum()))
            if time.monotonic() - saved >= _SAVE_SECONDS:
                _write([wanted[i] for i in todo], [kept[i] for i in todo])
                saved = time.monotonic()
    _write([wanted[i] for i in todo], [kept[i] for i in todo])
    return kept


def by_token(model: Model, several: Sequence[Rows], mesh: Mesh | None = None) -> list[list[list[float | None]]]:
    """The log-probability of each token of rows of several corpora, in nats, in one pass.

    Args:
        several: rows of each corpus, at least one.
        mesh: where the model lies, if on more than one device.
    Returns: for each corpus and row a value for each token; None for those that were given, not drawn.
    """
    tokens = [ids for rows in several for ids in rows.tokens]
    together = several[0]._replace(tokens=tokens, length=np.concatenate([rows.length for rows in several]))
    log_probs, _ = score.log_prob(model, *corpus_lib.padded(together), mesh=mesh)
    values = []
    for rows, part in zip(
        several, np.split(log_probs, np.cumsum([len(rows.index) for rows in several])[:-1]), strict=True
    ):
        drawn = rows.learnt(np.arange(len(part)), part.shape[1])
        # entry j is of token j + 1
        values.append([
            [None] + [round(float(v), 3) if own else None for v, own in zip(row, mask, strict=True)][: length - 1]
            for row, mask, length in zip(part, drawn, rows.length, strict=True)
        ])  # fmt: skip
    return values


def _at_samplers(logits: jax.Array, ids: jax.Array, knobs: tuple[dict[str, jax.Array | None], ...]):
    """For each sampler the log-probabilities of the ids and of the likeliest id."""
    return tuple(next_token.log_prob(logits, ids, **each) for each in knobs), None


def _at_samplers_and_top(logits: jax.Array, ids: jax.Array, knobs: tuple[dict[str, jax.Array | None], ...]):
    return _at_samplers(logits, ids, knobs)[0], logits.argmax(axis=-1).astype(np.int32)


def _agreement(top_ids, others: Sequence[np.ndarray], inside: np.ndarray) -> np.ndarray:
    return np.array(
        [(row[mask] == other).sum() for row, mask, other in zip(top_ids, inside, others, strict=True)], float
    )


def _add(scores: Scores, chosen, log_probs, top, agreement, inside: np.ndarray, label: str) -> None:
    """Adds a batch to the scores, in place.

    Entry j of log_probs, top and inside [row, position] is of token j + 1; `inside` says which are scored.
    """
    # exactly rounded sums, so that padding and the order of rows do not enter
    sums = np.array([math.fsum(row[mask].tolist()) for row, mask in zip(log_probs, inside, strict=True)])
    if np.isnan(sums).any():
        bad = chosen[np.isnan(sums).argmax()]
        raise RunError(f"{label}: the model gives NaN for row {bad}; are all of its weights finite?")
    # A batch is scored again as a whole after a restart; rows that were kept already are not added twice.
    new = np.isnan(scores.log_prob[chosen])
    scores.log_prob[chosen] = np.where(new, sums, scores.log_prob[chosen])
    scores.agreement[chosen] = np.where(new, agreement, scores.agreement[chosen])
    inside = inside & new[:, None]
    # float64 before exp and the sums: bins add up the probabilities of many tokens.
    confidence = np.exp(top[inside].astype(np.float64))
    # An id with the largest log-probability is the likeliest, or one of several; an argmax would be slow on CPUs.
    right = log_probs[inside] == top[inside]
    # counts by bin rather than values by token: they add up over batches and restarts
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    for column, weights in enumerate((np.ones(len(bins)), confidence, right)):
        scores.calibration[:, column] += np.bincount(bins, weights, CALIBRATION_BINS)


def _read(wanted: Wanted, count: int) -> Scores:
    """The scores in the file: NaN for rows that are not scored yet, and for all rows where it has another key."""
    # NaN can mark them: a log-probability is finite or -inf.
    if wanted.path.exists():
        hint = "; remove it, and the same command makes it again"
        arrays = read_arrays(wanted.path, hint=hint)
        if str(arrays.get("key")) == wanted.text:
            try:
                # views of what was read cannot be written to
                scores = Scores(*(arrays[name].copy() for name in Scores._fields))
            except KeyError as error:
                raise RunError(f"{wanted.path} is damaged: it has no {error}{hint}") from error
            if scores.log_prob.shape != (count,):
                raise RunError(f"{wanted.path} is damaged: it has {scores.log_prob.shape} rows, not {count}{hint}")
            return scores
    return Scores(np.full(count, np.nan), np.zeros((CALIBRATION_BINS, 3)), np.zeros(count))


def _write(wanted: Sequence[Wanted], kept: Sequence[Scores]) -> None:
    """Writes each file whole or not at all."""
    if not distributed.leads():
        return
    for one, scores in zip(wanted, kept, strict=True):
        one.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(one.path) as file:
            np.savez(file, key=np.array(one.text), **scores._asdict())


def likeliest_ids(
    path: Path, key: dict[str, Any], load: Callable[[], Model], rows: Rows, *, label: str,
    batch_tokens: int | None = None, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> np.ndarray:  # fmt: skip
    """The likeliest id at each generated token, all rows one after another, int32 [token]; kept in `path`.

    Args:
        path: the .npz it is kept in, and resumed from.
        key: says which model and which rows these are.
        load: called only if something has to be scored.
    Raises: RunError where the file is damaged.
    """
    tokens, lengths = corpus_lib.padded(rows)
    ends = np.cumsum(rows.num_learnt)
    # -1 is not an id: it marks the tokens that are still to do.
    text, ids = json.dumps(key, sort_keys=True), np.full(ends[-1], -1, np.int32)
    if path.exists():
        arrays = read_arrays(path, hint="; remove it, and the same command makes it again")
        ids = arrays["ids"].copy() if str(arrays.get("key")) == text else ids
    if (ids >= 0).all():
        return ids
    model = load()
    batch_tokens = score.tokens_at_once(model, mesh) if batch_tokens is None else batch_tokens
    saved = time.monotonic()

    def save() -> None:
        if distributed.leads():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, key=np.array(text), ids=ids)

    with progress.bar(label, int((ids >= 0).sum()), len(ids), "token") as bar:
        for chosen, _ in score.batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
            # Ids of a row are written together, so its last one says whether it is done.
            if (ids[ends[chosen] - 1] >= 0).all():
                continue
            (_, top_ids), _ = score.per_token(
                model, tokens[chosen], lengths[chosen], _at_samplers_and_top, (), batch_tokens=batch_tokens,
                compute=compute, mesh=mesh,
            )  # fmt: skip
            inside = rows.learnt(chosen, top_ids.shape[1])
            for i, row, mask in zip(chosen, top_ids, inside, strict=True):
                ids[ends[i] - mask.sum() : ends[i]] = row[mask]
            bar.update(int(inside.sum()))
            if time.monotonic() - saved >= _SAVE_SECONDS:
                save()
                saved = time.monotonic()
    save()
    return ids
