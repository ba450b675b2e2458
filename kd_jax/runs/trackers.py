"""Where the numbers of a run also go, if asked: TensorBoard files, Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

# The module each needs, and what to install for it. Neither is needed for a run without it.
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not known, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"config.train.trackers: {name!r} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(f"config.train.trackers: {name!r} needs the package {TRACKERS[name]}: pip install it")


def start(names: Sequence[str], folder: Path) -> Callable[[int, dict[str, float]], None]:
    """A function (step, values) that hands numbers to each of `names`."""
    each = [{"tensorboard": _tensorboard, "wandb": _wandb}[name](folder) for name in names]

    def track(step: int, values: dict[str, float]) -> None:
        for one in each:
            one(step, values)

    return track


def _tensorboard(folder: Path) -> Callable[[int, dict[str, float]], None]:
    import tensorboardX

    writer = tensorboardX.SummaryWriter(str(folder / "tensorboard"))

    def track(step, values):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # what a killed run has seen stays

    return track


def _wandb(folder: Path) -> Callable[[int, dict[str, float]], None]:
    import wandb

    # the folder's name is the run's: a resumed run goes on in its own
    run = wandb.init(project="kd_jax", id=folder.name, name=folder.name, dir=str(folder), resume="allow")
    return lambda step, values: run.log(values, step=step)
