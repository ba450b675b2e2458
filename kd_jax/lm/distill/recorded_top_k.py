"""A teacher on disk: its k most probable next tokens at each position of a corpus, and the probability of all others.

They are columns of the corpus itself (kd_jax.lm.corpus.shards.TOP_K), one entry for each token after the prompt. An
id takes 2 bytes where the vocabulary fits in 65536 (else 4), a log-probability 2 bytes: code c stands for
-64 (c / 65534)^2 nats, 65535 for -inf. The step between codes grows with the square root of the value: the error is at
most 1.2e-4 nats at -1, 3.9e-4 at -10 and 1e-3 at -64; everything below is -64. (float16's error is 4.9e-4 at -1 to -2
and 3.9e-3 at -8 to -16.) The format "float32" keeps the values as they are.
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

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import score, weights
from kd_jax.lm.corpus import Arrival, Corpus, compatibility, shards
from kd_jax.lm.corpus.batches import Targets
from kd_jax.lm.distill import teacher_forward as teacher_lib
from kd_jax.lm.model import DEFAULT, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import progress

FORMS = ("uint16", "float32")
# Code 65534 stands for -64 nats, 65535 for -inf.
_RANGE, _LAST, _NEVER = 64.0, 65534, 65535


def encode(log_probs: np.ndarray) -> np.ndarray:
    """uint16 codes of log-probabilities; a value that rounding has put above 0 counts as 0.

    Args:
        log_probs: natural logarithms, any shape; -inf has a code of its own.
    """
    # float64: by a rounding error in float32, a value could get the neighbouring code.
    values = np.asarray(log_probs, np.float64)
    codes = np.rint(_LAST * np.sqrt(np.clip(-values / _RANGE, 0, 1)))
    return np.where(values == -np.inf, _NEVER, codes).astype(np.uint16)


def decode(codes: jax.Array) -> jax.Array:
    """float32 log-probabilities of codes."""
    values = -_RANGE * jnp.square(codes.astype(jnp.float32) / _LAST)
    return jnp.where(codes == _NEVER, -jnp.inf, values)


def read(targets: Targets) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 ids [..., k], float32 log-probabilities [..., k] and the tail's [...], of a batch on its devices.

    Codes are rounded, so they are normalised again to a total probability of 1.
    """
    ids, log_probs, tail = targets
    if jnp.issubdtype(log_probs.dtype, jnp.integer):
        # Decoded on the device: the codes are half the bytes to send.
        log_probs, tail = decode(log_probs), decode(tail)
        total = jnp.logaddexp(jax.nn.logsumexp(log_probs, axis=-1), tail)
        log_probs, tail = log_probs - total[..., None], tail - total
    return ids.astype(jnp.int32), log_probs, tail


def settings(model: Model, source: str, k: int, form: str, dtype: str, corpus: str | None) -> dict[str, Any]:
    """All that the columns depend on: the setting "teacher" of the corpus.

    Args:
        model: the teacher.
        source: where it comes from.
        k: how many tokens are recorded at a position.
        form: one of FORMS.
        dtype: of the teacher's activations and products.
        corpus: fingerprint of the corpus that is scored; None where the rows are the teacher's own samples.
    Raises: ValueError for a k beyond the model's ids, or another format.
    """
    if not 1 <= k <= model.num_tokens:
        raise ValueError(f"top_k={k} must be from 1 to the model's {model.num_tokens} ids")
    if form not in FORMS:
        raise ValueError(f"log_prob_format={form!r} must be one of {', '.join(FORMS)}")
    return {
        "source": source, "model_fingerprint": weights.fingerprint(model.params),
        "tokenizer_fingerprint": compatibility.tokenizer_fingerprint(model), "num_tokens": model.num_tokens,
        "dtype": dtype, "top_k": k, "log_prob_format": form, "corpus": corpus,
    }  # fmt: skip


def recorder(
    model: Model, about: dict[str, Any], *, compute: Compute = DEFAULT, mesh: Mesh | None = None
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """A function that adds the columns TOP_K to rows of a corpus (kd_jax.lm.corpus.shards.SCHEMA).

    Batches depend on the lengths of these rows and on the devices alone: on devices of one kind, a shard gets the same
    numbers whenever it is made.

    Args:
        model: the teacher.
        about: its settings, see `settings`.
        compute, mesh: how it is run, and where it lies.
    Raises: the function raises ValueError where the teacher gives NaN.
    """
    # The same program wherever the teacher lies; only the layout differs.
    make = teacher_lib.jitted if mesh is None else functools.partial(teacher_lib.over_mesh, mesh=mesh)
    run = make(model, want="top_k", k=about["top_k"], compute=compute)
    batch_tokens = score.tokens_at_once(model, mesh)
    # Half the bytes for every vocabulary up to 65536, SmolLM2's 49152 among them.
    id_type = np.uint16 if model.num_tokens <= 2**16 else np.uint32
    keep = encode if about["log_prob_format"] == "uint16" else functools.partial(np.asarray, dtype=np.float32)

    def columns(row: dict[str, Any], top_k: teacher_lib.TopK, i: int) -> dict[str, Any]:
        # position j predicts token j + 1
        learnt = slice(max(1, row["prompt_length"]) - 1, row["length"] - 1)
        if np.isnan(top_k.log_probs[i, learnt]).any():
            raise ValueError(f"the teacher gives NaN for row {row['index']}; are all of its weights finite?")
        values = top_k.ids[i, learnt].astype(id_type), keep(top_k.log_probs[i, learnt]), keep(top_k.tail[i, learnt])
        return row | dict(zip(shards.TOP_K, values, strict=True))

    def record(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows, lengths = list(rows), np.array([row["length"] for row in rows])
        for chosen, (size, width) in score.batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
            # Rows that fill up the batch have length 0: all of their outputs are masked.
            tokens, counts = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
            for place, i in enumerate(chosen):
                tokens[place, : lengths[i]], counts[place] = rows[i]["tokens"], lengths[i]
            top_k = distributed.fetch(run(tokens, counts))
            for place, i in enumerate(chosen):
                rows[i] = columns(rows[i], top_k, place)
        return rows

    return record


def num_entries(corpus: Corpus) -> int:
    """How many tokens of the teacher a corpus has recorded: k for each position that is learnt."""
    positions = 0
    for shard in corpus.manifest["shards"]:
        # The first token of a row is predicted by nothing, so a row without a prompt counts from its second.
        table = shards.read(corpus.folder, shard, ["length", "prompt_length"])
        positions += int((table["length"].to_numpy() - np.maximum(1, table["prompt_length"].to_numpy())).sum())
    return positions * corpus.manifest["settings"]["teacher"]["top_k"]


def check(source: Corpus, model: Model, label: str) -> None:
    """Raises ValueError for an unfinished corpus, another tokenizer, or rows longer than the model's positions.

    Args:
        source: the corpus that is to be scored.
        model: the teacher.
        label: what messages call the teacher.
    """
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
    """Writes the rows of a corpus with the teacher's columns into a corpus folder of their own; it resumes.

    Args:
        source: the corpus.
        folder: the new corpus.
        model: the teacher.
        about: its settings, see `settings`.
        command: for the manifest.
        label: of the progress bar.
        compute, mesh: how the teacher is run, and where it lies.
    Raises: ValueError or RunError as kd_jax.lm.corpus.create_or_resume.
    """
    check(source, model, about["source"])
    folder = Path(folder)
    # With a teacher it is another corpus, and its folder is not taken for the source's.
    settings = {**source.manifest["settings"], "teacher": about}

    corpus = corpus_lib.open_for_all(folder, settings, command=command, kind=source.kind)
    if corpus.finished:
        return corpus

    def arrivals() -> Iterator[Arrival]:
        step = source.manifest["settings"]["shard_size"]
        # One shard of the source at a time, which is one shard here: a resumed run scores the same batches.
        for first in range(corpus.num_rows, source.num_rows, step):
            rows = source.rows(first, min(first + step, source.num_rows))
            columns = {name: column for name, column in rows._asdict().items() if column is not None}
            listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            yield Arrival(listed, int((rows.length - rows.prompt_length).sum()))

    record = recorder(model, about, compute=compute, mesh=mesh)
    with progress.bar(label, corpus.num_rows, source.num_rows, "row") as bar:
        if distributed.leads():
            corpus_lib.write_rows(corpus, arrivals(), lambda rows, _: bar.update(rows), record)
        else:
            # the other processes compute their own part of each batch; process 0 alone writes
            for arrival in arrivals():  # each is a shard
                record(arrival.rows)
    distributed.wait(f"{folder} is written")
    return corpus_lib.open(folder)
