"""Run folders: what a run was, whether it may carry on, and its rows of numbers."""

import collections
import contextlib
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

import kd_jax
from kd_jax.runs.config import flatten
from kd_jax.storage import files
from kd_jax.storage.errors import RunError

# All that a run writes into its folder, and so all that --overwrite removes.
NAMES = (
    "config.json", "manifest.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "stages", "evaluation",
    "report.html", "figures",
)  # fmt: skip

_AGAIN = "; --overwrite starts the run again"


class Run(NamedTuple):
    """An open run folder."""

    folder: Path
    resumed: bool
    finished: bool


def open_run(
    workdir: str | os.PathLike, config: Mapping[str, Any], *, argv: Sequence[str], overwrite: bool = False,
    staged: bool = False,
) -> Run:  # fmt: skip
    """Makes the run folder, or opens it again where it holds a run of this same config.

    A folder with another config, or with files but no run, is refused (RunError). `overwrite` starts the run
    again: it removes what a run writes (NAMES) and leaves every other file alone. A `staged` run takes another config
    of the same experiment, as its stages know what depends on what; the differences are printed.
    """
    folder = Path(workdir)
    # through JSON and back, so that it compares equal with what is read from the file
    wanted = json.loads(files.dump(dict(config)))
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; --workdir has to be a folder")
    try:
        exists = (folder / "config.json").exists()
        if not exists and folder.is_dir():
            # a .tmp of ours is what a kill during the very first write leaves
            foreign = sorted(set(os.listdir(folder)) - {f"{name}.tmp" for name in NAMES})
            if foreign:
                raise RunError(
                    f"{folder} is not empty and holds no run (no config.json, but {foreign[0]}); "
                    "choose another --workdir"
                )
        if exists and not overwrite:
            changes = _changes(files.read_json(folder / "config.json", hint=_AGAIN), wanted)
            if changes and not (staged and not any(change.startswith("  experiment:") for change in changes)):
                raise RunError(
                    f"{folder} holds a run with another config:\n"
                    + "\n".join(changes)
                    + "\nchoose another --workdir, or start this one again with --overwrite"
                )
            if changes:
                print(f"{folder}: the config has changed; what depends on it is made anew\n" + "\n".join(changes))
                files.write_json(folder / "config.json", wanted)
                (folder / "manifest.json").unlink(missing_ok=True)
            return _reopen(folder, config, argv)
        folder.mkdir(parents=True, exist_ok=True)
        if exists:
            # config.json stays until it is replaced: without it, a kill here would leave a folder that is refused
            for name in NAMES[1:]:
                files.remove(folder / name)
        files.write_json(folder / "config.json", wanted)
        files.write_json(folder / "manifest.json", _manifest(config, argv))
    except OSError as error:
        raise RunError(f"cannot write the run folder {folder}: {error}") from error
    return Run(folder, resumed=False, finished=False)


class Stop:
    """Whether somebody has asked for the end, by Ctrl-C or SIGTERM: long work looks at `asked` where it can save.

    As a context manager it takes over both signals; a second one interrupts at once.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Clock:
    """Seconds by what they were spent on: `with clock("data"): ...`. What is inside another counts there alone."""

    def __init__(self):
        self.seconds: collections.Counter[str] = collections.Counter()
        self._names: list[str] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._names:
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


def finish(run: Run, **extra: Any) -> None:
    """Marks the run finished in its manifest, with `extra` (timings and the like) beside it."""
    path = run.folder / "manifest.json"
    files.write_json(path, {**files.read_json(path, hint=_AGAIN), **extra, "status": "finished", "finished": _now()})


def _reopen(folder: Path, config: Mapping[str, Any], argv: Sequence[str]) -> Run:
    path = folder / "manifest.json"
    if path.exists():
        manifest = files.read_json(path, hint=_AGAIN)
        if manifest.get("status") == "finished":
            return Run(folder, resumed=True, finished=True)
        manifest.setdefault("resumed", []).append(_now())
    else:
        manifest = _manifest(config, argv)  # killed between the two first files
    files.write_json(path, manifest)
    return Run(folder, resumed=True, finished=False)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each field that differs."""
    old, new = flatten(old), flatten(new)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        was, now = (files.dump(side[key]) if key in side else "(not set)" for side in (old, new))
        if was != now:
            changes.append(f"  {key}: {was} -> {now}")
    return changes


def _manifest(config: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    devices = jax.devices()
    return {
        "status": "running",
        "started": _now(),
        "command": _command(argv),
        "seed": config.get("seed"),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "kd_jax": kd_jax.__version__,
        },
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": _git_commit(),
    }


def _command(argv: Sequence[str]) -> str:
    program, *rest = argv or ["kd_jax/train.py"]
    # `python -m kd_jax.train` shows up in sys.argv as the path of the file, which does not run from elsewhere
    start = ["python", "-m", f"kd_jax.{Path(program).stem}"]
    return shlex.join([*start, *rest])


def _git_commit() -> str | None:
    package = Path(kd_jax.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # an installed copy can lie inside some other project's repository: only a tracked one counts
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
