"""Learning from a teacher's distribution at each position: how, and the loss of an update.

    online       the teacher runs inside the update, on text of p*, of its own, or a mix
    on_policy    the same on text that the student samples with the parameters of that very update, for a share of the
                 updates (generalised knowledge distillation: Agarwal et al. 2024, arXiv 2306.13649)
    offline      the teacher's likeliest tokens were recorded with the corpus (kd_jax.lm.distill.recorded_top_k); no
                 teacher is needed

The teacher is an argument of the update that is neither differentiated nor donated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax import fused, losses
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus.batches import Batch
from kd_jax.lm.distill import recorded_top_k
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.losses import terms
from kd_jax.metrics import Mean
from kd_jax.parallel import mesh as mesh_lib

POLICIES = ("online", "on_policy", "offline")
TAILS = ("bucket", "renormalise")
# loss(params, part of a batch, guide) -> the loss as a Mean over the tokens learnt from, and statistics by name
Loss = Callable[[Any, Batch, Any], tuple[Mean, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a student learns from a teacher's distribution.

    Attributes:
        policy: one of POLICIES.
        divergence: one of kd_jax.losses.DIVERGENCES.
        parameter: its beta or alpha; None for its default.
        loss_temperature: T, by which both models' logits are divided; the divergence is multiplied by T^2.
        teacher_temperature: by which the teacher's are divided in place of T: below T, what is learnt is more selective
            than the teacher. None for T.
        hard_weight: share of the cross-entropy with the text itself in the loss.
        mix: share of the sequences that are of a member's second corpus.
        on_policy_fraction: lambda, the probability that an update's sequences are the student's own.
        prompt_length: of the student's own sequences, taken from rows of a corpus; 0 for the corpus' prompt.
        student_sample_temperature: at which the student samples them.
        rollout_batch_size: how many of them are sampled at a time; 0 for all of an update.
        tail: offline, what becomes of the probability beyond the recorded tokens; one of TAILS.
    """

    policy: str
    divergence: str = "forward_kl"
    parameter: float | None = None
    loss_temperature: float = 1.0
    teacher_temperature: float | None = None
    hard_weight: float = 0.0
    mix: float = 0.0
    on_policy_fraction: float = 0.5
    prompt_length: int = 0
    student_sample_temperature: float = 1.0
    rollout_batch_size: int = 0
    tail: str = "bucket"

    def __post_init__(self):
        for name, known in (("policy", POLICIES), ("divergence", losses.DIVERGENCES), ("tail", TAILS)):
            if getattr(self, name) not in known:
                raise ValueError(f"distill.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("loss_temperature", "teacher_temperature", "student_sample_temperature"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("hard_weight", "mix", "on_policy_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be from 0 to 1")
        for name in ("prompt_length", "rollout_batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be 0 or above")
        if self.parameter is not None:
            if self.divergence not in losses.PARAMETER:
                raise ValueError(f"distill.parameter={self.parameter}: {self.divergence} has none")
            terms.checked_parameter(self.divergence, self.parameter)


class Distillation(NamedTuple):
    """A teacher, and how students learn from it.

    Attributes:
        settings: see there.
        teacher: with its weights where they are to lie, of whatever dtype; None offline.
        compute: how the teacher is run.
    """

    settings: Settings
    teacher: Model | None = None
    compute: Compute = DEFAULT


class Guide(NamedTuple):
    """What the loss depends on beside the student and the batch; all traced, so other values do not recompile."""

    teacher: Any  # weights; None offline
    loss_temperature: jax.Array
    teacher_temperature: jax.Array
    parameter: jax.Array | None
    hard_weight: jax.Array


def guide(distillation: Distillation) -> Guide:
    """The argument of the update that says whom to learn from and how."""
    settings, teacher, _ = distillation
    theirs = settings.loss_temperature if settings.teacher_temperature is None else settings.teacher_temperature
    parameter = None if settings.parameter is None else jnp.float32(settings.parameter)
    numbers = jnp.float32(settings.loss_temperature), jnp.float32(theirs), parameter, jnp.float32(settings.hard_weight)
    return Guide(None if teacher is None else teacher.params, *numbers)


def loss(distillation: Distillation, student: Model, compute: Compute, *, packed: bool = True) -> Loss:
    """The loss of a part of a batch: (1 - hard_weight) T^2 divergence + hard_weight cross-entropy.

    Its statistics are those of kd_jax.fused: divergence, cross-entropy, both models' entropies (nats a token) and how
    often their likeliest tokens agree. `compute` says over which mesh the student lies. `packed` says that a row may
    hold several sequences; attention is quicker where none does.
    """
    run = _from_records if distillation.settings.policy == "offline" else _from_teacher

    def function(params: Any, part: Batch, guide: Guide) -> tuple[Mean, dict[str, Mean]]:
        part = part if packed else part._replace(segments=None)
        hidden = _hidden(params, student.architecture, part, compute)
        # what follows each token; of the last of a row nothing is learnt, so what rolls in does not matter
        labels = jnp.roll(part.tokens, -1, axis=-1)
        how = {
            "divergence": distillation.settings.divergence, "parameter": guide.parameter,
            "temperature": guide.loss_temperature, "teacher_temperature": guide.teacher_temperature,
            "hard_weight": guide.hard_weight, "num_tokens": student.num_tokens,
            "chunk": compute.chunk, "mesh": compute.mesh,
        }  # fmt: skip
        found, statistics = run(distillation, guide, hidden, model_lib.head(params), labels, part, how)
        return found, statistics._asdict()

    return function


def _hidden(params: Any, architecture: Architecture, part: Batch, compute: Compute) -> jax.Array:
    return model_lib.forward(
        params, architecture, part.tokens, positions=part.positions, segments=part.segments, compute=compute
    )


def _from_teacher(distillation: Distillation, guide: Guide, hidden, head, labels, part: Batch, how):
    teacher = jax.lax.stop_gradient(guide.teacher)
    # wherever the teacher lies; its hidden states are then brought to the student's
    over = mesh_lib.of(distillation.teacher.params)
    compute = dataclasses.replace(distillation.compute, mesh=over)
    theirs = _hidden(teacher, distillation.teacher.architecture, part, compute)
    theirs = mesh_lib.constrain(theirs, ("batch", None, None), how["mesh"])
    return fused.linear_distillation(hidden, head, theirs, model_lib.head(teacher), labels, part.mask, **how)


def _from_records(distillation: Distillation, guide: Guide, hidden, head, labels, part: Batch, how):
    ids, log_probs, tail = recorded_top_k.read(part.targets)
    return fused.linear_top_k_distillation(
        hidden, head, ids, log_probs, tail, labels, part.mask, tail=distillation.settings.tail, **how
    )


def cross_entropy(architecture: Architecture, compute: Compute) -> Loss:
    """The loss of learning the text itself; it takes no guide."""

    def loss(params, part: Batch, guide=None):
        hidden = model_lib.forward(
            params, architecture, part.tokens, positions=part.positions, segments=part.segments, compute=compute
        )
        # what follows each token; of the last of a row nothing is learnt, so what rolls in does not matter
        labels = jnp.roll(part.tokens, -1, axis=-1)
        head = model_lib.head(params)
        found = fused.linear_cross_entropy(hidden, head, labels, part.mask, chunk=compute.chunk, mesh=compute.mesh)
        return found, {}

    return loss
