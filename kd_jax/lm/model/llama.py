"""The Llama architecture: the pure functions that run it on its weights, which kd_jax.lm.model.architecture declares.

Linear weights are stored [out, in], as in the checkpoints: the products contract the last axis of both sides, which is
also the quicker layout for small batches on CPUs. Those of all layers lie stacked, [layer, out, in], and are scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import fused
from kd_jax.lm.model import attention, kv_cache
from kd_jax.lm.model.architecture import AXES, PRESETS, Architecture, abstract, init, logical_axes
from kd_jax.lm.model.kv_cache import Cache, Pages
from kd_jax.parallel import mesh as mesh_lib

__all__ = [
    "DEFAULT", "PRESETS", "Architecture", "Cache", "Compute", "Model", "Pages", "abstract", "empty_cache", "extend",
    "forward", "head", "init", "logical_axes", "logits", "unstack",
]  # fmt: skip


class Model(NamedTuple):
    """A model that can be scored, sampled and exported.

    Attributes:
        architecture: its shape.
        params: its weights; the tree is that of `abstract(architecture)`.
        eos_ids: ids that end a sequence; none for a model that never stops.
        bos_id: id that starts one, or None.
        pad_id: id that fills up a row, or None; never used to find out what is padding.
        tokenizer: a kd_jax.lm.weights.tokenizer.Tokenizer, or None.
    """

    architecture: Architecture
    params: dict[str, Any]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    tokenizer: Any = None

    @property
    def num_tokens(self) -> int:
        """How many ids are real; a checkpoint's vocabulary may be padded beyond its tokenizer's."""
        return self.architecture.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is run, apart from its weights; hashable, so that it can be static under jit.

    Attributes:
        dtype: of activations and products. Norms, rotary phases, softmax and logits are float32 whatever it is.
        attention, query_block: see kd_jax.lm.model.attention.causal.
        remat: recompute each layer in the backward pass instead of keeping its activations.
        mesh: what rows and weights are split over, if they are: then each device keeps its rows, and weights are
            gathered for them (see kd_jax.parallel.mesh). The programs that take a mesh put it in here.
        chunk_tokens: whose logits a device holds at a time; None for what suits it (kd_jax.fused.chunk_tokens).
    """

    dtype: str = "float32"
    attention: str = "auto"
    query_block: int = 128
    remat: bool = False
    mesh: Mesh | None = None
    chunk_tokens: int | None = None

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"compute dtype {self.dtype!r} is not float32, bfloat16 or float16")
        if self.query_block < 1:
            raise ValueError(f"query_block={self.query_block} must be at least 1")
        attention.check(self.attention, self.dtype)

    @property
    def chunk(self) -> int:
        """Tokens of all devices whose logits are held at a time."""
        return fused.chunk_tokens(self.mesh, self.chunk_tokens)


DEFAULT = Compute()


def empty_cache(architecture: Architecture, rows: int, length: int, dtype=jnp.float32) -> Cache:
    """A cache of zeros with room for `length` positions in each of `rows` rows."""
    a = architecture
    return kv_cache.empty(a.num_hidden_layers, rows, a.num_key_value_heads, a.head_dim, length, dtype)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The same weights with a tuple of layers in place of the stacked ones: what `extend` is quickest with.

    It is a copy. Taking a layer out of the stack at each step of decoding would copy it each time.
    """
    stacks = params["layers"]
    count = len(next(iter(stacks.values())))
    # by number: what lies on the devices of several processes cannot be gone through
    return {**params, "layers": tuple({name: stack[i] for name, stack in stacks.items()} for i in range(count))}


def forward(
    params: dict[str, Any], architecture: Architecture, tokens: jax.Array, *, positions: jax.Array | None = None,
    segments: jax.Array | None = None, compute: Compute = DEFAULT,
) -> jax.Array:  # fmt: skip
    """Hidden states [row, position, hidden_size] after the last norm; multiply by the head for logits.

    Args:
        tokens: ids [row, position].
        positions: [row, position], by default 0, 1, 2, ... in each row.
        segments: [row, position]; a position attends only to earlier ones of its own segment. Several sequences packed
            in a row have a segment each; left padding has one of its own. By default a row is one segment, which is
            right for right padding too: nothing attends to what comes after it.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    phases = _phases(positions, architecture)
    # The lookup's gradient is summed up in the weights' own dtype, and on each device first (which `constrain` is for:
    # else the gradients of all rows are sent to wherever a piece of the width lies).
    embedding = mesh_lib.gather(params["embedding"], ("vocab", "embed"), compute.mesh)
    embedding = mesh_lib.constrain(embedding, ("vocab", None), compute.mesh)
    x = _rows(embedding[tokens].astype(compute.dtype), compute)

    def attend(q, k, v):
        return attention.causal(q, k, v, segments, compute.attention, compute.query_block)

    def layer(x, w):
        q, k, v = _project(w, x, phases, architecture, compute)
        x = x + _out(w, attend(q, k, v), compute)
        return _rows(_mlp(w, x, architecture, compute), compute), None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if compute.remat else layer, x, params["layers"])
    return _norm(x, params["norm"], architecture, compute)


def extend(
    params: dict[str, Any], architecture: Architecture, cache: Cache | Pages, tokens: jax.Array,
    positions: jax.Array, *, compute: Compute = DEFAULT,
) -> tuple[jax.Array, Cache | Pages]:  # fmt: skip
    """Runs new tokens of each row against the cache, and writes them into it.

    A step of decoding is the case of one token a row, prefill that of many; a long prompt can come in pieces.

    Args:
        params: as they are, or from `unstack`.
        cache: of the rows; positions that were never written are not looked at, as long as each row's positions come
            in order. Pages take one token a row.
        tokens, positions: [row, new]. A position outside the cache (padding: give it the cache's length) is not
            written and its hidden state means nothing.
    Returns: hidden states [row, new, hidden_size] and the cache, in place if it is donated.
    """
    layers = params["layers"] if isinstance(params["layers"], tuple) else unstack(params)["layers"]
    phases = jax.tree.map(functools.partial(attention.apart, axis=-1), _phases(positions, architecture))
    x = _rows(params["embedding"][tokens].astype(compute.dtype), compute)
    keys, values = list(cache.keys), list(cache.values)
    for i, w in enumerate(layers):
        one = cache._replace(keys=(keys[i],), values=(values[i],))
        x, keys[i], values[i] = _extend_layer(w, x, one, positions, phases, architecture, compute)
    return _norm(x, params["norm"], architecture, compute), cache._replace(keys=tuple(keys), values=tuple(values))


# Jitted so that it is traced once for all layers; XLA gets the same program.
@functools.partial(jax.jit, static_argnums=(5, 6))
def _extend_layer(w, x, cache, positions, phases, architecture, compute):
    """Of a cache of one layer -> the layer's output, its keys and values."""
    q, k, v = _project(w, x, phases, architecture, compute)
    keys, values, seen = cache.attend(0, q, k, v, positions)
    x = x + _out(w, seen, compute)
    return _rows(_mlp(w, x, architecture, compute), compute), keys, values


def head(params: dict[str, Any]) -> jax.Array:
    """The output projection [vocab, hidden_size]: the embedding where they are tied."""
    return params.get("head", params["embedding"])


def logits(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """float32 logits [..., vocab] of hidden states [..., hidden_size]."""
    return fused.project(hidden, head(params))


def _rows(x, compute):
    """Activations [row, position, width] stay where their rows are."""
    return mesh_lib.constrain(x, ("batch", None, None), compute.mesh)


def _linear(x, w, name, compute):
    """x [..., in] times a layer's weight [out, in] -> [..., out]"""
    weight = mesh_lib.gather(w[name].astype(compute.dtype), AXES[name], compute.mesh)
    # One leading axis: the weight's gradient would contract several, for which XLA's CPU code transposes both sides.
    out = fused.dot(x.reshape(-1, x.shape[-1]), weight, (1, 1), out_dtype=compute.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _norm(x, gain, architecture, compute):
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + architecture.rms_norm_eps)
    gain = mesh_lib.gather(gain.astype(jnp.float32), ("embed",), compute.mesh)
    return (x * gain).astype(compute.dtype)


def _phases(positions, architecture):
    """cos and sin [row, position, 1, head_dim / 2] of the rotary embedding, in float32."""
    half = architecture.head_dim // 2
    inverse = architecture.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, phases):
    cos, sin = phases
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# Checkpointed: what lies between the products (norms, SwiGLU) is cheaper to make again in the backward pass than to
# keep, and a weight that fsdp splits is gathered again. The products themselves are not made again, as nothing there
# needs what comes out of these functions.


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _project(w, x, phases, architecture, compute):
    """Rotated queries [row, position, head, head_dim], rotated keys and values (with their fewer heads)."""
    a = architecture
    h = _norm(x, w["attention_norm"], a, compute)
    q = _linear(h, w, "q", compute).reshape(*x.shape[:2], a.num_attention_heads, a.head_dim)
    k = _linear(h, w, "k", compute).reshape(*x.shape[:2], a.num_key_value_heads, a.head_dim)
    v = _linear(h, w, "v", compute).reshape(*x.shape[:2], a.num_key_value_heads, a.head_dim)
    return _rotate(q, phases), _rotate(k, phases), v


@functools.partial(jax.checkpoint, static_argnums=2)
def _out(w, x, compute):
    return _linear(x, w, "o", compute)


def _mlp(w, x, architecture, compute):
    gate, up = _gate_up(w, x, architecture, compute)
    return x + _down(w, gate, up, compute)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _gate_up(w, x, architecture, compute):
    h = _norm(x, w["mlp_norm"], architecture, compute)
    return _linear(h, w, "gate", compute), _linear(h, w, "up", compute)


@functools.partial(jax.checkpoint, static_argnums=3)
def _down(w, gate, up, compute):
    return _linear(jax.nn.silu(gate) * up, w, "down", compute)
