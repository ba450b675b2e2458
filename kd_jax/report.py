"""Run folders -> figures and one HTML page each: `python -m kd_jax.report FOLDER...`.

The experiment is read from the folder's config.json. Where both mixture and language-model runs are named, the language
models' pages also show the mixtures' frontiers.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_jax.runs import command_line
from kd_jax.storage import files

# Modules by the experiment's name, so that one experiment's report does not import the others. Each has
# write(folder, note=TEXT), which returns the path of a page that begins with the note, and may have result(folder), a
# finished run's result in a few lines.
PAGES = {
    "gmm": "kd_jax.gmm.report.page",
    "gmm_frontier": "kd_jax.gmm.report.frontier",
    "lm": "kd_jax.lm.report.page",
}


def write(folder: str | Path) -> Path:
    """Writes the page and figures of a run at its end, and returns the page's path; raises as `write_all` does."""
    return write_all([folder], at_end=True)[0]


def write_all(folders: Sequence[str | Path], *, at_end: bool = False) -> list[Path]:
    """Writes the page and figures of each run, and returns the pages' paths in the same order.

    Pages of runs that are not finished say so, unless they are `at_end`: a run is finished when it has its page.

    Raises FileNotFoundError, ValueError or RunError, naming the file; no page is written unless every folder is a run.
    """
    # All folders are looked at first: no page is written unless all of them are runs.
    runs = [(Path(folder), experiment(Path(folder))) for folder in folders]
    names = {name for _, name in runs}
    modules = {name: importlib.import_module(PAGES[name]) for name in names}
    mixtures = [modules["gmm"].beside(folder) for folder, name in runs if name == "gmm"] if "lm" in names else []
    extra = {"lm": {"beside": mixtures}}
    notes = ["" if at_end else _unfinished(folder) for folder, _ in runs]
    return [
        modules[name].write(folder, note=note, **extra.get(name, {}))
        for (folder, name), note in zip(runs, notes, strict=True)
    ]


def _unfinished(folder: Path) -> str:
    from kd_jax.reporting import page  # here, as it takes a second, and --help needs none of it

    return page.unfinished(str(folder), page.read_json(folder / "manifest.json"))


def result(folder: str | Path) -> list[str]:
    """A finished run in a few lines: its finding and a short table; [] for an experiment without such a summary."""
    module = importlib.import_module(PAGES[experiment(Path(folder))])
    return module.result(folder) if hasattr(module, "result") else []


def experiment(folder: Path) -> str:
    """The name of the experiment that a folder is a run of; raises FileNotFoundError or ValueError, fit to print."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run folder: {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: it is not a run folder")
    name = files.read_json(path, ValueError).get("experiment")
    if not isinstance(name, str) or name not in PAGES:
        raise ValueError(f'{path}: "experiment" is {name!r}; it has to be one of: {", ".join(sorted(PAGES))}')
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of each run folder; the first word is the program's name. Returns the exit code."""
    argv = list(sys.argv if argv is None else argv)
    parser = command_line.Parser(prog="python -m kd_jax.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders (config.json, metrics.jsonl)")
    return command_line.main(parser.parse_args, _report, argv)


def _report(args: argparse.Namespace) -> None:
    for folder, path in zip(args.folders, write_all(args.folders), strict=True):
        print(path)
        if note := _unfinished(folder):
            print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
