"""The teacher's forward pass, compiled in three forms with the same result: on one device, over a mesh, and pmapped.

Each of the three compiles the program and returns a function of (tokens, lengths[, positions]). Outputs carry no
gradient.
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
    """The k most probable next tokens at each position, and the probability of all others.

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
    """The pure function behind the three forms.

    Args:
        params, architecture: of the teacher.
        tokens: int ids [row, position].
        lengths: int [row], how many tokens of each row count. Outputs beyond are 0; for "top_k", log-probabilities are
            -inf there.
        positions: for "logits", int [row, wanted]: where the logits are taken.
        want: "hidden" (after the last norm, [row, position, width]), "logits" (float32 [row, wanted, num_tokens]; only
            at `positions`, since full rows of logits are large) or "top_k" (a TopK).
        k: for "top_k", how many tokens.
        num_tokens: how many ids are real; logits of others are left out before any softmax.
        compute: how the model is run.
    """
    num_tokens = num_tokens or architecture.vocab_size
    hidden = model_lib.forward(params, architecture, tokens, compute=compute)
    inside = jnp.arange(tokens.shape[1]) < lengths[:, None]
    head, softcap = model_lib.head(params), architecture.logit_softcap
    if want == "hidden":
        # What the model computes beyond a row's length means nothing.
        out = jnp.where(inside[..., None], hidden, 0)
    elif want == "logits":
        # Positions are chosen before the projection: full rows of logits are never made.
        chosen = jnp.take_along_axis(hidden, positions[..., None], axis=1)
        out = jnp.where((positions < lengths[:, None])[..., None], fused.project(chosen, head[:num_tokens], softcap), 0)
    else:

        def best(logits):
            if num_tokens < logits.shape[-1]:
                # masked, not cut off: a cut head that is split over devices would have to be redistributed
                logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
            return _top_k(logits, k, compute.mesh)

        log_probs, ids, tail = fused.linear_map(
            best, hidden, head, softcap=softcap, chunk=compute.chunk, mesh=compute.mesh
        )
        out = TopK(jnp.where(inside[..., None], log_probs, -jnp.inf), ids, jnp.where(inside, tail, -jnp.inf))
    return jax.lax.stop_gradient(out)


def _top_k(logits, k, mesh):
    """Log-probabilities of the k most probable tokens, their ids, and log of the probability of all others."""
    vocab = logits.shape[-1]
    # One more than k: the likeliest of all other tokens, by which the sum of the tail is shifted.
    values, ids = mesh_lib.top_k(logits, min(k + 1, vocab), ("batch", None, "vocab"), mesh)
    # The tail is a sum of its own, relative to its largest term: 1 minus the sum of the top would lose a small tail to
    # rounding. Among equal logits the lowest ids belong to the top.
    least, last = values[..., k - 1 : k], ids[..., k - 1 : k]
    taken = (logits > least) | ((logits == least) & (jnp.arange(vocab) <= last))
    top = values[..., -1:]
    # Where no other token is possible its logit is -inf, and -inf - -inf would be NaN.
    top = jnp.where(top > -jnp.inf, top, 0)
    rest = top[..., 0] + jnp.log(jnp.where(taken, 0, jnp.exp(logits - top)).sum(axis=-1))
    values, ids = values[..., :k], ids[..., :k]
    # Top and tail are normalised by their own sum, so that they add up to 1.
    total = jnp.logaddexp(jax.nn.logsumexp(values, axis=-1), rest)
    return values - total[..., None], ids.astype(jnp.int32), rest - total


def jitted(model: Model, *, want: str = "hidden", k: int | None = None, compute: Compute = DEFAULT) -> Callable:
    """The forward pass on the device that the parameters lie on.

    Args:
        model: the teacher.
        want, k, compute: see `forward`.
    Returns: a function of NumPy or JAX arrays (tokens, lengths[, positions]), see `forward`.
    Raises: ValueError for a `want` or `k` that does not exist; the function raises it for ids, lengths or positions out
        of range.
    """
    # The weights are an argument: closed over, they would be constants of the compiled program, and copied.
    run = jax.jit(_bound(model, want, k, compute))
    return _checked(model, want, lambda *arrays: run(model.params, *map(jnp.asarray, arrays)))


def over_mesh(
    model: Model, mesh: Mesh, *, want: str = "hidden", k: int | None = None, compute: Compute = DEFAULT
) -> Callable:
    """As `jitted`, over a mesh of data x fsdp x tensor; parameters are moved onto it if they are not there yet.

    Rows are padded to a multiple of the devices they are split over, and cut again.

    Args:
        model: the teacher.
        mesh: of data x fsdp x tensor.
        want, k, compute: see `forward`.
    Returns: as `jitted`.
    """
    run = jax.jit(_bound(model, want, k, dataclasses.replace(compute, mesh=mesh)))
    architecture = model.architecture
    params = jax.device_put(
        model.params, mesh_lib.shardings(model_lib.logical_axes(architecture), model_lib.abstract(architecture), mesh)
    )
    # Each process sends the rows of its own devices.
    rows = mesh_lib.sharding(("batch", None), mesh)

    def call(*arrays):
        count, arrays = _pad_rows(arrays, mesh_lib.batch_devices(mesh))
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
    """As `jitted`, by jax.pmap: rows are split over the devices of this host, parameters are copied to each.

    Args:
        model: the teacher.
        devices: of this host; by default all of its devices.
        want, k, compute: see `forward`.
    Returns: as `jitted`.
    """
    devices = list(devices or jax.local_devices())
    run = jax.pmap(
        _bound(model, want, k, compute), in_axes=(None, *[0] * (3 if want == "logits" else 2)), devices=devices
    )
    # Copied to all devices once; otherwise each call would send them.
    params = jax.device_put(model.params, mesh_lib.sharding((), mesh_lib.one_axis("device", devices)))

    def call(*arrays):
        count, arrays = _pad_rows(arrays, len(devices))
        out = run(params, *(array.reshape(len(devices), -1, *array.shape[1:]) for array in arrays))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], out)

    return _checked(model, want, call)


def _bound(model: Model, want: str, k: int | None, compute: Compute) -> Callable:
    """`forward` as a function of params, tokens, lengths[, positions]."""
    if want not in WANTS:
        raise ValueError(f"want={want!r} must be one of {', '.join(WANTS)}")
    if want == "top_k" and not 1 <= (k or 0) <= model.num_tokens:
        raise ValueError(f"k={k} must be from 1 to the model's {model.num_tokens} ids")
    architecture, num_tokens = model.architecture, model.num_tokens

    def run(params, tokens, lengths, positions=None):
        return forward(
            params, architecture, tokens, lengths, positions, want=want, k=k, num_tokens=num_tokens, compute=compute
        )

    return run


def _checked(model: Model, want: str, call: Callable) -> Callable:
    """`call` on host arrays whose values are checked first: on a device, an id out of range gives a wrong result."""

    def run(tokens, lengths, positions=None):
        if (positions is not None) != (want == "logits"):
            raise ValueError("want='logits' needs positions, and only that takes them")
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        width = tokens.shape[1]
        # Beyond a row's length there may be anything; 0 is an id of every model.
        tokens = np.where(np.arange(width) < lengths[:, None], tokens, 0)
        arrays, ranges = [tokens, lengths], [("ids", tokens, model.num_tokens), ("lengths", lengths, width + 1)]
        if positions is not None:
            arrays.append(np.asarray(positions))
            ranges.append(("positions", arrays[2], width))
        for name, array, end in ranges:
            if array.size and not (0 <= array.min() and array.max() < end):
                raise ValueError(f"{name} from {array.min()} to {array.max()} must be from 0 to {end - 1}")
        return call(*(array.astype(np.int32) for array in arrays))

    return run


def _pad_rows(arrays, multiple):
    """The number of rows, and the arrays with rows of zeros added up to a multiple."""
    count = arrays[0].shape[0]
    padding = -count % multiple
    return count, [np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
