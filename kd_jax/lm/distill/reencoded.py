"""The samples of a teacher with another vocabulary as a corpus in the student's ids.

Samples are decoded to bytes and encoded again. The prompt is given in the student's ids, and the rest is encoded by
itself, so that no token crosses their border. What is lost is counted in the manifest under `reencoded`: bytes that are
not UTF-8 (invalid_bytes), the beginning of a character at the end of a text (cut_bytes), characters that the student
has no tokens for (unknown_characters), the teacher's special tokens (special_tokens), rows that the student's tokenizer
normalises (changed_rows), and rows that are longer than max_length (cut_rows).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.corpus.store import Arrival
from kd_jax.lm.distill import alignment
from kd_jax.lm.model import Model
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.parallel import distributed

COUNTS = ("invalid_bytes", "cut_bytes", "unknown_characters", "special_tokens", "changed_rows", "cut_rows")


def write(
    samples: Corpus, teacher: Tokenizer, student: Model, folder: str | os.PathLike, *, student_source: str,
    prompt_ids: Sequence[int], max_length: int, command: str,
) -> Corpus:  # fmt: skip
    """Writes the corpus (kind "data": its log-probabilities are not known), or returns it where it is finished.

    Args:
        samples: the teacher's, finished.
        teacher: its tokenizer.
        student: whose ids the rows are to have; its weights are not used.
        folder: of the new corpus.
        student_source: where the student's tokenizer is from, for the manifest.
        prompt_ids: the student's, for the text that the samples continue.
        max_length: of a row; a longer one is cut, has no end, and is counted.
        command: for the manifest.
    """
    before = samples.manifest["settings"]
    settings = {
        "source": before["source"], "subset": None, "split": "train", "streaming": False, "text_column": None,
        "ids_column": None, "data_fingerprint": corpus_lib.fingerprint(samples), "first": 0,
        "tokenizer_source": student_source, "tokenizer_fingerprint": student.tokenizer.fingerprint,
        "special_tokens": False, "prompt_ids": list(prompt_ids), "eos_ids": [min(student.eos_ids)],
        "seed": before["seed"], "max_length": max_length, "num_samples": samples.num_rows,
        "shard_size": before["shard_size"],
    }  # fmt: skip
    folder = Path(folder)

    def open_and_write() -> None:
        corpus = corpus_lib.create_or_resume(folder, settings, command=command, kind="data")
        if not corpus.finished:
            corpus_lib.write_rows(corpus, _arrivals(samples, corpus, teacher, student.tokenizer), lambda rows, _: None)

    distributed.once(open_and_write, f"re-encoding {samples.folder}")
    return corpus_lib.open(folder)


def _arrivals(samples: Corpus, target: Corpus, teacher: Tokenizer, student: Tokenizer) -> Iterator[Arrival]:
    settings, size = target.manifest["settings"], target.manifest["settings"]["shard_size"]
    counts = dict.fromkeys(COUNTS, 0) | target.manifest.get("reencoded", {})
    prompt, eos, max_length = settings["prompt_ids"], settings["eos_ids"], settings["max_length"]
    continues = any(alignment.pieces(student, prompt))  # else the prompt is BOS, and a text begins after it
    for first in range(target.num_rows, samples.num_rows, size):
        old, rows = samples.rows(first, min(first + size, samples.num_rows)), []
        for index, ids, start, finished in zip(old.index, old.tokens, old.prompt_length, old.finished, strict=True):
            # The end is no text, whatever the tokenizer writes for it.
            body = ids[start : len(ids) - int(finished)].tolist()
            new = alignment.reencode(teacher, body, student, continues=continues)
            tokens = [*prompt, *new.ids, *(eos if finished else [])]
            lost = (new.invalid, new.cut, new.unknown, new.special, int(new.changed), int(len(tokens) > max_length))
            counts = {name: counts[name] + number for name, number in zip(COUNTS, lost, strict=True)}
            finished = bool(finished) and len(tokens) <= max_length
            tokens = np.array(tokens[:max_length], np.int32)
            rows.append({
                "index": int(index), "tokens": tokens, "length": len(tokens), "prompt_length": len(prompt),
                "finished": finished, "log_prob": None, "sample_log_prob": None,
            })  # fmt: skip
        yield Arrival(rows, sum(row["length"] - row["prompt_length"] for row in rows), about={"reencoded": counts})
