"""The teacher's forward pass, compiled in three forms that give one result: on one device, over a mesh, and pmapped.

Each maker puts the program together and returns a function of (tokens, lengths[, positions]). Nothing here is
differentiated: outputs carry no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm import model as model_lib
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib

WANTS = ("hidden", "logits", "top_k")


class TopK(NamedTuple):
    """The k most probable next tokens at each position, and what is left.

    Attributes:
        log_probs: float32 [row, position, k], descending, under the whole vocabulary.
        ids: int32 [row, position, k].
        tail: float32 [row, position], log of the probability of all other tokens together; -inf where there are none.
    """

    log_probs: jax.Array
    ids: jax.Array
    tail: jax.Array


def forward(
    params: dict[str, Any], architecture: Architecture, tokens: jax.Array, lengths: jax.Array,
    positions: jax.Array | None = None, *, want: str = "hidden", k: int | None = None, num_tokens: int | None = None,
    compute: Compute = DEFAULT,
) -> jax.Array | TopK:  # fmt: skip
    """The pure function behind all forms.

    Args:
        tokens, lengths: ids [row, position], and how many of each row count; outputs beyond that are 0 (top_k: as if no
            token were probable).
        positions: for "logits": [row, wanted], at which the logits are taken; beyond the length they are 0.
        want: "hidden" (after the last norm, [row, position, width]), "logits" (float32 [row, wanted, num_tokens]; full
            rows of logits are large, so only at `positions`) or "top_k".
        num_tokens: how many ids are real; logits of others are left out before any softmax.
    """
    num_tokens = num_tokens or architecture.vocab_size
    hidden = model_lib.forward(params, architecture, tokens, compute=compute)
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    head = model_lib.head(params)
    if want == "hidden":
        out = jnp.where(inside[..., None], hidden, 0)
    elif want == "logits":
        chosen = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        out = jnp.where((positions < lengths[:, None])[..., None], fused.project(chosen, head[:num_tokens]), 0)
    else:

        def best(logits):
            if num_tokens < logits.shape[-1]:
                # hidden, not cut off: what is left of a head that is split would have to be dealt out anew
                logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
            return _top_k(logits, k, compute.mesh)

        log_probs, ids, tail = fused.linear_map(best, hidden, head, chunk=compute.chunk, mesh=compute.mesh)
        out = TopK(jnp.where(inside[..., None], log_probs, -jnp.inf), ids, jnp.where(inside, tail, -jnp.inf))
    return jax.lax.stop_gradient(out)


def _top_k(logits, k, mesh):
    """Log-probabilities of the k likeliest, their ids, and the log of what all others have together."""
    vocab = logits.shape[-1]
    values, ids = mesh_lib.top_k(logits, min(k + 1, vocab), ("batch", None, "vocab"), mesh)
    # The others summed by themselves, from their own largest: one minus the sum of the top would lose a small tail to
    # rounding. Of equals those with the lowest ids were taken.
    least, last = values[..., k - 1 : k], ids[..., k - 1 : k]
    taken = (logits > least) | ((logits == least) & (jnp.arange(vocab) <= last))
    top = values[..., -1:]
    top = jnp.where(top > -jnp.inf, top, 0)
    rest = top[..., 0] + jnp.log(jnp.where(taken, 0, jnp.exp(logits - top)).sum(axis=-1))
    values, ids = values[..., :k], ids[..., :k]
    total = jnp.logaddexp(jax.nn.logsumexp(values, axis=-1), rest)
    return values - total[..., None], ids.astype(jnp.int32), rest - total


def jitted(model: Model, *, want: str = "hidden", k: int | None = None, compute: Compute = DEFAULT) -> Callable:
    """The forward pass on the device that the parameters lie on."""
    run = jax.jit(_bound(model, want, k, compute))
    return _checked(model, want, lambda *arrays: run(model.params, *map(jnp.asarray, arrays)))


def over_mesh(
    model: Model, mesh: Mesh, *, want: str = "hidden", k: int | None = None, compute: Compute = DEFAULT
) -> Callable:
    """The forward pass over a mesh of data x fsdp x tensor; parameters are laid out on it if they are not yet.

    Rows are filled up to a multiple of the devices they are split over, and cut again.
    """
    run = jax.jit(_bound(model, want, k, dataclasses.replace(compute, mesh=mesh)))
    architecture = model.architecture
    params = jax.device_put(
        model.params, mesh_lib.shardings(model_lib.logical_axes(architecture), model_lib.abstract(architecture), mesh)
    )
    rows = mesh_lib.sharding(("batch", None), mesh)

    def call(*arrays):
        count, arrays = _fill(arrays, mesh_lib.batch_devices(mesh))
        placed = [
            distributed.spread(array, rows if array.ndim == 2 else mesh_lib.sharding(("batch",), mesh))
            for array in arrays
        ]
        return jax.tree.map(lambda leaf: leaf[:count], run(params, *placed))

    return _checked(model, want, call)


def pmapped(
    model: Model, devices: Sequence[jax.Device] | None = None, *, want: str = "hidden", k: int | None = None,
    compute: Compute = DEFAULT,
) -> Callable:  # fmt: skip
    """The forward pass by jax.pmap: rows are shared out among the devices of this host, parameters copied to each."""
    devices = list(devices or jax.local_devices())
    run = jax.pmap(
        _bound(model, want, k, compute), in_axes=(None, *[0] * (3 if want == "logits" else 2)), devices=devices
    )

    params = jax.device_put(model.params, mesh_lib.sharding((), mesh_lib.one_axis("device", devices)))

    def call(*arrays):
        count, arrays = _fill(arrays, len(devices))
        out = run(params, *(array.reshape(len(devices), -1, *array.shape[1:]) for array in arrays))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], out)

    return _checked(model, want, call)


def _bound(model, want, k, compute):
    """`forward` as a function of params, tokens, lengths[, positions]; ValueError for what cannot be wanted."""
    if want not in WANTS:
        raise ValueError(f"want={want!r} is not one of {', '.join(WANTS)}")
    if (k is not None) != (want == "top_k") or (
        k is not None and not (isinstance(k, int) and 1 <= k <= model.num_tokens)
    ):
        raise ValueError(f"k={k} with want={want!r}: top_k needs a k from 1 to {model.num_tokens}, the others none")
    architecture, num_tokens = model.architecture, model.num_tokens

    def run(params, tokens, lengths, positions=None):
        return forward(
            params, architecture, tokens, lengths, positions, want=want, k=k, num_tokens=num_tokens, compute=compute
        )

    return run


def _checked(model, want, call):
    """`call` on host arrays that have been looked at first."""

    def run(tokens, lengths, positions=None):
        if (positions is not None) != (want == "logits"):
            raise ValueError("positions go with want='logits', and only with it")
        arrays = [np.asarray(array) for array in (tokens, lengths, positions) if array is not None]
        tokens, lengths = arrays[:2]
        for name, array, rank in zip(("tokens", "lengths", "positions"), arrays, (2, 1, 2), strict=False):
            if array.ndim != rank or array.shape[0] != tokens.shape[0] or not array.size:
                raise ValueError(
                    f"need tokens [row, position], lengths [row], positions [row, wanted]; {name}: {array.shape}"
                )
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name} have to be integers, not {array.dtype}")
        width = tokens.shape[1]
        if not (0 <= lengths.min() and lengths.max() <= width):
            raise ValueError(f"lengths run from {lengths.min()} to {lengths.max()}, rows have {width} positions")
        tokens = np.where(np.arange(width) < lengths[:, None], tokens, 0)
        if not (0 <= tokens.min() and tokens.max() < model.num_tokens):
            raise ValueError(
                f"ids run from {tokens.min()} to {tokens.max()}; the model's are 0 to {model.num_tokens - 1}"
            )
        if positions is not None and not (0 <= arrays[2].min() and arrays[2].max() < width):
            raise ValueError(
                f"positions run from {arrays[2].min()} to {arrays[2].max()}; they must be 0 to {width - 1}"
            )
        return call(*(array.astype(np.int32) for array in (tokens, *arrays[1:])))

    return run


def _fill(arrays, multiple):
    """Arrays with rows of zeros added up to a multiple, and how many rows they had."""
    count = arrays[0].shape[0]
    more = -count % multiple
    return count, [np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
