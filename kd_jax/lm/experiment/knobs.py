"""The knobs of selectivity that a run compares: which arms are the settings of which knob, and what those came to.

    config.frontier.knobs        ((name, ((value, arm), ...)), ...): values as text, in order; arms:
                                 kd_jax.lm.experiment.arms
    config.frontier.references   arms in which knobs change nothing: all are counted from the first, and each knob as
                                 well from the first that is a setting of its own
    config.frontier.gains        nats a token of precision above them, at which knobs are compared

Knobs may share arms: the setting at which a knob changes nothing is another's too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kd_jax.reporting.row_kinds import SIZE, is_kind


class Knob(NamedTuple):
    """A knob: its settings in order, each a value as text and the arm that has it."""

    name: str
    settings: tuple[tuple[str, str], ...]


class Frontier(NamedTuple):
    """What config.frontier says."""

    references: tuple[str, ...]
    gains: tuple[float, ...]
    knobs: tuple[Knob, ...]

    @property
    def reference(self) -> str:
        """The arm that all is counted from."""
        return self.references[0]

    def neutral(self, knob: str) -> str:
        """The arm in which a knob changes nothing."""
        (arms,) = ([arm for _, arm in own.settings] for own in self.knobs if own.name == knob)
        return next(arm for arm in self.references if arm in arms)

    @property
    def arms(self) -> list[str]:
        """The reference and all arms of knobs, none twice."""
        return list(dict.fromkeys([self.reference, *(arm for knob in self.knobs for _, arm in knob.settings)]))

    def label(self, arm: str) -> str:
        """Of which knobs an arm is which setting; the arm's own name where it is of none."""
        found = [f"{knob.name} = {value}" for knob in self.knobs for value, own in knob.settings if own == arm]
        return ", ".join(found) or arm


def read(config: Mapping[str, Any]) -> Frontier | None:
    """What a config, or a run's config.json, says of knobs; None where it has none.

    Raises ValueError, naming the key, for what is not so put together.
    """
    found = config.get("frontier") or {}
    if not isinstance(found, (Mapping, ConfigDict)):
        raise ValueError(f"config.frontier is {found!r:.40}; it has knobs, references and gains")
    if not found.get("knobs"):
        return None
    for name in ("knobs", "references", "gains"):
        if not isinstance(found.get(name) or (), (list, tuple)):
            raise ValueError(f"config.frontier.{name}={found[name]!r:.40} must be a list")
    knobs = tuple(_knob(knob) for knob in found["knobs"])
    if len({knob.name for knob in knobs}) < len(knobs):
        raise ValueError(f"config.frontier.knobs has a name twice: {', '.join(knob.name for knob in knobs)}")
    gains = tuple(found.get("gains") or ())
    if not gains or not all(is_kind(gain, SIZE) and gain > 0 for gain in gains):
        raise ValueError(f"config.frontier.gains={gains} must be numbers above 0, at least one")
    references = tuple(found.get("references") or ())
    if not all(isinstance(arm, str) for arm in references):
        raise ValueError(f"config.frontier.references={references!r:.40} must be names of arms")
    for knob in knobs:
        if not set(references) & {arm for _, arm in knob.settings}:
            raise ValueError(f"config.frontier.references={references}: none is a setting of {knob.name}")
    return Frontier(references, gains, knobs)


def _knob(found: Any) -> Knob:
    try:
        name, settings = found
        settings = tuple((value, arm) for value, arm in settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.frontier.knobs: {found!r} is not (name, ((value, arm), ...))") from error
    if not all(isinstance(text, str) and text for text in (name, *sum(settings, ()))):
        raise ValueError(f"config.frontier.knobs: {found!r}: names, values and arms are text")
    if not settings:
        raise ValueError(f"config.frontier.knobs: {name} has no settings")
    for texts in zip(*settings, strict=True):
        if len(set(texts)) < len(texts):
            raise ValueError(f"config.frontier.knobs: {name} has a setting twice: {', '.join(texts)}")
    return Knob(name, settings)


def check(config: Mapping[str, Any], arms: Collection[str]) -> None:
    """Raises ValueError, naming the key, for knobs that cannot be: of `arms`, the run's, above all."""
    frontier = read(config)
    if frontier is None:
        return
    places = {"config.frontier.references": frontier.references}
    places |= {f"config.frontier.knobs: {knob.name}": [arm for _, arm in knob.settings] for knob in frontier.knobs}
    for place, names in places.items():
        for name in names:
            if name not in arms:
                raise ValueError(f"{place}: {name!r} is not one of the run's arms ({', '.join(arms)})")
