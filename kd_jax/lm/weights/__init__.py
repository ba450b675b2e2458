"""Weights: from folders, the hub, GGUF files or our checkpoints to a model, and back."""

from kd_jax.lm.weights.load_save import (
    SOURCES,
    WHEELS,
    check_export,
    describe,
    export,
    fetch,
    fingerprint,
    hub_architecture,
    identity,
    load,
    load_description,
    save,
    save_description,
    tokenizer,
)

__all__ = [
    "SOURCES", "WHEELS", "check_export", "describe", "export", "fetch", "fingerprint", "hub_architecture", "identity",
    "load", "load_description", "save", "save_description", "tokenizer",
]  # fmt: skip
