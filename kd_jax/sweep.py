"""A grid of runs: `kd-jax sweep --config CONFIG --workdir FOLDER --config.KEY=VALUE,VALUE ...`.

Every combination of the values is one run, as `kd-jax train` would make it. At the end, one page compares them all.

    FOLDER/runs/learning_rate=0.001/    a run
    FOLDER/stages/                      the stages of all runs of language models: those that no swept setting reaches
                                        are made once
    FOLDER/compare.html                 the page

The same command resumes a sweep that was stopped; with more values it adds runs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kd_jax import compare, train
from kd_jax.runs import command_line, settings
from kd_jax.runs import config as config_lib
from kd_jax.storage import errors, files

_EPILOG = """Values are separated by commas: --config.train.learning_rate=1e-3,3e-3. Text with a comma is put in quotes.
For a setting that is a tuple, each value is put in brackets: '--config.taus=[0.8],[0.8,1.0]'. Without brackets it is
one tuple for all runs, as in train."""
# Longest name of a run's folder.
_LONGEST = 100


class Run(NamedTuple):
    """One run of a sweep: its name, its settings, and the words that make it in train."""

    name: str
    config: ConfigDict
    words: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    return command_line.main(_parse, lambda args: _run(args, argv), argv)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m kd_jax.sweep",
        usage="%(prog)s --config CONFIG[:ARG] --workdir FOLDER --config.KEY=VALUE,VALUE ... [flags]",
        description=__doc__, epilog=_EPILOG,
    )  # fmt: skip
    add = parser.add_argument
    add("--workdir", type=command_line.path, metavar="FOLDER", help="the folder of the sweep")
    parser.flag("overwrite", "start all runs again")
    parser.flag("dry_run", "list the runs; nothing is written")
    command_line.add_processes(parser)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    words = command_line.read_flagfiles(words)
    fixed, grid = split(words, config_lib.types(words, train.spec_of))
    # The other flags, and --help, are those of the first run.
    first = [f"{key}={values[0]}" for key, values in grid.items()]
    args = config_lib.parse([*fixed, *first], _parser(), train.spec_of)
    if not args.workdir:
        raise ValueError("--workdir is missing (for example --workdir runs/sweep)")
    if not grid:
        raise ValueError("no setting has several values (for example --config.seed=0,1)")
    args.runs = plan(fixed, grid)
    if (Path(args.workdir) / "config.json").exists():
        raise ValueError(f"{args.workdir} is the folder of a run; choose another --workdir")
    return args


def split(words: Sequence[str], types: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a command line without the settings that have several values, and those values.

    Args:
        words: those after the program's name.
        types: of the settings, by "config.KEY".
    Returns: the other words, and each such setting's values as text, by its flag.
    """
    fixed: list[str] = []
    grid: dict[str, list[str]] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        if flag.startswith("--config.") and not equals and words and not words[0].startswith("--"):
            # --config.KEY VALUE
            text = words.pop(0)
            word = f"{flag}={text}"
        # a bare flag has no text
        listed = flag.startswith("--config.") and "=" in word
        values = split_values(text, types.get(flag.removeprefix("--"), Any)) if listed else []
        if len(values) > 1:
            grid[flag] = values
        else:
            fixed.append(f"{flag}={values[0]}" if values else word)
    return fixed, grid


def split_values(text: str, hint: Any) -> list[str]:
    """The values that a text lists, at commas outside of quotes and brackets; the text itself where it is one value.

    Args:
        text: as it is typed.
        hint: the setting's type. Values of a tuple are in brackets each.
    """
    # A value: a quoted text, a bracket with one level of brackets in it, or any characters but commas.
    pattern = r"\s*(\"[^\"]*\"|'[^']*'|[\[(](?:[^\[\]()]|[\[(][^\[\]()]*[\])])*[\])]|[^,]*)\s*(?:,|$)"
    values = [match[1] for match in re.finditer(pattern, text) if match.start() < len(text)]
    kind, _ = settings.without_none(hint)  # a setting of config.student.train may also be None
    members = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    if not members:
        # quotes around a value, not those inside it or at one of its ends
        bare = [value[1:-1] if re.fullmatch(r"\"[^\"]*\"|'[^']*'", value) else value for value in values]
        return bare if len(values) > 1 or (hint is str and bare != values) else [text]
    if len(values) < 2 or not all(value[:1] in ("[", "(") for value in values):
        return [text]
    # Texts in a tuple are written as a,b without quotes; other tuples as in Python.
    return [value[1:-1] if members[0] is str else f"[{value[1:-1]}]" for value in values]


def plan(fixed: Sequence[str], grid: dict[str, list[str]]) -> list[Run]:
    """The runs of a grid, the last setting's values changing fastest.

    Args:
        fixed: words of the command line that are the same in all runs.
        grid: values by flag, as `split` returns them.
    Raises: ValueError for a value that is not one of its setting, and for values that are the same.
    """
    labels = _labels([flag.removeprefix("--config.") for flag in grid])
    runs: dict[str, Run] = {}
    for values in itertools.product(*grid.values()):
        words = [f"{flag}={value}" for flag, value in zip(grid, values, strict=True)]
        config = config_lib.parse([*fixed, *words], _parser(), train.spec_of).config
        # As it was read: 1e-3 and 0.001 are one value.
        read = config_lib.flatten(config_lib.to_dict(config))
        name = _name({label: read.get(key, "") for key, label in labels.items()})
        if name in runs:
            raise ValueError(f"two runs of the sweep are the same: {name}")
        runs[name] = Run(name, config, [*_config_words(fixed), *words])
    return list(runs.values())


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Each key's shortest end that no other key has."""
    parts = {key: key.split(".") for key in keys}
    ends = {key: [".".join(own[-n:]) for n in range(1, len(own) + 1)] for key, own in parts.items()}
    taken = [end for own in ends.values() for end in own]
    return {key: next((end for end in own if taken.count(end) == 1), key) for key, own in ends.items()}


def _name(values: dict[str, Any]) -> str:
    """The name of a run, which is that of its folder."""
    texts = {key: _text(value) for key, value in values.items()}
    parts = [f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', text)}" for key, text in texts.items()]
    name = ",".join(parts)
    # What does not fit into the name of a folder is told apart by a digest.
    if len(name) > _LONGEST or any(re.search(r"[^A-Za-z0-9_.+-]", text) for text in texts.values()):
        name = f"{name[:_LONGEST]}-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]}"
    return name


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _config_words(fixed: Sequence[str]) -> list[str]:
    """The words that say what the config is."""
    words, kept = list(fixed), []
    while words:
        word = words.pop(0)
        if word.startswith("--config") or word.startswith("--noconfig"):
            kept.append(word)
            if word == "--config":
                kept.append(words.pop(0))
    return kept


def _run(args: argparse.Namespace, argv: list[str]) -> None:
    # Joined before anything asks JAX for its devices, as the checks of the settings do.
    if not args.dry_run:
        command_line.start_processes(args)
    for run in args.runs:
        try:
            train.check(run.config)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
    folder = Path(args.workdir)
    if args.dry_run:
        for number, run in enumerate(args.runs, start=1):
            print(f"run {number} of {len(args.runs)}: {folder / 'runs' / run.name}")
        return
    with command_line.writing(args.workdir, argv):
        if args.overwrite:
            _remove(folder / "stages")
        failed = _carry_out(args.runs, folder, overwrite=args.overwrite)
        _page([run for run in args.runs if run.name not in failed], folder)
    if failed:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise errors.RunError(f"{len(failed)} of {len(args.runs)} runs did not finish:\n{listed}")


def _remove(stages: Path) -> None:
    from kd_jax.parallel import distributed

    distributed.once(lambda: files.remove(stages), "removing the stages")


def _carry_out(runs: Sequence[Run], folder: Path, *, overwrite: bool) -> dict[str, str]:
    """Makes the runs, or what is left of them; returns why runs did not finish, by name."""
    failed = {}
    for number, run in enumerate(runs, start=1):
        train.say(f"run {number} of {len(runs)}: {run.name}")
        workdir = str(folder / "runs" / run.name)
        argv = ["kd_jax/train.py", *run.words, "--workdir", workdir]
        try:
            train.carry_out(run.config, workdir, argv, overwrite=overwrite, shared_stages=folder / "stages")
        except FloatingPointError as error:
            # A learning rate that is too high is a result of a sweep: the other runs go on.
            failed[run.name] = " ".join(str(error).split())
            train.say(f"{run.name} did not finish: {failed[run.name]}")
    return failed


def _page(runs: Sequence[Run], folder: Path) -> None:
    from kd_jax.parallel import distributed

    if len(runs) < 2:
        train.say("fewer than two runs finished, so there is no page that compares them")
        return
    places, names = [folder / "runs" / run.name for run in runs], [run.name for run in runs]
    for line in distributed.once(lambda: compare.write(places, folder, names=names), "the page of all runs"):
        train.say(line)


if __name__ == "__main__":
    sys.exit(main())
