"""Rows of a corpus as text, for reading: what `python -m kd_jax.sample --read` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.lm import corpus, weights
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import write_rows


def samples(folder: str, *, model: str | None, first: int, num_samples: int, text_out: str | None) -> None:
    """Prints rows of a corpus as text, or writes them as JSON lines.

    Args:
        folder: of the corpus.
        model: a source that has the tokenizer; by default what the corpus was made with.
        first, num_samples: which rows.
        text_out: the file to write; None prints.

    Raises: ValueError, with the flag at fault, where there are no such rows or no tokenizer.
    """
    opened = corpus.open(folder)
    if first >= opened.num_rows:
        raise ValueError(f"--first {first}: {folder} has {opened.num_rows} samples")
    stop = min(first + num_samples, opened.num_rows)
    tokenizer = _tokenizer(folder, model, opened.manifest["settings"])
    rows = opened.rows(first, stop)
    # a corpus sampled without a tokenizer is shown as its ids
    texts, changed = ([None] * len(rows.index), 0) if tokenizer is None else corpus.text(opened, tokenizer, first, stop)
    names = ("index", "length", "finished", "log_prob", "text", "tokens")
    # rows made from data have none
    log_probs = [None if np.isnan(value) else value for value in rows.log_prob]
    columns = zip(rows.index, rows.length, rows.finished, log_probs, texts, rows.tokens, strict=True)
    lines = [dict(zip(names, row, strict=True)) for row in columns]
    if text_out is not None:
        Path(text_out).parent.mkdir(parents=True, exist_ok=True)
        write_rows(Path(text_out), lines)
    else:
        for line in lines:
            _print(line)
    total = opened.manifest["settings"]["num_samples"]
    so_far = "" if opened.finished else f" there so far ({total} wanted)"
    where = "" if text_out is None else f" in {text_out}"
    print(f"{len(lines)} of {opened.num_rows} samples{so_far}{where}; {changed} with text that encodes to other ids")


def _print(line: dict[str, Any]) -> None:
    end = "finished" if line["finished"] else "cut"
    log_prob = "" if line["log_prob"] is None else f", log_prob {line['log_prob']:.4f}"
    print(f"[{line['index']}] length {line['length']}, {end}{log_prob}")
    print(line["tokens"].tolist() if line["text"] is None else line["text"], end="\n\n")


def _tokenizer(folder: str, model: str | None, settings: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of `model`, or by default of the corpus's own source; None for a corpus made without a tokenizer.

    Raises: ValueError where it is not the one that the corpus was made with.
    """
    if model is None and settings["tokenizer_fingerprint"] is None:
        return None
    source = model or settings.get("tokenizer_source", settings["source"])
    try:
        tokenizer = weights.tokenizer(source)
    except (OSError, ValueError, RunError) as error:
        raise ValueError(f"no tokenizer from {source} ({error}); name a source that has it with --model") from error
    if tokenizer is None or settings["tokenizer_fingerprint"] not in (None, tokenizer.fingerprint):
        raise ValueError(f"{source} does not have the tokenizer that {folder} was made with; name one with --model")
    return tokenizer
