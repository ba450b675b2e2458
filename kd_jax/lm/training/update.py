"""The update: loss and gradient of a batch, the optimiser's step, and the metrics it reports.

The loss is a mean in nats over all tokens that the batch's mask selects, however the batch is cut into parts, rows or
devices: sums and counts are added up before anything is divided. A mean of the parts' means would weigh the tokens of
short parts more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd_jax.lm.corpus.batches import Batch
from kd_jax.lm.distill.loss import Loss
from kd_jax.lm.model import Architecture, frozen
from kd_jax.lm.model.frozen import ALL, Part
from kd_jax.lm.training.state import State, shardings
from kd_jax.metrics import Mean


class Metrics(NamedTuple):
    """What an update reports; float32 scalars."""

    loss: jax.Array  # nats per token, before the update
    num_tokens: jax.Array  # learnt from
    gradient_norm: jax.Array  # of all parameters together, before clipping
    learning_rate: jax.Array
    statistics: dict[str, jax.Array] = {}  # what the loss reports beside itself: means over the same tokens


def make(loss: Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule) -> Callable:
    """The update as a pure function: (state, batch, guide) -> (next state, metrics).

    Args:
        loss: see kd_jax.lm.distill.loss; `guide` is its third argument, a teacher's weights for instance.
        optimizer, schedule: optax's; the schedule is only reported here, the optimiser has it inside.
    """

    def update(state: State, batch: Batch, guide: Any = None) -> tuple[State, Metrics]:
        (value, statistics), gradient, count = loss_and_gradient(loss, state.params, batch, guide)
        changes, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        # The schedule counts finished updates, as the optimiser's own counter does.
        learning_rate = jnp.float32(schedule(state.step))
        metrics = Metrics(value, count, optax.tree.norm(gradient), learning_rate, statistics)
        return State(params, moments, state.step + 1), metrics

    return update


def compiled(
    update: Callable, architecture: Architecture, optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None, members: int = 1, part: Part = ALL,
) -> Callable:  # fmt: skip
    """`update` under jit, with the state's shardings. The state's buffers are donated; those of the guide are not.

    With several `members`, so many models of one shape are updated by one program (vmap): state, batch and metrics have
    a leading axis over them, and all share the guide.

    Args:
        update: as `make` returns it.
        architecture, optimizer, mesh: of the state.
        members: models that are trained together.
        part: which weights are trained (kd_jax.lm.training.state.Part).
    Returns: (state, batch, guide) -> (state, metrics).
    """
    to = shardings(architecture, optimizer, mesh, part)
    if members == 1:
        # Without the state's shardings XLA could lay it out otherwise: its donated buffers would not fit, and the next
        # update would compile again.
        return jax.jit(update, donate_argnums=0, out_shardings=(to, None))
    if mesh is not None:
        # Members are not split over devices: each device has its part of every member.
        to = jax.tree.map(lambda one: NamedSharding(mesh, PartitionSpec(None, *one.spec)), to)
    # The guide is not mapped: one teacher serves all members.
    many = jax.vmap(update, in_axes=(0, 0, None))
    return jax.jit(
        lambda state, batch, guide=None: many(state, batch, guide), donate_argnums=0, out_shardings=(to, None)
    )


@functools.lru_cache(maxsize=16)
def of_part(loss: Loss, architecture: Architecture, part: Part) -> Loss:
    """The loss as a function of the trained part of a model; its guide is (frozen weights, guide of the whole loss).

    The same arguments give the same function, so that what is compiled for it is found again.
    """
    if part.is_all:
        return loss

    # The frozen weights are no first argument, so nothing is differentiated with respect to them.
    def loss_of_part(trained: Any, batch: Batch, guide: tuple[Any, Any]):
        kept, guide_of_loss = guide
        return loss(frozen.attached(trained, kept, architecture, part), batch, guide_of_loss)

    return loss_of_part


def loss_and_gradient(loss: Loss, params: Any, batch: Batch, guide: Any = None):
    """((mean loss, means of the statistics), float32 gradient, number of tokens) of a whole batch, part after part.

    Args:
        loss: see kd_jax.lm.distill.loss.
        params: the weights that it is differentiated in.
        batch: [part, row, position].
        guide: the third argument of the loss.
    """
    # Counted over the whole batch first: the parts' shares of the mean, and so their gradients, simply add up.
    total = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)

    def share(params, part: Batch):
        mean, statistics = loss(params, part, guide)
        return mean.mean * (mean.count / total), {name: weighted_sum(one) / total for name, one in statistics.items()}

    value_and_grad = jax.value_and_grad(share, has_aux=True)
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    # A single part needs no loop, and no second copy of the gradient to add to.
    if batch.tokens.shape[0] == 1:
        return *value_and_grad(params, first), batch.mask.sum()

    def add(so_far, part):
        return jax.tree.map(jnp.add, so_far, value_and_grad(params, part)), None

    shapes = jax.eval_shape(value_and_grad, params, first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # A loop, so that the activations of one part are in memory at a time.
    (values, gradient), _ = jax.lax.scan(add, zero, batch)
    return values, gradient, batch.mask.sum()


def weighted_sum(mean: Mean) -> jax.Array:
    """The sum of the values that a Mean is of; 0 for none, though their mean is NaN."""
    return jnp.where(mean.count > 0, mean.mean * mean.count, 0.0)
