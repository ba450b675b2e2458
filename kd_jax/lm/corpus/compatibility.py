"""Whether models and corpora speak of the same sequences: the same ids, that mean the same, with the same ends."""

from __future__ import annotations

from kd_jax.lm.corpus.store import Corpus
from kd_jax.lm.model import Model


def check_model(name: str, model: Model, p_star: Model, max_length: int) -> None:
    """Raises ValueError unless both give probabilities to the same sequences."""
    if model.num_tokens != p_star.num_tokens:
        raise ValueError(f"{name} has {model.num_tokens} ids and p* {p_star.num_tokens}: another vocabulary")
    tokenizers = tokenizer_fingerprint(model), tokenizer_fingerprint(p_star)
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise ValueError(f"{name} has another tokenizer than p*: the same id is not the same token")
    if set(model.eos_ids) != set(p_star.eos_ids):
        raise ValueError(f"{name} ends a sequence with ids {sorted(model.eos_ids)}, p* with {sorted(p_star.eos_ids)}")
    limit = model.architecture.max_position_embeddings
    if max_length > limit:
        raise ValueError(f"{name} has {limit} positions, and sequences are up to {max_length} ids long")


def check_teacher(teacher: Model, student: Model) -> None:
    """Raises ValueError unless the ids of both mean the same, so that a distribution over them can be learnt."""
    if teacher.num_tokens != student.num_tokens:
        raise ValueError(
            f"the teacher has {teacher.num_tokens} ids and the student {student.num_tokens}: distilling on logits "
            "needs one vocabulary"
        )
    tokenizers = tokenizer_fingerprint(teacher), tokenizer_fingerprint(student)
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise ValueError(
            f"the teacher has another tokenizer (fingerprint {tokenizers[0][:12]}) than the student "
            f"({tokenizers[1][:12]}): the same id is not the same token"
        )


def check_corpus(label: str, held: Corpus, p_star: Model, num_rows: int) -> None:
    """Raises ValueError unless the corpus has so many rows, of the same tokens as p*'s."""
    about = held.manifest["settings"]
    if not held.finished:
        raise ValueError(f"{label} is not finished: it has {held.num_rows} of {about['num_samples']} rows")
    if not 1 <= num_rows <= held.num_rows:
        raise ValueError(f"{label} has {held.num_rows} rows, and {num_rows} of them were asked for")
    if not about["prompt_ids"]:
        raise ValueError(f"{label} has no prompt, and a model needs an id to start from")
    tokenizers = about["tokenizer_fingerprint"], tokenizer_fingerprint(p_star)
    if None not in tokenizers and len(set(tokenizers)) > 1:
        raise ValueError(f"{label} was made with another tokenizer than p*'s")
    # Documents end with one id; of a model that has several, any of them will do.
    ends, known = set(about["eos_ids"]), set(p_star.eos_ids)
    if ends != known and not (held.kind == "data" and ends and ends <= known):
        raise ValueError(f"{label} has rows that end with ids {about['eos_ids']}; p*'s are {sorted(p_star.eos_ids)}")


def tokenizer_fingerprint(model: Model) -> str | None:
    return None if model.tokenizer is None else model.tokenizer.fingerprint
