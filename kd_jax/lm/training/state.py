"""The state that an update changes, and where it and a batch lie on the devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus.batches import Batch
from kd_jax.lm.model import Architecture, frozen
from kd_jax.lm.model.frozen import ALL, Part
from kd_jax.parallel import distributed
from kd_jax.parallel import mesh as mesh_lib


class State(NamedTuple):
    """All that an update changes.

    Attributes:
        params: the trained part (kd_jax.lm.model.frozen), by default all weights; float32.
        optimizer: optax's state for them.
        step: int32, the number of finished updates.
    """

    params: Any
    optimizer: Any
    step: jax.Array


def init(
    key: jax.Array, architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None,
    part: Part = ALL,
) -> State:  # fmt: skip
    """Random float32 weights (or new adapters) and an empty optimiser state, allocated with their shardings.

    Args:
        key: a key of jax.random.
        architecture: of the model.
        optimizer: optax's.
        mesh: what the state is split over; None for one device.
        part: what of the model is trained.
    """
    make = functools.partial(_init, architecture=architecture, optimizer=optimizer, part=part)
    # Each device draws its own part: no device ever holds all of a weight that is split.
    return jax.jit(make, out_shardings=shardings(architecture, optimizer, mesh, part))(key)


def abstract(
    architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, part: Part = ALL
) -> State:
    """Shapes, dtypes and shardings of a state; nothing is allocated.

    Args:
        architecture, optimizer, mesh, part: as of `init`.
    """
    return _with_shardings(_shapes(architecture, optimizer, part), shardings(architecture, optimizer, mesh, part))


def abstract_frozen(architecture: Architecture, mesh: Mesh | None, part: Part) -> Any:
    """Shapes, dtypes and shardings of the float32 weights that are not trained; None for none."""
    shapes = jax.eval_shape(lambda params: frozen.cut(params, architecture, part)[1], model_lib.abstract(architecture))
    return _with_shardings(shapes, _layout(shapes, frozen.logical_axes(architecture, part)[1], mesh))


def place_frozen(params: Any, architecture: Architecture, mesh: Mesh | None, part: Part) -> Any:
    """The weights of a whole model that are not trained, on the mesh; they are shared, not copied, where possible."""
    kept = frozen.cut(params, architecture, part)[1]
    return jax.device_put(kept, _layout(kept, frozen.logical_axes(architecture, part)[1], mesh))


def from_params(
    params: Any, architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None = None,
    part: Part = ALL,
) -> State:  # fmt: skip
    """A state that starts from given weights: from those that `part` trains.

    They are copied, since an update donates the buffers of its state.

    Args:
        params: the weights, of any dtype; they become float32.
        architecture, optimizer, mesh, part: as of `init`.
    """
    to = shardings(architecture, optimizer, mesh, part)
    trained = frozen.cut(params, architecture, part)[0]
    # astype alone gives float32 leaves back uncopied, and the first update would free the caller's weights.
    copied = jax.tree.map(lambda leaf, to: jax.device_put(jnp.copy(leaf).astype(jnp.float32), to), trained, to.params)
    empty = jax.jit(lambda params: (optimizer.init(params), jnp.int32(0)), out_shardings=(to.optimizer, to.step))
    return State(copied, *empty(copied))


def shardings(
    architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh | None, part: Part = ALL
) -> State:
    """The sharding of each leaf of a state: moments as the weights they belong to, all else replicated.

    Args:
        architecture, optimizer, mesh, part: as of `init`.
    Raises: ValueError for a weight that cannot be split over the mesh.
    """
    shapes = _shapes(architecture, optimizer, part)
    if mesh is None:
        return _layout(shapes, None, None)
    weights = _layout(shapes.params, frozen.logical_axes(architecture, part)[0], mesh)
    replicated = mesh_lib.sharding((), mesh)
    # optax tells which leaves of its state belong to weights; its counters are replicated.
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, shapes.optimizer, weights,
        transform_non_params=lambda _: replicated,
    )  # fmt: skip
    return State(weights, moments, replicated)


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """The batch on the devices, its rows split over them; each process sends only its own part.

    Args:
        batch: NumPy arrays [part, row, position, ...], equal in all processes.
        mesh: None for one device.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    # [part, row, position, ...], perhaps with an axis over members before them
    leading = batch.tokens.ndim - 2

    def one(array):
        axes = (None,) * leading + ("batch",) + (None,) * (array.ndim - leading - 1)
        return distributed.spread(array, mesh_lib.sharding(axes, mesh))

    return jax.tree.map(one, batch)


def stack(batches: Sequence[Batch]) -> Batch:
    """A batch for each member -> one batch with a leading axis over members; all get the rows of the largest."""
    # Packed batches differ in rows; the rows that are added have segment 0, which is padding.
    rows = max(batch.tokens.shape[1] for batch in batches)

    def one(*arrays):
        pads = [[(0, 0), (0, rows - array.shape[1])] + [(0, 0)] * (array.ndim - 2) for array in arrays]
        return np.stack([np.pad(array, pad) for array, pad in zip(arrays, pads, strict=True)])

    return jax.tree.map(one, *batches)


def _init(key, architecture, optimizer, part):
    params = frozen.init(key, architecture, part)
    return State(params, optimizer.init(params), jnp.int32(0))


def _shapes(architecture, optimizer, part) -> State:
    # Traced only: layouts are known before anything is allocated.
    return jax.eval_shape(lambda: _init(jax.random.key(0), architecture, optimizer, part))


def _layout(tree: Any, axes: Any, mesh: Mesh | None) -> Any:
    """The sharding of each leaf, by its logical axes."""
    if mesh is not None:
        return mesh_lib.shardings(axes, tree, mesh)
    # Stated on one device too: new, restored and updated states are then laid out alike, and the update compiles once.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, tree)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
