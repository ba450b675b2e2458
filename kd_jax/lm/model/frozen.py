"""Partial training: what is trained (some weights, or adapters), what is frozen, and the whole model of both.

The optimiser is given the trained part alone: it has no state for frozen weights, and they stay bit for bit the same.
Layers are stacked, so a stack of which only some layers are frozen is cut in two.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm.model import architecture as architecture_lib
from kd_jax.lm.model import lora as lora_lib
from kd_jax.lm.model.architecture import AXES, Architecture
from kd_jax.lm.model.lora import Lora

_PATTERN = re.compile(r"layers(?:\.(\d+)(?:-(\d+))?)?(?:\.([a-z_]+))?")


class Part(NamedTuple):
    """What is trained of a model. The default is all of it, as the usual tree of weights.

    Attributes:
        frozen: patterns of weights that are not trained, see `frozen_layers`.
        lora: adapters that are trained in place of all weights.
    """

    frozen: tuple[str, ...] = ()
    lora: Lora | None = None

    @property
    def is_all(self) -> bool:
        return not self.frozen and self.lora is None


ALL = Part()


def init(key: jax.Array, architecture: Architecture, part: Part = ALL) -> Any:
    """The trained part with random float32 values; new adapters change nothing."""
    if part.lora is not None:
        return lora_lib.init(key, architecture, part.lora)
    return cut(architecture_lib.init(key, architecture), architecture, part)[0]


def cut(params: Any, architecture: Architecture, part: Part) -> tuple[Any, Any]:
    """(trained weights, frozen weights) of a whole model; None for the first where adapters are trained."""
    if part.lora is not None:
        return None, params
    return split(params, frozen_layers(part.frozen, architecture)) if part.frozen else (params, None)


def logical_axes(architecture: Architecture, part: Part = ALL) -> tuple[Any, Any]:
    """Logical axis names of what is trained and of what is frozen."""
    axes = architecture_lib.logical_axes(architecture)
    if part.lora is not None:
        return lora_lib.logical_axes(part.lora), axes
    if not part.frozen:
        return axes, None
    # The trained and the kept part have the layout of the weights that they come from.
    flat = _flat(axes)
    # A stack that is cut in two has the same axes in both parts: layers are never split over devices.
    shapes = jax.eval_shape(lambda params: cut(params, architecture, part), architecture_lib.abstract(architecture))
    trained, kept = ({name: flat[name] for name in some} for some in shapes)
    return trained, kept


def attached(trained: Any, kept: Any, architecture: Architecture, part: Part) -> Any:
    """The whole model for `forward`, under jit and differentiable; adapters are beside the weights, not merged."""
    if part.lora is not None:
        return lora_lib.attached(kept, trained, part.lora)
    return join(trained, kept, frozen_layers(part.frozen, architecture)) if part.frozen else trained


# Compiled, so that the float32 product of a large stack is not kept beside the sum. What only passes through is shared.
@functools.partial(jax.jit, static_argnums=(2, 3))
def merged(trained: Any, kept: Any, architecture: Architecture, part: Part) -> Any:
    """The whole model as the usual tree of weights."""
    if part.lora is not None:
        return lora_lib.merged(kept, trained, part.lora)
    return attached(trained, kept, architecture, part)


def frozen_layers(patterns: tuple[str, ...], architecture: Architecture) -> dict[str, frozenset[int]]:
    """From patterns to the frozen layers of each weight; a weight outside of the layers counts as one layer, 0.

    Args:
        patterns: "embedding", "norm" or "head"; "layers" for all, "layers.4" or "layers.0-3" for some; followed by the
            name of a weight for that weight alone: "layers.q", "layers.0-3.mlp_norm".
    Raises: ValueError naming the pattern that matches nothing.
    """
    count, of_layer = architecture.num_hidden_layers, architecture_lib.layer_shapes(architecture)
    frozen: dict[str, frozenset[int]] = {}
    for pattern in patterns:
        match = _PATTERN.fullmatch(pattern)
        if pattern == "head" and architecture.tie_word_embeddings:
            raise ValueError(f"frozen pattern {pattern!r}: head and embedding of this model are one; freeze embedding")
        if pattern in ("embedding", "norm", "head"):
            names, layers = [pattern], frozenset({0})
        elif match is None or match[3] not in (None, *AXES):
            raise ValueError(f"frozen pattern {pattern!r} is not embedding, norm, head, layers, layers.0-3 or layers.q")
        else:
            first = 0 if match[1] is None else int(match[1])
            last = count - 1 if match[1] is None else int(match[2] or match[1])
            if not 0 <= first <= last < count:
                raise ValueError(f"frozen pattern {pattern!r} names layers that are not among 0 to {count - 1}")
            if match[3] and match[3] not in of_layer:
                raise ValueError(f"frozen pattern {pattern!r}: layers of this model have {', '.join(of_layer)}")
            names, layers = [match[3]] if match[3] else list(of_layer), frozenset(range(first, last + 1))
            names = [f"layers.{name}" for name in names]
        frozen |= {name: frozen.get(name, frozenset()) | layers for name in names}
    return frozen


def split(params: dict[str, Any], frozen: dict[str, frozenset[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the weights that are trained, those that are frozen), both flat: {"embedding": ..., "layers.q": ...}.

    Args:
        params: the tree of weights, layers stacked.
        frozen: as `frozen_layers` gives it.
    """
    trained, kept = {}, {}
    for name, leaf in _flat(params).items():
        layers = frozen.get(name, frozenset())
        # A stack that is trained or frozen as a whole is not cut: no copy is made.
        if not name.startswith("layers.") or len(layers) in (0, len(leaf)):
            (kept if layers else trained)[name] = leaf
        else:
            # The optimiser's state has the shapes of the trained part, so that part is an array of its own.
            free = [i for i in range(len(leaf)) if i not in layers]
            trained[name], kept[name] = leaf[np.array(free)], leaf[np.array(sorted(layers))]
    return trained, kept


def join(trained: dict[str, Any], kept: dict[str, Any], frozen: dict[str, frozenset[int]]) -> dict[str, Any]:
    """Puts the two parts of `split` together again; differentiable, for use under jit.

    Args:
        trained, kept: the parts.
        frozen: as it was given to `split`.
    Returns: the tree of weights, layers stacked.
    """
    params: dict[str, Any] = {"layers": {}}
    for name in sorted({*trained, *kept}):
        if name in trained and name in kept:
            layers, count = frozen[name], len(trained[name]) + len(kept[name])
            order = [i for i in range(count) if i not in layers] + sorted(layers)
            # argsort of a permutation is its inverse: layers return to their old places.
            leaf = jnp.concatenate([trained[name], kept[name]])[np.argsort(order)]
        else:
            leaf = trained[name] if name in trained else kept[name]
        if name.startswith("layers."):
            params["layers"][name.removeprefix("layers.")] = leaf
        else:
            params[name] = leaf
    return params


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    layers = {f"layers.{name}": leaf for name, leaf in params["layers"].items()}
    return {name: leaf for name, leaf in params.items() if name != "layers"} | layers
