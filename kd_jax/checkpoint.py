"""Checkpoints, through orbax: a step is there whole or not at all.

A step's number says how much is finished; steps are ordered as numbers, never by name or time.
"""

from pathlib import Path

import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints in one folder. Use as a context manager: leaving waits for what is being written."""

    def __init__(self, folder: Path | str):
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        # orbax refuses relative paths.
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that were saved whole, ascending. What a killed save left behind is not among them."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree) -> None:
        """Save a pytree of arrays as `step`. Raises where it cannot be written."""
        if not self._manager.save(step, args=ocp.args.StandardSave(tree), force=True):
            raise OSError(f"checkpoint {step} was not written to {self._manager.directory}")

    def load(self, step: int, like):
        """The tree of `step`; `like` is a tree of arrays or abstract arrays of its structure."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(like))
