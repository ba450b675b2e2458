"""The optimiser and its schedule, through optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def wsd(peak: float, steps: int, warmup: float, decay: float) -> optax.Schedule:
    """Learning rate by the number of finished updates: warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395).

    Args:
        peak: the stable learning rate.
        steps: updates in all.
        warmup, decay: shares of them, both linear. Update 0 has rate 0 where there is a warm-up; the last update is one
            step of the decay above 0.
    """
    warmup_steps, decay_steps = round(warmup * steps), round(decay * steps)
    parts = [
        optax.linear_schedule(0.0, peak, warmup_steps) if warmup_steps else optax.constant_schedule(peak),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, decay_steps) if decay_steps else optax.constant_schedule(peak),
    ]
    # Each part counts from its own beginning.
    return optax.join_schedules(parts, [warmup_steps, steps - decay_steps])


def adamw(
    schedule: optax.Schedule, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW after clipping by the global norm. Norm gains and biases are not decayed: they have one axis in each layer.

    Moments are float32 whatever the parameters are: in bfloat16 the second moment would stop growing. `clip` 0 turns
    clipping off.

    Args:
        schedule: the learning rate by the number of finished updates.
        b1, b2: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate, of all weights but norm gains and biases.
        clip: the global norm that gradients are clipped to.
    """
    # Clipped first, so that one huge gradient does not stay in the moments.
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(
        *parts,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32),
        # After Adam's scaling: weight decay is decoupled from the gradient (Loshchilov & Hutter 2019, arXiv
        # 1711.05101).
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: Any) -> Any:
    # By name: in a stack of layers, gains and biases have two axes like a matrix.
    def is_matrix(path, _):
        return not jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
