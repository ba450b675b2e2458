"""Log-probabilities of token sequences under a model, of any number and any lengths.

Rows are sorted by length and run in batches of nearly equal lengths, so that padding costs little; the order they come
in, the batches and the padding do not enter the result (but through the rounding of float arithmetic).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib


def log_prob(
    model: Model, tokens: np.ndarray, lengths: np.ndarray, *, prefix: Sequence[int] = (), entropy: bool = False,
    batch_tokens: int = 4096, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Natural log-probability of each token given those before it, at temperature 1.

    Args:
        tokens: int [N, L]; what lies beyond a row's length does not matter.
        lengths: int [N], from 1 to L. An EOS counts, and is scored, like any token.
        prefix: ids put in front of every row (a BOS, say), not scored themselves. Without it the first token of a row
            has nothing to be predicted from and is not scored: the result is a column shorter, and a row of length 1
            has no scored token.
        entropy: also return the entropy of each prediction, in nats.
        batch_tokens: about how many tokens run at a time.
        mesh: where the parameters lie, if on more than one device.
    Returns: log-probabilities float32 [N, L - 1] (entry j is of token j + 1; with a prefix [N, L], of token j) and the
        mask bool of what is scored; elsewhere they are 0. With `entropy`, the entropies as a third array.
    Raises: ValueError for ids, lengths or shapes that cannot be.
    """
    tokens, lengths = _check(model, np.asarray(tokens), np.asarray(lengths), list(prefix))
    compute = dataclasses.replace(compute, mesh=mesh)
    rows, width = tokens.shape[0], tokens.shape[1] - 1
    mask = np.arange(width) < lengths[:, None] - 1
    mask[:, : max(0, len(prefix) - 1)] = False
    out = [np.zeros((rows, width), np.float32) for _ in range(1 + entropy)]
    for chosen, shape in batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
        batch = np.zeros(shape, np.int32)
        longest = min(shape[1], tokens.shape[1])
        batch[: len(chosen), :longest] = tokens[chosen, :longest]
        if mesh is None:
            batch = jnp.asarray(batch)
        else:
            batch = distributed.spread(batch, mesh_lib.sharding(("batch", None), mesh))
        scores = distributed.fetch(_score(model.params, model.architecture, batch, model.num_tokens, entropy, compute))
        for whole, part in zip(out, scores, strict=False):
            whole[chosen, : longest - 1] = part[: len(chosen), : longest - 1]
    cut = slice(max(0, len(prefix) - 1), None)
    return tuple([np.where(mask, out[0], 0)[:, cut], mask[:, cut], *(np.where(mask, x, 0)[:, cut] for x in out[1:])])


def batches(
    lengths: np.ndarray, batch_tokens: int, row_multiple: int = 1
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Rows in batches of similar length, longest first: their indices, and the shape to pad the batch to.

    There are few shapes (lengths are rounded up to 2**k or 1.5 * 2**k), since each is compiled for itself.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = _bucket(int(lengths[order[start]]))
        rows = max(1, batch_tokens // length // row_multiple) * row_multiple
        yield order[start : start + rows], (rows, length)
        start += rows


def _bucket(length: int) -> int:
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _check(model, tokens, lengths, prefix):
    """Tokens with their prefix, and their lengths with it; ValueError where they cannot be right."""
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"need tokens [N, L] and lengths [N], not {tokens.shape} and {lengths.shape}")
    if not all(np.issubdtype(array.dtype, np.integer) for array in (tokens, lengths)):
        raise ValueError(f"tokens and lengths have to be integers, not {tokens.dtype} and {lengths.dtype}")
    if len(lengths) and not (1 <= lengths.min() and lengths.max() <= tokens.shape[1]):
        raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}; they must be 1 to {tokens.shape[1]}")
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    bad = inside & ((tokens < 0) | (tokens >= model.num_tokens))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"row {row} has id {tokens[row, column]} at position {column}; the model's are 0 to {model.num_tokens - 1}"
        )
    tokens = np.where(inside, tokens, 0)
    if prefix:
        if not all(0 <= i < model.num_tokens for i in prefix):
            raise ValueError(f"prefix {prefix} has an id that is not from 0 to {model.num_tokens - 1}")
        tokens = np.concatenate(
            [np.broadcast_to(np.asarray(prefix, tokens.dtype), (len(tokens), len(prefix))), tokens], 1
        )
        lengths = lengths + len(prefix)
    limit = model.architecture.max_position_embeddings
    if len(lengths) and lengths.max() > limit:
        raise ValueError(f"a row of {lengths.max()} tokens is beyond the model's {limit} positions")
    return tokens, lengths


def lower(model: Model, tokens: jax.ShapeDtypeStruct, compute: Compute) -> jax.stages.Lowered:
    """The program for a batch of these tokens [row, position], for a plan; `model.params` are shapes, too."""
    return _score.lower(model.params, model.architecture, tokens, model.num_tokens, False, compute)


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _score(params, architecture: Architecture, tokens, num_tokens: int, entropy: bool, compute: Compute):
    hidden = model_lib.forward(params, architecture, tokens[:, :-1], compute=compute)
    head = model_lib.head(params)[:num_tokens]
    return fused.linear_log_prob(hidden, head, tokens[:, 1:], entropy=entropy, chunk=compute.chunk, mesh=compute.mesh)
