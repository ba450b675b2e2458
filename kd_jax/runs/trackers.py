"""Other places where the numbers of a training are logged, if asked: TensorBoard files, Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax.storage.files import write_text

# The package each needs. Neither is needed for a run without it.
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not known, or whose package is not installed."""
    for name in names:
        # find_spec imports nothing: a tracker's package may take seconds to import.
        if importlib.util.find_spec(TRACKERS.get(name, "none such")) is None:
            known = ", ".join(f"{name} (package {package})" for name, package in TRACKERS.items())
            raise ValueError(f"config.train.trackers: {name!r} is not one of {known} that is installed here")


class Tracker:
    """Logs the numbers of one training to each of `names`, as a run of its own even where several are trained at once.

    Args:
        names: out of TRACKERS.
        folder: of the training. Its name is the run's; TensorBoard's files, and W&B's id and files, are in it.
    """

    def __init__(self, names: Sequence[str], folder: Path):
        starts = {"tensorboard": _tensorboard, "wandb": _wandb}
        self._loggers = [starts[name](folder) for name in names]

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step."""
        for log, _ in self._loggers:
            log(step, values)

    def finish(self) -> None:
        """Ends the runs: what follows in this process does not belong to them."""
        for _, end in self._loggers:
            end()


Logger = tuple[Callable[[int, Mapping[str, float]], Any], Callable[[], Any]]


def _tensorboard(folder: Path) -> Logger:
    import tensorboardX

    writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # what a killed run has logged stays

    return log, writer.close


def _wandb(folder: Path) -> Logger:
    import wandb

    # An id of its own, kept with the training: a resumed training continues its run, and trainings of the same name in
    # two run folders are two.
    path = folder / "wandb_id.txt"
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    # create_new: several students that train together each have a run in this process
    run = wandb.init(
        project="kd_jax", id=path.read_text(encoding="utf-8"), name=folder.name, dir=str(folder), resume="allow",
        reinit="create_new",
    )  # fmt: skip
    return lambda step, values: run.log(dict(values), step=step), run.finish
