"""Training a model on a corpus: the loop round `step`, with what it leaves in its folder.

    FOLDER/metrics.jsonl    rows of kind "training" and "validation"
    FOLDER/checkpoints/     STEP/weights, STEP/optimizer, STEP/about; model.json and the tokenizer: a STEP is a model
    FOLDER/model/           the checkpoint with the least validation loss, once all is done
    FOLDER/training.json    which one that was and by what rule, and where the time went

Killed at any moment, the same call goes on from the last checkpoint and ends with the same numbers: an update is a
function of the state and of its own number.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kd_jax import mesh as mesh_lib
from kd_jax import optim, trackers
from kd_jax.checkpoint import Checkpoints
from kd_jax.lm import batches, cost, step, weights
from kd_jax.lm.batches import Layout, Sequences, Updates
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.model import Compute, Model
from kd_jax.run import Clock, RunError, Stop, append_rows, read_json, read_rows, write_json, write_rows

RULE = "the least validation loss (nats a token, padding not counted)"
# Updates whose numbers have not been fetched yet; the device is kept busy, and a bad loss is seen this much later.
_BEHIND = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        epochs: times through the corpus.
        batch_size: sequences of an update.
        row_length: of packed rows; 0 for a row each.
        parts: an update's batch is computed in so many parts.
        num_validation: rows at the end of the corpus that are not trained on: by them the checkpoint is chosen.
        validations: how many times, evenly spread, the last update included; each saves a checkpoint.
        save_every: updates between further checkpoints; 0 for none.
        log_every: updates between rows of metrics.
        keep: how many of the last checkpoints stay, beside the best.
        keep_checkpoints: leave them there once the training is done.
        learning_rate, warmup, decay, b1, b2, eps, weight_decay, clip: see kd_jax.optim.
        trackers: names out of kd_jax.trackers.TRACKERS.
    """

    epochs: int
    batch_size: int
    num_validation: int
    learning_rate: float
    row_length: int = 0
    parts: int = 1
    validations: int = 10
    save_every: int = 0
    log_every: int = 10
    keep: int = 1
    keep_checkpoints: bool = False
    warmup: float = 0.01
    decay: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    trackers: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("epochs", "batch_size", "num_validation", "parts", "validations", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.train.{name}={getattr(self, name)} must be at least 1")
        for name in ("row_length", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.train.{name}={getattr(self, name)} must be 0 or above")
        optim.validate(self)
        trackers.check(self.trackers)

    def schedule(self, updates: int):
        return optim.wsd(self.learning_rate, updates, self.warmup, self.decay)

    def optimizer(self, updates: int):
        return optim.adamw(
            self.schedule(updates), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, clip=self.clip
        )


def train(
    settings: Settings, model: Model, corpus: Corpus, seed: int, folder: Path, *, name: str = "model",
    compute: Compute, mesh: Mesh | None = None, stop: Stop | None = None, tags: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains `model` (its weights are not looked at: random ones are drawn from `seed`) and writes FOLDER/model.

    Args:
        corpus: its last settings.num_validation rows choose the checkpoint, the others are trained on.
        stop: asked between updates; what is there is then saved, and KeyboardInterrupt raised.
        tags: fields for every row of metrics.jsonl.
    Returns: what is in training.json.
    Raises: ValueError or RunError for a corpus or a folder that cannot be used; FloatingPointError for a loss that is
    not finite, with the batch saved.
    """
    done = folder / "training.json"
    if done.exists():
        result = read_json(done)
        if result["seed"] != seed:
            raise RunError(f"{done} is of another training (seed {result['seed']}, not {seed}); choose another folder")
        _tidy(settings, folder)
        return result
    folder.mkdir(parents=True, exist_ok=True)
    clock, began = Clock(), time.perf_counter()
    with clock("data"):
        data, validation = _data(settings, corpus, seed, folder, mesh)
    run = _Run(settings, model, data, validation, seed, folder, compute, mesh, clock, {"name": name, **(tags or {})})
    saved = Checkpoints(folder / "checkpoints", keep=settings.keep, best="loss", background=True)
    with saved:
        if jax.process_index() == 0:
            weights.save_about(model, folder / "checkpoints")
        state = run.loop(saved, stop or Stop())
        result = run.choose(saved, state)
    seconds = {key: round(value, 3) for key, value in clock.seconds.items()}
    result |= {"seconds": {**seconds, "total": round(time.perf_counter() - began, 3)}, "seed": seed}
    write_json(done, result)
    _tidy(settings, folder)
    return result


def _tidy(settings: Settings, folder: Path) -> None:
    """Removes what nobody needs once the model is there."""
    unwanted = ["arrow"] if settings.keep_checkpoints else ["arrow", "checkpoints"]
    for name in unwanted if jax.process_index() == 0 else ():
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _data(settings, corpus, seed, folder, mesh) -> tuple[Updates, list[batches.Batch]]:
    sequences = Sequences.of(corpus, str(folder / "arrow"))
    held = settings.num_validation
    if not held < len(sequences):
        raise ValueError(f"{corpus.folder} has {len(sequences)} rows; {held} of them would be held out for validation")
    multiple = mesh_lib.batch_devices(mesh)
    longest = int(sequences.lengths.max())
    shape = {"max_length": longest, "row_length": settings.row_length and max(settings.row_length, longest)}
    layout = Layout(settings.batch_size, parts=settings.parts, row_multiple=multiple, **shape)
    train = Updates(sequences.part(0, len(sequences) - held), layout, seed, settings.epochs)
    # in the order they come; a last batch that is not full is filled up with empty rows
    rest = sequences.part(len(sequences) - held, len(sequences))
    validation = []
    for first in range(0, held, settings.batch_size):
        rows = np.arange(first, min(first + settings.batch_size, held))
        validation.append(batches.arrange(rest.tokens(rows), rest.prompt_lengths[rows], layout))
    return train, validation


@dataclasses.dataclass
class _Run:
    """What stays the same while a model is trained."""

    settings: Settings
    model: Model
    data: Updates
    validation: list[batches.Batch]
    seed: int
    folder: Path
    compute: Compute
    mesh: Mesh | None
    clock: Clock
    tags: dict[str, Any]

    def loop(self, saved: Checkpoints, stop: Stop) -> step.State:
        """All updates from the newest checkpoint on; returns the last state."""
        settings, total = self.settings, len(self.data)
        optimizer = settings.optimizer(total)
        with self.clock("checkpoints"):
            state, first, tokens = self._restore(saved, optimizer)
        update = step.make(self.model.architecture, optimizer, settings.schedule(total), self.compute, self.mesh)
        validate_at = {-(-total * (i + 1) // settings.validations) for i in range(settings.validations)}
        with self.clock("logging"):
            log = _Log(self, first)
        source, pending = self.data.start(first), collections.deque()
        for done in range(first + 1, total + 1):
            with self.clock("data"):
                batch = next(source)
            with self.clock("updates"):
                state, metrics = update(state, step.place(batch, self.mesh))
            tokens += int(batch.mask.sum())
            pending.append((done, tokens, metrics))
            validate, halt = done in validate_at, stop.asked and done < total
            save = validate or halt or (settings.save_every and done % settings.save_every == 0)
            while pending and (save or len(pending) > _BEHIND):
                self._fetch(*pending.popleft(), log)
            if save:
                loss = self._validate(state, done, log) if validate else None
                self._save(saved, done, state, tokens, loss)
            if halt:
                raise KeyboardInterrupt
        log.close()
        return state

    def _restore(self, saved: Checkpoints, optimizer) -> tuple[step.State, int, int]:
        """The newest state, its number of updates and how many tokens they were; a new one where there is none."""
        steps = saved.steps()
        if not steps:
            key = jax.random.key(self.seed)
            return step.init(key, self.model.architecture, optimizer, self.mesh), 0, 0
        about = saved.values(steps[-1])
        if (about["seed"], about["updates"]) != (self.seed, len(self.data)):
            raise RunError(f"{saved.folder(steps[-1])} is of another training: {about}; choose another folder")
        like = step.abstract(self.model.architecture, optimizer, self.mesh)
        found = saved.load(steps[-1], {"weights": like.params, "optimizer": like.optimizer})
        count = jax.device_put(np.int32(steps[-1]), like.step.sharding)
        return step.State(found["weights"], found["optimizer"], count), steps[-1], about["tokens"]

    def _fetch(self, done: int, tokens: int, metrics: step.Metrics, log: _Log) -> None:
        with self.clock("updates"):
            metrics = step.Metrics(*(float(value) for value in metrics))
        if not math.isfinite(metrics.loss) or not math.isfinite(metrics.gradient_norm):
            path = self.folder / f"batch-{done}.npz"
            np.savez(path, rows=self.data.rows(done - 1), **self.data[done - 1]._asdict())
            raise FloatingPointError(
                f"update {done} has loss {metrics.loss} and gradient norm {metrics.gradient_norm}; "
                f"its batch is in {path}"
            )
        with self.clock("logging"):
            log.update(done, tokens, metrics)

    def _validate(self, state: step.State, done: int, log: _Log) -> float:
        with self.clock("validation"):
            placed = (step.place(batch, self.mesh) for batch in self.validation)
            loss = step.evaluate(state.params, self.model.architecture, placed, self.compute)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss after update {done} is {loss}")
        with self.clock("logging"):
            log.validation(done, loss)
        return loss

    def _save(self, saved: Checkpoints, done: int, state: step.State, tokens: int, loss: float | None) -> None:
        about = {"updates": len(self.data), "seed": self.seed, "tokens": tokens, "epoch": done / self.data.per_epoch}
        with self.clock("checkpoints"):
            trees = {"weights": state.params, "optimizer": state.optimizer}
            saved.save(done, trees, about, metrics=None if loss is None else {"loss": loss})

    def choose(self, saved: Checkpoints, state: step.State) -> dict[str, Any]:
        """Writes FOLDER/model: the weights that RULE says."""
        rows = read_rows(self.folder / "metrics.jsonl")
        losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "validation"}
        with self.clock("checkpoints"):
            saved.wait()
            chosen = min(set(losses) & set(saved.steps()), key=lambda number: (losses[number], number))
            params = state.params
            if chosen != len(self.data):
                like = step.abstract(self.model.architecture, self.settings.optimizer(len(self.data)), self.mesh)
                params = saved.load(chosen, {"weights": like.params})["weights"]
            weights.save(self.model._replace(params=params), self.folder / "model", overwrite=True)
        rows = [row | {"chosen": row["step"] == chosen} if row["kind"] == "validation" else row for row in rows]
        write_rows(self.folder / "metrics.jsonl", rows)
        return {
            "rule": RULE, "chosen": chosen, "updates": len(self.data),
            "tokens": saved.values(saved.steps()[-1])["tokens"], "validation_loss": losses[chosen],
            "perplexity": math.exp(losses[chosen]), "fingerprint": weights.fingerprint(params),
        }  # fmt: skip


class _Log:
    """Rows of metrics.jsonl, the progress bar, and whatever else the settings ask for."""

    def __init__(self, run: _Run, first: int):
        self._run, self._path = run, run.folder / "metrics.jsonl"
        # those beyond the checkpoint come again
        write_rows(self._path, [row for row in read_rows(self._path) if row["step"] <= first])
        self._track = trackers.start(run.settings.trackers, run.folder)
        length = run.data.layout.row_length or run.data.layout.max_length
        self._ceiling_tokens = cost.ceiling(run.compute.dtype) / cost.training_flops(run.model.architecture, length)
        self._before = None  # tokens and time at the row before
        often = 0.1 if sys.stderr.isatty() else 30  # into a log file, a line now and then
        self._bar = tqdm(
            total=len(run.data), initial=first, unit="update", desc=run.tags["name"], mininterval=often,
            dynamic_ncols=True,
        )  # fmt: skip

    def update(self, done: int, tokens: int, metrics: step.Metrics) -> None:
        self._bar.update(1)
        if done % self._run.settings.log_every and done != len(self._run.data):
            return
        now, speed = time.perf_counter(), None
        if self._before is not None:
            speed = (tokens - self._before[0]) / (now - self._before[1])
        self._before = tokens, now
        values = {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, "learning_rate": metrics.learning_rate}
        # of the first row the time is unknown: it has the compilation in it
        values |= {"tokens_per_second": speed, "share_of_ceiling": speed and speed / self._ceiling_tokens}
        self._bar.set_postfix_str(f"loss {metrics.loss:.3f}, {speed or 0:.0f} tokens/s", refresh=False)
        self._row("training", done, values | {"tokens": tokens})

    def validation(self, done: int, loss: float) -> None:
        self._row("validation", done, {"loss": loss, "perplexity": math.exp(loss)})
        self._before = None  # the next row's time would have the validation in it

    def _row(self, kind: str, done: int, values: dict[str, Any]) -> None:
        append_rows(self._path, [{"kind": kind, **self._run.tags, "step": done, **values}])
        self._track(done, {f"{kind}/{name}": value for name, value in values.items() if value is not None})

    def close(self) -> None:
        self._bar.close()
