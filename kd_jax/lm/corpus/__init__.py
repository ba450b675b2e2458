"""Corpora of token ids on disk: written by shards, resumed, read; data sets made into corpora; batches."""

from kd_jax.lm.corpus.store import (
    DATA_SETTINGS,
    SCHEMA,
    SETTINGS,
    Arrival,
    Corpus,
    Rows,
    create_or_resume,
    find,
    fingerprint,
    open,
    open_for_all,
    padded,
    text,
    write,
    write_rows,
)

__all__ = [
    "DATA_SETTINGS", "SCHEMA", "SETTINGS", "Arrival", "Corpus", "Rows", "create_or_resume", "find", "fingerprint",
    "open", "open_for_all", "padded", "text", "write", "write_rows",
]  # fmt: skip
