"""The student's own samples, drawn with the parameters of an update, as the batch of that update.

Which updates learn from them, their prompts and their random numbers are functions of (seed, update) alone. So a
rollout is a function of these and of the parameters, and a resumed run draws the same samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from kd_jax.lm import decode
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Batch, Layout, Sequences
from kd_jax.lm.distill.loss import DistillSpec
from kd_jax.lm.model import Compute, Model

# What a random number is for, so that one seed serves all.
_CHOICE, _PROMPTS, _SAMPLES = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """How a student's own samples are made.

    Attributes:
        spec: see kd_jax.lm.distill.loss.
        student: its weights are not used.
        layout: of the update's batch.
        seed: of the training.
        prompt_ids: what every sample begins with, where spec.prompt_length is 0; none where sequences have prompts of
            their own, which the student then answers.
        prompts: sequences whose beginnings are the prompts, where they differ.
        max_length: of a sample, prompt included.
        compute, mesh: how the student is run, and where its parameters lie.
        complete: adds to a batch what else an update needs.
    """

    spec: DistillSpec
    student: Model
    layout: Layout
    seed: int
    prompt_ids: list[int]
    prompts: Sequences
    max_length: int
    compute: Compute
    mesh: Mesh | None = None
    complete: Callable[[Batch], Batch] = lambda batch: batch

    def __post_init__(self):
        longest = self.spec.prompt_length or len(self.prompt_ids) or int(self.prompts.prompt_lengths.max())
        if not 1 <= longest < self.max_length:
            raise ValueError(
                f"a prompt of {longest} ids (distill.prompt_length, or the prompt of the corpus) must have at least "
                f"one id, and fewer than the {self.max_length} of a whole sequence"
            )

    def wanted(self, update: int) -> bool:
        """Whether an update (the first is 0) learns from the student's own samples: with probability lambda."""
        # A generator for each update: the draw is the same whatever was drawn before, so a resumed run repeats it.
        return bool(np.random.default_rng((self.seed, _CHOICE, update)).random() < self.spec.on_policy_fraction)

    def prompts_of(self, update: int) -> list[list[int]]:
        """The prompts of an update: one for all of its samples, or one for each."""
        length, count = self.spec.prompt_length, self.layout.sequences
        # One prompt for all samples, whose cache is then computed once.
        if self.prompt_ids and not length:
            return [list(self.prompt_ids)]
        random = np.random.default_rng((self.seed, _PROMPTS, update))
        rows = random.choice(len(self.prompts), count, replace=count > len(self.prompts))
        ends = [length] * count if length else self.prompts.prompt_lengths[rows]
        # without the last id, which may be an EOS: each prompt needs something after it
        return [
            ids[: max(1, min(end, len(ids) - 1))].tolist()
            for ids, end in zip(self.prompts.tokens(rows), ends, strict=True)
        ]

    def batch(self, params: Any, update: int) -> Batch:
        """The batch of an update, sampled with these parameters; what comes after an EOS is masked.

        Args:
            params: the student's weights, as they are before the update.
            update: its number, from 0.
        """
        prompts, count = self.prompts_of(update), self.layout.sequences
        # SeedSequence mixes the three numbers; sums of seed and update would coincide between seeds.
        seed = np.random.SeedSequence((self.seed, _SAMPLES, update)).generate_state(1)[0]
        tokens, lengths, _ = decode.generate(
            self.student._replace(params=params), prompts, count, max_length=self.max_length,
            sample_temperature=self.spec.student_sample_temperature, seed=int(seed),
            batch_size=self.spec.rollout_batch_size or count, compute=self.compute, mesh=self.mesh,
        )  # fmt: skip
        starts = np.array([len(prompts[i % len(prompts)]) for i in range(count)])
        rows = [ids[:n] for ids, n in zip(tokens, lengths, strict=True)]
        return self.complete(batches.arrange(rows, starts, self.layout))
