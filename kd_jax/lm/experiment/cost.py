"""What the stages of a run cost in operations, time and disk space, as upper bounds, and whether there is room."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.lm.experiment.arms import Arm, arms
from kd_jax.lm.experiment.specs import LmSpec, make_mesh
from kd_jax.lm.model import Architecture, flops, frozen
from kd_jax.lm.model.frozen import ALL, Part
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import devices
from kd_jax.parallel.devices import GIB
from kd_jax.runs import stages
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.runs.stages import Stage
from kd_jax.storage.errors import RunError

# Shares of the measured peak rate that the parts of a run reach, for the times of --dry_run.
SHARES = {"training": 0.4, "sampling": 0.2, "scoring": 0.4}


class Cost(NamedTuple):
    """What a stage costs at most.

    Attributes:
        kind: a key of SHARES.
        tokens: that are sampled, scored or learnt from.
        shape: of the model; None where the config does not say it, and then neither flops nor disk are known.
        flops: floating-point operations; a multiplication and an addition are two.
        disk: bytes that stay on disk.
        written: bytes of checkpoints that are written.
        checkpoint: bytes of one of them: float32 weights that are trained, and two moments.
        count: models that are trained by one program.
        teacher: that runs inside the updates, if one does.
        arm: of the students, if it is a training of students.
        top_k: tokens that are recorded at each position, if they are.
        train: of a training, its settings.
        part: of a training, what of the model is trained.
    """

    kind: str
    tokens: int
    shape: Architecture | None
    flops: float = math.nan
    disk: float = math.nan
    written: float = 0.0
    checkpoint: float = 0.0
    count: int = 1
    teacher: Architecture | None = None
    arm: Arm | None = None
    top_k: int | None = None
    train: TrainSpec | None = None
    part: Part = ALL


def sampling(spec: LmSpec, shape: Architecture | None, num_samples: int) -> Cost:
    """The cost of drawing samples.

    Args:
        shape: of the model; None where the config does not say it.
        num_samples: rows of the corpus.
    """
    # At most: samples that end early have fewer.
    tokens = num_samples * spec.sampling.max_length
    # ids as int32 and a few numbers for each row; Parquet packs them somewhat
    return _cost("sampling", spec, shape, tokens, disk=4 * tokens + 40 * num_samples)


def training(
    spec: LmSpec, shape: Architecture | None, *, count: int = 1, arm: Arm | None = None,
    teacher: Architecture | None = None, train: TrainSpec | None = None, part: Part = ALL,
) -> Cost:  # fmt: skip
    """The cost of training `count` models together.

    Args:
        shape: of one model.
        arm: of students.
        teacher: that runs inside the updates.
        train: how they are trained; by default as config.train says.
        part: what of a model is trained. Operations are counted as if it were all: an upper bound.
    """
    train, length = train or spec.train, spec.sampling.max_length
    rows = spec.num_train if arm is None else arm.text.rows or spec.num_train
    sequences = train.updates * train.batch_size or rows * train.epochs
    tokens = count * sequences * length
    validated = count * spec.num_validation * length * train.validations
    # An update is 3 forward passes' worth. A rollout is one more, at the slower rate of sampling.
    rollouts = 0.0 if arm is None else arm.rollouts
    passes = 3 + rollouts * SHARES["training"] / SHARES["sampling"]
    cost = _cost("training", spec, shape, tokens, passes=passes)._replace(
        count=count, arm=arm, teacher=teacher, train=train, part=part
    )
    if shape is None:
        return cost
    updates = sequences // train.batch_size
    saves = train.validations + (updates // train.save_every if train.save_every else 0)
    # Validation is a forward pass; its tokens are not among those learnt from.
    extra = flops.forward_flops(shape, length) * validated
    if teacher is not None:
        extra += flops.forward_flops(teacher, length) * (tokens + validated)
    # a checkpoint has what is trained, in float32, and two moments; at the end all weights are written once more
    trained = jax.eval_shape(lambda: frozen.init(jax.random.key(0), shape, part))
    checkpoint = 12 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    model = 4 * shape.num_parameters
    disk = count * (model + checkpoint * (train.keep + 1) * train.keep_checkpoints)
    return cost._replace(
        flops=cost.flops + extra, disk=disk, written=count * (saves * checkpoint + model),
        checkpoint=count * checkpoint,
    )  # fmt: skip


def copying(spec: LmSpec, shape: Architecture | None, num_samples: int) -> Cost:
    """The cost of reading rows of data, or choosing among samples that are there: disk space, and next to no time."""
    return sampling(spec, shape, num_samples)._replace(tokens=0, flops=0.0)


def scoring(spec: LmSpec, shape: Architecture | None, top_k: int) -> Cost:
    """The cost of recording the teacher's top_k tokens at each position of a corpus.

    Args:
        shape: of the teacher; None where the config does not say it.
        top_k: tokens at a position.
    """
    tokens = (spec.num_train + spec.num_validation) * spec.sampling.max_length
    return _cost("scoring", spec, shape, tokens, disk=4 * tokens * (1 + top_k))._replace(top_k=top_k)


def evaluation(spec: LmSpec, shape: Architecture | None, student: Architecture | None) -> Cost:
    """The cost of scoring every model's samples under p*, by far the largest part, and of answers that are checked.

    Args:
        shape: of p*.
        student: whose answers are sampled.
    """
    groups = arms(spec)
    cooled = sum(not spec.cooled_arms or arm.name in spec.cooled_arms for arm in groups)
    students = spec.seeds * (len(groups) - cooled + cooled * len(spec.evaluation.sample_temperatures))
    models = students + len({arm.sampler for arm in groups if arm.sampler is not None})
    # Agreement scores p* on the validation rows, too.
    rows = spec.teachers * models * spec.num_samples + (spec.num_recall if spec.evaluation.agreement else 0)
    tokens = rows * spec.sampling.max_length
    cost = _cost("scoring", spec, shape, tokens, disk=8 * tokens)
    prompts = spec.instruct.num_validation + spec.instruct.num_test
    if not prompts or shape is None or student is None:
        return cost
    answers = prompts * spec.instruct.samples_per_prompt * len(spec.instruct.sample_temperatures)
    # p* answers too. Operations of sampling are counted as those of scoring that take as long.
    own = spec.teachers * spec.seeds * len(groups) * flops.forward_flops(student, spec.sampling.max_length)
    extra = (own + flops.forward_flops(shape, spec.sampling.max_length)) * answers * spec.sampling.max_length
    return cost._replace(flops=cost.flops + extra * SHARES["scoring"] / SHARES["sampling"])


def _cost(
    kind: str, spec: LmSpec, shape: Architecture | None, tokens: int, *, passes: float = 1.0, disk: float = math.nan
) -> Cost:
    if shape is None:
        return Cost(kind, tokens, None)
    return Cost(kind, tokens, shape, passes * flops.forward_flops(shape, spec.sampling.max_length) * tokens, disk)


@functools.cache
def writing_rate() -> float:
    """Bytes per second of writing checkpoints, measured here in two seconds, where temporary files go."""
    # half a GiB: disks and caches take the first few MiB at once, which would promise too much
    tree = {str(i): jax.random.normal(jax.random.key(i), (1 << 24,)) for i in range(8)}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(0, {"weights": jax.tree.map(lambda leaf: leaf[:1], tree)})  # compiles what it needs
        began = time.perf_counter()
        checkpoints.save(1, {"weights": tree})
        checkpoints.wait()
        return sum(leaf.nbytes for leaf in tree.values()) / (time.perf_counter() - began)


def show(dtype: str, costs: dict[str, Cost], finished: Callable[[str], bool]) -> None:
    """Prints the costs of stages on this machine, at most.

    Args:
        dtype: of matrix products, whose rate is measured.
        costs: by name of the stage.
        finished: whether the stage of a name is finished; finished ones take no more time.
    """
    rate, total, unknown = flops.ceiling(dtype), 0.0, False
    print(f"{'stage':24} {'parameters':>13} {'tokens':>14} {'FLOPs':>9} {'disk MB':>9} {'minutes':>10}  state")
    for name, cost in costs.items():
        seconds = cost.flops / (rate * SHARES[cost.kind])
        unknown |= math.isnan(seconds)
        # An unknown time is left out of the total, and the last line says so.
        total += 0 if finished(name) or math.isnan(seconds) else seconds
        numbers = ["?" if cost.shape is None else f"{cost.shape.num_parameters:,}", f"{cost.tokens:,}"]
        numbers += ["?" if cost.shape is None else text for text in (
            f"{cost.flops:.2e}", f"{cost.disk / 1e6:.0f}", f"{seconds / 60:.1f}")]  # fmt: skip
        state = "finished" if finished(name) else "to do"
        print(
            f"{name:24} " + " ".join(f"{n:>{w}}" for n, w in zip(numbers, (13, 14, 9, 9, 10), strict=True)), "", state
        )
    if unknown:
        print("?: unknown until p* is there; config.p_star.architecture names a preset to plan with")
    print(
        f"at most {total / 60:.0f} minutes are left{', those marked ? not counted,' if unknown else ''} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, which does {rate / 1e9:.0f} GFLOP/s in large "
        f"products; sampling is taken to reach {SHARES['sampling']:.0%} of that, training {SHARES['training']:.0%}, "
        f"scoring {SHARES['scoring']:.0%}"
    )


def check_room(spec: LmSpec, folder: Path, chain: Sequence[Stage], only: Sequence[str] = ()) -> None:
    """Raises RunError where the stages that are left certainly do not fit, on the disk or in a device's memory.

    Only what is certain counts: weights, moments and gradients, not corpora and activations. Of a stage whose shape is
    unknown nothing is certain.

    Args:
        spec: of the run.
        folder: of the run; it need not exist.
        chain: the stages, inputs first, whose `cost` is a Cost.
        only: groups of stages that are run; by default all.
    """
    folders, chosen = stages.folders(folder, chain), [stage for stage in chain if not only or stage.group in only]
    left = [stage for stage in chosen if stage.cost.shape is not None and not stages.finished(folders[stage.name])]
    trainings = [stage.cost for stage in left if stage.cost.kind == "training"]
    # While a training runs, there is a checkpoint more than it keeps.
    saved = [cost.checkpoint * (cost.train.keep + 1) for cost in trainings]
    needed = sum(cost.disk for cost in trainings) + max(saved, default=0)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RunError(
            f"models and checkpoints need {needed / 1e6:,.1f} MB, and {there} has {free / 1e6:,.1f} MB free: make room "
            "there, and the same command resumes"
        )
    memory, mesh = devices.memory(), make_mesh(spec.mesh)
    split = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    for name, cost in ((stage.name, stage.cost) for stage in left):
        if cost.kind == "training":
            # The gradient is as large as the weights in the checkpoint, which are those that are trained.
            what, size = "weights, gradient and moments", 4 * cost.count * cost.shape.num_parameters + cost.checkpoint
        elif cost.kind == "sampling":
            what, size = "weights", jnp.dtype(spec.sampling.dtype).itemsize * cost.shape.num_parameters
        else:
            continue
        if size / split > memory:
            raise RunError(
                f"{name} needs {size / split / GIB:.1f} GiB a device for {what} alone, and there are "
                f"{memory / GIB:.1f}: raise config.mesh.fsdp or tensor"
            )


def show_room(spec: LmSpec, folder: Path, chain: Sequence[Stage], only: Sequence[str] = ()) -> None:
    """Prints what `check_room` would raise here. A plan may be for another machine, so it is no error."""
    try:
        check_room(spec, folder, chain, only)
    except RunError as error:
        print(f"not on this machine: {error}")
