"""A shallower copy of a model: the usual start of a pruned student (as in DistilBERT, arXiv 1910.01108)."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np

from kd_jax.lm.model.architecture import Model


def layers_kept(rule: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The numbers of the layers that a rule keeps, in order.

    Args:
        rule: the numbers themselves; "every_N", the layers 0, N, 2 N, ...; or "first_and_last_N", the first N and the
            last N.
        num_layers: of the whole model.
    Raises: ValueError for another rule, or layers that the model does not have.
    """
    match = re.fullmatch(r"(every|first_and_last)_([1-9]\d*)", rule) if isinstance(rule, str) else None
    if match is None and isinstance(rule, str):
        raise ValueError(f"layers_kept={rule!r} is neither numbers, nor every_N, nor first_and_last_N")
    if match is None:
        kept = tuple(rule)
    elif match[1] == "every":
        kept = tuple(range(0, num_layers, int(match[2])))
    else:
        count = int(match[2])
        # Where the two overlap, the check below refuses them.
        kept = (*range(count), *range(num_layers - count, num_layers))
    if not kept or sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < num_layers:
        raise ValueError(
            f"layers_kept={rule!r} has to name some of the layers 0 to {num_layers - 1}, each once, in order"
        )
    return kept


def shallower(model: Model, kept: tuple[int, ...]) -> Model:
    """The model with only these layers; weights outside of the layers are the same arrays.

    Windows and layers without rotary phases stay with the layers that had them.

    Args:
        model: with weights, layers stacked.
        kept: numbers of its layers, ascending, as `layers_kept` gives them.
    """
    a = model.architecture

    def renumbered(layers):
        return tuple(new for new, old in enumerate(kept) if old in layers)

    sliding = renumbered(a.sliding_layers)
    architecture = dataclasses.replace(
        a, num_hidden_layers=len(kept), sliding_layers=sliding, unrotated_layers=renumbered(a.unrotated_layers),
        sliding_window=a.sliding_window if sliding else None,
    )  # fmt: skip
    # A copy: the whole model's stacks can be freed.
    layers = jax.tree.map(lambda stack: stack[np.array(kept)], model.params["layers"])
    return model._replace(architecture=architecture, params={**model.params, "layers": layers})
