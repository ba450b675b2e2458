"""Weights: from folders, the hub, GGUF files or our checkpoints to a model, and back."""

from kd_jax.lm.weights.load_save import (
    SOURCES,
    WHEELS,
    about,
    describe,
    export,
    fetch,
    fingerprint,
    hub_architecture,
    identity,
    load,
    save,
    save_about,
    tokenizer,
)

__all__ = [
    "SOURCES",
    "WHEELS",
    "about",
    "describe",
    "export",
    "fetch",
    "fingerprint",
    "hub_architecture",
    "identity",
    "load",
    "save",
    "save_about",
    "tokenizer",
]
