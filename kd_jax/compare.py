"""Several finished runs of one experiment on one page: `kd-jax compare RUN RUN ... --out FOLDER`.

The page has all frontiers on one axis, the settings that differ, and each student beside that of the first run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_jax.runs import command_line

# Modules by the experiment's name. Each has comparable(folder), which returns a kd_jax.reporting.run_comparison.Run.
COMPARABLE = {
    "gmm": "kd_jax.gmm.findings",
    "gmm_frontier": "kd_jax.gmm.report.frontier",
    "lm": "kd_jax.lm.report.comparison",
}

# Lines of the table that are printed.
LONGEST = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, whose first word is the program's name, and returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    parser = command_line.Parser(prog="python -m kd_jax.compare", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=command_line.path, metavar="RUN", help="run folders; differences are from the first")
    add("--out", type=command_line.path, metavar="FOLDER", required=True, help="folder of compare.html and figures/")
    return command_line.main(parser.parse_args, _compare, argv)


def _compare(args: argparse.Namespace) -> None:
    for line in write(args.runs, args.out, names=short_names(args.runs)):
        print(line)


def short_names(folders: Sequence[str]) -> list[str]:
    """The folders' own names; as many of their parents' as it takes to tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def write(folders: Sequence[str | os.PathLike], out: str | os.PathLike, *, names: Sequence[str]) -> list[str]:
    """Writes the page of several runs.

    Args:
        folders: finished runs of one experiment, at least two; differences are from the first.
        out: folder of the page.
        names: what the page calls each of them.
    Returns: lines to print: which runs are not finished, the table of students, and the page's path.
    Raises: FileNotFoundError, ValueError or RunError, before anything is written.
    """
    from kd_jax import report
    from kd_jax.reporting import run_comparison, tables

    if len(set(map(os.path.abspath, folders))) < max(2, len(folders)):
        raise ValueError("compare needs two or more run folders, none of them twice")
    kinds = {str(folder): report.experiment(Path(folder)) for folder in folders}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{folder} is {kind}" for folder, kind in kinds.items())
        raise ValueError(f"only runs of one experiment can be compared: {listed}")
    module = importlib.import_module(COMPARABLE[next(iter(kinds.values()))])
    # All runs are read before the page is begun.
    runs = [module.comparable(Path(folder))._replace(name=name) for folder, name in zip(folders, names, strict=True)]
    command = shlex.join(["kd-jax", "compare", *map(str, folders), "--out", str(out)])
    path, table = run_comparison.write(runs, Path(out), command)
    lines = tables.to_text(table)
    left = lines[LONGEST:]
    more = [f"... {len(left)} more lines in {path.parent / 'figures' / table.name}.csv"] if left else []
    return [*run_comparison.unfinished(runs), *lines[:LONGEST], *more, f"page: {path}"]


if __name__ == "__main__":
    sys.exit(main())
