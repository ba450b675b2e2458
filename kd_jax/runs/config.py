"""The command line: one config file, overrides of its fields, and the run folder."""

import difflib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from kd_jax.parallel import cluster

USAGE = (
    "usage: {prog} --config FILE.py --workdir FOLDER [--overwrite] [--stages A,B] [--flagfile FILE] "
    "[--dry_run [--device 8xH100] [--mfu 0.4] [--price_per_hour X]] "
    "[--coordinator_address HOST:PORT --num_processes N --process_id I] [--initialization_timeout SECONDS] "
    "[--heartbeat_timeout SECONDS] [--config.KEY=VALUE ...]"
)


class Args(NamedTuple):
    """What the command line asked for; `config` is locked, and `processes` is for kd_jax.parallel.cluster.find."""

    config: ml_collections.ConfigDict
    workdir: str
    overwrite: bool
    stages: tuple[str, ...] = ()
    dry_run: bool = False
    processes: dict[str, Any] = {}
    initialization_timeout: int = 300
    heartbeat_timeout: int = 60
    device: str = ""
    mfu: float = 0.4
    price_per_hour: float | None = None


def parse(argv: Sequence[str]) -> Args:
    """Reads a command line (program name first, as in sys.argv).

    A flag that is unknown or has a bad value ends the program: one line on stderr naming it, exit code 2.
    Nothing is written, so a typing error never leaves a half-made run folder behind.
    """
    prog = argv[0] if argv else "train"
    if any(arg in ("--help", "-help", "-h") for arg in argv[1:]):
        print(USAGE.format(prog=prog))
        raise SystemExit(0)
    try:
        # force_gnu: a --flagfile counts also after `--config FILE` written as two words
        argv = [prog, *flags.FlagValues().read_flags_from_files(list(argv[1:]), force_gnu=True)]
    except flags.Error as error:
        _fail(str(error))

    # First without the overrides: the fields as the file has them are what the overrides are held against.
    defaults = _values(argv, overrides=False).config
    if defaults is None:
        _fail("--config is missing (for example --config configs/gmm.py)")
    before = flatten(defaults.to_dict())
    _check_names(argv, before)

    values = _values(argv, overrides=True)
    _check_tuples(before, flatten(values.config.to_dict()))
    if not values.workdir:
        _fail("--workdir is missing (for example --workdir runs/gmm)")
    for name in ("mfu", "price_per_hour"):
        if values[name].present and not values.device:
            _fail(f"--{name} is of the devices that --dry_run --device names")
    if values.device and not values.dry_run:
        _fail("--device is what --dry_run is to reckon with; a run takes the devices that are there")
    processes = {name: values[name].value for name in cluster.NAMES}
    return Args(
        values.config, values.workdir, values.overwrite, tuple(values.stages), values.dry_run, processes,
        values.initialization_timeout, values.heartbeat_timeout, values.device, values.mfu, values.price_per_hour,
    )  # fmt: skip


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as plain JSON-able values: nested dicts, lists in place of tuples."""
    return _plain(config.to_dict())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as one level of dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _values(argv: list[str], overrides: bool) -> flags.FlagValues:
    # Flag values of their own, since the global ones can be defined only once in a process.
    values = flags.FlagValues()
    # ml_collections looks for overrides in sys_argv and not in what it is called with
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv if overrides else argv[:1]
    )
    flags.DEFINE_string("workdir", None, "The run folder.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Start the run in this folder again.", flag_values=values)
    flags.DEFINE_list("stages", [], "Of an experiment in stages, run these alone.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Show what there is to do and what it costs.", flag_values=values)
    flags.DEFINE_string("device", "", "Show it for these devices, such as 8xH100.", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "Share of their peak that training reaches.", flag_values=values)
    flags.DEFINE_float("price_per_hour", None, "Of one of them.", flag_values=values)
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values)
    flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds to wait for all processes.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "heartbeat_timeout", 60, "Seconds of silence after which a process is dead.", lower_bound=1, flag_values=values
    )
    values.set_gnu_getopt(True)
    try:
        rest = values(argv, known_only=not overrides)
    except flags.UnrecognizedFlagError as error:
        _fail(f"unknown flag --{error.flagname}")
    except flags.Error as error:
        _fail(_one_line(error))
    except Exception as error:  # the config file is Python: whatever it raises is about --config
        _fail(f"--config: {type(error).__name__}: {_one_line(error)}")
    if overrides and len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r} (flags are written --name=value)")
    if values.config is not None and not isinstance(values.config, ml_collections.ConfigDict):
        # a file that is not there comes as a stand-in that raises the real error when it is first used
        try:
            values.config.to_dict()
        except Exception as error:
            _fail(f"--config={values['config'].config_filename}: {_one_line(error)}")
        _fail("--config: get_config() has to return an ml_collections.ConfigDict")
    return values


def _check_names(argv: list[str], fields: dict[str, Any]) -> None:
    known = [
        "config",
        "workdir",
        "overwrite",
        "nooverwrite",
        "stages",
        "dry_run",
        "nodry_run",
        "device",
        "mfu",
        "price_per_hour",
        *cluster.NAMES,
        "initialization_timeout",
        "heartbeat_timeout",
        *(f"config.{key}" for key in fields),
    ]
    known += [f"noconfig.{key}" for key, value in fields.items() if isinstance(value, bool)]
    for arg in argv[1:]:
        if arg == "--":
            break
        name = arg.split("=", 1)[0].lstrip("-")
        if not arg.startswith("-") or _is_number(arg) or name in known:
            continue
        if any(key.startswith(name + ".") for key in known):
            _fail(f"--{name} is a group of fields; set one of them, for example --{name}.KEY=VALUE")
        close = difflib.get_close_matches(name, known, n=1)
        if not close:
            # also by the last part alone: a field is often given without the group it is in
            last = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            close = last[:1]
        _fail(f"unknown flag --{name}" + (f"; did you mean --{close[0]}?" if close else ""))


def _check_tuples(before: dict[str, Any], after: dict[str, Any]) -> None:
    # ml_collections holds a tuple to being a tuple only; its members are held to the file's here.
    for key, value in after.items():
        default = before.get(key)
        if not isinstance(value, tuple) or value == default or not default:
            continue
        types = {type(member) for member in default}
        if float in types:
            types.add(int)
        for member in value:
            if type(member) not in types:
                names = " or ".join(sorted(kind.__name__ for kind in types))
                _fail(f"--config.{key}={value}: {member!r} is not of type {names}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
