"""Log-probabilities of token sequences under a model, of any number and any lengths.

Rows are sorted by length and run in batches of nearly equal lengths, so that padding costs little. Their order, the
batches and the padding change a result by rounding only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.losses import head as head_lib
from kd_jax.parallel import devices, distributed
from kd_jax.parallel import mesh as mesh_lib

# Tokens of a batch for each part of the mesh: on a CPU; the least and the most on other devices. The most are 10^13
# operations of a model of 135M weights: about 30 ms on an H100 by its peak, long compared with fetching the results.
TOKENS, LEAST, MOST = 4096, 512, 32768


def log_prob(
    model: Model, tokens: np.ndarray, lengths: np.ndarray, *, prefix: Sequence[int] = (), entropy: bool = False,
    sample_temperature: float = 1.0, batch_tokens: int | None = None, compute: Compute = DEFAULT,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Natural log-probability of each token given those before it.

    Args:
        tokens: int [N, L]; what lies beyond a row's length does not matter.
        lengths: int [N], from 1 to L. An EOS counts, and is scored, like any token.
        prefix: ids put in front of every row (a BOS, say), not scored themselves. Without it the first token of a row
            has nothing to be predicted from and is not scored: the result is a column shorter, and a row of length 1
            has no scored token.
        entropy: also return the entropy of each prediction, in nats.
        sample_temperature: score under softmax(logits / sample_temperature); above 0.
        batch_tokens: about how many tokens run at a time; by default `tokens_at_once`.
        mesh: where the parameters lie, if on more than one device.
    Returns: log-probabilities float32 [N, L - 1] (entry j is of token j + 1; with a prefix [N, L], of token j) and the
        mask bool of what is scored; elsewhere they are 0. With `entropy`, the entropies as a third array.
    Raises: ValueError for ids, lengths or shapes that cannot be.
    """
    if not sample_temperature > 0:
        raise ValueError(f"sample_temperature={sample_temperature} must be above 0")
    function = _log_prob_and_entropy if entropy else _log_prob
    values, mask = per_token(
        model, tokens, lengths, function, None if sample_temperature == 1 else np.float32(sample_temperature),
        prefix=prefix, batch_tokens=batch_tokens, compute=compute, mesh=mesh,
    )  # fmt: skip
    return values[0], mask, *values[1:]


def _log_prob(logits: jax.Array, ids: jax.Array, temperature: jax.Array | None) -> tuple[jax.Array]:
    logits = logits if temperature is None else logits / temperature
    return (jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1),)


def _log_prob_and_entropy(logits: jax.Array, ids: jax.Array, temperature: jax.Array | None) -> tuple[jax.Array, ...]:
    logits = logits if temperature is None else logits / temperature
    below = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # p log p tends to 0 with p, but 0 * -inf is NaN: tokens of probability 0 are left out.
    entropy = -jnp.where(below > -jnp.inf, jnp.exp(below) * below, 0).sum(axis=-1)
    return *_log_prob(logits, ids, None), entropy


def per_token(
    model: Model, tokens: np.ndarray, lengths: np.ndarray, function: Callable[..., Any], *arguments: Any,
    prefix: Sequence[int] = (), batch_tokens: int | None = None, compute: Compute = DEFAULT, mesh: Mesh | None = None,
) -> tuple[Any, np.ndarray]:  # fmt: skip
    """A function of each token and of the logits that predict it; [tokens, vocab] never exists as a whole.

    Args:
        function: takes float32 logits [..., position, vocab] over the real ids, the ids [..., position] and the
            arguments; returns float32 or int32 arrays [..., position] in any tree. It is part of the compiled program:
            give the same function object again, not a new one.
        arguments: arrays and scalars in any trees, traced.
        tokens, lengths, prefix, batch_tokens, mesh: as of `log_prob`.
    Returns: the tree with arrays [N, L - 1] (with a prefix [N, L]), 0 where nothing is scored, and the mask of what is.
    Raises: ValueError for ids, lengths or shapes that cannot be.
    """
    tokens, lengths = _check(model, np.asarray(tokens), np.asarray(lengths), list(prefix))
    compute = dataclasses.replace(compute, mesh=mesh)
    batch_tokens = tokens_at_once(model, mesh) if batch_tokens is None else batch_tokens
    rows, width = tokens.shape[0], tokens.shape[1] - 1
    scored_from = max(0, len(prefix) - 1)
    mask = np.arange(width) < lengths[:, None] - 1
    # The ids of the prefix are given, so they are not scored; the first scored one is predicted by its last id.
    mask[:, :scored_from] = False
    # On the host: [N, L] numbers, where the device holds a batch at a time.
    whole = jax.tree.map(lambda leaf: np.zeros((rows, width), leaf.dtype), _shapes(model, function, arguments))
    for chosen, shape in batches(lengths, batch_tokens, mesh_lib.batch_devices(mesh)):
        batch = np.zeros(shape, np.int32)
        longest = min(shape[1], tokens.shape[1])
        # Padding is to the right and attention causal, so what stands there changes no score.
        batch[: len(chosen), :longest] = tokens[chosen, :longest]
        if mesh is None:
            batch = jnp.asarray(batch)
        else:
            batch = distributed.spread(batch, mesh_lib.sharding(("batch", None), mesh))
        part = distributed.fetch(
            _score(model.params, model.architecture, batch, arguments, model.num_tokens, function, compute)
        )
        for out, values in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            out[chosen, : longest - 1] = values[: len(chosen), : longest - 1]
    return jax.tree.map(lambda out: np.where(mask, out, 0)[:, scored_from:], whole), mask[:, scored_from:]


def _shapes(model: Model, function: Callable, arguments: tuple):
    """Shapes and dtypes of what the function returns for one token."""
    logits = jax.ShapeDtypeStruct((1, model.num_tokens), np.float32)
    return jax.eval_shape(function, logits, jax.ShapeDtypeStruct((1,), np.int32), *arguments)


def tokens_at_once(model: Model, mesh: Mesh | None = None, memory: float | None = None) -> int:
    """About how many tokens are scored at a time, on all devices together.

    On a CPU this is TOKENS for each part of the mesh that rows are split over. On other devices it is the largest power
    of two from LEAST to MOST that needs at most half of the memory that the weights leave. What else is in memory at
    the moment is not counted: a run that resumes has the same batches, and so the same rounding.

    Args:
        model: with weights, or their shapes.
        mesh: where it lies, if on more than one device.
        memory: bytes of a device; None for this process's devices.
    """
    memory = devices.limit() if memory is None else memory
    if memory is None:
        return TOKENS * mesh_lib.batch_devices(mesh)
    room, each = (memory - mesh_lib.device_bytes(model.params)) / 2, MOST
    while each > LEAST and _bytes_of_scoring(model.architecture, each) > room:
        each //= 2
    # Processes may be on different devices, but have to run the same batches.
    return distributed.same(each) * mesh_lib.batch_devices(mesh)


def _bytes_of_scoring(a: Architecture, tokens: int) -> int:
    """An upper bound of what a device needs beside the weights to score as many tokens."""
    # What a layer has at a time, as float32: residual stream and norms, MLP, heads, and scores of a block of queries.
    heads = a.num_attention_heads * (a.head_dim + DEFAULT.query_block)
    layer = 8 * a.hidden_size + 4 * a.intermediate_size + 4 * heads
    # Logits of a chunk, and what is computed of them.
    return 4 * (tokens * layer + 3 * min(tokens, head_lib.TOKENS) * a.vocab_size)


def batches(
    lengths: np.ndarray, batch_tokens: int, row_multiple: int = 1
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Rows in batches of similar length, longest first: their indices, and the shape to pad the batch to.

    There are few shapes (lengths are rounded up to 2**k or 1.5 * 2**k), since each is compiled for itself.

    Args:
        lengths: int [N].
        batch_tokens: about how many tokens a batch has.
        row_multiple: rows of a batch are a multiple of this.
    """
    # Longest first: the first batch takes the most memory, and a lack of it shows at once.
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = _bucket(int(lengths[order[start]]))
        # Rows times length is about the same for all batches, so the logits and activations of each take the same
        # room.
        rows = max(1, batch_tokens // length // row_multiple) * row_multiple
        yield order[start : start + rows], (rows, length)
        start += rows


def _bucket(length: int) -> int:
    # 16, 24, 32, 48, ...: beyond 16, less than a third of a padded row is padding.
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
    # Ids beyond a row's length may be anything, also out of the embedding's range: 0 is always an id.
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


def lower(
    model: Model, tokens: jax.ShapeDtypeStruct, compute: Compute, platform: str | None = None
) -> jax.stages.Lowered:
    """The program of `log_prob` for a batch of these tokens [row, position], for a plan; `model.params` are shapes.

    Args:
        model: with shapes in place of weights.
        compute: how it is run.
        platform: "cuda", "tpu" or "cpu"; None for that of the devices.
    """
    traced = _score.trace(model.params, model.architecture, tokens, (None,), model.num_tokens, _log_prob, compute)
    return traced.lower(lowering_platforms=platform and (platform,))


@functools.partial(jax.jit, static_argnames=("architecture", "num_tokens", "function", "compute"))
def _score(
    params, architecture: Architecture, tokens, arguments: tuple, num_tokens: int, function: Callable, compute: Compute
):  # fmt: skip
    hidden = model_lib.forward(params, architecture, tokens[:, :-1], compute=compute)
    # Only the ids that the tokenizer has: a vocabulary padded to a round size has probability on ids that never occur.
    head = model_lib.head(params)[:num_tokens]
    return fused.linear_map(
        lambda logits, ids: function(logits, ids, *arguments), hidden, head, tokens[:, 1:],
        softcap=architecture.logit_softcap, chunk=compute.chunk, mesh=compute.mesh,
    )  # fmt: skip
