"""How a model is trained: the settings of kd_jax.lm.training, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.lm.corpus import Corpus
from kd_jax.lm.training import optimizer as optim
from kd_jax.runs import trackers


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
        learning_rate, warmup, decay, b1, b2, eps, weight_decay, clip: see kd_jax.lm.training.optimizer.
        trackers: names out of kd_jax.runs.trackers.TRACKERS.
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


class Member(NamedTuple):
    """A model to be trained.

    Attributes:
        corpus: its last settings.num_validation rows choose the checkpoint, the others are trained on.
        seed: of its random start and of the order of its data.
        folder: what it leaves.
        name: for the progress bar.
        tags: fields for every row of its metrics.jsonl.
        mixed: the corpus that distill.mix takes its share of sequences from.
        prompts: the corpus whose rows give the prompts of the student's own sequences; by default `corpus`.
    """

    corpus: Corpus
    seed: int
    folder: Path
    name: str = "model"
    tags: dict[str, Any] = {}
    mixed: Corpus | None = None
    prompts: Corpus | None = None
