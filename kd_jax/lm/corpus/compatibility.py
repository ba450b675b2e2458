"""Checks that models and corpora speak of the same sequences: the same ids, of the same meaning, with the same ends."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kd_jax.lm.corpus.store import Corpus
from kd_jax.lm.model import Model
from kd_jax.lm.weights.tokenizer import difference


def check_model(name: str, model: Model, p_star: Model, max_length: int) -> None:
    """Raises ValueError unless both models give probabilities to the same sequences.

    Args:
        name: of the model, for the message.
        model, p_star: the two.
        max_length: ids of the longest sequence.
    """
    _check_ids(name, model, "p*", p_star)
    if set(model.eos_ids) != set(p_star.eos_ids):
        raise ValueError(f"{name} ends a sequence with ids {sorted(model.eos_ids)}, p* with {sorted(p_star.eos_ids)}")
    limit = model.architecture.max_position_embeddings
    if max_length > limit:
        raise ValueError(f"{name} has {limit} positions, and sequences are up to {max_length} ids long")


def check_teacher(teacher: Model, student: Model) -> None:
    """Raises ValueError unless an id means the same to both, so that one can learn the other's distribution.

    Args:
        teacher, student: without weights, or with them.
    """
    _check_ids("the teacher", teacher, "the student", student)


def other_vocabulary(name: str, model: Model, other_name: str, other: Model) -> str | None:
    """How the ids of two models differ, in words; None where an id means the same to both.

    Args:
        name, other_name: what the text calls them.
        model, other: the two.
    """
    if model.num_tokens != other.num_tokens:
        return f"{name} has {model.num_tokens} ids and {other_name} {other.num_tokens}: another vocabulary"
    # A model without a tokenizer is compared by its number of ids alone: there is nothing else to compare.
    if model.tokenizer is None or other.tokenizer is None:
        return None
    problem = difference(model.tokenizer, other.tokenizer, name, other_name)
    return None if problem is None else f"{name} has another tokenizer than {other_name}: {problem}"


def _check_ids(name: str, model: Model, other_name: str, other: Model) -> None:
    problem = other_vocabulary(name, model, other_name, other)
    if problem is not None:
        raise ValueError(problem)


def check_ids(label: str, rows: Iterable[np.ndarray], model: Model) -> None:
    """Raises ValueError for an id that the model has no weights for: a tokenizer may have added tokens beyond them.

    Args:
        label: what the message calls the text.
        rows: its ids.
    """
    largest = max((int(np.max(row, initial=0)) for row in rows), default=0)
    if largest >= model.num_tokens:
        token = "" if model.tokenizer is None else f" ({model.tokenizer.backend.id_to_token(largest)!r})"
        raise ValueError(f"{label} has id {largest}{token}; the model's are 0 to {model.num_tokens - 1}")


def check_corpus(label: str, corpus: Corpus, p_star: Model, num_rows: int) -> None:
    """Raises ValueError unless the corpus can serve as data of p*: enough rows, of its tokens, with its ends.

    Samples end with any of a model's EOS ids, data with the one that was named for them.

    Args:
        label: what the message calls the corpus.
        num_rows: how many rows are needed.
    """
    settings = corpus.manifest["settings"]
    if not corpus.finished:
        raise ValueError(f"{label} is not finished: it has {corpus.num_rows} of {settings['num_samples']} rows")
    if not 1 <= num_rows <= corpus.num_rows:
        raise ValueError(f"{label} has {corpus.num_rows} rows, and {num_rows} of them were asked for")
    # A row's first token is predicted by nothing: without a prompt or a mask, it would be left out unnoticed.
    if not settings["prompt_ids"] and not has_own_prompts(corpus):
        raise ValueError(f"{label} has no prompt, and a model needs an id to start from")
    tokenizers = settings["tokenizer_fingerprint"], tokenizer_fingerprint(p_star)
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise ValueError(f"{label} was made with another tokenizer than p*'s")
    ends, model_ends = set(settings["eos_ids"]), set(p_star.eos_ids)
    # Rows that never end, or end otherwise, would count as evidence that a model stops too early or too late.
    if not (ends == model_ends or (corpus.kind == "data" and ends and ends <= model_ends)):
        raise ValueError(f"{label} has rows that end with ids {sorted(ends)}; p*'s are {sorted(model_ends)}")


def has_own_prompts(corpus: Corpus) -> bool:
    """Whether the rows have prompts of their own: they are conversations, or samples of several prompts."""
    return corpus.has_loss_mask or bool(corpus.manifest["settings"].get("samples_per_prompt"))


def tokenizer_fingerprint(model: Model) -> str | None:
    """The fingerprint of a model's tokenizer; None for a model without one."""
    return None if model.tokenizer is None else model.tokenizer.fingerprint
