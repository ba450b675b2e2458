"""How a model is sampled: one spec that command lines, corpora, the device program and scoring share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.runs.settings import setting, spec


@spec
class SamplerSpec:
    """How a model is sampled. The default of each setting is its value for off: the model's own distribution.

    The logits are divided by the temperature, then truncated: top-k, then top-p of what is left, then min-p. Manifests
    and keyword arguments may write None for off.
    """

    sample_temperature: float = setting(1.0, "tau; 1 is the model's own distribution, 0 the likeliest id", at_least=0)
    top_k: int = setting(0, "draw from the K likeliest ids only; 0 is off", at_least=0)
    top_p: float = setting(1.0, "draw from the fewest ids of probability P together; 1 is off", above=0, at_most=1)
    min_p: float = setting(
        0.0, "draw from the ids of at least P times the top probability; 0 is off", at_least=0, at_most=1
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplerSpec:
        """The spec from the settings in a mapping; one that is absent or None is off."""
        names = {field.name for field in dataclasses.fields(cls)} & set(values)
        return cls(**{name: values[name] for name in names if values[name] is not None})

    def knobs(self) -> dict[str, Any]:
        """Each setting by name, None where it is off; the temperature is always a number."""
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return {name: None if value == off and name != _TEMPERATURE else value for name, value, off in fields}

    def arrays(self) -> dict[str, jax.Array | None]:
        """The knobs as device scalars, for `sample`: what is off is left out of the program, and values are traced."""
        return {name: None if value is None else jnp.float32(value) for name, value in self.knobs().items()}

    @property
    def label(self) -> str:
        """A short name such as tau-0.8-top_k-50."""
        on = [f"{name}-{value:g}" for name, value in self.knobs().items() if name != _TEMPERATURE and value is not None]
        return "-".join([f"tau-{self.sample_temperature:g}", *on])


_TEMPERATURE = "sample_temperature"
# The model's own distribution.
WHOLE = SamplerSpec()
