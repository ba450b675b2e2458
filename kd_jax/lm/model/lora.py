"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W becomes W + alpha / rank * B A for some linear layers.

Adapters are a tree of their own: {weight: {"a": [layer, rank, in], "b": [layer, out, rank]}}. `attached` puts them
among a model's weights for `forward` and `extend`, which add their products to the base weights'. A loss that is
differentiated with respect to the adapters alone needs neither gradients nor optimiser state of the base, and a teacher
that is the base shares its arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.lm.model.architecture import AXES, Architecture, abstract

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class Lora(NamedTuple):
    """The settings of adapters.

    Attributes:
        rank: rows of A, columns of B.
        alpha: the product is scaled by alpha / rank.
        targets: linear layers that have one, of TARGETS.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank


def init(key: jax.Array, architecture: Architecture, lora: Lora) -> dict[str, Any]:
    """New adapters, float32: A uniform within 1 / sqrt(in), as PEFT draws it, and B zero, so that nothing changes yet.

    Args:
        key: a key of jax.random.
        architecture: of the base model.
        lora: rank, scale and targets.
    Raises: ValueError for a target that is not a linear layer, or a rank below 1.
    """
    unknown = [name for name in lora.targets if name not in TARGETS]
    if unknown or not lora.targets or lora.rank < 1:
        raise ValueError(f"lora needs a rank of 1 or more and targets of {', '.join(TARGETS)}, not {lora}")
    layers = abstract(architecture)["layers"]

    def adapter(name, key):
        count, rows, columns = layers[name].shape
        bound = columns**-0.5
        a = jax.random.uniform(key, (count, lora.rank, columns), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((count, rows, lora.rank), jnp.float32)}

    keys = jax.random.split(key, len(lora.targets))
    return {name: adapter(name, key) for name, key in zip(lora.targets, keys, strict=True)}


def logical_axes(lora: Lora) -> dict[str, Any]:
    """Logical axis names of each adapter, in the tree of `init`; the rank is whole on every device."""
    # A is split like the weight's input, B like its output: no other communication than the weight's own.
    return {name: {"a": ("layer", None, AXES[name][1]), "b": ("layer", AXES[name][0], None)} for name in lora.targets}


def attached(params: dict[str, Any], adapters: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """The weights of the base model with the adapters among them, for `forward`, `extend` and `unstack`.

    Args:
        params: of the base model.
        adapters: as of `init`.
        lora: their settings.
    """
    more = {}
    for name, adapter in adapters.items():
        # the scale goes into the smaller of the two products
        more |= {f"{name}_lora_a": adapter["a"], f"{name}_lora_b": lora.scale * adapter["b"]}
    return {**params, "layers": {**params["layers"], **more}}


def merged(params: dict[str, Any], adapters: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Weights of the base architecture that compute the same, up to rounding; in the base weights' dtype.

    Args:
        params: of the base model.
        adapters: as of `init`.
        lora: their settings.
    """
    layers = dict(params["layers"])
    for name, adapter in adapters.items():
        # In float32, the adapters' dtype, and rounded once: in bfloat16 most of a small update would be lost.
        update = lora.scale * jnp.einsum("lor,lri->loi", adapter["b"], adapter["a"], precision="highest")
        layers[name] = (layers[name] + update).astype(layers[name].dtype)
    return {**params, "layers": layers}
