"""One model in training: its data, its checkpoints and its log, and which checkpoint becomes the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import weights
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill.loss import Distillation
from kd_jax.lm.model import Compute, Model, flops, frozen
from kd_jax.lm.model.frozen import Part
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training.data import Data
from kd_jax.lm.training.log import ROW, Log
from kd_jax.lm.training.recipe import Member, TrainSpec
from kd_jax.lm.training.state import State
from kd_jax.lm.training.update import Metrics
from kd_jax.lm.weights import adapters
from kd_jax.parallel import distributed
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.runs.run import Clock
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import read_rows, replacing, write_rows

RULE = "the least validation loss (nats per token, padding not counted)"
# (weights, placed batches) -> the loss, as "loss", and its statistics
Evaluate = Callable[[Any, Iterable[batches.Batch]], dict[str, float]]


@dataclasses.dataclass
class Session:
    """What stays the same while a member is trained, and how many tokens it has learnt from."""

    spec: TrainSpec
    model: Model
    data: Data
    member: Member
    checkpoints: Checkpoints
    compute: Compute
    mesh: Mesh | None
    clock: Clock
    part: Part
    kept: Any  # the weights that are not trained; None where all are
    tokens: int = 0

    @property
    def tree(self) -> str:
        """What checkpoints call what is trained; a checkpoint with "weights" is a model."""
        return "weights" if self.part.is_all else "trained"

    @property
    def total(self) -> int:
        """Updates in all."""
        return len(self.data.updates)

    def count(self, batch: batches.Batch) -> int:
        """Adds the tokens that a batch teaches; returns how many it is so far."""
        self.tokens += int(batch.mask.sum())
        return self.tokens

    def log(self, first: int, distillation: Distillation | None, quiet: bool) -> Log:
        """The log of the updates after `first`.

        Args:
            first: updates that are finished.
            distillation: the teacher, whose forward pass counts as work; None for text alone.
            quiet: no progress bar.
        """
        layout = self.data.updates.layout
        length = layout.row_length or layout.max_length
        per_token = flops.training_flops(self.model.architecture, length)
        if self.part.lora is not None:  # there are no gradients of the base's weights
            per_token *= 2 / 3
        if distillation is not None and distillation.teacher is not None:
            per_token += flops.forward_flops(distillation.teacher.architecture, length)
        return Log(
            self.member.folder, {"name": self.member.name, **self.member.tags}, first, self.total, self.spec.log_every,
            self.spec.trackers, tokens_at_ceiling=flops.ceiling(self.compute.dtype) / per_token, clock=self.clock,
            quiet=quiet,
        )  # fmt: skip

    def on_policy(self, done: int) -> bool | None:
        """Whether update `done` (the first is 1) learns from the student's own samples; None where no update does."""
        return None if self.data.rollouts is None else self.data.rollouts.wanted(done - 1)

    def rollout(self, state: State, done: int) -> batches.Batch:
        """The student's own samples as the batch of update `done`.

        Args:
            state: as it is before the update.
            done: number of the update, from 1.
        """
        with self.clock("updates"):
            jax.block_until_ready(state.params)  # so that the previous update's time is not counted as the rollout's
        with self.clock("rollouts"):
            return self.data.rollouts.batch(self.whole(state.params), done - 1)

    def whole(self, params: Any) -> Any:
        """All weights of the model whose trained part these are."""
        return frozen.merged(params, self.kept, self.model.architecture, self.part) if self.kept is not None else params

    def restore(self, first: int, optimizer) -> State:
        """The state after `first` updates: the checkpoint's; for 0 a new one, from the member's start or random.

        Args:
            first: finished updates; 0 for none.
            optimizer: optax's, for the shape of its state.
        Raises: RunError for a checkpoint of another training.
        """
        # The updates of later checkpoints are about to be made again.
        self.checkpoints.drop_after(first)
        if not first:
            layout = self.model.architecture, optimizer, self.mesh, self.part
            if self.member.start is not None and self.part.lora is None:
                return state_lib.from_params(self.member.start, *layout)
            return state_lib.init(jax.random.key(self.member.seed), *layout)
        about = self.checkpoints.values(first)
        if (about.get("seed"), about.get("updates")) != (self.member.seed, self.total) or "tokens" not in about:
            raise RunError(f"{self.checkpoints.folder(first)} is of another training: {about}; choose another folder")
        # Restored into this run's layout, which may be over other devices than the one that saved it.
        like = state_lib.abstract(self.model.architecture, optimizer, self.mesh, self.part)
        trees = self.checkpoints.load(first, {self.tree: like.params, "optimizer": like.optimizer})
        self.tokens = about["tokens"]
        return State(trees[self.tree], trees["optimizer"], jax.device_put(np.int32(first), like.step.sharding))

    def check(self, done: int, metrics: Metrics, batch: batches.Batch) -> None:
        """Raises FloatingPointError, with the batch saved, where an update's loss or gradient is not finite.

        Args:
            done: number of the update, from 1.
            metrics: of the update, as floats.
            batch: that it learnt from.
        """
        if math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm):
            return
        path = self.member.folder / f"batch-{done}.npz"
        arrays = batch._asdict() | ({} if batch.targets is None else batch.targets._asdict())
        # The pair is a function of the tokens.
        del arrays["targets"], arrays["pair"]
        if distributed.leads():
            with replacing(path) as file:
                np.savez(file, rows=self.data.updates.rows(done - 1), **arrays)
        raise FloatingPointError(
            f"update {done} has loss {metrics.loss} and gradient norm {metrics.gradient_norm}; its batch is in {path}"
        )

    def validate(self, state: State, done: int, log: Log, evaluate: Evaluate) -> float:
        """The validation loss after update `done`, logged.

        Args:
            state: after the update.
            done: number of the update.
            log: where the loss is logged.
            evaluate: from weights and batches to the loss and its statistics.
        Raises: FloatingPointError for a loss that is not finite.
        """
        with self.clock("validation"):
            # One batch after another goes to the devices, as it is needed.
            placed = (state_lib.place(batch, self.mesh) for batch in self.data.validation)
            values = evaluate(state.params, placed)
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the validation loss after update {done} is {values['loss']}")
        with self.clock("logging"):
            log.validation(done, values)
        return values["loss"]

    def save(self, done: int, state: State, loss: float | None) -> None:
        """Saves a checkpoint, in the background; `loss` is the validation's, if there was one.

        Args:
            done: updates so far.
            state: after them.
        """
        # What a later start compares with its own settings, and counts on from.
        about = {"updates": self.total, "seed": self.member.seed, "tokens": self.tokens}
        with self.clock("checkpoints"):
            trees = {self.tree: state.params, "optimizer": state.optimizer}
            self.checkpoints.save(done, trees, about, metrics=None if loss is None else {"loss": loss})

    def choose(self, state: State) -> dict[str, Any]:
        """Writes FOLDER/model, the checkpoint that RULE names; returns what training.json says of it."""
        path = self.member.folder / "metrics.jsonl"
        rows = distributed.once(lambda: read_rows(path, ROW), "the rows of a training")
        validations = {row["step"]: row for row in rows if row["kind"] == "validation"}
        with self.clock("checkpoints"):
            self.checkpoints.wait()
            # The best checkpoint is kept beside the newest ones, so the least loss is among those on disk.
            saved = set(validations) & set(self.checkpoints.steps())
            # At equal loss the earlier one: less training for the same model.
            chosen = min(saved, key=lambda step: (validations[step]["loss"], step))
            trained = state.params
            # The last state is in memory; any other is read from its checkpoint.
            if chosen != self.total:
                optimizer = self.spec.optimizer(self.total)
                like = state_lib.abstract(self.model.architecture, optimizer, self.mesh, self.part)
                trained = self.checkpoints.load(chosen, {self.tree: like.params})[self.tree]
            params = self.whole(trained)
            # Overwritten: a start that was stopped before training.json was written chooses again.
            weights.save(self.model._replace(params=params), self.member.folder / "model", overwrite=True)
            self._export_adapters(trained)
        if distributed.leads():
            write_rows(
                path,
                [row | {"chosen": row["step"] == chosen} if row["kind"] == "validation" else row for row in rows],
            )
        return {
            "rule": RULE, "chosen": chosen, "updates": self.total, "tokens": self.tokens,
            "validation_loss": validations[chosen]["loss"], "perplexity": validations[chosen]["perplexity"],
            "fingerprint": weights.fingerprint(params),
        }  # fmt: skip

    def _export_adapters(self, trained: Any) -> None:
        """Writes FOLDER/adapter for `peft`, where it can be had: for a base model that has a name, not fused."""
        lora = self.part.lora
        if lora is None or not self.member.base or adapters.in_fused(self.model.architecture, lora):
            return
        # A collective, so all processes take part before one of them writes.
        on_host = distributed.fetch(trained)
        if distributed.leads():
            adapters.export(
                on_host, lora, self.model.architecture, self.member.folder / "adapter",
                base=self.member.base, overwrite=True,
            )  # fmt: skip
