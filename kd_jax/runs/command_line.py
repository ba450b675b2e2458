"""What the commands share: their parser, the arguments that several of them have, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kd_jax.parallel import cluster
from kd_jax.runs import settings
from kd_jax.storage import errors, lock

# The flags of `add_processes` and what they are where they are not given.
PROCESSES = {**dict.fromkeys(cluster.NAMES), "initialization_timeout": 300, "heartbeat_timeout": 60}


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. A wrong argument is a ValueError that names it and suggests the right one."""

    def __init__(self, **options: Any):
        # An abbreviation that is clear today would be ambiguous with the next flag.
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        """Raises a ValueError with argparse's message."""
        # argparse would print the usage and exit; here all errors end in one place, `main`
        raise ValueError(message.removeprefix("argument "))

    def flag(self, name: str, help: str, *, group: Any = None, default: bool = False) -> None:
        """Adds a boolean flag: --NAME, --NAME=true, --NAME=false and --noNAME.

        Args:
            name: of the flag.
            help: one line.
            group: of arguments; by default the parser itself.
            default: where the flag is not given.
        """
        group = group or self
        group.add_argument(
            f"--{name}", dest=name, nargs="?", const=True, metavar="bool", default=default, type=boolean, help=help
        )
        group.add_argument(f"--no{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)

    def parse_known_args(self, words: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with negative numbers like -1e-4 as values."""
        # A flag and a negative number after it are joined to one word.
        joined: list[str] = []
        for word in words:
            # argparse takes -1e-4 for a flag: it knows negative numbers without an exponent only
            if joined and re.fullmatch(r"--[^=]+", joined[-1]) and re.match(r"-[.\d]", word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def parse_args(self, words: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        """As argparse's, after flag files are read; raises ValueError for a word that is not an argument."""
        args, rest = self.parse_known_args(read_flagfiles(words), namespace)
        if rest:
            raise self.unknown(rest[0])
        return args

    def unknown(self, word: str) -> ValueError:
        """The error for a word that this command does not know."""
        name, known = word.partition("=")[0].lstrip("-"), [option[2:] for option in self._option_string_actions]
        if not word.startswith("-"):
            said = f"unexpected argument {word!r} (flags are written --name=value)"
        elif any(key.startswith(f"{name}.") for key in known):
            said = f"--{name} is a group of settings; set one of them, for example --{name}.KEY=VALUE"
        else:
            said = f"unknown flag {word.partition('=')[0]}{settings.did_you_mean(name, known, '--')}"
        return ValueError(said)


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
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
        inside = [line for line in lines if not line.strip().startswith(("#", "//"))]
        try:
            words = [*shlex.split("\n".join(inside)), *words]
        except ValueError as error:
            raise ValueError(f"--flagfile {path}: {error}; its words are quoted as in a shell") from error
    return read


def path(text: str) -> str:
    """A path, with ~ as the user's home: in --out=~/a the shell leaves it as it is."""
    if not text.strip():  # an unset variable of the shell; Path("") is the folder that the command runs in
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from error


def boolean(text: str) -> bool:
    """A boolean flag's value."""
    return settings.from_text(text, bool, "")


def ids(text: str) -> list[int]:
    """Token ids written as 1,504."""
    return [int(part) for part in text.split(",")] if text.strip() else []


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of mesh axes written as data=2,tensor=4."""
    return {name.strip(): int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


def number(kind: type, *, at_least: float, below: float = float("inf")) -> Callable[[str], Any]:
    """An argument's type: a number from `at_least` (inclusive) to `below` (exclusive).

    Args:
        kind: int or float.
        at_least: the smallest value.
        below: all values are smaller.
    """

    def read(text: str) -> Any:
        value = kind(text)
        if not at_least <= value < below:  # NaN is not
            limit = "and finite" if below == float("inf") else f"and below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {at_least} {limit}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def mesh(sizes: dict[str, int] | None) -> Any:
    """The mesh that --mesh asks for, by default all devices of several processes along "data"; None for one process.

    Raises: ValueError for axes that are not there, and sizes that do not make up the number of devices.
    """
    # JAX is imported late: help and typing errors do not wait for it.
    from kd_jax.parallel import distributed
    from kd_jax.parallel import mesh as mesh_lib

    if sizes is None:
        return mesh_lib.make() if distributed.several() else None
    unknown = [name for name in sizes if name not in (*mesh_lib.AXES, "slices")]
    if unknown:
        raise ValueError(f"--mesh: {unknown[0]!r} is not an axis; there are {', '.join(mesh_lib.AXES)}")
    return mesh_lib.make(**sizes)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Adds the two ways to give a prompt."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help='what every sample begins with, after BOS where the tokenizer adds it ("The")')
    add("--prompt_ids", type=ids, metavar="1,504", help="the prompt as token ids, as they are")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which of several processes this one is."""
    group = parser.add_argument_group("several processes (srun, mpirun and TPU VMs say all of this themselves)")

    def add(name: str, kind: Any, metavar: str, help: str) -> None:
        group.add_argument(f"--{name}", type=kind, default=PROCESSES[name], metavar=metavar, help=help)

    seconds = number(int, at_least=1)
    add("coordinator_address", str, "HOST:PORT", "where process 0 waits for the others")
    add("num_processes", int, "N", "how many processes there are")
    add("process_id", int, "I", "which of them this is, from 0")
    add("initialization_timeout", seconds, "SECONDS", "to wait for all of them (300)")
    add("heartbeat_timeout", seconds, "SECONDS", "of silence after which a process counts as dead (60)")


def start_processes(args: argparse.Namespace) -> None:
    """Joins the processes of this run, where there are several; before anything else is asked of JAX."""
    from kd_jax.parallel import distributed

    processes = cluster.find({name: getattr(args, name) for name in cluster.NAMES})
    if processes is None:
        errors.end_on_terminate()  # one of several may be waiting for another, where it cannot be interrupted
    else:
        distributed.start(processes, args.initialization_timeout, args.heartbeat_timeout)


@contextlib.contextmanager
def writing(folder: str | os.PathLike, argv: Sequence[str]) -> Iterator[None]:
    """Holds the folder that a command writes while the block runs; with several processes, process 0 does for all.

    Raises: RunError, in all processes, where another start holds it (kd_jax.storage.lock).
    """
    from kd_jax.parallel import distributed

    with contextlib.ExitStack() as stack:
        # Process 0 alone holds the lock; where it cannot, all processes get its error.
        hold = functools.partial(stack.enter_context, lock.held(folder, command(argv)))
        distributed.once(hold, f"the lock of {folder}")
        yield


def command(argv: Sequence[str]) -> str:
    """What to type for the same again, from the words of sys.argv."""
    # `python -m kd_jax.train` shows up in sys.argv as the path of the file, which does not run from elsewhere
    return shlex.join(["python", "-m", f"kd_jax.{Path(argv[0]).stem}", *argv[1:]])


def main(parse: Callable[[Sequence[str]], argparse.Namespace], work: Callable[[argparse.Namespace], None],
         argv: Sequence[str]) -> int:  # fmt: skip
    """Runs a command and returns its exit code.

    0: done. 2: an error that the user can mend, in one line on stderr. 75: other processes are not there. 130:
    interrupted. 141: stdout was closed, as by `| head`; nothing is printed. 1: any other, in one of several processes
    (with one it is raised), with a traceback.

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
        return _main(parse, work, argv)
    except KeyboardInterrupt:  # before the work: there is nothing to resume
        print("interrupted", file=sys.stderr)
        return 130


def _main(parse: Callable[[Sequence[str]], argparse.Namespace], work: Callable[[argparse.Namespace], None],
          argv: Sequence[str]) -> int:  # fmt: skip
    try:
        args = parse(argv[1:])
    except (ValueError, OSError) as error:
        return _fail("", error)
    from kd_jax.parallel import distributed  # JAX: a typing error need not wait for it

    try:
        work(args)
        # Before the output is flushed: a process that ends early would leave the others waiting.
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
    # not 2: where a process came too late, starting all again puts it right, and Kubernetes does so
    return os.EX_TEMPFAIL if isinstance(error, errors.Absent) else 2
