"""A run made of stages, each in a folder named by a digest of everything that its result depends on.

    WORKDIR/stages/NAME-KEY/stage.json    what it depends on, whether it is finished, how long it took

The key is a digest of the stage's settings and of the keys of its inputs. So finished stages are reused, a changed
setting makes new folders for exactly the stages that depend on it, and changing it back finds the old ones.

With several processes all run each stage, and process 0 writes stage.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.parallel import distributed
from kd_jax.runs import command_line
from kd_jax.runs.run import timestamp
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import read_json, write_json


class Stage(NamedTuple):
    """A piece of a run.

    Attributes:
        name: may have slashes; its first part is the group that --stages selects.
        settings: plain values that its result depends on, beside its inputs.
        inputs: names of the stages whose folders it reads.
        work: called with its own folder and a dict of its inputs' folders; the folder still has what a killed start
            has finished. Returns plain values for stage.json.
        cost: what the experiment's --dry_run shows.
        students: the models that it trains, for the experiment.
    """

    name: str
    settings: dict[str, Any]
    inputs: tuple[str, ...]
    work: Callable[[Path, dict[str, Path]], dict[str, Any]]
    cost: Any = None
    students: tuple[Any, ...] = ()

    @property
    def group(self) -> str:
        """The first part of the name, which --stages selects."""
        return self.name.split("/")[0]


def folders(workdir: Path, stages: Iterable[Stage]) -> dict[str, Path]:
    """The folder of each stage, by name. `stages` are in order: inputs before the stages that read them.

    Args:
        workdir: the run folder.
    """
    keys: dict[str, str] = {}
    for stage in stages:
        # An input enters by its key: a change far up gives all stages below it other folders.
        origin = {"name": stage.name, "settings": stage.settings, "inputs": {name: keys[name] for name in stage.inputs}}
        keys[stage.name] = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    # Eight digits are enough to tell the versions of one stage apart, and the folder stays readable.
    return {name: Path(workdir) / "stages" / f"{name}-{key[:8]}" for name, key in keys.items()}


def record(folder: Path) -> dict[str, Any] | None:
    """The content of a stage's stage.json; None where it has not begun. Raises RunError for a damaged file."""
    path = folder / "stage.json"
    if not path.exists():
        return None
    there = read_json(path, needs={"status": str, "starts": int, "seconds": int | float}, hint=again(folder))
    if there["status"] == "finished" and "result" not in there:
        raise RunError(f"{path} says that the stage is finished, but has no result{again(folder)}")
    return there


def finished(folder: Path) -> bool:
    """Whether the stage of this folder is finished."""
    there = record(folder)
    return there is not None and there["status"] == "finished"


def run(workdir: Path, stages: Sequence[Stage], only: Sequence[str] = ()) -> None:
    """Runs the stages that are not finished, in order.

    Args:
        only: groups to run; by default all.
    Raises: ValueError for a group that does not exist, RunError for an input that is neither finished nor selected.
    """
    groups = list(dict.fromkeys(stage.group for stage in stages))
    for name in only:
        if name not in groups:
            raise ValueError(f"--stages: {name!r} is not one of {', '.join(groups)}")
    where = folders(workdir, stages)
    # process 0 decides for all: another process might look when a stage has just finished
    done = distributed.once(lambda: [stage.name for stage in stages if finished(where[stage.name])], "what is finished")
    chosen = [stage for stage in stages if stage.name not in done and (not only or stage.group in only)]
    to_run = {stage.name for stage in chosen}
    for stage in chosen:
        missing = [name for name in stage.inputs if name not in to_run and name not in done]
        if missing:
            group = missing[0].split("/")[0]
            raise RunError(f"stage {stage.name} needs {missing[0]}; run it too (--stages {group})")
    for number, stage in enumerate(chosen, start=1):
        if distributed.leads():
            print(f"stage {number} of {len(chosen)}: {stage.name}", flush=True)
        folder, alone = where[stage.name], contextlib.nullcontext()
        # The runs of a sweep share their stages, and each holds its own folder only.
        if (Path(workdir) / "stages").is_symlink():
            alone = command_line.writing(folder, sys.argv)
        with alone:
            _run(stage, where)
        # No process begins a stage while another still writes its inputs.
        distributed.wait(f"the end of {stage.name}")


def _run(stage: Stage, where: dict[str, Path]) -> None:
    folder = where[stage.name]
    folder.mkdir(parents=True, exist_ok=True)
    there = record(folder) or {
        "name": stage.name, "settings": stage.settings, "inputs": {name: where[name].name for name in stage.inputs},
        "status": "running", "seconds": 0.0, "starts": 0,
    }  # fmt: skip
    # Kept from start to start, so that the time of a stage is that of all its starts.
    there["starts"] += 1
    # Written before the work, so that a start that was killed is counted.
    _write(folder, there)
    began = time.perf_counter()
    try:
        there["result"] = stage.work(folder, {name: where[name] for name in stage.inputs})
        there |= {"status": "finished", "finished": timestamp()}
    finally:
        # the time of a start that was killed outright is unknown and not counted
        there["seconds"] = round(there["seconds"] + time.perf_counter() - began, 3)
        _write(folder, there)


def _write(folder: Path, there: dict[str, Any]) -> None:
    if distributed.leads():
        write_json(folder / "stage.json", there)
