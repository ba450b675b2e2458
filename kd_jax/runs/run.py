"""Run folders: making, resuming and finishing a run, and its manifest; stopping on signals; a clock."""

import collections
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

import kd_jax
from kd_jax.runs.command_line import command
from kd_jax.runs.config import flatten
from kd_jax.storage import errors, files, lock
from kd_jax.storage.errors import RunError

# Written with some settings only: what another config has left must not be shown as this one's.
EXTRAS = ("answers.jsonl", "embedding_map.jsonl")
# Everything that a run writes into its folder; --overwrite removes exactly this.
NAMES = (
    "config.json", "manifest.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "stages", "evaluation",
    "report.html", "figures", "recall.npz", *EXTRAS,
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
    """Makes the run folder, or opens it again where it holds a run of the same config.

    Args:
        config: plain values, for config.json.
        argv: the command line, for the manifest.
        overwrite: start the run again: remove what a run writes (NAMES), and leave every other file alone.
        staged: take another config of the same experiment, as stages know what depends on what; prints what differs.
    Raises: RunError for a folder with a run of another config, or with files but no run; OSError where it cannot be
        written.
    """
    files.without_brackets(workdir)
    folder = Path(workdir)
    # through JSON and back, to compare with the content of the file
    wanted = json.loads(files.dump(dict(config)))
    with errors.writing(folder):
        exists = (folder / "config.json").exists()
        if not exists and folder.is_dir():
            # a kill during the very first write leaves a .tmp
            foreign = sorted(set(lock.contents(folder)) - {f"{name}.tmp" for name in NAMES})
            if foreign:
                raise RunError(f"{folder} holds no run (no config.json, but {foreign[0]}); choose another --workdir")
        if exists and not overwrite:
            old = files.read_json(folder / "config.json", hint=_AGAIN)
            advice = "choose another --workdir, or start this one again with --overwrite"
            was, now = (side.get("experiment") for side in (old, wanted))
            if was != now:  # other settings altogether
                raise RunError(f"{folder} holds a run of {was}, not of {now}; {advice}")
            changes = _changes(old, wanted)
            if changes and not staged:
                raise RunError("\n".join([f"{folder} holds a run with another config:", *changes, advice]))
            if changes:
                print(f"{folder}: the config has changed; stages that depend on it run again\n" + "\n".join(changes))
                # With other settings the run is not finished, and has no results. The config comes last: a kill in
                # between must not leave it beside a manifest that says "finished".
                for name in ("manifest.json", "metrics.jsonl", *EXTRAS):
                    files.remove(folder / name)
                files.write_json(folder / "config.json", wanted)
            return _reopen(folder, config, argv)
        folder.mkdir(parents=True, exist_ok=True)
        if exists:
            # config.json stays until it is replaced: a kill here must not leave a folder that looks foreign
            for name in NAMES[1:]:
                files.remove(folder / name)
        # config.json first: it is what says that a folder holds a run.
        files.write_json(folder / "config.json", wanted)
        files.write_json(folder / "manifest.json", _manifest(config, argv))
    return Run(folder, resumed=False, finished=False)


class Stop:
    """Catches Ctrl-C and SIGTERM while its block runs: long work checks `asked` where it can save and stop.

    A second signal interrupts at once.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self._before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        # The earlier handlers come back, whatever they were.
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, *_) -> None:
        # Whoever sends a second signal does not want to wait for a checkpoint.
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Clock:
    """Counts seconds by activity: `with clock("data"): ...`. Time in an inner block counts for that block only."""

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
            # An inner block's time is taken off the outer one: activities add up to the total.
            self.seconds[self._names[-1]] += now - self._since
        self._since = now


def finish(run: Run, **extra: Any) -> None:
    """Marks the run finished in its manifest, and adds `extra` to it."""
    path = run.folder / "manifest.json"
    manifest = files.read_json(path, hint=_AGAIN)
    files.write_json(path, {**manifest, **extra, "status": "finished", "finished": timestamp()})


def _reopen(folder: Path, config: Mapping[str, Any], argv: Sequence[str]) -> Run:
    path = folder / "manifest.json"
    if path.exists():
        manifest = files.read_json(path, hint=_AGAIN)
        if manifest.get("status") == "finished":
            return Run(folder, resumed=True, finished=True)
        manifest.setdefault("resumed", []).append(timestamp())
    else:
        manifest = _manifest(config, argv)  # a kill came between the first two files
    files.write_json(path, manifest)
    return Run(folder, resumed=True, finished=False)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each field that differs."""
    old, new = flatten(old), flatten(new)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        # Compared as text: NaN is not equal to itself.
        was, now = (files.dump(side[key]) if key in side else "(not set)" for side in (old, new))
        if was != now:
            changes.append(f"  {key}: {was} -> {now}")
    return changes


def _manifest(config: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    return {"status": "running", "started": timestamp(), "seed": config.get("seed"), **origin(command(argv))}


def origin(command: str, *modules: ModuleType) -> dict[str, Any]:
    """What numbers depend on beside their settings, for a manifest: command, versions, device and commit.

    Args:
        command: what was typed.
        modules: further ones whose versions matter.
    """
    devices = jax.devices()
    versions = {module.__name__: module.__version__ for module in (jax, jaxlib, np, kd_jax, *modules)}
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None where it is no repository."""
    package = Path(kd_jax.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # an installed copy may lie inside another project's repository: only tracked code counts
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def timestamp() -> str:
    """The time in UTC, as manifests have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
