"""Settings, each declared once: its type, default, range and meaning, as a field of a frozen dataclass (a spec).

The config file's fields, the checks of the command line, its help and the documentation all come from the declaration:

    @spec
    class TrainSpec:
        batch_size: int = setting(256, "sequences of an update", at_least=1)

    defaults(TrainSpec)                     a ConfigDict of the defaults, for a config file to change
    freeze(TrainSpec, config, "config")     the spec with a config's values; ValueError names the key
    describe(TrainSpec)                     a row for each setting

A field's type is bool, int, float, str, a tuple of one of these, one of these or None, another spec, or
dict[str, Any] for names that the user makes up.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from ml_collections import ConfigDict, config_dict

T = TypeVar("T")
_RANGES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least {}", lambda value, bound: value >= bound),
    "above": ("above {}", lambda value, bound: value > bound),
    "at_most": ("at most {}", lambda value, bound: value <= bound),
    "below": ("below {}", lambda value, bound: value < bound),
}


class Setting(NamedTuple):
    """A setting as help and documentation show it."""

    key: str
    type: str
    default: Any
    range: str
    meaning: str


def setting(default: Any, meaning: str, *, one_of: Iterable[str] | None = None, **bounds: float) -> Any:
    """A field of a spec.

    Args:
        default: its value where nothing else is said.
        meaning: one line: what it is, with its unit, and what a special value such as 0 stands for.
        one_of: the values that a text may have.
        bounds: at_least, above, at_most, below. They hold for each member of a tuple, and not for None.
    """
    metadata = {"meaning": meaning, "one_of": None if one_of is None else tuple(one_of), "bounds": bounds}
    if isinstance(default, ConfigDict | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def spec(kind: type[T]) -> type[T]:
    """Makes a class of settings a frozen dataclass with keywords only, whose values are checked when it is made."""
    more = kind.__dict__.get("__post_init__")

    def __post_init__(self):
        for field in _fields(type(self)):
            _check_range(field, getattr(self, field.name))
        if more is not None:
            more(self)

    kind.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=True)(kind)


def defaults(kind: type) -> ConfigDict:
    """The defaults of a spec as a ConfigDict, with specs inside it as ConfigDicts of their own."""
    config, hints = ConfigDict(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value, hint = _default(field), hints[field.name]
        if dataclasses.is_dataclass(hint):
            config[field.name] = ConfigDict(to_dict(value))
        elif value is None:
            config[field.name] = config_dict.placeholder(_optional(hint)[0])
        else:
            config[field.name] = value if not isinstance(value, dict) else ConfigDict(value)
    return config


def freeze(kind: type[T], config: Mapping[str, Any] | ConfigDict, at: str = "config") -> T:
    """A spec with the values of a config; what the config leaves out has its default.

    Raises: ValueError, naming the key as AT.NAME, for a key that is no setting, a value of another type, or out of its
        range. An integer is a float where a float is asked for.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(config) - set(hints))
    if unknown:
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        raise ValueError(f"{at}.{unknown[0]} is not a setting" + (f"; did you mean {at}.{close[0]}?" if close else ""))
    values = {}
    for name in config:
        value, hint = config[name], hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = freeze(hint, value, f"{at}.{name}")
        else:
            values[name] = _typed(value, hint, f"{at}.{name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{at}.{error}") from error


def to_dict(value: Any) -> dict[str, Any]:
    """A spec as nested dicts of plain values."""
    return {
        field.name: to_dict(member) if dataclasses.is_dataclass(member) else member
        for field in dataclasses.fields(value)
        for member in [getattr(value, field.name)]
    }


def describe(kind: type, at: str = "config") -> Iterator[Setting]:
    """A row for each setting of a spec, those of specs inside it included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from describe(hint, f"{at}.{field.name}")
        else:
            about = field.metadata
            yield Setting(f"{at}.{field.name}", _name(hint), _default(field), _range(field), about.get("meaning", ""))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _fields(kind: type) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(kind) if "bounds" in field.metadata)


def _check_range(field: dataclasses.Field, value: Any) -> None:
    one_of, bounds = field.metadata["one_of"], field.metadata["bounds"]
    for member in value if isinstance(value, tuple) else (value,):
        if member is None:
            continue
        within = all(_RANGES[name][1](member, bound) for name, bound in bounds.items())
        # NaN is within no range, and infinity is within none that has no upper bound
        finite = not bounds or not isinstance(member, float) or math.isfinite(member)
        if not within or not finite or (one_of is not None and member not in one_of):
            raise ValueError(f"{field.name}={member!r} must be {_range(field)}")


def _range(field: dataclasses.Field) -> str:
    one_of, bounds = field.metadata.get("one_of"), field.metadata.get("bounds", {})
    words = [_RANGES[name][0].format(bound) for name, bound in bounds.items()]
    return " and ".join(words) if one_of is None else "one of " + ", ".join(map(str, one_of))


def _optional(hint: Any) -> tuple[Any, bool]:
    """The type, and whether None stands beside it."""
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0], len(members) < len(typing.get_args(hint))
    return hint, False


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value as its declared type; ValueError where it is of another."""
    hint, optional = _optional(hint)
    if value is None and optional:
        return None
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{key}={value!r} must be a tuple")
        return tuple(_typed(member, typing.get_args(hint)[0], key) for member in value)
    if typing.get_origin(hint) is dict:
        return value.to_dict() if isinstance(value, ConfigDict) else dict(value)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{key}: {value!r} must be {_name(hint)}")
    return value


def _name(hint: Any) -> str:
    hint, optional = _optional(hint)
    if typing.get_origin(hint) is tuple:
        name = f"tuple of {_name(typing.get_args(hint)[0])}"
    else:
        name = {float: "float", int: "int", bool: "bool", str: "text"}.get(hint, "any")
    return f"{name} or none" if optional else name
