"""Experiments from the command line: a config file, and flags that change its settings."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import kd_jax
from kd_jax.runs import settings
from kd_jax.runs.command_line import Parser, read_flagfiles


def parse(words: Sequence[str], parser: Parser, spec_of: Callable[[ConfigDict], type | None]) -> argparse.Namespace:
    """Reads a command line that has --config CONFIG[:ARG] and overrides --config.KEY=VALUE.

    Nothing is written, so a typing error never leaves a half-made run folder behind.

    Args:
        words: those after the program's name.
        parser: the command's other flags; those of the config's settings are added to it.
        spec_of: the declaration (kd_jax.runs.settings) of the experiment that a config is for; None where there is
            none, and the types are those of the config's own values.
    Returns: the parser's namespace; `config` is the ConfigDict with the overrides, locked.
    Raises: ValueError, naming the flag.
    """
    words = read_flagfiles(words)
    parser.add_argument(
        "--config", metavar="CONFIG", help="a file, or a name such as gmm:smoke; with --help its settings are listed"
    )
    # The config is read first, since its settings are flags themselves.
    chosen = _chosen(words)
    config = hints = None
    if chosen is not None:
        config = load(chosen)
        hints = _types(config, spec_of(config))
        _add_settings(parser, config, hints, spec_of(config))
    args, rest = parser.parse_known_args(words)
    for word in rest:
        if not word.startswith("--config."):
            raise parser.unknown(word)
    if config is None:
        raise ValueError("--config is missing (for example --config gmm:smoke)")
    given = {key: value for key, value in vars(args).items() if key.startswith("config.")}
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        # names in a dict setting are the user's own
        if not equals or not any(hint == dict[str, Any] and key.startswith(f"{name}.") for name, hint in hints.items()):
            raise parser.unknown(word)
        given[key] = text
    for key, text in given.items():
        _set(config, key.removeprefix("config."), settings.from_text(text, hints.get(key, Any), f"--{key}"))
    # From here on a name that the config does not have is an error, not a new setting.
    config.lock()
    args.config = config
    return args


def types(words: Sequence[str], spec_of: Callable[[ConfigDict], type | None]) -> dict[str, Any]:
    """The type of each setting by its flag's name ("config.seed"), of the config that a command line names.

    Args:
        words: those after the program's name.
        spec_of: as in `parse`.
    Returns: {} without --config.
    Raises: ValueError for a config that cannot be read.
    """
    chosen = _chosen(words)
    if chosen is None:
        return {}
    config = load(chosen)
    return _types(config, spec_of(config))


def _chosen(words: Sequence[str]) -> str | None:
    first = Parser(add_help=False)
    first.add_argument("--config")
    # Without --help: argparse would print its text and exit before the settings are known.
    return first.parse_known_args([word for word in words if word not in ("--help", "-h")])[0].config


def load(name: str) -> ConfigDict:
    """The config of a file, or of a name such as lm_laptop; after a ":" comes the argument of its get_config().

    Raises: ValueError for whatever goes wrong.
    """
    path, colon, arg = name.partition(":")
    shipped = _shipped()
    if not Path(path).is_file():
        names = {file.stem: file for file in sorted(shipped.glob("[!_]*.py"))}
        if path not in names:
            raise ValueError(f"--config {name}: {path} is neither a file nor one of {', '.join(names)}")
        path = names[path]
    # A config may begin with another one (`from configs import lm`), wherever it lies itself. First on the path, as the
    # folder that the command runs in may have a package `configs` of its own.
    # After it the config's own folder, as for a script: a config may import a file beside it.
    added = [str(shipped.parent), str(Path(path).absolute().parent)]
    sys.path[:0] = added
    try:
        # Not `import`: a config is any file, and need not be on the path or be named like a module.
        found = importlib.util.spec_from_file_location("kd_jax_config", path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        if colon and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"get_config() in {path} takes no argument; leave out :{arg}")
        config = module.get_config(arg) if colon else module.get_config()
    except (Exception, SystemExit) as error:  # the file is Python, and may raise anything
        raise ValueError(f"--config {name}: {_one_line(error)}") from error
    finally:
        for folder in added:
            sys.path.remove(folder)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config {name}: get_config() must return an ml_collections.ConfigDict")
    return config


def _one_line(error: BaseException) -> str:
    """An error's message; with its type and place unless the file has raised it to explain something itself."""
    message = " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__}: {message} ({last.filename}, line {last.lineno})"
    return message if isinstance(error, ValueError) else where


def _shipped() -> Path:
    """The folder of configs that come with the package: inside an installed one, beside it in a checkout."""
    package = Path(kd_jax.__file__).parent
    inside = package / "shipped" / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON-able values: nested dicts, lists in place of tuples."""
    return _plain(config.to_dict())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level of dotted keys.

    Args:
        tree: nested dicts.
        prefix: of all keys.
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _types(config: ConfigDict, spec: type | None) -> dict[str, Any]:
    """The type of each setting by its flag's name: as declared, else as the value in the file has it."""
    declared = {} if spec is None else dict(settings.declared(spec))
    free = tuple(f"{key}." for key, hint in declared.items() if hint == dict[str, Any])
    values = {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
    known = {key: _type(value, config, key) for key, value in values.items() if spec is None or key.startswith(free)}
    return {**known, **declared}


def _type(value: Any, config: ConfigDict, key: str) -> Any:
    if isinstance(value, dict):
        return dict[str, Any]
    if isinstance(value, tuple | list):
        # A mixed tuple of int and float is one of floats.
        members = {type(member) for member in value}
        kind = members.pop() if len(members) == 1 else float if members == {int, float} else Any
        return tuple[kind, ...] if kind in (bool, int, float, str) else tuple[Any, ...]
    if value is not None:
        return type(value)
    *path, name = key.split(".")[1:]
    for part in path:
        config = config[part]
    kind = config.get_type(name)  # of a placeholder
    return Any if kind is type(None) else kind | None


def _add_settings(parser: Parser, config: ConfigDict, types: dict[str, Any], spec: type | None) -> None:
    """A flag for each setting, in a group for each part of the config."""
    rows = {} if spec is None else {row.key: row for row in settings.describe(spec)}
    values = {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
    groups: dict[str, Any] = {}
    for key, hint in types.items():
        part = key.rpartition(".")[0]
        if part not in groups:
            groups[part] = parser.add_argument_group(f"settings: {part}")
        row = rows.get(key)
        value = values.get(key, None if row is None else row.default)
        limits = f"{row.range}; " if row and row.range else ""
        text = f"{row.meaning if row else ''} ({limits}default {value!r})".strip()
        options = {"nargs": "?", "const": "true"} if hint is bool else {}
        groups[part].add_argument(
            # SUPPRESS: only flags that were typed change the config.
            f"--{key}",
            default=argparse.SUPPRESS,
            metavar=settings.type_name(hint),
            help=text.replace("%", "%%"),
            **options,
        )
        if hint is bool:
            groups[part].add_argument(
                f"--no{key}", dest=key, default=argparse.SUPPRESS, action="store_const", const="false",
                help=argparse.SUPPRESS,
            )  # fmt: skip


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *path, name = key.split(".")
    # the type has been checked; the file's own value may be of another, such as 1 for a float
    with config.unlocked(), config.ignore_type():
        for part in path:
            if part not in config:
                config[part] = ConfigDict()
            config = config[part]
        config[name] = ConfigDict(value) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value
