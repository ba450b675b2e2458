"""Attention: among the positions of whole rows, and of new queries to a cache (kd_jax.lm.model.kv_cache).

Queries are [row, position, head, head_dim]; keys and values have fewer heads, each shared by the same number of
consecutive query heads (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245). Softmax is always float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm.model import splash

KINDS = ("auto", "blocked", "xla", "cudnn", "splash")


class Rule(NamedTuple):
    """How the scores of a layer are made; static under jit.

    Attributes:
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        softcap: scores become cap * tanh(score / cap); None for no cap.
        window: a position attends to so many positions, itself included; None for all before it.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def scaled(self, q: jax.Array) -> jax.Array:
        """Queries times the scale: there are fewer of them than scores."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scores of any shape under the soft cap, if there is one."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Whether a query's position attends to a key's position, by the causal mask and the window.

        Args:
            queries, keys: positions, of shapes that broadcast.
        """
        mask = keys <= queries
        return mask if self.window is None else mask & (keys > queries - self.window)


LLAMA = Rule()


def check(kind: str, dtype: str) -> None:
    """Raises ValueError where this kind of attention is unknown or cannot run here.

    Args:
        kind: one of KINDS.
        dtype: of the activations.
    """
    if kind not in KINDS:
        raise ValueError(f"attention {kind!r} is not one of {', '.join(KINDS)}")
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(kind)
    if needed is not None and (jax.default_backend() != needed or dtype == "float32"):
        raise ValueError(f"attention {kind!r} needs a {needed.upper()} and dtype bfloat16 or float16 (use 'auto')")


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, kind: str = "auto", block: int = 128,
    rule: Rule = LLAMA, mesh: Mesh | None = None,
) -> jax.Array:  # fmt: skip
    """Attention of each position to itself and those before it, of its own segment and within the window.

    Args:
        q: [row, position, head, head_dim].
        k, v: [row, position, kv head, head_dim].
        segments: [row, position], or None where a row is one segment. The positions of a segment are neighbours, so the
            window is counted along the row.
        kind: "blocked" (blocks of queries, each with the keys that its mask lets through), "xla" or "cudnn" (both are
            jax.nn.dot_product_attention), "splash" (kd_jax.lm.model.splash), or "auto": with a 16-bit dtype splash on a
            TPU, and cudnn on a GPU for the shapes that it takes, else blocked. With a soft cap "xla" and "cudnn" are
            "blocked", as dot_product_attention has none.
        block: queries of a block.
        rule: how the scores are made.
        mesh: what rows and heads are split over; "splash" has to know it.
    Returns: [row, position, head * head_dim].
    """
    if kind == "auto":
        kind = _best(q, segments)
    if kind == "splash":
        out = splash.attend(rule.scaled(q), k, v, segments, softcap=rule.softcap, window=rule.window, mesh=mesh)
    elif kind == "blocked" or rule.softcap is not None:
        out = _blocked(q, k, v, segments, block, rule)
    else:
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        # The library's window does not count the position itself; none of the right, by the causal mask.
        window = None if rule.window is None else (rule.window - 1, 0)
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, scale=rule.scale, local_window_size=window, implementation=kind
        )
    return out.reshape(*out.shape[:2], -1)


def _best(q: jax.Array, segments: jax.Array | None) -> str:
    # The kernels round float32 factors.
    backend = "cpu" if q.dtype == jnp.float32 else jax.default_backend()
    # What cuDNN takes on every GPU; of an odd number of positions it has no gradient beside a mask.
    length, width = q.shape[1], q.shape[3]
    if backend == "gpu" and width % 8 == 0 and width <= 128 and (segments is None or length % 2 == 0):
        return "cudnn"
    return "splash" if backend == "tpu" else "blocked"


def cached(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, rule: Rule = LLAMA) -> jax.Array:
    """Attention of new queries to what a cache has up to their own positions.

    Args:
        q: [row, new, head, head_dim].
        k: [row, kv head, head_dim, key].
        v: [row, kv head, key, head_dim].
        positions: [row, new], of the queries.
    Returns: [row, new, head * head_dim].
    """
    rows, new, heads, width = q.shape
    groups, length = k.shape[1], k.shape[-1]
    # Query heads by the KV head that they share: keys are not repeated for each of them.
    q = rule.scaled(q).reshape(rows, new, groups, heads // groups, width)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    mask = rule.visible(positions[..., None], jnp.arange(length))[:, None, None]  # [row, 1, 1, new, key]
    if new == 1:
        # a product and a sum: XLA's batched dot of so few queries is slower
        scores = rule.capped((q[:, 0, ..., None].astype(jnp.float32) * k[:, :, None]).sum(axis=3))
        weights, total, _ = _softmax(_hide(scores, mask[:, :, :, 0]))
        out = ((weights / total)[..., None] * v[:, :, None]).sum(axis=3)
        return out.astype(q.dtype).reshape(rows, new, heads * width)
    # Scores and softmax in float32; the weights then take the values' dtype, so that the second product is as fast as
    # the first.
    weights, total, _ = _softmax(_hide(rule.capped(_einsum("rqghd,rgdk->rghqk", q, k)), mask))
    # Divided after the product: there are fewer outputs than weights.
    out = _einsum("rghqk,rgkd->rghqd", weights.astype(v.dtype), v) / total
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype).reshape(rows, new, heads * width)


def paged(
    q: jax.Array, k: jax.Array, v: jax.Array, owner: jax.Array, visible: jax.Array, table: jax.Array,
    rule: Rule = LLAMA,
) -> jax.Array:  # fmt: skip
    """Attention of one new query for each slot to the pages it has.

    Each page answers its owner's query alone; then the answers of a slot's pages are combined by their softmax sums.
    JAX's own kernels for this do not fit: the one for TPUs does not lower for heads of 64 dimensions, as all sizes of
    SmolLM2 have them; those for GPUs are deprecated; and neither has a window.

    Args:
        q: [slot, head, head_dim].
        k: [page, kv head, head_dim, key].
        v: [page, kv head, key, head_dim].
        owner: int [page], the slot of each page; the number of slots or more for a free page.
        visible: bool [page, key].
        table: int [slot, order], the pages of each slot; the number of pages where there is none.
    Returns: [slot, head * head_dim].
    """
    slots, heads, width = q.shape
    pages, groups = k.shape[:2]
    q = rule.scaled(q).reshape(slots, groups, heads // groups, width)
    # Each page takes its owner's query. Stored first, since XLA would fuse the projection into the gather and compute
    # a query again for each page.
    queries = _rows(apart(q), jnp.minimum(owner, slots - 1))
    scores = rule.capped(_einsum("pgqd,pgdk->pgqk", queries, k.astype(q.dtype)))
    weights, total, top = _softmax(_hide(scores, visible[:, None, None]))
    out = _einsum("pgqk,pgkd->pgqd", weights.astype(q.dtype), v.astype(q.dtype))
    # Where a slot has no page, some page is gathered below; its share of the answer is 0.
    exists = (table < pages)[:, :, None, None]
    total, top, out = (_rows(x, jnp.minimum(table, pages - 1)) for x in (total[..., 0], top[..., 0], out))
    # Pages were shifted by their own largest scores; a common shift, the slot's largest, makes their sums comparable.
    share = jnp.where(exists, jnp.exp(top - jnp.where(exists, top, -jnp.inf).max(axis=1, keepdims=True)), 0)
    whole = (share * total).sum(axis=1, keepdims=True)
    share = share / jnp.where(whole > 0, whole, 1)  # a slot without pages gets zeros, not NaN
    # A product, not a sum: XLA's CPU code would compute the sum again for each tile of the product that comes next.
    out = _einsum("sogq,sogqd->sgqd", share, out)
    return out.astype(q.dtype).reshape(slots, heads * width)


def apart(x: jax.Array, axis: int = 0) -> jax.Array:
    """x unchanged, but on CPUs stored in an array of its own: XLA would recompute it wherever it is used.

    XLA's CPU compiler drops optimization barriers before it fuses operations, but leaves a scatter alone (along an axis
    that is not split over devices).
    """

    def scattered(x):
        place = (slice(None),) * (axis % x.ndim) + (jnp.arange(x.shape[axis]),)
        return jnp.zeros_like(x).at[place].set(x)

    return jax.lax.platform_dependent(x, cpu=scattered, default=lambda x: x)


def _rows(x, index):
    # indices are in bounds: nothing has to be masked
    return x.at[index].get(mode="promise_in_bounds")


def _blocked(q, k, v, segments, block, rule):
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    # [row, kv head, query head of it, position, head_dim]
    q = rule.scaled(q).reshape(rows, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    out = _flash(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), segments, block, rule)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


class _Block(NamedTuple):
    """Queries `start` to `stop`, and the first key that any of them attends to."""

    start: int
    stop: int
    first: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q, k, v, segments, block, rule):
    """Attention of scaled queries [row, kv head, query head of it, position, width] to k, v [row, kv head, width, key].

    Block by block of queries (Dao et al. 2022, arXiv 2205.14135): keys beyond a block, or before its window, are never
    multiplied. The backward pass recomputes the scores, by far the largest arrays to keep, and normalises them with the
    forward pass's log-sum-exp. No product contracts two axes at once: XLA's CPU code would transpose both sides for it.
    """
    return _flash_forward(q, k, v, segments, block, rule)[0]


def _flash_forward(q, k, v, segments, block, rule):
    outs, norms = [], []
    # A Python loop, not a scan: each block has another number of keys, and none beyond its last query is multiplied.
    for b in _blocks(q, block, rule):
        weights, total, top = _softmax(_scores(q, k, segments, b, rule)[0])
        out = _einsum("rgqk,rgdk->rgqd", weights.astype(v.dtype), v[..., b.first : b.stop]) / total
        outs.append(_unmerge(out.astype(q.dtype), q))
        norms.append(_unmerge(jnp.log(total) + top, q))
    out = jnp.concatenate(outs, axis=3)
    # What the backward pass needs: inputs, outputs and one number a query, but no scores.
    return out, (q, k, v, segments, out, jnp.concatenate(norms, axis=3))


def _flash_backward(block, rule, kept, out_gradient):
    q, k, v, segments, out, norm = kept
    # The softmax's gradient is weights * (change - sum(weights * change)); this is that sum, from the outputs alone.
    inner = (out.astype(jnp.float32) * out_gradient).sum(axis=-1, keepdims=True)
    # float32 sums: a key gathers gradients from every block of queries that sees it.
    q_gradients, k_gradient, v_gradient = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for b in _blocks(q, block, rule):
        scores, slope = _scores(q, k, segments, b, rule)
        # The forward pass's log-sum-exp normalises the weights at once: neither maxima nor sums are taken again.
        weights = jnp.exp(scores - _merge(norm, b))
        queries, gradient = _merge(q, b), _merge(out_gradient, b)
        change = _einsum("rgqd,rgdk->rgqk", gradient, v[..., b.first : b.stop]) - _merge(inner, b)
        change = weights * change
        # Through the soft cap, and into the dtype of the products that follow.
        change = (change if slope is None else change * slope).astype(q.dtype)
        q_gradient = _einsum("rgqk,rgdk->rgqd", change, k[..., b.first : b.stop])
        q_gradients.append(_unmerge(q_gradient.astype(q.dtype), q))
        k_gradient = k_gradient.at[..., b.first : b.stop].add(_einsum("rgqk,rgqd->rgdk", change, queries))
        v_gradient = v_gradient.at[..., b.first : b.stop].add(
            _einsum("rgqk,rgqd->rgdk", weights.astype(q.dtype), gradient)
        )
    q_gradient = jnp.concatenate(q_gradients, axis=3)
    return q_gradient, k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None


_flash.defvjp(_flash_forward, _flash_backward)


def _blocks(q, block, rule):
    length, window = q.shape[3], rule.window or q.shape[3]
    starts = range(0, length, block)
    return [_Block(start, min(start + block, length), max(0, start - window + 1)) for start in starts]


def _merge(x, b):
    """[row, kv head, query head, position, width] -> [row, kv head, query heads and positions of the block, width]"""
    # The query heads of a KV head see the same keys: with them as rows, a block is one product for each KV head.
    x = x[:, :, :, b.start : b.stop]
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unmerge(x, q):
    return x.reshape(*q.shape[:3], -1, x.shape[-1])


def _scores(q, k, segments, b, rule):
    """Scores [row, kv head, query heads and positions of the block, key of the block], and the soft cap's slope."""
    # Positions in the row serve for the mask, also of packed rows: a segment's positions are neighbours.
    mask = rule.visible(jnp.arange(b.start, b.stop)[:, None], jnp.arange(b.first, b.stop))
    if segments is not None:
        same = segments[:, b.start : b.stop, None] == segments[:, None, b.first : b.stop]
        mask = mask & same[:, None, None]
    scores = rule.capped(_einsum("rgqd,rgdk->rgqk", _merge(q, b), k[..., b.first : b.stop]))
    # of cap * tanh(x / cap): 1 - tanh(x / cap)^2
    slope = None if rule.softcap is None else 1 - (scores / rule.softcap) ** 2
    return _hide(_unmerge(scores, q), mask).reshape(scores.shape), slope


def _hide(scores, mask):
    # Added, not selected: XLA's CPU code is faster. The number is beyond any score, yet far from float32's end.
    return scores + jnp.where(mask, 0.0, -1e30)


def _softmax(scores):
    """Unnormalised weights, their sums and the scores' maxima. A row that sees nothing gets some weights, not NaN."""
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    return weights, weights.sum(axis=-1, keepdims=True), top


def _einsum(formula, a, b):
    # Sums are float32 also where the factors are bfloat16: scores and softmax need the digits.
    return jnp.einsum(formula, a, b, precision=fused.precision(a.dtype), preferred_element_type=jnp.float32)
