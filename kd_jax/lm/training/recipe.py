"""How a model is trained, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import optax

from kd_jax.lm.corpus import Corpus
from kd_jax.lm.training import optimizer
from kd_jax.runs.settings import setting, spec
from kd_jax.runs.trackers import TRACKERS


@spec
class TrainSpec:
    """How a model is trained."""

    epochs: int = setting(5, "passes over the corpus; 0 where updates say how long training is", at_least=0)
    updates: int = setting(0, "updates in all, in place of epochs; 0 for as many as the epochs make", at_least=0)
    batch_size: int = setting(256, "sequences of an update", at_least=1)
    row_length: int = setting(0, "tokens of a packed row; 0 gives each sequence a row", at_least=0)
    parts: int = setting(1, "parts that an update's batch is computed in (gradient accumulation)", at_least=1)
    learning_rate: float = setting(5e-4, "AdamW's, after the warm-up", above=0.0)
    warmup: float = setting(
        0.01, "share of the updates, at the start, in which the learning rate rises", at_least=0.0, at_most=1.0
    )
    decay: float = setting(
        0.2, "share of the updates, at the end, in which the learning rate falls to 0", at_least=0.0, at_most=1.0
    )
    b1: float = setting(0.9, "AdamW's decay of the first moment", at_least=0.0, below=1.0)
    # 0.95 is usual for language models: the second moment follows the gradients faster than with Adam's 0.999.
    b2: float = setting(0.95, "AdamW's decay of the second moment", at_least=0.0, below=1.0)
    eps: float = setting(1e-8, "AdamW's epsilon", above=0.0)
    weight_decay: float = setting(0.0, "AdamW's, of matrices alone", at_least=0.0)
    clip: float = setting(1.0, "global norm that gradients are clipped to; 0 for none", at_least=0.0)
    frozen: tuple[str, ...] = setting(
        (), "weights that stay as they start: embedding, norm, head, layers, layers.0-3, layers.q, layers.0-3.q"
    )
    # Each validation saves a checkpoint, as the one of least validation loss becomes the model.
    validations: int = setting(10, "how many, evenly spread, the last after the last update; each saves a checkpoint",
                               at_least=1)  # fmt: skip
    save_every: int = setting(0, "updates between further checkpoints; 0 for none", at_least=0)
    log_every: int = setting(10, "updates between rows of metrics", at_least=1)
    keep: int = setting(1, "checkpoints that stay beside the best", at_least=1)
    # By default they go: the model is saved apart, and a checkpoint with both moments takes three times its space.
    keep_checkpoints: bool = setting(False, "keep the checkpoints after the training")
    trackers: tuple[str, ...] = setting((), "where metrics are logged beside metrics.jsonl", one_of=TRACKERS)
    together: int = setting(1, "students of an arm trained at once: faster on a GPU that one does not fill",
                            at_least=1)  # fmt: skip

    def __post_init__(self):
        if bool(self.epochs) == bool(self.updates):
            raise ValueError(
                f"epochs={self.epochs} and updates={self.updates}: exactly one of them is above 0 (set the other to 0)"
            )
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} must not be above 1 together")

    def schedule(self, updates: int) -> optax.Schedule:
        """The learning rate by the number of finished updates, of `updates` in all."""
        return optimizer.wsd(self.learning_rate, updates, self.warmup, self.decay)

    def optimizer(self, updates: int) -> optax.GradientTransformation:
        """AdamW with that schedule."""
        return optimizer.adamw(
            self.schedule(updates), b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, clip=self.clip
        )


class Member(NamedTuple):
    """A model to be trained.

    Attributes:
        corpus: its last num_validation rows choose the checkpoint; the model is trained on the others.
        num_validation: how many.
        seed: of its random start and of the order of its data.
        folder: what it writes.
        name: for the progress bar.
        tags: fields for every row of its metrics.jsonl.
        mixed: the corpus that DistillSpec.mix takes its share of sequences from.
        prompts: the corpus whose rows give the prompts of the student's own samples; by default `corpus`.
        start: weights that training starts from; None for random ones. What is trained is copied, what is frozen is
            shared. Members that are trained together and have frozen weights have one start.
        base: folder or id of the model that `start` is, for the record of adapters; without it, there is no adapter
            folder.
    """

    corpus: Corpus
    num_validation: int
    seed: int
    folder: Path
    name: str = "model"
    tags: dict[str, Any] = {}
    mixed: Corpus | None = None
    prompts: Corpus | None = None
    start: Any = None
    base: str = ""
