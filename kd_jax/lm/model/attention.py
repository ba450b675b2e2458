"""Attention: among the positions of whole rows, and of new queries to a cache (kd_jax.lm.model.kv_cache).

Queries are [row, position, head, head_dim]; keys and values have fewer heads, each shared by the same number of
consecutive query heads. Softmax is float32 whatever the dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kd_jax import fused

KINDS = ("auto", "blocked", "xla", "cudnn")


def check(kind: str, dtype: str) -> None:
    """Raises ValueError where this kind of attention is unknown or cannot run here."""
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"attention 'cudnn' needs a GPU; this is {jax.default_backend()} (use 'auto')")
    if kind == "cudnn" and dtype == "float32":
        raise ValueError("attention 'cudnn' needs dtype bfloat16 or float16 (use 'auto' for float32)")


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, kind: str = "auto", block: int = 128
) -> jax.Array:
    """Attention of each position to itself and those before it, of its own segment -> [row, position, heads * width].

    Args:
        segments: [row, position], or None where a row is one segment.
        kind: "blocked" (blocks of so many queries, which skip what the causal mask hides), "xla" or "cudnn" (both are
            jax.nn.dot_product_attention), or "auto": cudnn on a GPU with a 16-bit dtype, else blocked.
    """
    if kind == "auto":
        kind = "cudnn" if jax.default_backend() == "gpu" and q.dtype != jnp.float32 else "blocked"
    if kind == "blocked":
        out = _blocked(q, k, v, segments, block)
    else:
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=kind)
    return out.reshape(*out.shape[:2], -1)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of new queries to what a cache holds up to their own positions -> [row, new, heads * width].

    Args:
        k: [row, kv head, head_dim, key].
        v: [row, kv head, key, head_dim].
        positions: [row, new], of the queries.
    """
    rows, new, heads, width = q.shape
    groups, length = k.shape[1], k.shape[-1]
    q = (q * width**-0.5).reshape(rows, new, groups, heads // groups, width)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    mask = (jnp.arange(length) <= positions[..., None])[:, None, None]  # [row, 1, 1, new, key]
    if new == 1:
        # a product and a sum: XLA's batched dot of so few queries is slower
        scores = (q[:, 0, ..., None].astype(jnp.float32) * k[:, :, None]).sum(axis=3)
        weights, total, _ = _softmax(_hide(scores, mask[:, :, :, 0]))
        out = ((weights / total)[..., None] * v[:, :, None]).sum(axis=3)
        return out.astype(q.dtype).reshape(rows, new, heads * width)
    weights, total, _ = _softmax(_hide(_einsum("rqghd,rgdk->rghqk", q, k), mask))
    out = _einsum("rghqk,rgkd->rghqd", weights.astype(v.dtype), v) / total
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype).reshape(rows, new, heads * width)


def paged(
    q: jax.Array, k: jax.Array, v: jax.Array, owner: jax.Array, visible: jax.Array, table: jax.Array
) -> jax.Array:
    """Attention of one new query for each slot to the pages it has -> [slot, heads * width].

    Each page answers its owner's query by itself; then the answers of a slot's pages are put together.

    Args:
        q: [slot, head, head_dim].
        k: [page, kv head, head_dim, key].
        v: [page, kv head, key, head_dim].
        owner: int [page], the slot of each page; of one that is free anything beyond.
        visible: bool [page, key].
        table: int [slot, order], the pages of each slot; the number of pages where there is none.
    """
    slots, heads, width = q.shape
    pages, groups = k.shape[:2]
    q = (q * width**-0.5).reshape(slots, groups, heads // groups, width)
    asked = _rows(apart(q), jnp.minimum(owner, slots - 1))
    scores = _einsum("pgqd,pgdk->pgqk", asked, k.astype(q.dtype))
    weights, total, top = _softmax(_hide(scores, visible[:, None, None]))
    out = _einsum("pgqk,pgkd->pgqd", weights.astype(q.dtype), v.astype(q.dtype))
    there = (table < pages)[:, :, None, None]
    total, top, out = (_rows(x, jnp.minimum(table, pages - 1)) for x in (total[..., 0], top[..., 0], out))
    share = jnp.where(there, jnp.exp(top - jnp.where(there, top, -jnp.inf).max(axis=1, keepdims=True)), 0)
    whole = (share * total).sum(axis=1, keepdims=True)
    share = share / jnp.where(whole > 0, whole, 1)  # a slot without pages gets zeros, not NaN
    # A product, not a sum: XLA's CPU code would work that out anew for each tile of the product that comes next.
    out = _einsum("sogq,sogqd->sgqd", share, out)
    return out.astype(q.dtype).reshape(slots, heads * width)


def apart(x: jax.Array, axis: int = 0) -> jax.Array:
    """x, as an array of its own on CPUs: XLA's code there would work it out anew wherever it is used.

    (It drops optimization barriers before it puts operations together, but leaves a scatter alone: along an axis that
    is not split over devices.)
    """

    def scattered(x):
        place = (slice(None),) * (axis % x.ndim) + (jnp.arange(x.shape[axis]),)
        return jnp.zeros_like(x).at[place].set(x)

    return jax.lax.platform_dependent(x, cpu=scattered, default=lambda x: x)


def _rows(x, index):
    # indices are in bounds: nothing has to be masked
    return x.at[index].get(mode="promise_in_bounds")


def _blocked(q, k, v, segments, block):
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    # [row, kv head, query head of it, position, head_dim]
    q = (q * width**-0.5).reshape(rows, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    out = _flash(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), segments, block)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segments, block):
    """Attention of scaled queries [row, kv head, query head of it, position, width] to k, v [row, kv head, width, key].

    Block by block of queries; nothing beyond a block is visible to it, so that is never computed. The backward pass
    makes the scores again (they are by far the largest thing to keep) and normalises them with what the forward pass
    found. Its products are written so that none contracts two axes at once, which XLA's CPU code transposes for.
    """
    return _flash_forward(q, k, v, segments, block)[0]


def _flash_forward(q, k, v, segments, block):
    outs, norms = [], []
    for start, stop in _blocks(q, block):
        weights, total, top = _softmax(_scores(q, k, segments, start, stop))
        out = _einsum("rgqk,rgdk->rgqd", weights.astype(v.dtype), v[..., :stop]) / total
        outs.append(_unmerge(out.astype(q.dtype), q))
        norms.append(_unmerge(jnp.log(total) + top, q))
    out = jnp.concatenate(outs, axis=3)
    return out, (q, k, v, segments, out, jnp.concatenate(norms, axis=3))


def _flash_backward(block, kept, out_gradient):
    q, k, v, segments, out, norm = kept
    # what the softmax's gradient subtracts from each row
    inner = (out.astype(jnp.float32) * out_gradient).sum(axis=-1, keepdims=True)
    q_gradients, k_gradient, v_gradient = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _blocks(q, block):
        weights = jnp.exp(_scores(q, k, segments, start, stop) - _merge(norm, start, stop))
        queries, gradient = _merge(q, start, stop), _merge(out_gradient, start, stop)
        change = _einsum("rgqd,rgdk->rgqk", gradient, v[..., :stop]) - _merge(inner, start, stop)
        change = (weights * change).astype(q.dtype)
        q_gradient = _einsum("rgqk,rgdk->rgqd", change, k[..., :stop])
        q_gradients.append(_unmerge(q_gradient.astype(q.dtype), q))
        k_gradient = k_gradient.at[..., :stop].add(_einsum("rgqk,rgqd->rgdk", change, queries))
        v_gradient = v_gradient.at[..., :stop].add(_einsum("rgqk,rgqd->rgdk", weights.astype(q.dtype), gradient))
    q_gradient = jnp.concatenate(q_gradients, axis=3)
    return q_gradient, k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None


_flash.defvjp(_flash_forward, _flash_backward)


def _blocks(q, block):
    length = q.shape[3]
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _merge(x, start, stop):
    """[row, kv head, query head, position, width] -> [row, kv head, query heads and positions of the block, width]"""
    x = x[:, :, :, start:stop]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unmerge(x, q):
    return x.reshape(*q.shape[:3], -1, x.shape[-1])


def _scores(q, k, segments, start, stop):
    """[row, kv head, query heads and positions of the block, key] of the keys before `stop`."""
    mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    if segments is not None:
        mask = mask & (segments[:, start:stop, None] == segments[:, None, :stop])[:, None, None]
    scores = _einsum("rgqd,rgdk->rgqk", _merge(q, start, stop), k[..., :stop])
    return _hide(_unmerge(scores, q), mask).reshape(scores.shape)


def _hide(scores, mask):
    # Added, not selected: XLA's CPU code is quicker with it. The number is out of the reach of scores, yet far from
    # the end of float32.
    return scores + jnp.where(mask, 0.0, -1e30)


def _softmax(scores):
    """Unnormalised weights, their sums and the scores' maxima. A row that sees nothing gets some weights, not NaN."""
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    return weights, weights.sum(axis=-1, keepdims=True), top


def _einsum(formula, a, b):
    return jnp.einsum(formula, a, b, precision=fused.precision(a.dtype), preferred_element_type=jnp.float32)
