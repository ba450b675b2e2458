"""What the commands share: their parser, the arguments that several of them have, and how they end."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kd_jax.parallel import cluster
from kd_jax.runs import settings
from kd_jax.storage import errors


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. A wrong argument is a ValueError that names it and suggests the right one."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def flag(self, name: str, help: str, *, group: Any = None, default: bool = False) -> None:
        """Adds a boolean flag: --NAME, --NAME=true, --NAME=false and --noNAME."""
        group = group or self
        group.add_argument(
            f"--{name}", dest=name, nargs="?", const=True, metavar="bool", default=default, type=_boolean, help=help
        )
        group.add_argument(f"--no{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)

    def parse_args(self, words: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        args, rest = self.parse_known_args(read_flagfiles(words), namespace)
        if rest:
            self.refuse(rest[0])
        return args

    def refuse(self, word: str) -> NoReturn:
        """Raises the ValueError for a word that is no argument of this command."""
        if not word.startswith("-"):
            raise ValueError(f"unexpected argument {word!r} (flags are written --name=value)")
        name, known = word.partition("=")[0].lstrip("-"), [option[2:] for option in self._option_string_actions]
        if any(key.startswith(f"{name}.") for key in known):
            raise ValueError(f"--{name} is a group of settings; set one of them, for example --{name}.KEY=VALUE")
        raise ValueError(f"unknown flag --{name}{settings.did_you_mean(name, known, '--')}")


def read_flagfiles(words: Sequence[str]) -> list[str]:
    """The words of a command line with each --flagfile replaced by the words in that file, quoted as in a shell.

    Lines that begin with # or // are comments, as in absl's flag files; a flag file may name another.
    """
    read, words = [], list(words)
    while words:
        word = words.pop(0)
        name, equals, path = word.partition("=")
        if name != "--flagfile":
            read.append(word)
            continue
        path = path if equals or not words else words.pop(0)
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        inside = [line for line in lines if not line.strip().startswith(("#", "//"))]
        words = [*shlex.split("\n".join(inside)), *words]
    return read


def _boolean(text: str) -> bool:
    try:
        return settings.from_text(text, bool, "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false") from None


def ids(text: str) -> list[int]:
    """Token ids written as 1,504."""
    try:
        numbers = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        numbers = [-1]
    if min(numbers, default=0) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ids such as 1,504")
    return numbers


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of mesh axes written as data=2,tensor=4."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in pairs}
    if len(sizes) < len(pairs) or not all(size.lstrip("-").isdecimal() for size in sizes.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form data=2,tensor=4, each axis once")
    return {name: int(size) for name, size in sizes.items()}


def number(kind: type, *, at_least: float, below: float = float("inf")) -> Callable[[str], Any]:
    """An argument's type: a number from `at_least` (inclusive) to `below` (exclusive)."""

    def read(text: str) -> Any:
        value = kind(text)
        if not at_least <= value < below:  # NaN is not
            limit = "and finite" if below == float("inf") else f"and below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {at_least} {limit}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def mesh(sizes: dict[str, int] | None) -> Any:
    """The mesh that --mesh asks for; None without the flag. Raises ValueError for axes or sizes that cannot be."""
    from kd_jax.parallel import mesh as mesh_lib

    if sizes is None:
        return None
    unknown = [name for name in sizes if name not in mesh_lib.AXES]
    if unknown:
        raise ValueError(f"--mesh: {unknown[0]!r} is not an axis; there are {', '.join(mesh_lib.AXES)}")
    try:
        return mesh_lib.make(**sizes)
    except ValueError as error:
        raise ValueError(f"--mesh: {error}") from error


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which of several processes this one is."""
    group = parser.add_argument_group("several processes (launchers that JAX knows say all of this themselves)")
    add = group.add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="where process 0 waits for the others")
    add("--num_processes", type=int, metavar="N", help="how many processes there are")
    add("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    seconds = number(int, at_least=1)
    add("--initialization_timeout", type=seconds, default=300, metavar="SECONDS", help="to wait for all of them (300)")
    add("--heartbeat_timeout", type=seconds, default=60, metavar="SECONDS",
        help="without a sign of life after which a process counts as dead (60)")  # fmt: skip


def start_processes(args: argparse.Namespace) -> None:
    """Joins the processes of this run, where there are several; before anything else is asked of JAX."""
    from kd_jax.parallel import distributed

    processes = cluster.find({name: getattr(args, name) for name in cluster.NAMES})
    if processes is None:
        errors.end_on_terminate()  # one of several may be waiting for another, where it cannot be interrupted
    else:
        distributed.start(processes, args.initialization_timeout, args.heartbeat_timeout)


def main(parse: Callable[[Sequence[str]], argparse.Namespace], work: Callable[[argparse.Namespace], None],
         argv: Sequence[str]) -> int:  # fmt: skip
    """Runs a command and returns its exit code.

    0: done. 2: an error that the user can mend, in one line on stderr. 130: interrupted. 141: stdout was closed, as by
    `| head`; nothing is printed. 1: any other, in one of several processes (with one it is raised), with a traceback.

    Args:
        parse: the arguments from the words after the program's name; raises ValueError.
        work: what the command does.
        argv: the command line, the program's name first.
    """
    # a terminal or a file whose encoding has no "±" shows "?" instead of ending a run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = parse(argv[1:])
    except (ValueError, OSError) as error:
        return _fail("", error)
    from kd_jax.parallel import distributed  # JAX: a typing error need not wait for it

    try:
        work(args)
        distributed.end()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        code = 141
    except (ValueError, OSError, FloatingPointError, errors.RunError) as error:
        code = _fail(distributed.name(), error)
    except KeyboardInterrupt:
        print(f"\n{distributed.name()}interrupted; the same command resumes", file=sys.stderr)
        code = 130
    except Exception:
        if not distributed.several():
            raise
        print(f"{distributed.name()}{traceback.format_exc()}", file=sys.stderr)
        code = 1
    if distributed.several():
        distributed.leave(code)  # JAX would wait for the others, which wait for this one
    return code


def _fail(process: str, error: BaseException) -> int:
    print(f"error: {process}{errors.explain(error)}", file=sys.stderr)
    return 2
