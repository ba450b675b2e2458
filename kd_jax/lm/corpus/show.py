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
    """Prints samples first .. first + num_samples - 1, or writes them to `text_out`, a JSON object a line.

    `model` is a source that has the tokenizer; without it, it comes from what the corpus was made with.

    Raises ValueError, in the words of the command line, for what is not there.
    """
    held = corpus.open(folder)
    if first >= held.num_rows:
        raise ValueError(f"--first {first}: {folder} has {held.num_rows} samples")
    stop = min(first + num_samples, held.num_rows)
    tokenizer = _tokenizer(folder, model, held.manifest["settings"])
    rows = held.rows(first, stop)
    # a corpus sampled without a tokenizer is shown as its ids
    texts, changed = ([None] * len(rows.index), 0) if tokenizer is None else corpus.text(held, tokenizer, first, stop)
    names = ("index", "length", "finished", "log_prob", "text", "tokens")
    # rows made from data have none
    log_probs = [None if np.isnan(value) else value for value in rows.log_prob]
    columns = zip(rows.index, rows.length, rows.finished, log_probs, texts, rows.tokens, strict=True)
    lines = [dict(zip(names, row, strict=True)) for row in columns]
    if text_out is not None:
        write_rows(Path(text_out), lines)
    else:
        for line in lines:
            _print(line)
    where = "" if text_out is None else f" in {text_out}"
    so_far = "" if held.finished else f" there so far ({held.manifest['settings']['num_samples']} wanted)"
    print(
        f"{len(lines)} of {held.num_rows} samples{so_far}{where}; {changed} with text that does not encode to their ids"
    )


def _print(line: dict[str, Any]) -> None:
    end = "finished" if line["finished"] else "cut"
    log_prob = "" if line["log_prob"] is None else f", log_prob {line['log_prob']:.4f}"
    print(f"[{line['index']}] length {line['length']}, {end}{log_prob}")
    print(line["tokens"].tolist() if line["text"] is None else line["text"], end="\n\n")


def _tokenizer(folder: str, model: str | None, settings: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of `model`, or of the source the corpus is from, which had one or else this is None.

    Raises ValueError where it is not the one the corpus was made with.
    """
    if model is None and settings["tokenizer_fingerprint"] is None:
        return None
    source = model or settings.get("tokenizer_source", settings["source"])
    try:
        tokenizer = weights.tokenizer(source)
    except (OSError, ValueError, RunError) as error:
        raise ValueError(f"no tokenizer from {source} ({error}); name a source that has it with --model") from error
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; name a source that has it with --model")
    if settings["tokenizer_fingerprint"] not in (None, tokenizer.fingerprint):
        raise ValueError(f"the tokenizer of {source} is not the one {folder} was made with; give --model")
    return tokenizer
