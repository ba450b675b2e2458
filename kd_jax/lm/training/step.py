"""One update of a model's weights: a jitted function from state and batch to the next state.

The loss is the mean, in nats, over all the tokens of the batch that its mask selects, however they are cut into parts,
rows or devices: sums and counts are put together before anything is divided. It is the cross-entropy unless another
(kd_jax.lm.distill.loss) is given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus.batches import Batch
from kd_jax.lm.distill.loss import Loss, cross_entropy
from kd_jax.lm.model import Architecture, Compute
from kd_jax.metrics import Mean
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib


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
    statistics: dict[str, jax.Array] = {}  # means over the same tokens, of what the loss reports beside itself


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


def from_params(
    params: Any, architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> State:
    """A state that starts from these weights. They are copied: an update takes its state over, not them."""
    where = shardings(architecture, optimizer, mesh)
    own = jax.tree.map(lambda leaf, to: jax.device_put(jnp.copy(leaf).astype(jnp.float32), to), params, where.params)
    empty = jax.jit(lambda params: (optimizer.init(params), jnp.int32(0)), out_shardings=(where.optimizer, where.step))
    return State(own, *empty(own))


def make(
    architecture: Architecture, optimizer: optax.GradientTransformation, schedule: optax.Schedule, compute: Compute,
    mesh: Mesh | None = None, members: int = 1, loss: Loss | None = None,
) -> Callable[..., tuple[State, Metrics]]:  # fmt: skip
    """The jitted update(state, batch[, guide]). It takes the state over (donation): what was passed in is gone then.

    With several `members`, as many models of one shape are updated by one program (vmap): state, batch and metrics
    have a leading axis over them. `loss` is the cross-entropy by default; `guide` is what else it takes: a teacher's
    weights, say, which get no gradient, are not taken over, and may lie on the devices otherwise than the state does.
    """
    loss = loss or cross_entropy(architecture, dataclasses.replace(compute, mesh=mesh))

    def update(state: State, batch: Batch, guide: Any = None) -> tuple[State, Metrics]:
        found, gradient, count = _loss_and_gradient(loss, state.params, batch, guide)
        changes, moments = optimizer.update(gradient, state.optimizer, state.params)
        rate = jnp.float32(schedule(state.step))
        metrics = Metrics(found[0], count, optax.tree.norm(gradient), rate, found[1])
        return State(optax.apply_updates(state.params, changes), moments, state.step + 1), metrics

    where = shardings(architecture, optimizer, mesh)
    if members == 1:
        return jax.jit(update, donate_argnums=0, out_shardings=(where, None))
    if mesh is not None:
        where = jax.tree.map(lambda one: NamedSharding(mesh, PartitionSpec(None, *one.spec)), where)
    many = jax.vmap(update, in_axes=(0, 0, None))
    return jax.jit(
        lambda state, batch, guide=None: many(state, batch, guide), donate_argnums=0, out_shardings=(where, None)
    )


def loss_and_gradient(
    params: Any, architecture: Architecture, batch: Batch, compute: Compute
) -> tuple[jax.Array, Any, jax.Array]:
    """Mean cross-entropy over the whole batch, its gradient (float32), and the number of tokens it is a mean over."""
    (loss, _), gradient, count = _loss_and_gradient(cross_entropy(architecture, compute), params, batch, None)
    return loss, gradient, count


def _loss_and_gradient(loss: Loss, params, batch: Batch, guide):
    """((mean loss, means of the statistics), gradient, count) of the whole batch."""
    total = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)

    def share(params, part: Batch):
        mean, statistics = loss(params, part, guide)
        return mean.mean * (mean.count / total), {name: _sum(one) / total for name, one in statistics.items()}

    value_and_grad = jax.value_and_grad(share, has_aux=True)
    if batch.tokens.shape[0] == 1:
        found, gradient = value_and_grad(params, jax.tree.map(lambda leaf: leaf[0], batch))
        return found, gradient, batch.mask.sum()

    def add(so_far, part):
        return jax.tree.map(jnp.add, so_far, value_and_grad(params, part)), None

    first = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda leaf: leaf[0], batch))
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    (found, gradient), _ = jax.lax.scan(add, zero, batch)
    return found, gradient, batch.mask.sum()


def _sum(mean: Mean) -> jax.Array:
    return jnp.where(mean.count > 0, mean.mean * mean.count, 0.0)


def make_evaluate(
    architecture: Architecture, compute: Compute, loss: Loss | None = None
) -> Callable[..., dict[str, float]]:
    """A function of (params, batches[, guide]): the loss, as "loss", and its statistics by name.

    They are means over all tokens of all batches together, padding not counted; summed in float64.
    """
    loss = loss or cross_entropy(architecture, compute)

    @jax.jit
    def one_batch(params, batch: Batch, guide):
        def one(part):
            mean, statistics = loss(params, part, guide)
            return {"loss": mean.mean * mean.count} | {k: _sum(v) for k, v in statistics.items()}, mean.count

        sums, counts = jax.lax.map(one, batch)
        return jax.tree.map(jnp.sum, sums), counts.sum()

    def run(params: Any, batches: Iterable[Batch], guide: Any = None) -> dict[str, float]:
        parts = [distributed.fetch(one_batch(params, batch, guide)) for batch in batches]
        count = sum(float(part[1]) for part in parts)
        return {name: sum(float(part[0][name]) for part in parts) / count for name in parts[0][0]}

    return run


def evaluate(params: Any, architecture: Architecture, batches: Iterable[Batch], compute: Compute) -> float:
    """Mean cross-entropy in nats a token over all batches together, padding not counted; summed in float64."""
    return evaluator(architecture, compute)(params, batches)["loss"]


@functools.cache
def evaluator(architecture: Architecture, compute: Compute) -> Callable[..., dict[str, float]]:
    """`make_evaluate` of the cross-entropy, made once: a second training of such a model compiles nothing for it."""
    return make_evaluate(architecture, compute)


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """The batch on the devices, its rows split over them; each process sends only its own part."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    # [part, row, position, ...], or with the members of `make` before them
    rows = batch.tokens.ndim - 2

    def one(a):
        sharding = mesh_lib.sharding((None,) * rows + ("batch",) + (None,) * (a.ndim - rows - 1), mesh)
        return distributed.spread(a, sharding)

    return jax.tree.map(one, batch)


def stack(batches: Sequence[Batch]) -> Batch:
    """One batch for each member -> a batch with a leading axis over them; all get as many rows."""
    rows = max(batch.tokens.shape[1] for batch in batches)

    def one(*arrays):
        more = [[(0, 0), (0, rows - array.shape[1])] + [(0, 0)] * (array.ndim - 2) for array in arrays]
        return np.stack([np.pad(array, pad) for array, pad in zip(arrays, more, strict=True)])

    return jax.tree.map(one, *batches)
