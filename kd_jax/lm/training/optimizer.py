"""The optimiser and its schedule, through optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def wsd(peak: float, steps: int, warmup: float, decay: float) -> optax.Schedule:
    """Learning rate by the number of finished updates: warm-up, stable, decay (Hu et al. 2024, MiniCPM), all linear.

    Args:
        peak: the stable learning rate.
        steps: updates in all.
        warmup, decay: shares of them. Update 0 has 0 where there is a warm-up; the last update is one step of the decay
            above 0.
    """
    warmup_steps, decay_steps = round(warmup * steps), round(decay * steps)
    parts = [
        optax.linear_schedule(0.0, peak, warmup_steps) if warmup_steps else optax.constant_schedule(peak),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, decay_steps) if decay_steps else optax.constant_schedule(peak),
    ]
    return optax.join_schedules(parts, [warmup_steps, steps - decay_steps])


def adamw(
    schedule: optax.Schedule, *, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW after clipping by the global norm; what has one axis in each layer (norm gains) is not decayed.

    Moments are float32 whatever the parameters are. `clip` 0 turns clipping off.
    """
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(
        *parts,
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path[-1:]), params)


def validate(settings: Any) -> None:
    """Raises ValueError, naming the key, for a value that the optimiser cannot work with."""
    for name in ("learning_rate", "eps"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise ValueError(f"config.train.{name}={getattr(settings, name)} must be above 0 and finite")
    for name in ("b1", "b2"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"config.train.{name}={getattr(settings, name)} must be from 0 and below 1")
    for name in ("weight_decay", "clip"):
        if not 0 <= getattr(settings, name) < float("inf"):
            raise ValueError(f"config.train.{name}={getattr(settings, name)} must be 0 or above and finite")
    if not (settings.warmup >= 0 and settings.decay >= 0 and settings.warmup + settings.decay <= 1):
        raise ValueError(
            f"config.train.warmup={settings.warmup} and config.train.decay={settings.decay} are shares of the updates "
            "and must not be more than 1 together"
        )
