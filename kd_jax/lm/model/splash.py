"""Attention by the kernel for TPUs that comes with JAX: splash attention, a form of flash attention (arXiv 2205.14135).

Scores stay on the chip, and blocks that the mask hides are skipped. The kernel knows segments, windows, soft caps and
grouped queries, and has its own backward pass. (jax.experimental.pallas.ops.tpu.splash_attention)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax.parallel import mesh as mesh_lib

# Positions are a multiple of a TPU's lanes; the largest block that divides them is taken.
_LANES, _BLOCKS = 128, (512, 256, 128)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, softcap: float | None = None,
    window: int | None = None, mesh: Mesh | None = None,
) -> jax.Array:  # fmt: skip
    """Causal attention, as kd_jax.lm.model.attention.causal; on other devices the kernel is interpreted, and slow.

    Args:
        q: [row, position, head, head_dim], scaled.
        k, v: [row, position, kv head, head_dim].
        segments: [row, position], or None where a row is one segment.
        softcap, window: see kd_jax.lm.model.attention.Rule.
        mesh: what rows and heads are split over; each device runs the kernel on its own.
    Returns: [row, position, head, head_dim].
    """
    length = q.shape[1]
    # What is added on the right is seen by no query that counts.
    extra = -length % _LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    arrays = (q, k, v) if segments is None else (q, k, v, jnp.pad(segments, ((0, 0), (0, extra))))

    def on_device(q, k, v, segments=None):
        kernel = _kernel(q.shape[1], q.shape[2], softcap, window)
        if segments is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _segment_ids(ids)))(q, k, v, segments)

    if mesh is not None and mesh.size > 1:
        # The partitioner cannot look into a kernel. KV heads that the devices do not divide are on all of them.
        split = k.shape[1] % mesh.shape["tensor"] == 0
        heads = mesh_lib.spec(("batch", "heads" if split else None, None, None), mesh)
        specs = (heads,) * 3 + (mesh_lib.spec(("batch", None), mesh),) * (len(arrays) - 3)
        # the kernel's outputs do not say over which axes they vary
        on_device = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return on_device(*arrays).swapaxes(1, 2)[:, :length]


def _kernel(heads: int, length: int, softcap: float | None, window: int | None):
    # Imported where it is used: it is for TPUs alone, and takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    shape = (length, length)
    if window is None:
        mask = splash_attention_mask.CausalMask(shape)
    else:
        # the library's window does not count the position itself; none to the right, by the causal mask
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(size for size in _BLOCKS if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap, interpret=jax.default_backend() != "tpu",
    )  # fmt: skip


def _segment_ids(ids: jax.Array):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel.SegmentIds(ids, ids)
