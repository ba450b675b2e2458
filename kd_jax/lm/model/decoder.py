"""The decoder: pure functions that run an architecture on its weights, which kd_jax.lm.model.architecture declares.

Every family of models goes through these functions; what differs are settings of the Architecture and which weights
exist. Linear weights are stored [out, in], as in the checkpoints. Layers are stacked, [layer, out, in], and scanned.

Inside a layer, activations are [row, position, width], or "columns", [width, row, position], on a CPU without a mesh:
its products are faster with the weights as the left factor, by a third for a few tokens and a tenth for thousands.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm.model import attention, kv_cache, rotary
from kd_jax.lm.model.architecture import AXES, Architecture, LayerKind, unstack
from kd_jax.lm.model.kv_cache import Cache, Pages
from kd_jax.parallel import mesh as mesh_lib

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is run, apart from its weights; hashable, so that it can be static under jit.

    Attributes:
        dtype: of activations and products. Norms, rotary phases, softmax and logits are float32 whatever it is.
        attention, query_block: see kd_jax.lm.model.attention.causal.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        mesh: the mesh that rows and weights are split over, or None. Each device keeps its rows, and weights are
            gathered for them (see kd_jax.parallel.mesh). The programs that take a mesh set it here.
        chunk_tokens: how many tokens' logits a device holds at a time; None for the default of its kind
            (kd_jax.fused.chunk_tokens).
        columns: whether activations inside a layer are [width, row, position]; by default on a CPU. Never with a mesh.
    """

    dtype: str = "float32"
    attention: str = "auto"
    query_block: int = 64
    remat: bool = False
    mesh: Mesh | None = None
    chunk_tokens: int | None = None
    columns: bool | None = None

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"compute dtype {self.dtype!r} is not float32, bfloat16 or float16")
        if self.query_block < 1:
            raise ValueError(f"query_block={self.query_block} must be at least 1")
        attention.check(self.attention, self.dtype)

    @property
    def in_columns(self) -> bool:
        """Whether activations are columns, with the default decided."""
        wanted = jax.default_backend() == "cpu" if self.columns is None else self.columns
        return wanted and self.mesh is None

    @property
    def chunk(self) -> int:
        """How many tokens' logits all devices together hold at a time."""
        return fused.chunk_tokens(self.mesh, self.chunk_tokens)


DEFAULT = Compute()


def empty_cache(architecture: Architecture, rows: int, length: int, dtype=jnp.float32) -> Cache:
    """A cache of zeros with room for `length` positions in each of `rows` rows."""
    a = architecture
    return kv_cache.empty(a.num_hidden_layers, rows, a.num_key_value_heads, a.head_dim, length, dtype)


def forward(
    params: dict[str, Any], architecture: Architecture, tokens: jax.Array, *, positions: jax.Array | None = None,
    segments: jax.Array | None = None, compute: Compute = DEFAULT,
) -> jax.Array:  # fmt: skip
    """Hidden states after the last norm; see `logits` for what follows.

    Args:
        params: the weights, as in `abstract(architecture)`; adapters of kd_jax.lm.model.lora may be among them.
        tokens: ids [row, position].
        positions: [row, position], by default 0, 1, 2, ... in each row.
        segments: [row, position]; a position attends only to earlier ones of its own segment. Sequences packed into a
            row have a segment each; left padding has one of its own. By default a row is one segment, which is right
            for right padding too: nothing attends to what comes after it.
    Returns: [row, position, hidden_size] in the compute dtype.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # The lookup's gradient is summed in the weights' own dtype, and on each device first: without `constrain` the
    # gradients of all rows would be sent to wherever a piece of the width lies.
    embedding = mesh_lib.gather(params["embedding"], ("vocab", "embed"), compute.mesh)
    embedding = mesh_lib.constrain(embedding, ("vocab", None), compute.mesh)
    x = _embed(embedding, tokens, architecture, compute)
    phases = _phases(positions, architecture)
    kinds = architecture.layer_kinds
    period = _period(kinds)

    def layer(x, w, kind):
        def attend(q, k, v):
            rule = _rule(architecture, kind)
            out = attention.causal(q, k, v, segments, compute.attention, compute.query_block, rule, compute.mesh)
            return (out,)

        return _layer(w, x, phases[kind.rotary], attend, architecture, compute)[0]

    if compute.remat:
        layer = jax.checkpoint(layer, static_argnums=2)

    def repeat(x, weights):
        """The layers of one period of the pattern of kinds, each compiled for its own kind."""
        for i in range(period):
            x = layer(x, weights if period == 1 else jax.tree.map(lambda stack, i=i: stack[i], weights), kinds[i])
        return x, None

    # Layers beyond the last whole period follow the scan one by one.
    stacks, whole = params["layers"], len(kinds) // period * period
    if period > 1:
        scanned = jax.tree.map(lambda s: s[:whole].reshape(-1, period, *s.shape[1:]), stacks)
    # Scanned: XLA compiles one period of layers, however many layers there are.
    x, _ = jax.lax.scan(repeat, x, stacks if period == 1 else scanned)
    for i in range(whole, len(kinds)):
        x = layer(x, jax.tree.map(lambda stack, i=i: stack[i], stacks), kinds[i])
    return _last_norm(params, x, architecture, compute)


def extend(
    params: dict[str, Any], architecture: Architecture, cache: Cache | Pages, tokens: jax.Array,
    positions: jax.Array, *, compute: Compute = DEFAULT,
) -> tuple[jax.Array, Cache | Pages]:  # fmt: skip
    """Runs new tokens of each row against the cache, and writes them into it.

    One token a row is a step of decoding, several are prefill; a long prompt can come in pieces.

    Args:
        params: as they are, or from `unstack`.
        cache: of the rows; positions that were never written are not looked at, as long as each row's positions come
            in order. Pages take one token a row.
        tokens, positions: [row, new]. A position outside the cache (for padding: the cache's length) is not written and
            its hidden state means nothing.
    Returns: hidden states [row, new, hidden_size] and the cache, in place if it is donated.
    """
    layers = params["layers"] if isinstance(params["layers"], tuple) else unstack(params)["layers"]
    # Stored once (see `apart`): XLA would fuse cos and sin into every layer and compute them again in each.
    phases = jax.tree.map(functools.partial(attention.apart, axis=-1), _phases(positions, architecture))
    x = _embed(params["embedding"], tokens, architecture, compute)
    keys, values = list(cache.keys), list(cache.values)
    for i, (w, kind) in enumerate(zip(layers, architecture.layer_kinds, strict=True)):
        one = cache._replace(keys=(keys[i],), values=(values[i],))
        x, keys[i], values[i] = _extend_layer(w, x, one, positions, phases[kind.rotary], kind, architecture, compute)
    cache = cache._replace(keys=tuple(keys), values=tuple(values))
    return _last_norm(params, x, architecture, compute), cache


# Jitted so that it is traced once for all layers of a kind; XLA gets the same program.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _extend_layer(w, x, cache, positions, phases, kind, architecture, compute):
    """The layer's output, keys and values, for a cache of one layer."""

    def attend(q, k, v):
        keys, values, out = cache.attend(0, q, k, v, positions, _rule(architecture, kind))
        return out, keys, values

    return _layer(w, x, phases, attend, architecture, compute)


def head(params: dict[str, Any]) -> jax.Array:
    """The output projection [vocab, hidden_size]: the embedding where they are tied."""
    return params.get("head", params["embedding"])


def logits(params: dict[str, Any], architecture: Architecture, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden_size]."""
    return fused.project(hidden, head(params), softcap=architecture.logit_softcap)


def _period(kinds: tuple[LayerKind, ...]) -> int:
    """The shortest period of the pattern of layers."""
    periods = range(1, len(kinds) + 1)
    return next(p for p in periods if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def _rule(architecture: Architecture, kind: LayerKind) -> attention.Rule:
    return attention.Rule(architecture.attention_scale, architecture.attention_softcap, kind.window)


def _phases(positions, architecture):
    """cos and sin of each kind of rotary phases that the layers have, by its name; None for none."""
    a = architecture
    each = {
        "global": lambda: rotary.phases(positions, a.rope_theta, a.rotated, a.rope_scaling),
        "local": lambda: rotary.phases(positions, a.local_rope_theta, a.rotated, None),
        "none": lambda: None,
    }
    return {name: each[name]() for name in sorted({kind.rotary for kind in a.layer_kinds})}


def _embed(embedding, tokens, architecture, compute):
    x = embedding[tokens].astype(compute.dtype)
    # a Python number has no dtype of its own: in bfloat16 it is rounded to it, as the published models do
    x = x if architecture.embedding_multiplier == 1 else x * architecture.embedding_multiplier
    return _rows(_turn(x, compute), compute)


def _turn(x, compute):
    """Activations [row, position, width] in the order that they have inside a layer."""
    return x.transpose(2, 0, 1) if compute.in_columns else x


def _last_norm(params, x, architecture, compute):
    x = x.transpose(1, 2, 0) if compute.in_columns else x
    x = _norm(x, params["norm"], ("embed",), architecture, compute)
    return x if architecture.logits_divisor == 1 else x / architecture.logits_divisor


def _rows(x, compute):
    """Activations stay on the devices of their rows. Columns are on one device."""
    return mesh_lib.constrain(x, ("batch", None, None), compute.mesh)


def _layer(w, x, phases, attend, architecture, compute):
    """(the layer's output, what `attend` returns beside the attention's).

    Args:
        w: the layer's weights.
        x: [row, position, hidden_size], or columns.
        attend: from queries, keys and values to ([row, position, head * head_dim], ...).
    """
    q, k, v = _project(w, x, phases, architecture, compute)
    if architecture.query_key_norm != "none":
        q, k = _norm_and_rotate(w, q, k, phases, architecture, compute)
    out, *more = attend(q, k, v)
    x = _add(w, x, _out(w, _turn(out, compute), compute), "post_attention_norm", architecture, compute)
    gate, up = _gate_up(w, x, architecture, compute)
    x = _add(w, x, _down(w, gate, up, architecture, compute), "post_mlp_norm", architecture, compute)
    return _rows(x, compute), *more


def _linear(x, w, name, compute):
    """x times a layer's weight [out, in], with its bias and its adapter where they exist.

    Args:
        x: [..., in], or columns [in, ...].
    Returns: [..., out], or columns [out, ...].
    """
    columns = compute.in_columns

    def product(x, weight):
        a, b, axes = (weight, x, (1, 0)) if columns else (x, weight, (1, 1))
        return fused.dot(a, b, axes, out_dtype=compute.dtype)

    weight = mesh_lib.gather(w[name].astype(compute.dtype), AXES[name], compute.mesh)
    # One axis of tokens: the weight's gradient would contract several, for which XLA's CPU code transposes both sides.
    flat = x.reshape(len(x), -1) if columns else x.reshape(-1, x.shape[-1])
    out = product(flat, weight)
    if f"{name}_bias" in w:
        bias = w[f"{name}_bias"].astype(compute.dtype)
        out = out + (bias[:, None] if columns else bias)
    if f"{name}_lora_a" in w:  # see kd_jax.lm.model.lora
        for half, axes in (("a", (None, AXES[name][1])), ("b", (AXES[name][0], None))):
            flat = product(flat, mesh_lib.gather(w[f"{name}_lora_{half}"].astype(compute.dtype), axes, compute.mesh))
        out = out + flat
    return out.reshape(-1, *x.shape[1:]) if columns else out.reshape(*x.shape[:-1], -1)


def _norm(x, gain, axes, architecture, compute, columns=False):
    """RMS norm of the width (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=0 if columns else -1, keepdims=True) + architecture.rms_norm_eps)
    gain = mesh_lib.gather(gain.astype(jnp.float32), axes, compute.mesh)
    gain = 1 + gain if architecture.unit_offset_gain else gain
    return (x * (gain[:, None, None] if columns else gain)).astype(compute.dtype)


def _norm_if(w, x, name, architecture, compute):
    return _norm(x, w[name], AXES[name], architecture, compute, compute.in_columns) if name in w else x


# Checkpointed: what lies between the products (norms, rotation, the gated activation) is cheaper to recompute in the
# backward pass than to keep, and a weight that fsdp splits is gathered again. The products themselves are not
# recomputed, as nothing in these functions needs their results: a norm of a product's result is in another function.


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _project(w, x, phases, architecture, compute):
    """Queries [row, position, head, head_dim], keys, values (with fewer heads); rotated unless normed first."""
    a = architecture
    h = _norm_if(w, x, "attention_norm", a, compute)
    q = _heads(_linear(h, w, "q", compute), a.num_attention_heads, compute)
    k = _heads(_linear(h, w, "k", compute), a.num_key_value_heads, compute)
    v = _heads(_linear(h, w, "v", compute), a.num_key_value_heads, compute)
    return (*(_rotate(q, k, phases) if a.query_key_norm == "none" else (q, k)), v)


def _heads(x, count, compute):
    """[row, position, head, head_dim] of a product's result."""
    if compute.in_columns:
        return x.reshape(count, -1, *x.shape[1:]).transpose(2, 3, 0, 1)
    return x.reshape(*x.shape[:2], count, -1)


@functools.partial(jax.checkpoint, static_argnums=(4, 5))
def _norm_and_rotate(w, q, k, phases, architecture, compute):
    """Queries and keys with norms of their own: these need the products' results, which must not be recomputed."""
    whole = architecture.query_key_norm == "width"

    def norm(x, name):
        flat = x.reshape(*x.shape[:2], -1) if whole else x
        return _norm(flat, w[name], AXES[name], architecture, compute).reshape(x.shape)

    return _rotate(norm(q, "q_norm"), norm(k, "k_norm"), phases)


def _rotate(q, k, phases):
    return (q, k) if phases is None else (rotary.rotate(q, *phases), rotary.rotate(k, *phases))


@functools.partial(jax.checkpoint, static_argnums=2)
def _out(w, x, compute):
    return _linear(x, w, "o", compute)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _gate_up(w, x, architecture, compute):
    h = _norm_if(w, x, "mlp_norm", architecture, compute)
    return _linear(h, w, "gate", compute), _linear(h, w, "up", compute)


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _down(w, gate, up, architecture, compute):
    return _linear(_ACTIVATIONS[architecture.activation](gate) * up, w, "down", compute)


def _add(w, x, change, norm, architecture, compute):
    """x plus what attention or MLP changes, normed and scaled where the architecture says so."""
    # checkpointed by itself: the norm needs the product's result
    norm_change = jax.checkpoint(_norm_if, static_argnums=(2, 3, 4))
    change = norm_change(w, change, norm, architecture, compute) if norm in w else change
    return x + (change if architecture.residual_multiplier == 1 else change * architecture.residual_multiplier)
