"""The output projection of hidden states in chunks of positions, so that the logits of all tokens never exist.

Hidden states are [..., position, width]. The axes before the positions (rows, perhaps split over devices) stay whole: a
chunk has the same positions of every row. The logits of a chunk are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.parallel import mesh as mesh_lib

# Tokens in a chunk. Fewer on a CPU, where their logits should stay in its caches.
CPU_TOKENS, TOKENS = 256, 4096


def chunk_tokens(mesh: Mesh | None = None, each: int | None = None) -> int:
    """The default number of tokens in a chunk.

    Args:
        mesh: over its parts of the rows the number is multiplied, so that more devices do not mean more chunks.
        each: tokens of one such part, in place of the default.
    """
    return (each or (CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS)) * mesh_lib.batch_devices(mesh)


def linear_map(
    function: Callable[..., Any], hidden: jax.Array, head: jax.Array, *arrays: jax.Array, softcap: float | None = None,
    chunk: int | None = None, mesh: Mesh | None = None,
) -> Any:  # fmt: skip
    """function(logits, *pieces) of each chunk of positions, joined.

    Args:
        function: takes float32 logits [..., positions, vocab] and the same positions of `arrays`; returns arrays
            [..., positions, *any], in any tree.
        hidden: [..., position, width].
        head: [vocab, width].
        arrays: [..., position] each.
        softcap: of the logits, see `project`.
        chunk: tokens at a time, by default `chunk_tokens()`.
        mesh: what the rows and the head are split over.
    Returns: what the function returned, with all positions: [..., position, *any].
    """
    # A loop, so that the logits of one chunk exist at a time.
    size, pieces = cut((hidden, *arrays), hidden.shape[:-1], chunk or chunk_tokens(mesh))
    head = whole(head, hidden, mesh)
    out = jax.lax.map(lambda piece: function(project(piece[0], head, softcap), *piece[1:]), pieces)
    return jax.tree.map(lambda parts: join(parts, size, hidden.ndim - 2), out)


def project(hidden: jax.Array, head: jax.Array, softcap: float | None = None) -> jax.Array:
    """float32 logits [..., vocab] of hidden [..., width] and head [vocab, width]; with a cap, cap * tanh(logit / cap).

    (Gemma 2, arXiv 2408.00118, section 2.)
    """
    # Factors in the hidden states' dtype (bfloat16, perhaps), sums and logits in float32.
    logits = dot(hidden, head.astype(hidden.dtype), (hidden.ndim - 1, 1))
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def through_softcap(gradient: jax.Array, logits: jax.Array, softcap: float | None) -> jax.Array:
    """The gradient in the logits before the soft cap, from that in the capped logits.

    Args:
        gradient, logits: [..., vocab]; the logits are capped.
        softcap: of the logits; None for none.
    """
    return gradient if softcap is None else gradient * (1 - (logits / softcap) ** 2)


def real_only(logits: jax.Array, num_tokens: int) -> jax.Array:
    """Logits [..., vocab] with -inf for the ids from `num_tokens` on, which pad the vocabulary."""
    # Cutting the head instead would move it between the devices that it is split over.
    if num_tokens == logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)


def whole(head: jax.Array, hidden: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The head in the hidden states' dtype; where fsdp splits its width, gathered once for all chunks.

    Args:
        head: [vocab, width].
        hidden: the hidden states that it is multiplied with.
        mesh: what both are split over, or None.
    """
    if mesh is None:
        return head
    return mesh_lib.constrain(head.astype(hidden.dtype), ("vocab", None), mesh)


def groups(hidden: jax.Array, mesh: Mesh | None) -> int:
    """Number of groups of rows for which the head's gradient is summed up separately.

    Each device keeps its own sum while it goes through the chunks; they are added once at the end, not in every chunk.

    Args:
        hidden: [row, position, width]; where the rows do not divide over the devices, there is one group.
    """
    devices = mesh_lib.batch_devices(mesh)
    return devices if hidden.ndim > 2 and hidden.shape[0] % devices == 0 else 1


def no_gradient(head: jax.Array, groups: int, mesh: Mesh | None) -> jax.Array:
    """Zeros, float32, to which the `head_gradient` of each chunk is added: [vocab, width], or [group, vocab, width].

    Args:
        head: [vocab, width].
        groups: as `groups` gives it.
        mesh: what the head is split over, or None.
    """
    if groups == 1:
        return jnp.zeros(head.shape, jnp.float32)
    return mesh_lib.constrain(jnp.zeros((groups, *head.shape), jnp.float32), ("batch", "vocab", None), mesh)


def head_gradient(gradient: jax.Array, hidden: jax.Array, groups: int) -> jax.Array:
    """The head's gradient from a chunk's hidden states [..., width] and the gradient in its logits [..., vocab].

    Args:
        groups: as `groups` gives it.
    Returns: [vocab, width], or [group, vocab, width], float32.
    """
    # A batched product over the groups keeps each group's sum on its own devices, without communication.
    leading = () if groups == 1 else (groups,)
    rows = (array.reshape(*leading, -1, array.shape[-1]) for array in (gradient, hidden))
    return dot(*rows, (len(leading), len(leading)), batch=len(leading))


def summed(gradient: jax.Array, groups: int, mesh: Mesh | None) -> jax.Array:
    """The sum over the groups, split over the devices like the head."""
    # The only place where the head's gradient is summed between devices: once a loss.
    return gradient if groups == 1 else mesh_lib.constrain(gradient.sum(axis=0), ("vocab", "embed"), mesh)


def share_of_one(mask: jax.Array) -> jax.Array:
    """1 / number of selected positions, float32: the weight of each in the mean; 0 where none is selected."""
    count = mask.sum()
    return jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0).astype(jnp.float32)


def undivided(function: Callable[..., Any], num_static: int) -> Callable[..., Any]:
    """Wraps a function so that a reverse-mode derivative leaves its loops as they are.

    In the rule of a `custom_jvp`, JAX moves out of every loop what does not depend on the data (indices of blocks, say)
    and stores it for all steps. XLA then fuses less, and a fused loss took 1.3 times as long. A `custom_jvp` none of
    whose inputs has a tangent is taken as one piece; its rule, for second derivatives, is the ordinary one.

    Args:
        function: its derivative is in hidden states and head, the first two arguments that are arrays.
        num_static: how many leading arguments are not arrays.
    """
    whole = jax.custom_jvp(function, nondiff_argnums=tuple(range(num_static)))

    @whole.defjvp
    def jvp(*args):
        *static, (hidden, head, *others), tangents = args
        return jax.jvp(lambda *both: function(*static, *both, *others), (hidden, head), tangents[:2])

    return whole


def inner_product(gradients: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> jax.Array:
    """The tangent, float32, of a number that has these gradients.

    A derivative rule that is this product serves both directions. Its transpose only scales the gradients: backwards,
    nothing is computed a second time.

    Args:
        gradients, tangents: arrays of the same shapes, pair by pair.
    """
    pairs = zip(gradients, tangents, strict=True)
    return sum((gradient.astype(jnp.float32) * tangent.astype(jnp.float32)).sum() for gradient, tangent in pairs)


def cut(arrays: tuple[jax.Array, ...], shape: tuple[int, ...], chunk: int | None) -> tuple[int, tuple]:
    """Positions cut into chunks of equal length, about `chunk` tokens each.

    Args:
        arrays: a tree of [*rows, position, ...].
        shape: [*rows, position].
        chunk: tokens at a time, by default `chunk_tokens()`; a chunk has at least one position of every row.
    Returns: the number of positions, and the arrays as [chunk, *rows, position of it, ...], filled up with zeros.
    """
    *rows, size = shape
    longest = max(1, (chunk or chunk_tokens()) // max(1, math.prod(rows)))
    # 48 positions of at most 32 are 2 x 24: the rest of a last, shorter chunk would be computed for nothing.
    length = -(-size // -(-size // longest))
    axis = len(rows)

    def one(array):
        # Zeros are harmless: `join` cuts their results off, and their mask is False.
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, -size % length)
        array = jnp.pad(array, pad)
        # The chunks come first, for the loop. Rows stay whole, so nothing moves between devices that split them.
        return jnp.moveaxis(array.reshape(*rows, -1, length, *array.shape[axis + 1 :]), axis, 0)

    return size, jax.tree.map(one, tuple(arrays))


def join(parts: jax.Array, size: int, axis: int) -> jax.Array:
    """The reverse of `cut` for one array [chunk, *rows, position of it, ...]; `axis` is that of the positions.

    Args:
        size: number of positions, as `cut` gives it.
    """
    parts = jnp.moveaxis(parts, 0, axis)
    parts = parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])
    return jax.lax.slice_in_dim(parts, 0, size, axis=axis)


def dot(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], out_dtype: jnp.dtype = jnp.float32, batch: int = 0
) -> jax.Array:
    """The product of a and b over one axis of each; float32 operands are not rounded on any device.

    Args:
        axes: the axis of `a` and that of `b` that are contracted.
        out_dtype: of the result.
        batch: number of leading axes that both have and that stay.
    """
    same = tuple(range(batch))
    dims = (((axes[0],), (axes[1],)), (same, same))
    return jax.lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=out_dtype)


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision of a product of operands of that dtype.

    float32 operands need HIGHEST: by default a TPU rounds them to bfloat16 first, and a GPU may round them to TF32.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
