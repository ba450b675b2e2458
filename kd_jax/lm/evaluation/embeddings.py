"""Texts as points: the mean hidden state of a model over each generated text, kept in a file.

The model is any that loads, best not p* (whose own likelihood is a metric already). Where it has another tokenizer than
the corpus, texts are decoded and encoded again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm import score
from kd_jax.lm.corpus import Rows, compatibility
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs import progress
from kd_jax.storage.files import read_arrays, replacing


def mean_hidden_states(
    path: Path, key: dict[str, Any], load: Callable[[], Model], rows: Rows, tokenizer: Any, *, label: str,
    batch_tokens: int | None = None, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> np.ndarray:  # fmt: skip
    """The embedding of each row, float32 [n, width]: its last hidden states, averaged over the tokens after
    the prompt (two answers to one long prompt would otherwise lie close together, whatever they say).

    Args:
        path: the .npz it is kept in.
        key: says which model and which rows these are; a file with another key is made again.
        load: the model that embeds; called only if the file does not have this key.
        tokenizer: of the rows; None where they are ids of the model that embeds.
        label: of the progress bar.
        batch_tokens: about how many tokens run at a time; by default score.tokens_at_once.
    Raises: RunError where the file is damaged, FloatingPointError where an embedding is not finite.
    """
    text = json.dumps(key, sort_keys=True)
    if path.exists():
        arrays = read_arrays(path, hint="; remove it, and the same command makes it again")
        if str(arrays.get("key")) == text:
            return arrays["embeddings"]
    model = load()
    ids, starts = _ids(rows, tokenizer, model)
    lengths = np.array([len(row) for row in ids])
    batch_tokens = score.tokens_at_once(model, mesh) if batch_tokens is None else batch_tokens
    out = np.zeros((len(ids), model.architecture.hidden_size), np.float32)
    with progress.bar(label, 0, int(lengths.sum()), "token") as bar:
        for chosen, shape in score.batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
            # Rows that only fill up the last batch have length 1: a mean over no position would be NaN.
            batch, spans = np.zeros(shape, np.int32), np.tile(np.int32([0, 1]), (shape[0], 1))
            for i, row in enumerate(chosen):
                batch[i, : lengths[row]], spans[i] = ids[row], (starts[row], lengths[row])
            if mesh is not None:
                along = mesh_lib.sharding(("batch", None), mesh)
                batch, spans = (distributed.spread(array, along) for array in (batch, spans))
            means = distributed.fetch(_means(model.params, batch, spans, model.architecture, compute))
            out[chosen] = means[: len(chosen)]
            bar.update(int(lengths[chosen].sum()))
    wrong = np.flatnonzero(~np.isfinite(out).all(axis=1))
    if len(wrong):
        raise FloatingPointError(
            f"{label}: the embedding of row {wrong[0]} is not finite ({len(wrong)} in all); try the model in float32"
        )
    # Every process has all of the means; one of them writes.
    if distributed.leads():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, key=np.array(text), embeddings=out)
    return out


def _ids(rows: Rows, tokenizer: Any, model: Model) -> tuple[list[np.ndarray], np.ndarray]:
    """The rows as ids of the model that embeds, at most as many as it has positions, and where each text begins."""
    limit = model.architecture.max_position_embeddings
    own = compatibility.tokenizer_fingerprint(model)
    pairs = [(ids[:start], ids[start:]) for ids, start in zip(rows.tokens, rows.prompt_length, strict=True)]
    if tokenizer is not None and own not in (None, tokenizer.fingerprint):
        # Without special tokens: they would be spelled out, and tell whether a text ended, not what it says.
        texts = [[tokenizer.decode(part, skip_special=True) for part in pair] for pair in pairs]
        pairs = [(model.tokenizer.encode_prompt(start), model.tokenizer.encode(rest)) for start, rest in texts]
    # A text of no token, such as a lone EOS, still has to be a point: the token before it, or the first id.
    ids = [np.asarray([*prompt, *text] or [0])[:limit] for prompt, text in pairs]
    compatibility.check_ids("a text for the embedding model", ids, model)
    return ids, np.array([min(len(prompt), len(row) - 1) for (prompt, _), row in zip(pairs, ids, strict=True)])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _means(params, tokens, spans, architecture: Architecture, compute: Compute) -> jax.Array:
    # float32 before the sum: in bfloat16 a mean over hundreds of positions loses its digits
    hidden = model_lib.forward(params, architecture, tokens, compute=compute).astype(jnp.float32)
    position, (start, end) = jnp.arange(tokens.shape[1]), spans.T[..., None]
    inside = (position >= start) & (position < end)
    # selected, not multiplied: padding may hold anything
    return jnp.where(inside[..., None], hidden, 0).sum(axis=1) / (end - start).astype(jnp.float32)
