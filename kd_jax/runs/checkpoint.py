"""Checkpoints, through orbax: a step is there whole or not at all.

A step's number says how much is finished; steps are ordered as numbers, never by name or time. What a step holds are
named items, a folder each: trees of arrays, which can be restored onto other devices than they were saved from, and
plain values as JSON, which can be read without any. Beside them a step has the fingerprint of each item, to which what
is read is held: bytes that have changed on the disk are no weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kd_jax.runs.fingerprint import fingerprint
from kd_jax.storage import untrusted
from kd_jax.storage.errors import RunError, number
from kd_jax.storage.files import read_json

# The item of a step that has the fingerprints of the others.
_SUMS = "sums"
# What goes wrong in orbax's threads is raised by what waits for them; that it is also logged, with a traceback, helps
# nobody.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and "orbax" in record.getMessage()))


def _quiet(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """`report` without the writes that end once a save has failed, and nobody waits for them any more."""

    def said(unraisable):
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            report(unraisable)

    return said


sys.unraisablehook = _quiet(sys.unraisablehook)


class Checkpoints:
    """The checkpoints in one folder. Use as a context manager: leaving waits for what is being written.

    Args:
        folder: where they are, or will be.
        keep: how many of the last ones stay; None for all.
        best: name of a metric of `save`; the step with the least of it stays as well.
        background: `save` returns once the values are copied, and they are written while the program goes on. An error
            then comes from the next call, or on leaving.
    """

    def __init__(self, folder: Path | str, *, keep: int | None = None, best: str | None = None, background=False):
        policies = [checkpoint_managers.LatestN(keep)]
        self._best = best
        if best is not None:
            policies.append(
                checkpoint_managers.BestN(get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            create=True, enable_async_checkpointing=background, cleanup_tmp_directories=True,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        )  # fmt: skip
        if best is not None:
            options.best_fn = self._goodness  # else the metrics stay in memory, and after a restart no step is the best
        self._folder = Path(folder).absolute()  # orbax refuses relative paths
        for there in self._folder.glob("[0-9]*"):
            if there.name.isdigit():  # else it is what a kill has left
                _check_metrics(there)
        with _opening(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        if keep is not None:
            self._drop_leftovers(keep)

    def _drop_leftovers(self, keep: int) -> None:
        """Removes what was to go when a kill came, whole or in part; orbax looks only once it saves again."""
        steps = self.steps()
        kept = set(steps[-keep:])
        if self._best is not None and steps:
            # of equals orbax keeps the last
            kept.add(max(steps, key=lambda step: (self._goodness(self._manager.metrics(step) or {}), step)))
        for step in steps:
            if step not in kept:
                self._manager.delete(step)

    def _goodness(self, metrics: dict[str, float]) -> float:
        return -metrics.get(self._best, math.inf)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        with _writing(self._folder):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def wait(self) -> None:
        """Returns once all that was saved is written; raises what went wrong with it."""
        with _writing(self._folder):
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps that were saved whole, ascending. What a killed save left behind is not among them."""
        return sorted(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints beyond `step`."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def folder(self, step: int) -> Path:
        """Where a step is, or will be."""
        return self._folder / str(step)

    def save(self, step: int, trees: dict[str, Any], values: dict[str, Any] | None = None, metrics=None) -> None:
        """Save pytrees of arrays, and plain values as the item `about`, as `step`. Raises where it cannot be written.

        Args:
            metrics: a dict of floats to go by in what stays.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        sums = {name: fingerprint(tree) for name, tree in trees.items()}
        if values is not None:
            items["about"], sums["about"] = ocp.args.JsonSave(values), _digest(values)
        if self._best is not None:
            metrics = metrics or {}  # orbax warns of none at all
            sums["metrics"] = _digest(metrics)
        items[_SUMS] = ocp.args.JsonSave(sums)
        with _writing(self._folder):
            if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True):
                raise OSError(f"checkpoint {step} was not written to {self._folder}")

    def load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Items of `step`; each of `like` is a tree of arrays, or abstract arrays, of its structure and shardings.

        Raises RunError where they are not what was saved.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        with _reading(self.folder(step)):
            untrusted.check_json(self.folder(step))
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        self._check(step, {name: fingerprint(tree) for name, tree in found.items()})
        return found

    def values(self, step: int) -> dict[str, Any]:
        """The plain values that were saved with `step`. Raises RunError where they are not those."""
        with _reading(self.folder(step)):
            untrusted.check_json(self.folder(step) / "about")
            found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            if not isinstance(found, dict):
                raise ValueError("about is not a JSON object")
        self._check(step, {"about": _digest(found)})
        return found

    def _check(self, step: int, found: dict[str, str]) -> None:
        with _reading(self.folder(step)):
            saved = sums(self.folder(step))
        for name, value in found.items() if saved is not None else ():
            if saved.get(name) != value:
                raise _damaged(self.folder(step), f"{name} is not what was saved")


def sums(folder: Path) -> dict[str, str] | None:
    """The fingerprint of each item of a step that was saved in `folder`; None where it was saved without any.

    Raises RunError, naming the file, where it holds no object.
    """
    path = folder / _SUMS / "metadata"  # orbax's name for an item that is JSON
    return read_json(path) if path.exists() else None


def _check_metrics(folder: Path) -> None:
    """Raises RunError where the metrics of a step are not those it was saved with: by them steps stay or go."""
    path = folder / "metrics" / "metrics"  # orbax's name
    with _reading(folder):
        saved, there = sums(folder), read_json(path) if path.exists() else None
    if saved is not None and there is not None and saved.get("metrics") != _digest(there):
        raise _damaged(folder, "its metrics are not what was saved")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What went wrong in the block becomes an error that names the folder, with the operating system's number."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise no narrower class
        code = number(error)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(folder)) from error


@contextlib.contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """As `_writing`; what the operating system has no part in is damage."""
    try:
        with _writing(folder):
            yield
    except OSError:
        raise
    except Exception as error:  # orbax and tensorstore raise no narrower class
        raise _damaged(folder, f"{type(error).__name__}: {str(error)[:200]}") from error


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise no narrower class
        raise _damaged(folder, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"the checkpoint {folder} is damaged ({why}); remove it, and the same command makes it again")
