"""Training models on corpora: the loop around the update, and what it writes.

    FOLDER/metrics.jsonl    rows of kind "training" and "validation" (kd_jax.lm.training.log)
    FOLDER/checkpoints/     STEP/weights, STEP/optimizer, STEP/about; model.json and the tokenizer: a STEP is a model
                            (STEP/trained in place of STEP/weights, and no model, where only a part is trained)
    FOLDER/model/           the checkpoint with the least validation loss, once the training has finished
    FOLDER/adapter/         its adapters as a folder for `peft`, where adapters are trained; they are merged in model/
    FOLDER/training.json    which checkpoint that is, by which rule, and where the time went

Killed at any moment, the same call resumes from the last checkpoint and ends with the same numbers: an update is a
function of the state and of its own number.

What overlaps: batches are read ahead in threads, updates are queued and their metrics fetched two updates later, and
checkpoints are written in the background. A rollout (kd_jax.lm.distill.rollouts) needs the parameters of the update
before it, and the update after it needs its tokens, so these three wait for one another.

Several processes train together: each has every batch, sends the rows of its own devices, and takes part in each
checkpoint; process 0 writes the rest. A signal to any of them stops all after the same update.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import weights
from kd_jax.lm.corpus import batches, compatibility
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill.loss import Distillation, Loss
from kd_jax.lm.distill.pairing import Pairing
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.model.frozen import Part
from kd_jax.lm.model.lora import Lora
from kd_jax.lm.training import data as data_lib
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training import validation
from kd_jax.lm.training.log import Log
from kd_jax.lm.training.recipe import Member, TrainSpec
from kd_jax.lm.training.session import Evaluate, Session
from kd_jax.lm.training.state import State
from kd_jax.lm.training.update import Metrics
from kd_jax.parallel import distributed
from kd_jax.parallel.distributed import Agreement
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.runs.run import Clock, Stop
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import read_json, remove, write_json

# Updates whose metrics have not been fetched yet: the device stays busy, and a bad loss is seen this much later.
_BEHIND = 2


def train(
    spec: TrainSpec, model: Model, members: Sequence[Member], *, compute: Compute, mesh: Mesh | None = None,
    stop: Stop | None = None, distillation: Distillation | None = None, lora: Lora | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains models of the shape of `model` (its weights are not used) side by side, and writes FOLDER/model of each.

    Several members go through their corpora in one program; each ends with the numbers it would have alone, but for
    rounding.

    Args:
        spec: see there.
        members: what each learns from, and where it is written.
        compute: how the models are run.
        mesh: what they are split over.
        stop: asked between updates; if it says so, a checkpoint is saved and KeyboardInterrupt raised.
        distillation: the teacher to learn from; without it the text itself is learnt.
        lora: train adapters, and no weights of the members' start.
    Returns: the contents of each member's training.json.
    Raises: ValueError or RunError for a corpus or a folder that cannot be used; FloatingPointError for a loss that is
        not finite, with its batch saved.
    """
    # Process 0 reads, so that all processes agree on what is left to do.
    results = distributed.once(lambda: [_finished(member) for member in members], "what is trained")
    if None in results:
        part = Part(spec.frozen, lora)
        _check(model, members, compute, distillation, part)
        if distillation is not None and distillation.spec.vocabulary != "same":
            distillation = distillation._replace(pairing=Pairing(distillation.teacher, model))
        results = _train(spec, model, members, compute, mesh, stop or Stop(), distillation, part)
    distributed.wait("the end of a training")  # nobody reads any more what is removed now
    for member in members:
        _tidy(spec, member.folder)
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


def _check(
    model: Model, members: Sequence[Member], compute: Compute, distillation: Distillation | None, part: Part
) -> None:
    if compute.dtype == "float16":
        # Gradients of a mean over many tokens are below its smallest number, and there is no loss scaling.
        raise ValueError("models cannot be trained in float16: small gradients become 0; use bfloat16 or float32")
    if not part.is_all and any(member.start is None or member.start is not members[0].start for member in members):
        raise ValueError("frozen weights and adapters need a model that training starts from, the same for all members")
    if distillation is None:
        return
    spec, teacher = distillation.spec, distillation.teacher
    if (teacher is None) != (spec.policy == "offline"):
        raise ValueError(f"distill.policy={spec.policy!r} needs {'no' if teacher else 'a'} teacher")
    if teacher is not None and spec.vocabulary == "same":
        compatibility.check_teacher(teacher, model)
    if (spec.policy == "on_policy" or spec.vocabulary != "same") and len(members) > 1:
        raise ValueError(
            "students that learn from their own samples, or from a teacher with another vocabulary, are trained alone "
            "(config.train.together=1)"
        )
    if spec.share_of_samples and any(member.mixed is None for member in members):
        raise ValueError(f"distill.mix={spec.mix} needs a second corpus")


def _train(spec, model, members, compute, mesh, stop, distillation, part) -> list[dict[str, Any]]:
    clock, began = Clock(), time.perf_counter()
    kept = None
    if not part.is_all:
        kept = state_lib.place_frozen(members[0].start, model.architecture, mesh, part)
    with contextlib.ExitStack() as stack:
        sessions = []
        for member in members:
            member.folder.mkdir(parents=True, exist_ok=True)
            with clock("data"):
                data = data_lib.prepare(spec, model, member, compute, mesh, distillation)
            # of several members, one may be a checkpoint ahead of another that was being written
            keep = spec.keep if len(members) == 1 else max(2, spec.keep)
            checkpoints = Checkpoints(member.folder / "checkpoints", keep=keep, best="loss", background=True)
            stack.enter_context(checkpoints)
            # Before the first checkpoint: with it, a STEP is a model as soon as it is written.
            if part.is_all:
                weights.save_description(model, member.folder / "checkpoints")
            sessions.append(Session(spec, model, data, member, checkpoints, compute, mesh, clock, part, kept))
        states = _loop(sessions, stop, distillation)
        results = [session.choose(state) for session, state in zip(sessions, states, strict=True)]
    # Members share the time of their one program.
    seconds = {key: round(value / len(members), 3) for key, value in clock.seconds.items()}
    seconds["total"] = round((time.perf_counter() - began) / len(members), 3)
    for member, result in zip(members, results, strict=True):
        result |= {"seconds": seconds, "seed": member.seed, "together": len(members)}
        if "rollouts" in seconds:
            result["share_of_rollouts"] = round(seconds["rollouts"] / seconds["total"], 4)
        # Written last: this file says that the training is finished.
        if distributed.leads():
            write_json(member.folder / "training.json", result)
    return results


def _tidy(spec: TrainSpec, folder: Path) -> None:
    """Removes what is not needed once the model is written."""
    unwanted = ["arrow"] if spec.keep_checkpoints else ["arrow", "checkpoints"]
    for name in unwanted if distributed.leads() else ():
        remove(folder / name)


class _Programs(NamedTuple):
    update: Callable
    evaluate: Callable


@functools.lru_cache(maxsize=8)
def _programs(
    loss: Loss, architecture: Architecture, spec: TrainSpec, total: int, mesh: Mesh | None, members: int, part: Part
) -> _Programs:
    """The jitted update and validation. They are kept: a second training of the same kind compiles nothing."""
    optimizer = spec.optimizer(total)
    update = update_lib.make(loss, optimizer, spec.schedule(total))
    compiled = update_lib.compiled(update, architecture, optimizer, mesh, members, part)
    return _Programs(compiled, validation.make(loss))


def _loop(sessions: list[Session], stop: Stop, distillation: Distillation | None) -> list[State]:
    """All updates after the newest checkpoint that every session has; returns the last state of each."""
    one, count = sessions[0], len(sessions)
    spec, total, architecture = one.spec, one.total, one.model.architecture
    # One loop goes through the updates of all, with one schedule.
    if any(session.total != total for session in sessions):
        totals = [session.total for session in sessions]
        raise ValueError(f"models trained together need the same number of updates, not {totals}")
    compute = dataclasses.replace(one.compute, mesh=one.mesh)
    if distillation is None:
        loss, guides = distill.cross_entropy(architecture, compute, num_tokens=one.model.num_tokens), (None, None)
    else:
        loss = distill.loss(distillation, one.model, compute, packed=spec.row_length > 0)
        guide = distill.guide(distillation)
        # The second is for the student's own samples, which are no labels.
        guides = guide, guide._replace(hard_weight=jnp.float32(0))
    if not one.part.is_all:
        loss, guides = update_lib.of_part(loss, architecture, one.part), [(one.kept, guide) for guide in guides]
    update, evaluate = _programs(loss, architecture, spec, total, one.mesh, count, one.part)
    with one.clock("checkpoints"):
        first = max(set.intersection(*(set(session.checkpoints.steps()) for session in sessions)), default=0)
        state = _stack([session.restore(first, spec.optimizer(total)) for session in sessions])
    # Evenly spread and rounded up, so that the last update is validated.
    validate_at = {-(-total * (i + 1) // spec.validations) for i in range(spec.validations)}
    with one.clock("logging"):
        logs = [session.log(first, distillation, quiet=session is not one) for session in sessions]
    sources = [session.data.updates.start(first) for session in sessions]
    pending, agreed = collections.deque(), Agreement(_BEHIND)
    for done in range(first + 1, total + 1):
        with one.clock("data"):
            each = [next(source) for source in sources]
        on_policy = one.on_policy(done)
        if on_policy:
            each = [one.rollout(state, done)]
        with one.clock("data"):
            tokens = [session.count(batch) for session, batch in zip(sessions, each, strict=True)]
            batch = each[0] if count == 1 else state_lib.stack(each)
        with one.clock("updates"):
            # jit returns before the device has finished: this queues the update, and the next batch is made meanwhile.
            state, metrics = update(state, state_lib.place(batch, one.mesh), guides[bool(on_policy)])
        pending.append((done, tokens, each, metrics))
        # All processes vote in every update: the vote is a collective, and a signal may reach one of them only.
        validate, halt = done in validate_at, agreed(stop.asked) and done < total
        save = validate or halt or (spec.save_every and done % spec.save_every == 0)
        # All metrics are fetched before a save: a state after a loss that is not finite must not become a checkpoint.
        while pending and (save or len(pending) > _BEHIND):
            _fetch(sessions, logs, *pending.popleft())
        if save:
            _save(sessions, logs, state, done, functools.partial(evaluate, guide=guides[0]) if validate else None)
        if halt:
            # The checkpoint has been saved: the same command goes on from this update.
            raise KeyboardInterrupt
    for log in logs:
        log.close()
    return [_member(state, i, count) for i in range(count)]


def _fetch(
    sessions: list[Session], logs: list[Log], done: int, tokens: list[int], each: list[batches.Batch], metrics: Metrics
) -> None:
    """Takes the metrics of an update from the device, waiting for it, and logs them."""
    with sessions[0].clock("updates"):
        numbers = jax.tree.map(lambda leaf: leaf.astype(np.float64).reshape(-1), distributed.fetch(metrics))
    for i, (session, log) in enumerate(zip(sessions, logs, strict=True)):
        values = jax.tree.map(lambda leaf, i=i: float(leaf[i]), numbers)
        session.check(done, values, each[i])
        with session.clock("logging"):
            log.update(done, tokens[i], int((each[i].segments > 0).sum()), values, session.on_policy(done))


def _save(sessions: list[Session], logs: list[Log], state: State, done: int, evaluate: Evaluate | None) -> None:
    with sessions[0].clock("checkpoints"):
        for session in sessions:
            session.checkpoints.wait()  # so that no session is more than one checkpoint ahead of another
    for i, (session, log) in enumerate(zip(sessions, logs, strict=True)):
        one = _member(state, i, len(sessions))
        session.save(done, one, None if evaluate is None else session.validate(one, done, log, evaluate))


def _stack(states: list[State]) -> State:
    return states[0] if len(states) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _member(state: State, i: int, count: int) -> State:
    return state if count == 1 else jax.tree.map(lambda leaf: leaf[i], state)
