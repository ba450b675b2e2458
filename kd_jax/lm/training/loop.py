"""Training a model on a corpus: the loop round `step`, with what it leaves in its folder.

    FOLDER/metrics.jsonl    rows of kind "training" and "validation" (kd_jax.lm.training.log)
    FOLDER/checkpoints/     STEP/weights, STEP/optimizer, STEP/about; model.json and the tokenizer: a STEP is a model
    FOLDER/model/           the checkpoint with the least validation loss, once all is done
    FOLDER/training.json    which one that was and by what rule, and where the time went

Killed at any moment, the same call goes on from the last checkpoint and ends with the same numbers: an update is a
function of the state and of its own number.

What overlaps: batches are read ahead in threads, updates are queued and their numbers fetched two updates later, and
checkpoints are written in the background. A rollout (kd_jax.lm.distill.rollouts) needs the parameters of the update
before it, and the update after it its tokens, so these three wait for one another; the time of each is told apart.

Several processes train together: each has every batch, sends the rows of its own devices, and takes part in each
checkpoint; process 0 writes the rest. A signal to any of them stops all after the same update.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import weights
from kd_jax.lm.corpus import batches, compatibility
from kd_jax.lm.corpus.batches import Updates
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill.loss import Distillation
from kd_jax.lm.distill.rollouts import Rollouts
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.model import flops as flops_lib
from kd_jax.lm.training import data as training_data
from kd_jax.lm.training import step
from kd_jax.lm.training.log import ROW, Log
from kd_jax.lm.training.recipe import Member, Settings
from kd_jax.parallel import distributed
from kd_jax.parallel.distributed import Agreement
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.runs.run import Clock, Stop
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import read_json, read_rows, remove, replacing, write_json, write_rows

RULE = "the least validation loss (nats a token, padding not counted)"
# Updates whose numbers have not been fetched yet; the device is kept busy, and a bad loss is seen this much later.
_BEHIND = 2
# (weights, placed batches) -> the loss, as "loss", and its statistics
Evaluate = Callable[[Any, Iterable[batches.Batch]], dict[str, float]]


def train(
    settings: Settings, model: Model, members: Sequence[Member], *, compute: Compute, mesh: Mesh | None = None,
    stop: Stop | None = None, distillation: Distillation | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains models of the shape of `model` (its weights are not looked at), all at once, and writes FOLDER/model.

    Several members go through their corpora side by side in one program; each ends with the numbers it would have
    alone, but for rounding.

    Args:
        stop: asked between updates; what is there is then saved, and KeyboardInterrupt raised.
        distillation: the teacher to learn from; without it the text itself is learnt.
    Returns: what is in each member's training.json.
    Raises: ValueError or RunError for a corpus or a folder that cannot be used; FloatingPointError for a loss that is
    not finite, with the batch saved.
    """
    results = distributed.once(lambda: [_finished(member) for member in members], "what is trained")
    if None in results:
        _check(model, members, distillation)
        results = _train(settings, model, members, compute, mesh, stop or Stop(), distillation)
    distributed.wait("the end of a training")  # nobody reads what is removed now
    for member in members:
        _tidy(settings, member.folder)
    return results


def _finished(member: Member) -> dict[str, Any] | None:
    path = member.folder / "training.json"
    if not path.exists():
        return None
    result = read_json(path, needs={"seed": int}, hint=again(member.folder))
    if result["seed"] != member.seed:
        raise RunError(
            f"{path} is of another training (seed {result['seed']}, not {member.seed}); choose another folder"
        )
    return result


def _check(model: Model, members: Sequence[Member], distillation: Distillation | None) -> None:
    if distillation is None:
        return
    how, teacher, _ = distillation
    if (teacher is None) != (how.policy == "offline"):
        raise ValueError(f"distill.policy={how.policy!r} needs {'no' if teacher else 'a'} teacher")
    if teacher is not None:
        compatibility.check_teacher(teacher, model)
    if how.policy == "on_policy" and len(members) > 1:
        raise ValueError("students that learn from their own sequences are trained alone (config.train.together=1)")
    if how.mix and any(member.mixed is None for member in members):
        raise ValueError(f"distill.mix={how.mix} needs a second corpus")


def _train(settings, model, members, compute, mesh, stop, distillation) -> list[dict[str, Any]]:
    clock, began = Clock(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        runs = []
        for member in members:
            member.folder.mkdir(parents=True, exist_ok=True)
            with clock("data"):
                data = training_data.prepare(settings, model, member, compute, mesh, distillation)
            # of several, one may be a checkpoint ahead of another that was being written
            keep = settings.keep if len(members) == 1 else max(2, settings.keep)
            saved = Checkpoints(member.folder / "checkpoints", keep=keep, best="loss", background=True)
            stack.enter_context(saved)
            weights.save_about(model, member.folder / "checkpoints")
            runs.append(_Run(settings, model, *data, member, saved, compute, mesh, clock))
        states = _loop(runs, stop, distillation)
        results = [run.choose(state) for run, state in zip(runs, states, strict=True)]
    seconds = {key: round(value / len(members), 3) for key, value in clock.seconds.items()}
    seconds["total"] = round((time.perf_counter() - began) / len(members), 3)
    for member, result in zip(members, results, strict=True):
        result |= {"seconds": seconds, "seed": member.seed, "together": len(members)}
        if "rollouts" in seconds:
            result["share_of_rollouts"] = round(seconds["rollouts"] / seconds["total"], 4)
        if distributed.leads():
            write_json(member.folder / "training.json", result)
    return results


def _tidy(settings: Settings, folder: Path) -> None:
    """Removes what nobody needs once the model is there."""
    unwanted = ["arrow"] if settings.keep_checkpoints else ["arrow", "checkpoints"]
    for name in unwanted if distributed.leads() else ():
        remove(folder / name)


def _loop(runs: list[_Run], stop: Stop, distillation: Distillation | None) -> list[step.State]:
    """All updates from the newest checkpoint on that every run has; returns the last state of each."""
    one, total, count = runs[0], len(runs[0].data), len(runs)
    if any(len(run.data) != total for run in runs):
        raise ValueError(f"models trained together need as many updates each, not {[len(run.data) for run in runs]}")
    settings, optimizer = one.settings, one.settings.optimizer(total)
    with one.clock("checkpoints"):
        first = max(set.intersection(*(set(run.saved.steps()) for run in runs)), default=0)
        state = _stack([run.restore(first, optimizer) for run in runs])
    architecture, loss, guide = one.model.architecture, None, None
    compute = dataclasses.replace(one.compute, mesh=one.mesh)
    evaluate = step.evaluator(architecture, compute)
    if distillation is not None:
        guide = distill.guide(distillation)
        loss = distill.loss(distillation, one.model, compute, packed=settings.row_length > 0)
        evaluate = step.make_evaluate(architecture, compute, loss)
    update = step.make(architecture, optimizer, settings.schedule(total), compute, one.mesh, count, loss)
    validate_at = {-(-total * (i + 1) // settings.validations) for i in range(settings.validations)}
    with one.clock("logging"):
        logs = [run.log(first, total, distillation, quiet=run is not one) for run in runs]
    sources, pending, agreed = [run.data.start(first) for run in runs], collections.deque(), Agreement(_BEHIND)
    for done in range(first + 1, total + 1):
        with one.clock("data"):
            found = [next(source) for source in sources]
        found = one.rollout(state, done, found) if one.rollouts is not None else found
        with one.clock("data"):
            tokens = [run.seen(batch) for run, batch in zip(runs, found, strict=True)]
            batch = found[0] if count == 1 else step.stack(found)
        with one.clock("updates"):
            state, metrics = update(state, step.place(batch, one.mesh), guide)
        pending.append((done, tokens, found, metrics))
        validate, halt = done in validate_at, agreed(stop.asked) and done < total
        save = validate or halt or (settings.save_every and done % settings.save_every == 0)
        while pending and (save or len(pending) > _BEHIND):
            _fetch(runs, logs, *pending.popleft())
        if save:
            _save(runs, logs, state, done, (lambda params, held: evaluate(params, held, guide)) if validate else None)
        if halt:
            raise KeyboardInterrupt
    for log in logs:
        log.close()
    return [_member(state, i, count) for i in range(count)]


def _fetch(
    runs: list[_Run], logs: list[Log], done: int, tokens: list[int], found: list[batches.Batch], metrics: step.Metrics
) -> None:
    """Takes the numbers of an update from the device, waiting for it."""
    with runs[0].clock("updates"):
        numbers = jax.tree.map(lambda leaf: leaf.astype(np.float64).reshape(-1), distributed.fetch(metrics))
    for i, (run, log) in enumerate(zip(runs, logs, strict=True)):
        own = jax.tree.map(lambda leaf, i=i: float(leaf[i]), numbers)
        run.check(done, own, found[i])
        with run.clock("logging"):
            log.update(done, tokens[i], own, None if run.rollouts is None else run.rollouts.wanted(done - 1))


def _save(runs: list[_Run], logs: list[Log], state: step.State, done: int, evaluate: Evaluate | None) -> None:
    with runs[0].clock("checkpoints"):
        for run in runs:
            run.saved.wait()  # so that no run is more than one checkpoint ahead of another
    for i, (run, log) in enumerate(zip(runs, logs, strict=True)):
        own = _member(state, i, len(runs))
        run.save(done, own, None if evaluate is None else run.validate(own, done, log, evaluate))


def _stack(states: list[step.State]) -> step.State:
    return states[0] if len(states) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _member(state: step.State, i: int, count: int) -> step.State:
    return state if count == 1 else jax.tree.map(lambda leaf: leaf[i], state)


@dataclasses.dataclass
class _Run:
    """What stays the same while a model is trained, and how many tokens it has seen."""

    settings: Settings
    model: Model
    data: Updates
    validation: list[batches.Batch]
    rollouts: Rollouts | None
    member: Member
    saved: Checkpoints
    compute: Compute
    mesh: Mesh | None
    clock: Clock
    tokens: int = 0

    def seen(self, batch: batches.Batch) -> int:
        self.tokens += int(batch.mask.sum())
        return self.tokens

    def log(self, first: int, total: int, distillation: Distillation | None, quiet: bool) -> Log:
        length = self.data.layout.row_length or self.data.layout.max_length
        flops = flops_lib.training_flops(self.model.architecture, length)
        if distillation is not None and distillation.teacher is not None:
            flops += flops_lib.forward_flops(distillation.teacher.architecture, length)
        member, settings = self.member, self.settings
        return Log(
            member.folder, {"name": member.name, **member.tags}, first, total, settings.log_every, settings.trackers,
            tokens_at_ceiling=flops_lib.ceiling(self.compute.dtype) / flops, clock=self.clock, quiet=quiet,
        )  # fmt: skip

    def rollout(self, state: step.State, done: int, found: list[batches.Batch]) -> list[batches.Batch]:
        """The student's own sequences in place of the corpus', where this update is to have them."""
        if not self.rollouts.wanted(done - 1):
            return found
        with self.clock("updates"):
            jax.block_until_ready(state.params)  # the last update's time is not that of the rollout
        with self.clock("rollouts"):
            return [self.rollouts.batch(state.params, done - 1)]

    def restore(self, first: int, optimizer) -> step.State:
        """The state after `first` updates: that of the checkpoint, or a new one."""
        self.saved.drop_after(first)
        if not first:
            key = jax.random.key(self.member.seed)
            return step.init(key, self.model.architecture, optimizer, self.mesh)
        about = self.saved.values(first)
        if (about.get("seed"), about.get("updates")) != (self.member.seed, len(self.data)) or "tokens" not in about:
            raise RunError(f"{self.saved.folder(first)} is of another training: {about}; choose another folder")
        like = step.abstract(self.model.architecture, optimizer, self.mesh)
        found = self.saved.load(first, {"weights": like.params, "optimizer": like.optimizer})
        self.tokens = about["tokens"]
        return step.State(found["weights"], found["optimizer"], jax.device_put(np.int32(first), like.step.sharding))

    def check(self, done: int, metrics: step.Metrics, batch: batches.Batch) -> None:
        """Raises FloatingPointError, with the batch saved, where the numbers of an update are not finite."""
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
            path = self.member.folder / f"batch-{done}.npz"
            arrays = batch._asdict() | ({} if batch.targets is None else batch.targets._asdict())
            if distributed.leads():
                with replacing(path) as file:
                    np.savez(file, rows=self.data.rows(done - 1), **{k: v for k, v in arrays.items() if k != "targets"})
            raise FloatingPointError(
                f"update {done} has loss {metrics.loss} and gradient norm {metrics.gradient_norm}; "
                f"its batch is in {path}"
            )

    def validate(self, state: step.State, done: int, log: Log, evaluate: Evaluate) -> float:
        with self.clock("validation"):
            found = evaluate(state.params, (step.place(batch, self.mesh) for batch in self.validation))
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(f"the validation loss after update {done} is {found['loss']}")
        with self.clock("logging"):
            log.validation(done, found)
        return found["loss"]

    def save(self, done: int, state: step.State, loss: float | None) -> None:
        about = {"updates": len(self.data), "seed": self.member.seed, "tokens": self.tokens}
        with self.clock("checkpoints"):
            trees = {"weights": state.params, "optimizer": state.optimizer}
            self.saved.save(done, trees, about, metrics=None if loss is None else {"loss": loss})

    def choose(self, state: step.State) -> dict[str, Any]:
        """Writes FOLDER/model: the weights that RULE says."""
        rows = distributed.once(lambda: read_rows(self.member.folder / "metrics.jsonl", ROW), "the rows of a training")
        validations = {row["step"]: row for row in rows if row["kind"] == "validation"}
        losses = {number: row["loss"] for number, row in validations.items()}
        with self.clock("checkpoints"):
            self.saved.wait()
            chosen = min(set(losses) & set(self.saved.steps()), key=lambda number: (losses[number], number))
            params = state.params
            if chosen != len(self.data):
                like = step.abstract(self.model.architecture, self.settings.optimizer(len(self.data)), self.mesh)
                params = self.saved.load(chosen, {"weights": like.params})["weights"]
            weights.save(self.model._replace(params=params), self.member.folder / "model", overwrite=True)
        rows = [row | {"chosen": row["step"] == chosen} if row["kind"] == "validation" else row for row in rows]
        if distributed.leads():
            write_rows(self.member.folder / "metrics.jsonl", rows)
        return {
            "rule": RULE, "chosen": chosen, "updates": len(self.data),
            "tokens": self.tokens, "validation_loss": losses[chosen],
            "perplexity": validations[chosen]["perplexity"], "fingerprint": weights.fingerprint(params),
        }  # fmt: skip
