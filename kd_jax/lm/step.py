"""One update of a model's weights: a jitted function from state and batch to the next state.

The loss is the mean cross-entropy, in nats, of all the tokens of the batch that its mask selects, however they are cut
into parts, rows or devices: sums and counts are put together before anything is divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd_jax import fused
from kd_jax import mesh as mesh_lib
from kd_jax.lm import model as model_lib
from kd_jax.lm.batches import Batch
from kd_jax.lm.model import Architecture, Compute


class State(NamedTuple):
    """All that an update changes.

    Attributes:
        params: the weights.
        optimizer: optax's state for them.
        step: int32, how many updates are finished.
    """

    params: Any
    optimizer: Any
    step: jax.Array


class Metrics(NamedTuple):
    """What an update reports; float32 scalars."""

    loss: jax.Array  # nats a token, before the update
    num_tokens: jax.Array  # that were learnt from
    gradient_norm: jax.Array  # of all parameters together, before clipping
    learning_rate: jax.Array


def init(
    key: jax.Array, architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> State:
    """Random float32 weights and an empty optimiser, made where they are to lie."""
    make = functools.partial(_init, architecture=architecture, optimizer=optimizer)
    return jax.jit(make, out_shardings=shardings(architecture, optimizer, mesh))(key)


def abstract(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> State:
    """Shapes, dtypes and shardings of a state; nothing is allocated."""
    shapes = _shapes(architecture, optimizer)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes, shardings(architecture, optimizer, mesh),
    )  # fmt: skip


def _init(key, architecture, optimizer):
    params = model_lib.init(key, architecture)
    return State(params, optimizer.init(params), jnp.int32(0))


def _shapes(architecture, optimizer) -> State:
    return jax.eval_shape(lambda: _init(jax.random.key(0), architecture, optimizer))


def shardings(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> State:
    """Where a state lies: moments as the weights they belong to, all else on every device."""
    shapes = _shapes(architecture, optimizer)
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: here, shapes)
    weights = mesh_lib.shardings(model_lib.logical_axes(architecture), shapes.params, mesh)
    everywhere = mesh_lib.sharding((), mesh)
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, shapes.optimizer, weights,
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    return State(weights, moments, everywhere)


def make(
    architecture: Architecture, optimizer: optax.GradientTransformation, schedule: optax.Schedule, compute: Compute,
    mesh: Mesh | None = None, members: int = 1,
) -> Callable[[State, Batch], tuple[State, Metrics]]:  # fmt: skip
    """The jitted update. It takes the state over (donation): what was passed in is gone afterwards.

    With several `members`, as many models of one shape are updated by one program (vmap): state, batch and metrics
    have a leading axis over them.
    """

    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        loss, gradient, count = loss_and_gradient(state.params, architecture, batch, compute)
        changes, moments = optimizer.update(gradient, state.optimizer, state.params)
        metrics = Metrics(loss, count, optax.tree.norm(gradient), jnp.float32(schedule(state.step)))
        return State(optax.apply_updates(state.params, changes), moments, state.step + 1), metrics

    where = shardings(architecture, optimizer, mesh)
    if members == 1:
        return jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    if mesh is not None:
        where = jax.tree.map(lambda one: NamedSharding(mesh, PartitionSpec(None, *one.spec)), where)
    return jax.jit(jax.vmap(update), donate_argnums=0, out_shardings=(where, None))


def loss_and_gradient(
    params: Any, architecture: Architecture, batch: Batch, compute: Compute
) -> tuple[jax.Array, Any, jax.Array]:
    """Mean loss over the whole batch, its gradient (float32), and the number of tokens that it is a mean over."""
    total = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)

    def share(params, part: Batch):
        mean = _loss(params, architecture, part, compute)
        return mean.mean * (mean.count / total)

    value_and_grad = jax.value_and_grad(share)
    if batch.tokens.shape[0] == 1:
        loss, gradient = value_and_grad(params, jax.tree.map(lambda leaf: leaf[0], batch))
        return loss, gradient, batch.mask.sum()

    def add(so_far, part):
        return jax.tree.map(jnp.add, so_far, value_and_grad(params, part)), None

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, gradient), _ = jax.lax.scan(add, zero, batch)
    return loss, gradient, batch.mask.sum()


def _loss(params, architecture, part: Batch, compute):
    hidden = model_lib.forward(
        params, architecture, part.tokens, positions=part.positions, segments=part.segments, compute=compute
    )
    # what follows each token; of the last of a row nothing is learnt, so what rolls in does not matter
    labels = jnp.roll(part.tokens, -1, axis=-1)
    return fused.linear_cross_entropy(hidden, model_lib.head(params), labels, part.mask)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _evaluate(params, architecture: Architecture, batch: Batch, compute: Compute):
    def one(part):
        mean = _loss(params, architecture, part, compute)
        return mean.mean * mean.count, mean.count

    sums, counts = jax.lax.map(one, batch)
    return sums.sum(), counts.sum()


def evaluate(params: Any, architecture: Architecture, batches: Iterable[Batch], compute: Compute) -> float:
    """Mean cross-entropy in nats a token over all batches together, padding not counted; summed in float64."""
    parts = [_evaluate(params, architecture, batch, compute) for batch in batches]
    sums, counts = (sum(float(part[i]) for part in parts) for i in (0, 1))
    return sums / counts


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """The batch on the devices, its rows split over them; each process sends only its own part."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    # [part, row, position], or with the members of `make` before them
    sharding = mesh_lib.sharding((None,) * (batch.tokens.ndim - 2) + ("batch", None), mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), batch)


def stack(batches: Sequence[Batch]) -> Batch:
    """One batch for each member -> a batch with a leading axis over them; all get as many rows."""
    rows = max(batch.tokens.shape[1] for batch in batches)

    def one(*arrays):
        return np.stack([np.pad(array, ((0, 0), (0, rows - array.shape[1]), (0, 0))) for array in arrays])

    return jax.tree.map(one, *batches)
