"""Settings, each declared once, as a field of a frozen dataclass (a spec): type, default, range and meaning.

The config file's fields, the checks of the command line, its help and the documentation all come from the declaration:

    @spec
    class TrainSpec:
        batch_size: int = setting(256, "sequences of an update", at_least=1)

    defaults(TrainSpec)                     a ConfigDict of the defaults, for a config file to change
    freeze(TrainSpec, config, "config")     the spec with a config's values; ValueError names the key
    describe(TrainSpec)                     a row for each setting
    changes(TrainSpec)                      a spec of the same settings, all of them none; `merge` puts them over others

Types: bool, int, float or str; a tuple of one of these; one of these or None; a spec; dict[str, Any] with free keys.
"""

from __future__ import annotations

import ast
import contextlib
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
# What absl's flags take.
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
# What settings are called here (the last part of the key) -> what they are called elsewhere.
SYNONYMS = {
    "learning_rate": ("lr", "peak_lr", "step_size"),
    "updates": ("steps", "step", "max_steps", "num_steps", "train_steps", "iterations", "max_iters"),
    "epochs": ("epoch", "steps", "num_epochs", "num_train_epochs"),
    "num_updates": ("steps", "iterations"),
    "max_iter": ("steps", "iterations", "max_iters"),
    "divergence": ("loss", "loss_type", "loss_fn", "objective", "kd_loss", "kl"),
    "batch_size": ("bs", "batch", "global_batch_size", "per_device_train_batch_size", "train_batch_size"),
    "parts": ("grad_accum", "gradient_accumulation", "gradient_accumulation_steps", "accumulate"),
    "clip": ("clip_norm", "grad_clip", "gradient_clip", "max_grad_norm"),
    "warmup": ("warmup_steps", "warmup_ratio", "num_warmup_steps"),
    "max_length": ("seq_len", "max_seq_length", "max_seq_len", "context_length", "block_size"),
    "taus": ("tau", "temperature", "temperatures"),
    "loss_temperature": ("temperature", "kd_temperature"),
    "sample_temperatures": ("temperature", "temperatures"),
    "hard_weight": ("alpha", "ce_weight", "kd_alpha"),
    "layers": ("num_layers", "num_hidden_layers", "n_layer", "depth"),
    "heads": ("num_heads", "num_attention_heads", "n_head"),
    "width": ("hidden_size", "d_model", "n_embd", "dim"),
    "mlp": ("intermediate_size", "d_ff"),
    "source": ("model", "checkpoint", "model_name_or_path", "model_name", "dataset"),
    "trackers": ("logger", "report_to", "wandb", "tensorboard"),
    "weight_decay": ("wd",), "on_policy_fraction": ("lmbda", "lambda_"), "seeds": ("num_seeds",),
    "validations": ("eval_steps", "eval_every"), "remat": ("gradient_checkpointing",),
    "workdir": ("out", "output_dir", "logdir"), "overwrite": ("force",),
}  # fmt: skip


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
    # dataclasses take no mutable default. One object for all is right here: a spec is never changed.
    if isinstance(default, ConfigDict | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def spec(kind: type[T]) -> type[T]:
    """Makes a class of settings a frozen dataclass with keywords only, whose values are checked when it is made."""
    more = kind.__dict__.get("__post_init__")

    def __post_init__(self):
        # Ranges first, so that a spec's own checks can rely on them.
        for field in _fields(type(self)):
            for member, allowed in _out_of_range(field, getattr(self, field.name)):
                raise ValueError(f"{field.name}={member!r} must be {allowed}")
        if more is not None:
            more(self)

    kind.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=True)(kind)


def changes(kind: type[T]) -> type:
    """A spec with the settings of another, each of them none by default: what a part of a run does differently."""
    hints = typing.get_type_hints(kind)
    fields = [
        # The same ranges and meanings: they come with the metadata.
        (field.name, hints[field.name] | None, dataclasses.field(default=None, metadata=field.metadata))
        for field in dataclasses.fields(kind)
    ]
    made = dataclasses.make_dataclass(f"{kind.__name__}Changes", fields, frozen=True, kw_only=True)
    made.__doc__ = f"Settings of {kind.__name__} that differ; none for those that do not."
    return made


def merge(base: T, changed: Any, at: str) -> T:
    """The base spec with all settings of `changed` that are not none; ValueError names AT.NAME.

    Args:
        base: a spec.
        changed: of `changes(type(base))`.
        at: the place of the changes, for messages.
    """
    values = {name: value for name, value in to_dict(changed).items() if value is not None}
    try:
        return dataclasses.replace(base, **values)
    except ValueError as error:
        raise ValueError(f"{at}.{error}") from error


def defaults(kind: type) -> ConfigDict:
    """The defaults of a spec as a ConfigDict, with specs inside it as ConfigDicts of their own."""
    config, hints = ConfigDict(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value, hint = _default(field), hints[field.name]
        if dataclasses.is_dataclass(hint):
            config[field.name] = defaults(hint)
            config[field.name].update(to_dict(value))
        elif value is None:
            # A placeholder: None, which knows the type that a value has to have.
            member = without_none(hint)[0]
            config[field.name] = config_dict.placeholder(typing.get_origin(member) or member)
        else:
            config[field.name] = value if not isinstance(value, dict) else ConfigDict(value)
    return config


def freeze(kind: type[T], config: Mapping[str, Any] | ConfigDict, at: str = "config") -> T:
    """A spec with the values of a config; what the config leaves out has its default.

    Raises: ValueError, naming the key as AT.NAME, for a key that is not a setting, and for a value of another type or
        out of its range. An integer is a float where a float is asked for.
    """
    hints = typing.get_type_hints(kind)
    # Names first: a typing error should not show as the wrong type of another setting.
    unknown = sorted(set(config) - set(hints))
    if unknown:
        raise ValueError(f"{at}.{unknown[0]} is not a setting{did_you_mean(unknown[0], hints, f'{at}.')}")
    values = {}
    for name in config:
        value, hint = config[name], hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = freeze(hint, value, f"{at}.{name}")
        else:
            values[name] = _typed(value, hint, f"{at}.{name}")
    # A spec's own errors name the field; the place of the spec comes before it.
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
    """A row for each setting of a spec, those of specs inside it included.

    Args:
        kind: a spec's class.
        at: what its keys begin with.
    """
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from describe(hint, f"{at}.{field.name}")
        else:
            about = field.metadata
            yield Setting(
                f"{at}.{field.name}", type_name(hint), _default(field), _range(field), about.get("meaning", "")
            )


def declared(kind: type, at: str = "config") -> Iterator[tuple[str, Any]]:
    """(key, type) of each setting of a spec, those of specs inside it included.

    Args:
        kind: a spec's class.
        at: what its keys begin with.
    """
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from declared(hint, f"{at}.{name}")
        else:
            yield f"{at}.{name}", hint


def from_text(text: str, hint: Any, key: str) -> Any:
    """A value written on a command line.

    Numbers and texts are written as they are, booleans as true or false, a missing value as none; tuples and all else
    as in Python, a tuple of texts also as a,b, and a tuple of one number as that number.

    Args:
        hint: the declared type.
        key: what the error calls the setting.
    Raises: ValueError, naming the key, for a text that is not a value of this type.
    """
    kind, optional = without_none(hint)
    if optional and text.lower() == "none":
        return None
    value = text  # what cannot be read stays a text, and is refused by its type
    if kind is bool:
        value = _BOOLEANS.get(text.lower(), text)
    elif kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
    elif kind is not str:
        # a,b needs no quotes, and one number no comma; Python's own form works as well.
        value = tuple(text.split(",")) if kind == tuple[str, ...] else text
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
        value = (value,) if isinstance(value, int | float) and typing.get_origin(kind) is tuple else value
    return _typed(value, hint, key)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name, "; did you mean PREFIX+NAME?"; empty where no known name is similar.

    The name's meanings in other projects (SYNONYMS) count before its spelling; the group may be missing or wrong.

    Args:
        name: that is not known, with dots between its parts.
        known: the names that there are.
        prefix: written before the names that are suggested.
    """
    # A setting of the run comes before one of the same name deep inside.
    known = sorted(known, key=lambda key: (key.count("."), key))
    group, _, word = name.rpartition(".")

    def ending(last: str) -> str | None:
        """The setting with this last part: one of the same group, if there is one."""
        keys = [key for key in known if key.rpartition(".")[2] == last]
        return next((key for key in keys if key.startswith(f"{group}.")), keys[0] if keys else None)

    word = word.lower()
    meant = [ending(ours) for ours, theirs in SYNONYMS.items() if word in theirs] + [ending(word)]
    meant = [key for key in meant if key is not None][:3]
    if not meant:
        full = {key.removeprefix("config."): key for key in known}  # a common prefix would make all names similar
        last = dict.fromkeys(key.rpartition(".")[2] for key in known)
        meant = [full[key] for key in difflib.get_close_matches(name.removeprefix("config."), full, n=1)]
        meant = meant or [ending(part) for part in difflib.get_close_matches(word, last, n=1)]
    texts = [f"{prefix}{key}" for key in meant]
    return f"; did you mean {', '.join(texts[:-2] + [' or '.join(texts[-2:])])}?" if meant else ""


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _fields(kind: type) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(kind) if "bounds" in field.metadata)


def _out_of_range(field: dataclasses.Field, value: Any) -> Iterator[tuple[Any, str]]:
    """The value, or the members of a tuple, that the declaration does not allow, and what it allows."""
    one_of, bounds = field.metadata["one_of"], field.metadata["bounds"]
    for member in value if isinstance(value, tuple) else (value,):
        if member is None:
            continue
        within = all(_RANGES[name][1](member, bound) for name, bound in bounds.items())
        if bounds and isinstance(member, float) and not math.isfinite(member):
            yield member, "finite"
        elif not within or (one_of is not None and member not in one_of):
            yield member, _range(field)


def _range(field: dataclasses.Field) -> str:
    one_of, bounds = field.metadata.get("one_of"), field.metadata.get("bounds", {})
    words = [_RANGES[name][0].format(bound) for name, bound in bounds.items()]
    return " and ".join(words) if one_of is None else "one of " + ", ".join(map(str, one_of))


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type, and whether None stands beside it."""
    if isinstance(hint, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return members[0], len(members) < len(typing.get_args(hint))
    return hint, False


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value in its declared type; ValueError where it has another."""
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    if typing.get_origin(hint) is tuple:
        # JSON has no tuples: a config that is read back has lists in their place.
        if not isinstance(value, tuple | list):
            raise ValueError(f"{key}={value!r} must be a {type_name(hint)}")
        return tuple(_typed(member, typing.get_args(hint)[0], key) for member in value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping | ConfigDict):
            raise ValueError(f"{key}={value!r} must be a dict")
        return value.to_dict() if isinstance(value, ConfigDict) else dict(value)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if hint is float and type(value) is int:
        return float(value)
    # Not isinstance: a bool is an int to Python, and True would pass for 1.
    if type(value) is not hint:
        raise ValueError(f"{key}: {value!r} must be {type_name(hint)}")
    return value


def type_name(hint: Any) -> str:
    """A declared type as help and errors call it."""
    hint, optional = without_none(hint)
    if typing.get_origin(hint) is tuple:
        name = f"tuple of {type_name(typing.get_args(hint)[0])}"
    else:
        name = {float: "float", int: "int", bool: "bool", str: "text"}.get(hint, "any")
    return f"{name} or none" if optional else name
