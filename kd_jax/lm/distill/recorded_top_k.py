"""A teacher on disk: its k likeliest next tokens at each position of a corpus, and the probability of all others.

They are columns of the corpus itself (kd_jax.lm.corpus.shards.TOP_K), one entry for each token after the prompt. An
id takes 2 bytes where the vocabulary fits in 65536 (else 4), a log-probability 2: a code c for -64 (c / 65534)^2 nats,
65535 for -inf. The step between codes grows with the root: the error is at most 1.2e-4 nats at -1, 3.9e-4 at -10 and
1e-3 at -64, below which everything is -64. (Of float16 it is 4.9e-4 at -1 to -2 and 3.9e-3 at -8 to -16.) The form
"float32" keeps the values as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import score, weights
from kd_jax.lm.corpus import Arrival, Corpus, compatibility, shards
from kd_jax.lm.corpus.batches import Targets
from kd_jax.lm.distill import teacher_forward as teacher_lib
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib

FORMS = ("uint16", "float32")
_RANGE, _LAST, _NEVER = 64.0, 65534, 65535
# The reading of a shard that is scored, and of what the teacher says of it, is in memory at once.
_BATCH_TOKENS = 4096


def encode(log_probs: np.ndarray) -> np.ndarray:
    """uint16 codes of log-probabilities; what is above 0 by rounding counts as 0."""
    values = np.asarray(log_probs, np.float64)
    codes = np.rint(_LAST * np.sqrt(np.clip(-values / _RANGE, 0, 1)))
    return np.where(values == -np.inf, _NEVER, codes).astype(np.uint16)


def decode(codes: jax.Array) -> jax.Array:
    """float32 log-probabilities of codes."""
    values = -_RANGE * jnp.square(codes.astype(jnp.float32) / _LAST)
    return jnp.where(codes == _NEVER, -jnp.inf, values)


def read(targets: Targets) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 ids [..., k], float32 log-probabilities [..., k] and the tail's [...], of a batch on its devices.

    Codes are rounded values: what they are short of, or beyond, a probability of 1 is shared out among all.
    """
    ids, log_probs, tail = targets
    if jnp.issubdtype(log_probs.dtype, jnp.integer):
        log_probs, tail = decode(log_probs), decode(tail)
        total = jnp.logaddexp(jax.nn.logsumexp(log_probs, axis=-1), tail)
        log_probs, tail = log_probs - total[..., None], tail - total
    return ids.astype(jnp.int32), log_probs, tail


def settings(model: Model, source: str, k: int, form: str, dtype: str, corpus: str | None) -> dict[str, Any]:
    """What the columns are a function of: the corpus' setting "teacher". ValueError for what cannot be.

    `corpus` is the fingerprint of the one that is scored, None where the rows are the model's own samples.
    """
    if not 1 <= k <= model.num_tokens:
        raise ValueError(f"top_k={k} must be from 1 to the model's {model.num_tokens} ids")
    if form not in FORMS:
        raise ValueError(f"log_prob_format={form!r} is not one of {', '.join(FORMS)}")
    return {
        "source": source, "model_fingerprint": weights.fingerprint(model.params),
        "tokenizer_fingerprint": compatibility.tokenizer_fingerprint(model), "num_tokens": model.num_tokens,
        "dtype": dtype, "top_k": k, "log_prob_format": form, "corpus": corpus,
    }  # fmt: skip


def recorder(
    model: Model, about: dict[str, Any], *, compute: Compute = DEFAULT, mesh: Mesh | None = None
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """A function that gives rows of a corpus (kd_jax.lm.corpus.shards.SCHEMA) their columns TOP_K; `about` as of
    `settings`.

    What is run together depends on the lengths of these rows alone: for the rows of a shard the numbers are the same
    whenever it is made.
    """
    make = teacher_lib.jitted if mesh is None else functools.partial(teacher_lib.over_mesh, mesh=mesh)
    run = make(model, want="top_k", k=about["top_k"], compute=compute)
    id_type = np.uint16 if model.num_tokens <= 2**16 else np.uint32
    keep = encode if about["log_prob_format"] == "uint16" else functools.partial(np.asarray, dtype=np.float32)

    def columns(row: dict[str, Any], found: teacher_lib.TopK, i: int) -> dict[str, Any]:
        # position j predicts token j + 1
        learnt = slice(max(1, row["prompt_length"]) - 1, row["length"] - 1)
        if np.isnan(found.log_probs[i, learnt]).any():
            raise ValueError(f"the teacher gives NaN for row {row['index']}; are all of its weights finite?")
        values = found.ids[i, learnt].astype(id_type), keep(found.log_probs[i, learnt]), keep(found.tail[i, learnt])
        return row | dict(zip(shards.TOP_K, values, strict=True))

    def record(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows, lengths = list(rows), np.array([row["length"] for row in rows])
        for chosen, (size, width) in score.batches(lengths, _BATCH_TOKENS, mesh_lib.batch_devices(mesh)):
            tokens, counts = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for place, i in enumerate(chosen):
                tokens[place, : lengths[i]], counts[place] = rows[i]["tokens"], lengths[i]
            found = distributed.fetch(run(tokens, counts))
            for place, i in enumerate(chosen):
                rows[i] = columns(rows[i], found, place)
        return rows

    return record


def num_entries(held: Corpus) -> int:
    """How many tokens of the teacher a corpus has recorded: k for each position that is learnt."""
    positions = 0
    for shard in held.manifest["shards"]:
        table = shards.read(held.folder, shard, ["length", "prompt_length"])
        positions += int((table["length"].to_numpy() - np.maximum(1, table["prompt_length"].to_numpy())).sum())
    return positions * held.manifest["settings"]["teacher"]["top_k"]


def check(source: Corpus, model: Model, label: str) -> None:
    """Raises ValueError unless the model can say something of these rows: the same ids, that mean the same."""
    about = source.manifest["settings"]
    if not source.finished:
        raise ValueError(f"{source.folder} is not finished: it has {source.num_rows} of {about['num_samples']} rows")
    tokenizers = about["tokenizer_fingerprint"], compatibility.tokenizer_fingerprint(model)
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise ValueError(f"{source.folder} was made with another tokenizer than that of {label}")
    if about["max_length"] > model.architecture.max_position_embeddings:
        raise ValueError(
            f"{source.folder} has rows of up to {about['max_length']} ids; {label} has "
            f"{model.architecture.max_position_embeddings} positions"
        )


def score_corpus(
    source: Corpus, folder: str | os.PathLike, model: Model, about: dict[str, Any], *, command: str, label: str,
    compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> Corpus:  # fmt: skip
    """The rows of a corpus once more, with what the model says of them, in a corpus folder of its own.

    What is there of it already is gone on from. Raises ValueError or RunError as kd_jax.lm.corpus.create_or_resume.
    """
    check(source, model, about["source"])
    folder = Path(folder)
    settings = {**source.manifest["settings"], "teacher": about}

    def open_folder() -> dict[str, Any]:
        return corpus_lib.create_or_resume(folder, settings, command=command, kind=source.kind).manifest

    held = Corpus(folder, distributed.once(open_folder, f"opening {folder}"))
    if held.finished:
        return held

    def arrivals() -> Iterator[Arrival]:
        step = source.manifest["settings"]["shard_size"]
        for first in range(held.num_rows, source.num_rows, step):
            rows = source.rows(first, min(first + step, source.num_rows))
            columns = rows._asdict()
            listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            yield Arrival(listed, int((rows.length - rows.prompt_length).sum()))

    record, leads = recorder(model, about, compute=compute, mesh=mesh), distributed.leads()
    with tqdm(
        desc=label, initial=held.num_rows, total=source.num_rows, unit="row", dynamic_ncols=True, disable=not leads
    ) as bar:
        if leads:
            corpus_lib.write_rows(held, arrivals(), lambda rows, _: bar.update(rows), record)
        else:
            for arrival in arrivals():  # each is a shard
                record(arrival.rows)
    distributed.wait(f"{folder} is written")
    return corpus_lib.open(folder)
