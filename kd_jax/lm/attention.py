"""Attention: among the positions of whole rows, and of new queries to a cache.

Queries are [row, position, head, head_dim]; keys and values have fewer heads, each shared by the same number of
consecutive query heads. Softmax is float32 whatever the dtype.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

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
        weights, total = _softmax(scores, mask[:, :, :, 0])
        out = ((weights / total)[..., None] * v[:, :, None]).sum(axis=3)
        return out.astype(q.dtype).reshape(rows, new, heads * width)
    weights, total = _softmax(_einsum("rqghd,rgdk->rghqk", q, k), mask)
    out = _einsum("rghqk,rgkd->rghqd", weights.astype(v.dtype), v) / total
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype).reshape(rows, new, heads * width)


def _blocked(q, k, v, segments, block):
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    # [row, kv head, query head of it, position, head_dim]
    q = (q * width**-0.5).reshape(rows, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)

    @functools.partial(jax.checkpoint, static_argnums=(0, 1))  # the scores are by far the largest thing to keep
    def one(start, stop):
        # nothing beyond `stop` is visible to these queries, so it is never computed
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        if segments is not None:
            mask = mask & (segments[:, start:stop, None] == segments[:, None, :stop])[:, None, None]
        scores = _einsum("rghqd,rgkd->rghqk", q[:, :, :, start:stop], k[:, :, :stop])
        weights, total = _softmax(scores, mask)
        out = _einsum("rghqk,rgdk->rghqd", weights.astype(v.dtype), v[..., :stop]) / total
        return out.astype(q.dtype)

    out = jnp.concatenate([one(i, min(i + block, length)) for i in range(0, length, block)], axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


def _softmax(scores, mask):
    """Unnormalised weights and their sums. A row that sees nothing gets some weights, not NaN."""
    # Added, not selected: XLA's CPU code is quicker with it. The number is out of the reach of scores, yet far from
    # the end of float32.
    scores = scores + jnp.where(mask, 0.0, -1e30)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights, weights.sum(axis=-1, keepdims=True)


def _einsum(formula, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, precision=precision, preferred_element_type=jnp.float32)
