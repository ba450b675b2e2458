"""What a run compares: its one preregistered comparison, and the knobs of selectivity, whose settings are arms.

    config.contrast              see ContrastSpec

    config.frontier.knobs        ((name, ((value, arm), ...)), ...): values as text, in order; arms as
                                 kd_jax.lm.experiment.arms names them
    config.frontier.references   arms in which knobs change nothing: gains are counted from the first, and for each knob
                                 also from the first that is a setting of its own
    config.frontier.gains        nats per token of precision above the reference, at which knobs are compared

Knobs may share arms: the setting at which a knob changes nothing may belong to several.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from kd_jax.runs.settings import freeze, setting, spec


@spec
class FrontierSpec:
    """Knobs of selectivity that are compared."""

    knobs: tuple[Any, ...] = setting((), "((name, ((value, arm), ...)), ...), values as text, in order")
    references: tuple[str, ...] = setting(("tau-1",), "arms in which knobs change nothing")
    gains: tuple[float, ...] = setting(
        (0.5, 1.0, 2.0), "gains in precision at which knobs are compared, nats per token", above=0.0
    )


@spec
class ContrastSpec:
    """The run's one preregistered comparison: the page and the run's last lines begin with it.

    It is not chosen after looking, so it alone is not corrected for how many comparisons there are.
    """

    arm: str = setting("", "arm that is compared; empty for no declared comparison")
    other: str = setting("direct", "arm that it is compared with")
    metric: str = setting(
        "recall", "metric that is compared: the arm's minus the other's",
        one_of=("precision", "recall", "entropy", "kl_model_data", "kl_data_model", "calibration_error", "agreement"),
    )  # fmt: skip
    at_equal_precision: bool = setting(
        True, "the other arm is sampled at the temperature at which it is as precise; else both are sampled at 1"
    )


class Knob(NamedTuple):
    """A knob: its settings in order, each a value as text and the arm that has it."""

    name: str
    settings: tuple[tuple[str, str], ...]


class Frontier(NamedTuple):
    """A FrontierSpec, read."""

    references: tuple[str, ...]
    gains: tuple[float, ...]
    knobs: tuple[Knob, ...]

    @property
    def reference(self) -> str:
        """The arm that gains are counted from."""
        return self.references[0]

    def neutral(self, knob: str) -> str:
        """The arm in which a knob changes nothing."""
        (arms,) = ([arm for _, arm in one.settings] for one in self.knobs if one.name == knob)
        return next(arm for arm in self.references if arm in arms)

    @property
    def arms(self) -> list[str]:
        """The reference and all arms of knobs, none twice."""
        return list(dict.fromkeys([self.reference, *(arm for knob in self.knobs for _, arm in knob.settings)]))

    def label(self, arm: str) -> str:
        """The knobs that an arm is a setting of, with its values; its own name where there are none."""
        settings = [f"{knob.name} = {value}" for knob in self.knobs for value, name in knob.settings if name == arm]
        return ", ".join(settings) or arm


def read(config: Mapping[str, Any] | FrontierSpec) -> Frontier | None:
    """The knobs of a spec, or of a run's config.json; None where there are none.

    Raises: ValueError, naming the key, for knobs of another form, or without a setting in which they change nothing.
    """
    spec = config
    if not isinstance(spec, FrontierSpec):
        spec = freeze(FrontierSpec, config.get("frontier") or {}, "config.frontier")
    if not spec.knobs:
        return None
    knobs = tuple(_knob(knob) for knob in spec.knobs)
    names = [knob.name for knob in knobs]
    if len(set(names)) < len(names):
        raise ValueError(f"config.frontier.knobs has a name twice: {', '.join(names)}")
    if not spec.gains:
        raise ValueError("config.frontier.gains is empty; knobs are compared at one gain at least")
    for knob in knobs:
        # Without a neutral setting a knob's own effect could not be told from what its students have anyway.
        if not set(spec.references) & {arm for _, arm in knob.settings}:
            raise ValueError(f"config.frontier.references={spec.references}: none is a setting of {knob.name}")
    return Frontier(spec.references, spec.gains, knobs)


def _knob(entry: Any) -> Knob:
    try:
        name, settings = entry
        # Lists come from config.json, tuples from a config file.
        settings = tuple((value, arm) for value, arm in settings)
        well_formed = settings and all(isinstance(text, str) and text for text in (name, *sum(settings, ())))
    except (TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"config.frontier.knobs: {entry!r} is not (name, ((value, arm), ...)), all of them text")
    for texts in zip(*settings, strict=True):
        if len(set(texts)) < len(texts):
            raise ValueError(f"config.frontier.knobs: {name} has a setting twice: {', '.join(texts)}")
    return Knob(name, settings)


def check(spec: FrontierSpec, arms: Collection[str]) -> None:
    """Raises ValueError, naming the key, for an arm that the run does not have.

    Args:
        spec: of the config.
        arms: names of the run's arms.
    """
    frontier = read(spec)
    if frontier is None:
        return
    places = {"config.frontier.references": frontier.references}
    places |= {f"config.frontier.knobs: {knob.name}": [arm for _, arm in knob.settings] for knob in frontier.knobs}
    for place, names in places.items():
        for name in names:
            if name not in arms:
                raise ValueError(f"{place}: {name!r} is not one of the run's arms ({', '.join(arms)})")
