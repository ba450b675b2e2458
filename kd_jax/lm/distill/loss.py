"""What an update minimises: the text's cross-entropy, or a divergence from a teacher at each position.

    text         cross-entropy of the corpus; no teacher
    online       the teacher runs inside the update, on text of p*, on its own samples, or on a mix
    on_policy    the same, on text that the student samples with the parameters of that very update, for a share of the
                 updates (generalised knowledge distillation: Agarwal et al. 2024, arXiv 2306.13649)
    offline      the teacher's most probable tokens were recorded with the corpus (kd_jax.lm.distill.recorded_top_k)

A teacher with another vocabulary (online and on_policy) reads the text in its own tokens (kd_jax.lm.distill.pairing),
and is compared with the student at the spans of text that both have (kd_jax.lm.distill.cross_vocabulary).

The teacher's weights are passed to the update as an argument, without gradients or buffer donation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kd_jax import fused, losses
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus.batches import Batch, Pair
from kd_jax.lm.decode import chosen_text
from kd_jax.lm.distill import cross_vocabulary, recorded_top_k
from kd_jax.lm.distill.cross_vocabulary import Hidden
from kd_jax.lm.distill.pairing import Pairing
from kd_jax.lm.model import DEFAULT, Architecture, Compute, Model
from kd_jax.lm.sampler_spec import SamplerSpec
from kd_jax.losses.head import share_of_one
from kd_jax.metrics import Mean
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs.settings import setting, spec

# "sequence": the teacher's samples as text, without its distributions.
POLICIES = ("sequence", "online", "on_policy", "offline")
# Whose text is learnt from, and whether the teacher's distributions come with it.
DATA = ("p_star", "samples", "mix")
TAILS = ("bucket", "renormalise")
VOCABULARIES = ("same", *cross_vocabulary.KINDS)
# loss(params, part of a batch, guide) -> the loss as a Mean over the tokens learnt from, and statistics by name
Loss = Callable[[Any, Batch, Any], tuple[Mean, dict[str, Mean]]]


@spec
class DistillSpec:
    """How a student learns from a teacher."""

    policy: str = setting("sequence", "how students learn from the teacher", one_of=POLICIES)
    divergence: str = setting("forward_kl", "between teacher and student at a position", one_of=losses.DIVERGENCES)
    vocabulary: str = setting(
        "same", "the teacher's: the student's (same), or another, compared over spans of text that both have (aligned) "
        "or by sorted probabilities (uld)", one_of=VOCABULARIES,
    )  # fmt: skip
    parameter: float | None = setting(None, "beta or alpha of the divergence; none for its default")
    hard_weight: float = setting(0.0, "share of the text's cross-entropy in the loss", at_least=0.0, at_most=1.0)
    loss_temperature: float = setting(1.0, "T, divides both models' logits; the divergence is times T^2", above=0.0)
    teacher_temperature: float | None = setting(
        None, "divides the teacher's logits in place of T: below T the teacher is more selective", above=0.0
    )
    data: str = setting("p_star", "text that is learnt from: p*'s, the teacher's samples, or both", one_of=DATA)
    mix: float = setting(0.5, "share of the teacher's samples where data is mix", at_least=0.0, at_most=1.0)
    sampler: SamplerSpec = setting(SamplerSpec(), "how the teacher is sampled")
    text_rows: int = setting(0, "sequence: rows of the teacher's text; 0 for config.num_train", at_least=0)
    text_choice: str = setting("all", "sequence: which of the teacher's samples are learnt", one_of=chosen_text.CHOICES)
    text_share: float = setting(
        1.0,
        "share of the samples that is learnt; with text_choice=repeated, the share of different rows",
        above=0.0,
        at_most=1.0,
    )
    on_policy_fraction: float = setting(
        0.5, "lambda: probability that an update learns from the student's own samples", at_least=0.0, at_most=1.0
    )
    prompt_length: int = setting(0, "ids of p*'s rows that the student continues; 0 for the prompt", at_least=0)
    student_sample_temperature: float = setting(1.0, "on_policy: temperature of the student's samples", above=0.0)
    rollout_batch_size: int = setting(0, "on_policy: samples drawn at a time; 0 for all of an update", at_least=0)
    record_top_k: int = setting(64, "offline: tokens recorded at a position", at_least=1)
    log_prob_format: str = setting("uint16", "of recorded log-probabilities", one_of=recorded_top_k.FORMS)
    tail: str = setting("bucket", "offline: what becomes of the tokens that are not recorded", one_of=TAILS)
    teacher_dtype: str = setting(
        "float32", "of the teacher's activations and products", one_of=("float32", "bfloat16", "float16")
    )

    def __post_init__(self):
        if self.parameter is not None and self.divergence not in losses.PARAMETER:
            raise ValueError(f"parameter={self.parameter}: {self.divergence} has none")
        if (self.text_choice == "all") != (self.text_share == 1.0):
            raise ValueError(f"text_share={self.text_share} does not go with text_choice={self.text_choice!r}")
        if self.policy == "offline" and self.tail == "renormalise" and self.record_top_k == 1:
            raise ValueError("record_top_k=1 with tail='renormalise' has a loss of 0; record more tokens")
        if self.vocabulary != "same" and self.policy == "offline":
            raise ValueError(f"vocabulary={self.vocabulary!r} goes with policy='online' or 'on_policy', not 'offline'")
        try:
            losses.checked_parameter(self.divergence, self.parameter)
        except ValueError as error:
            raise ValueError(f"parameter: {error}") from error

    @property
    def share_of_samples(self) -> float:
        """The share of the teacher's samples in a mix of two corpora; 0 where there is one corpus."""
        return self.mix if self.data == "mix" else 0.0


class Distillation(NamedTuple):
    """A teacher, and how students learn from it.

    Attributes:
        spec: how.
        teacher: with its weights where they are to lie, of whatever dtype; None offline.
        compute: how the teacher is run.
        pairing: puts the tokens of a teacher with another vocabulary into batches; None for one vocabulary.
    """

    spec: DistillSpec
    teacher: Model | None = None
    compute: Compute = DEFAULT
    pairing: Pairing | None = None


class Guide(NamedTuple):
    """What the loss depends on beside student and batch; all traced, so that other values do not recompile."""

    teacher: Any  # weights; None offline
    loss_temperature: jax.Array
    teacher_temperature: jax.Array
    parameter: jax.Array | None
    hard_weight: jax.Array
    shared: losses.Shared | None = None  # the tokens that two vocabularies share


def guide(distillation: Distillation) -> Guide:
    """The third argument of the loss: the teacher's weights and the numbers of the spec, float32 scalars."""
    spec, teacher, pairing = distillation.spec, distillation.teacher, distillation.pairing
    # Without a temperature of its own, the teacher has the student's.
    temperature = spec.loss_temperature if spec.teacher_temperature is None else spec.teacher_temperature
    # Float32 arrays, not numbers: a sweep over them compiles nothing anew.
    return Guide(
        teacher=None if teacher is None else teacher.params,
        loss_temperature=jnp.float32(spec.loss_temperature),
        teacher_temperature=jnp.float32(temperature),
        parameter=None if spec.parameter is None else jnp.float32(spec.parameter),
        hard_weight=jnp.float32(spec.hard_weight),
        shared=None if pairing is None else jax.tree.map(jnp.asarray, pairing.shared),
    )


def cross_entropy(
    architecture: Architecture, compute: Compute, *, num_tokens: int | None = None, packed: bool = True
) -> Loss:
    """The loss of learning the text itself; it has no statistics and no guide.

    Args:
        architecture: of the student.
        compute: how it is run.
        num_tokens: how many ids are real; of a padded vocabulary the others are left out, as scoring does.
        packed: whether a row may hold several sequences; attention is quicker where none does.
    """
    return _cross_entropy(architecture, compute, num_tokens or architecture.vocab_size, packed)


# Equal arguments give the same function object, by which jit finds what it has compiled.
@functools.lru_cache(maxsize=16)
def _cross_entropy(architecture: Architecture, compute: Compute, num_tokens: int, packed: bool) -> Loss:
    def loss(params: Any, part: Batch, guide: None = None) -> tuple[Mean, dict[str, Mean]]:
        hidden = _hidden(params, architecture, part, compute, packed)
        mean = fused.linear_cross_entropy(
            hidden, model_lib.head(params), _next_tokens(part), part.mask, num_tokens=num_tokens,
            softcap=architecture.logit_softcap, chunk=compute.chunk,
            mesh=compute.mesh,
        )  # fmt: skip
        return mean, {}

    return loss


def loss(distillation: Distillation, student: Model, compute: Compute, *, packed: bool = True) -> Loss:
    """The loss of a part of a batch: (1 - hard_weight) T^2 divergence + hard_weight cross-entropy.

    Its statistics are those of kd_jax.fused: divergence, cross-entropy, both models' entropies (nats per token) and how
    often their most probable tokens agree. With another vocabulary: divergence, cross-entropy, and the share of tokens
    in spans that were compared.

    Args:
        student: its architecture and number of real ids; its weights are not used.
        compute: how the student is run, the mesh it lies on included.
        packed: whether a row may hold several sequences; attention is quicker where none does.
    """
    spec, teacher, teacher_compute, _ = distillation
    if spec.policy == "offline":
        # What was recorded came with the batch: no teacher runs.
        compare = _Records(spec.tail)
    else:
        # the teacher may lie on the devices in another way than the student
        mesh = mesh_lib.of(teacher.params)
        teacher_compute = dataclasses.replace(teacher_compute, mesh=mesh)
        compare = _Teacher(teacher.architecture, teacher_compute, compute.mesh, packed)
        if spec.vocabulary != "same":
            compare = _OtherVocabulary(compare, teacher.num_tokens, spec.vocabulary)
    return _loss(compare, spec.divergence, student.architecture, student.num_tokens, compute, packed)


# All arguments are hashable and compared by value: equal settings give the same function, compiled once.
@functools.lru_cache(maxsize=16)
def _loss(
    compare: _Records | _Teacher | _OtherVocabulary, divergence: str, architecture: Architecture, num_tokens: int,
    compute: Compute, packed: bool,
) -> Loss:  # fmt: skip
    def loss(params: Any, part: Batch, guide: Guide) -> tuple[Mean, dict[str, Mean]]:
        hidden = _hidden(params, architecture, part, compute, packed)
        # The numbers come in the guide and are traced; what is given here besides fixes the program.
        mean, statistics = compare(
            guide, part, hidden, model_lib.head(params), divergence=divergence, parameter=guide.parameter,
            temperature=guide.loss_temperature, teacher_temperature=guide.teacher_temperature,
            hard_weight=guide.hard_weight, num_tokens=num_tokens, softcap=architecture.logit_softcap,
            chunk=compute.chunk, mesh=compute.mesh,
        )  # fmt: skip
        return mean, statistics._asdict()

    return loss


class _Teacher(NamedTuple):
    """Compares the student with a teacher that runs on the same text."""

    architecture: Architecture
    compute: Compute
    student_mesh: Mesh | None
    packed: bool

    def __call__(self, guide: Guide, part: Batch, hidden: jax.Array, head: jax.Array, **loss_options):
        # No gradient reaches the teacher, whatever the loss is differentiated in.
        teacher = jax.lax.stop_gradient(guide.teacher)
        teacher_hidden = _hidden(teacher, self.architecture, part, self.compute, self.packed)
        # Hidden states are sent to the student's devices, not logits: a width instead of a vocabulary for each token.
        teacher_hidden = mesh_lib.constrain(teacher_hidden, ("batch", None, None), self.student_mesh)
        return fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=teacher_hidden,
            teacher_head=model_lib.head(teacher),
            labels=_next_tokens(part),
            mask=part.mask,
            teacher_softcap=self.architecture.logit_softcap,
            **loss_options,
        )


class _Statistics(NamedTuple):
    divergence: Mean
    cross_entropy: Mean
    compared: Mean


class _OtherVocabulary(NamedTuple):
    """Compares the student with a teacher that runs on the same text in its own tokens."""

    teacher: _Teacher
    num_tokens: int
    kind: str

    def __call__(
        self, guide: Guide, part: Batch, hidden: jax.Array, head: jax.Array, *, temperature, hard_weight, num_tokens,
        softcap, chunk, mesh, **loss_options,
    ):  # fmt: skip
        run, pair, mask = self.teacher, part.pair, part.mask
        weights = jax.lax.stop_gradient(guide.teacher)
        teacher_hidden = _hidden(weights, run.architecture, pair, run.compute, run.packed)
        teacher_hidden = mesh_lib.constrain(teacher_hidden, ("batch", None, None), run.student_mesh)
        teacher_head, teacher_softcap = model_lib.head(weights)[: self.num_tokens], run.architecture.logit_softcap
        total, values = cross_vocabulary.linear_aligned_divergence(
            teacher=Hidden(teacher_hidden, teacher_head, pair.tokens, teacher_softcap),
            student=Hidden(hidden, head[:num_tokens], part.tokens, softcap), pair=pair, shared=guide.shared,
            kind=self.kind, temperature=temperature, chunk=chunk, mesh=mesh, **loss_options,
        )  # fmt: skip
        length = mask.shape[-1]
        # A span counts where it begins: the sum over a text is that of its spans, and the mean is per token.
        divergence = losses.masked_mean(cross_vocabulary.at_first_tokens(values, pair.student, length), mask)
        compared = cross_vocabulary.at_all_tokens(pair.mask, pair.student, length)
        text = fused.linear_cross_entropy(
            hidden, head, _next_tokens(part), mask, num_tokens=num_tokens, softcap=softcap, chunk=chunk, mesh=mesh
        )
        soft = (1 - hard_weight) * temperature**2 * total * share_of_one(mask)
        loss = text._replace(mean=soft + hard_weight * text.mean)
        statistics = _Statistics(divergence, text, losses.masked_mean(compared.astype(jnp.float32), mask))
        return loss, jax.lax.stop_gradient(statistics)


class _Records(NamedTuple):
    """Compares the student with what was recorded of a teacher."""

    tail: str

    def __call__(self, guide: Guide, part: Batch, hidden: jax.Array, head: jax.Array, **loss_options):
        ids, log_probs, tail_log_prob = recorded_top_k.read(part.targets)
        return fused.linear_top_k_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_ids=ids,
            teacher_log_probs=log_probs,
            teacher_tail_log_prob=tail_log_prob,
            labels=_next_tokens(part),
            mask=part.mask,
            tail=self.tail,
            **loss_options,
        )


def _next_tokens(part: Batch) -> jax.Array:
    """The token after each; the mask leaves out the last of a row, so what rolls in there does not matter."""
    return jnp.roll(part.tokens, -1, axis=-1)


def _hidden(params: Any, architecture: Architecture, part: Batch | Pair, compute: Compute, packed: bool) -> jax.Array:
    # One sequence a row is padded on the right, where nothing attends to it: no segments are needed.
    segments = part.segments if packed else None
    return model_lib.forward(
        params, architecture, part.tokens, positions=part.positions, segments=segments, compute=compute
    )
