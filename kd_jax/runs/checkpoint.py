"""Checkpoints, through orbax: a step is saved whole or not at all.

A step's number says how much is finished; steps are ordered as numbers, never by name or time. A step consists of named
items, a folder each: trees of arrays, which can be restored onto other devices than they were saved from, and plain
values as JSON. It also has a fingerprint of each item, which is checked on loading: bytes that have changed on the disk
are an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from kd_jax.parallel import distributed
from kd_jax.runs.fingerprint import fingerprint
from kd_jax.storage.errors import REMEDIES, RunError, number
from kd_jax.storage.files import read_json, remove, without_brackets

# The item that holds the fingerprints of the others.
_SUMS = "sums"
# Where orbax's threads log their errors.
_LOGGERS = ("absl", "asyncio")


def _reported_elsewhere(record: logging.LogRecord) -> bool:
    """Whether a log record is not an error in orbax's threads: those are raised in the thread that waits for them."""
    return not (record.exc_info and ("orbax" in record.pathname or "orbax" in record.getMessage()))


class Checkpoints:
    """The checkpoints in one folder. Use as a context manager: it waits for pending writes at its end.

    Args:
        folder: of the checkpoints; made if necessary.
        keep: how many of the last steps to keep; None for all.
        best: name of a metric of `save`; the step with its smallest value is kept as well.
        background: `save` returns once the values are copied, and writes them while the program goes on. An error is
            then raised by the next call, or at the end.
    """

    def __init__(self, folder: Path | str, *, keep: int | None = None, best: str | None = None, background=False):
        # A step stays where any of the policies wants it.
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
            options.best_fn = self._goodness  # else orbax keeps metrics in memory only, and a restart forgets the best
        self._folder = without_brackets(folder)  # orbax refuses relative paths
        for step in self._folder.glob("[0-9]*"):
            if step.name.isdigit():  # other names are left by kills; orbax removes them
                _remove_if_empty(step)
                _check_metrics(step)
        # Before orbax lists the steps: all processes have to see the same ones.
        distributed.wait("empty checkpoints are removed")
        with _naming(self._folder, reading=True):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        if keep is not None:
            self._drop_leftovers(keep)

    def _drop_leftovers(self, keep: int) -> None:
        """Removes steps whose removal a kill has interrupted; orbax itself would do so at the next save."""
        steps = self.steps()
        kept = set(steps[-keep:])
        if self._best is not None and steps:
            # among equal values orbax keeps the last step
            kept.add(max(steps, key=lambda step: (self._goodness(self._manager.metrics(step) or {}), step)))
        for step in steps:
            if step not in kept:
                self._manager.delete(step)

    def _goodness(self, metrics: dict[str, float]) -> float:
        # orbax keeps the largest, and a loss is to be small. A step without the metric is the worst of all.
        return -metrics.get(self._best, math.inf)

    def __enter__(self) -> Checkpoints:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_reported_elsewhere)
        return self

    def __exit__(self, *_) -> None:
        try:
            with _naming(self._folder), contextlib.closing(self._manager):  # close raises a thread's error once more
                self._manager.wait_until_finished()
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).removeFilter(_reported_elsewhere)

    def wait(self) -> None:
        """Waits for pending writes; raises their errors."""
        with _naming(self._folder):
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps that were saved whole, ascending."""
        return sorted(self._manager.all_steps())

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints beyond `step`."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def folder(self, step: int) -> Path:
        """The folder of a step."""
        return self._folder / str(step)

    def save(self, step: int, trees: dict[str, Any], values: dict[str, Any] | None = None, metrics=None) -> None:
        """Saves a step.

        Args:
            trees: pytrees of arrays, by item.
            values: plain values, saved as the item `about`.
            metrics: floats by name, for `best`.
        Raises: OSError where it cannot be written.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        # Of the arrays in memory, before they are written: damage on the way to the disk shows as well.
        sums = {name: fingerprint(tree) for name, tree in trees.items()}
        if values is not None:
            items["about"], sums["about"] = ocp.args.JsonSave(values), _digest(values)
        if self._best is not None:
            metrics = metrics or {}  # orbax warns about None
            sums["metrics"] = _digest(metrics)
        items[_SUMS] = ocp.args.JsonSave(sums)
        with _naming(self._folder):
            # force: which steps are saved is the caller's decision, not that of an interval of orbax's.
            if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True):
                raise OSError(f"checkpoint {step} was not written to {self._folder}")

    def load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Loads items of a step.

        Args:
            like: for each item a tree of arrays, or abstract arrays, with the wanted structure and shardings.
        Raises: RunError where an item is damaged: it differs from its fingerprint, or cannot be read.
        """
        # `like` has the shardings: each device reads its own part.
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        with _naming(self.folder(step), reading=True):
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        # After the values are restored onto their devices: the fingerprint does not depend on the layout.
        self._check(step, {name: fingerprint(tree) for name, tree in found.items()})
        return found

    def values(self, step: int) -> dict[str, Any]:
        """The plain values of a step. Raises RunError where they are damaged."""
        with _naming(self.folder(step), reading=True):
            found = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        self._check(step, {"about": _digest(found)})
        return found

    def _check(self, step: int, found: dict[str, str]) -> None:
        with _naming(self.folder(step), reading=True):
            saved = sums(self.folder(step))
        # A step that was saved without fingerprints cannot be checked.
        for name, value in found.items() if saved is not None else ():
            if saved.get(name) != value:
                raise _damaged(self.folder(step), f"{name} is not what was saved")


def _remove_if_empty(step: Path) -> None:
    """Removes a step without any file, as an interrupted copy leaves it; the step before it is then the last."""
    if distributed.leads() and step.is_dir() and not any(path.is_file() for path in step.rglob("*")):
        print(f"the checkpoint {step} is empty and is removed", file=sys.stderr, flush=True)
        remove(step)


def sums(folder: Path) -> dict[str, str] | None:
    """The fingerprint of each item of the step in `folder`; None for a step saved without. RunError for damage."""
    path = folder / _SUMS / "metadata"  # orbax's name for an item that is JSON
    return read_json(path) if path.exists() else None


def _check_metrics(step: Path) -> None:
    """Raises RunError where the metrics of a step, which decide what stays, are damaged: orbax names no step."""
    path = step / "metrics" / "metrics"  # orbax's name
    if path.exists():
        with _naming(step, reading=True):
            saved, metrics = sums(step), read_json(path)
        if saved is not None and saved.get("metrics") != _digest(metrics):
            raise _damaged(step, "its metrics are not what was saved")


def _digest(values: dict[str, Any]) -> str:
    # Sorted: what is read back may have its keys in another order.
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _naming(folder: Path, *, reading: bool = False) -> Iterator[None]:
    """An error in the block becomes one that names the folder: the operating system's, with its number, or damage.

    Args:
        reading: an error that is neither a full disk nor a missing permission means damage; else it is left alone.
    """
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise no narrower class
        code = number(error)
        if code in REMEDIES or (code is not None and not reading):
            raise OSError(code, os.strerror(code), str(folder)) from error
        if not reading:
            raise
        raise _damaged(folder, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _damaged(folder: Path, why: str) -> RunError:
    return RunError(f"the checkpoint {folder} is damaged ({why}); remove it, and the same command makes it again")
