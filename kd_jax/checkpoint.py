"""Checkpoints, through orbax: a step is there whole or not at all.

A step's number says how much is finished; steps are ordered as numbers, never by name or time. What a step holds are
named items, a folder each: trees of arrays, which can be restored onto other devices than they were saved from, and
plain values as JSON, which can be read without any.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


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
        # orbax refuses relative paths.
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def _goodness(self, metrics: dict[str, float]) -> float:
        return -metrics[self._best]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Returns once all that was saved is written; raises what went wrong with it."""
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
        return Path(self._manager.directory) / str(step)

    def save(self, step: int, trees: dict[str, Any], values: dict[str, Any] | None = None, metrics=None) -> None:
        """Save pytrees of arrays, and plain values as the item `about`, as `step`. Raises where it cannot be written.

        Args:
            metrics: a dict of floats to go by in what stays.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        if values is not None:
            items["about"] = ocp.args.JsonSave(values)
        if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True):
            raise OSError(f"checkpoint {step} was not written to {self._manager.directory}")

    def load(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Items of `step`; each of `like` is a tree of arrays, or abstract arrays, of its structure and shardings."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())

    def values(self, step: int) -> dict[str, Any]:
        """The plain values that were saved with `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
