"""Prompts that models answer: from data files, or the beginnings of a corpus's rows, as token ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax.lm.corpus import documents, readers
from kd_jax.lm.corpus.store import Rows
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import packages

# Columns that are looked for where none is named: conversations, then texts.
COLUMNS = ("messages", "prompt", "instruction", "text")


def read(source: str | os.PathLike, tokenizer: Tokenizer, column: str | None = None) -> list[list[int]]:
    """The prompts of data files as ids.

    A text is what a user says, and a conversation is answered where it ends; a last turn of the assistant is left out.
    Both are rendered by the tokenizer's chat template, up to the assistant's words. Without a template a text is the
    prompt as it is, after BOS where the model's texts begin with it.

    Args:
        source: a file, a glob of files or a folder of them (see documents.SOURCES), or a package (see
            kd_jax.runs.packages).
        tokenizer: of the model that answers.
        column: with texts, or with lists of {"role", "content"}; by default the first of COLUMNS that is there.

    Returns: ids of each row, in order.
    Raises: ValueError, naming the row, for one that is not a prompt; FileNotFoundError or RunError for a source that
        cannot be read.
    """
    paths = documents.files(packages.locate(str(source)), split="train", subset=None)
    names = readers.names(paths)
    column = column or next((name for name in COLUMNS if name in names), COLUMNS[1])
    readers.check_columns(str(source), paths, (column,))
    columns = readers.request_columns(column)
    prompts = []
    for path in paths:
        for number, values in enumerate(readers.rows(path, columns)):
            try:
                prompts.append(encode(readers.request(*values), tokenizer))
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
    return prompts


def encode(prompt: str | Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """A prompt as ids: a text, or messages (a list, or the same as JSON); see `read`.

    Raises: ValueError for a prompt that is empty or neither, or for messages that the template refuses.
    """
    messages = prompt
    if isinstance(prompt, str):
        messages = None
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(prompt)
        # a text that happens to be other JSON is what a user says
        messages = messages if _are_messages(messages) else [{"role": "user", "content": prompt}]
    if not _are_messages(messages):
        raise ValueError(f"a prompt is a text, or messages with a role and a content; this is {str(prompt)[:40]}")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if tokenizer.chat_template:
        if not messages or not messages[-1]["content"].strip():
            raise ValueError("the prompt is empty")
        ids = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    elif len(messages) == 1:
        ids = tokenizer.encode_prompt(messages[0]["content"])
    else:
        raise ValueError("the tokenizer has no chat template; without one, a prompt is one text")
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def _are_messages(value: Any) -> bool:
    return (
        bool(value)
        and isinstance(value, list | tuple)
        and all(
            isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("role", "content")) for one in value
        )
    )


def of_rows(rows: Rows) -> list[list[int]]:
    """The prompts of a corpus's rows: the ids before what was generated, or before the assistant's first words."""
    return [ids[:length].tolist() for ids, length in zip(rows.tokens, rows.prompt_length, strict=True)]


def fingerprint(prompts: Sequence[Sequence[int]]) -> str:
    """A SHA-256 (hex) of the prompts in their order."""
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, "<i4").tobytes())
    return digest.hexdigest()


def settings(prompts: Sequence[Sequence[int]], samples_per_prompt: int) -> dict[str, Any]:
    """The settings of a corpus of samples that say which prompts they have (manifest.SampleSpec)."""
    return {
        "prompt": None, "prompt_ids": [], "prompts_fingerprint": fingerprint(prompts),
        "samples_per_prompt": samples_per_prompt,
    }  # fmt: skip
