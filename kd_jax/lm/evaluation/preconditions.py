"""What an evaluation is asked to do, and every check of it that needs no weights (so that a dry run makes it too)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from kd_jax.lm.corpus import Corpus, compatibility
from kd_jax.lm.evaluation.lazy_models import LazyModel, metadata
from kd_jax.lm.model import Model
from kd_jax.runs.settings import setting, spec

_NAME = re.compile(r"[\w.@+-]+(/[\w.@+-]+)*")
# Between the random seeds of one teacher's models and the next's.
TEACHERS_APART = 10_000_000
# Parts of a name that would collide with the files of another model.
_TAKEN = {"samples", "at", ".", ".."}


@spec
class MeasureSpec:
    """What is measured of each model."""

    sample_temperatures: tuple[float, ...] = setting(
        (1.0,), "each model is evaluated at each of these; 1 is its own distribution", above=0
    )
    agreement: bool = setting(False, "also score p* on the recall rows: how often its likeliest id is the model's, too")
    embedding_model: str = setting(
        "", "model whose mean hidden states embed texts, for metrics of samples; best not p*; empty for none"
    )
    samples_per_prompt: int = setting(
        1, "samples of each prompt, where the recall rows have prompts of their own", at_least=1
    )
    num_points: int = setting(2000, "texts of each model that are embedded, at most", at_least=20)
    batch_tokens: int | None = setting(
        None, "tokens scored at a time by all devices together; none: 4096 on a CPU, else as many as memory allows, "
        "times the parts of the mesh that rows are split over (kd_jax.lm.score.tokens_at_once)", at_least=1,
    )  # fmt: skip


@spec
class EvaluationSpec(MeasureSpec):
    """How models are evaluated."""

    num_samples: int = setting(1000, "samples of each model at each temperature", at_least=1)
    num_recall: int | None = setting(None, "rows that recall is measured on; none takes all of the corpus", at_least=1)
    seed: int = setting(0, "of the samples; a model's own seed is added")
    dtype: str = setting("float32", "of weights and matrix products", one_of=("float32", "bfloat16", "float16"))
    batch_size: int = setting(64, "samples drawn at a time", at_least=1)


class Entry(NamedTuple):
    """A model to evaluate.

    Attributes:
        source: what kd_jax.lm.weights.load takes, or the model itself.
        arm: "direct", "distilled", "teacher" or "model". Like `tau`, it only says in the row what this is.
        tau: the sample temperature of the teacher, in the samples the model learnt from or in its own here.
        seed: of the model's training. Models of one seed are sampled with the same random numbers, which makes
            differences between them less noisy; models of another seed with others.
        samples: samples of the model to take, the first num_samples; it is then evaluated as they were drawn.
        teacher: which teacher of a run with several this is, or learnt from. Models of different teachers are sampled
            with different random numbers.
        sample_temperatures: to evaluate this model at, in place of the evaluation's.
    """

    source: str | os.PathLike | Model
    arm: str = "model"
    tau: float | None = None
    seed: int | None = None
    samples: Corpus | None = None
    teacher: int | None = None
    sample_temperatures: tuple[float, ...] | None = None


def check(
    p_star: str | os.PathLike | Model | LazyModel, models: Mapping[str, Entry], spec: EvaluationSpec, max_length: int
) -> None:
    """Checks models before any weights are loaded. A Model may have empty params, such as one yet to be trained.

    Args:
        max_length: of the validation rows and of the samples, the prompt included.
    Raises: ValueError for models that do not go together with p* (vocabulary, tokenizer, EOS ids), have fewer than
        max_length positions, or a name that cannot be a folder; FileNotFoundError or RunError for a source that is not
        there or cannot be opened.
    """
    if not spec.sample_temperatures or len(set(spec.sample_temperatures)) < len(spec.sample_temperatures):
        raise ValueError(f"sample_temperatures={spec.sample_temperatures} must be different numbers, at least one")
    for name in models:
        if not _NAME.fullmatch(name) or _TAKEN & set(name.split("/")):
            raise ValueError(
                f"{name!r} cannot name a model: use letters, digits and . _ @ + - with / between, and no part "
                "'samples' or 'at'"
            )
    reference = p_star.metadata if isinstance(p_star, LazyModel) else metadata(p_star)
    # p* against itself: the length of the sequences.
    compatibility.check_model("p*", reference, reference, max_length)
    for name, entry in models.items():
        compatibility.check_model(name, metadata(entry.source), reference, max_length)
    if spec.embedding_model:
        embedder = metadata(spec.embedding_model)
        # Without text in between, p*'s ids go to the embedding model as they are.
        if reference.tokenizer is None and embedder.num_tokens < reference.num_tokens:
            raise ValueError(
                f"embedding_model {spec.embedding_model} has {embedder.num_tokens} ids, p* has {reference.num_tokens} "
                "and no tokenizer to make text of them"
            )


def check_samples(name: str, samples: Corpus, p_star: Model, validation: Mapping[str, Any], num_samples: int) -> None:
    """Raises ValueError unless given samples are enough, and agree with the validation rows in prompt and length.

    Args:
        name: of the model, for the message.
        samples: the model's samples.
        p_star: without weights.
        validation: settings of the validation corpus.
        num_samples: how many are needed.
    """
    label = f"{name}: the corpus {samples.folder}"
    compatibility.check_corpus(label, samples, p_star, num_samples)
    # Other prompts or a shorter limit would make precision and recall averages over different sets of sequences.
    for key in ("prompt_ids", "max_length", "max_new_tokens", "prompts_fingerprint"):
        value, wanted = samples.manifest["settings"].get(key), validation.get(key)
        if value != wanted:
            raise ValueError(f"{label} has {key} {value}, the validation corpus {wanted}")
