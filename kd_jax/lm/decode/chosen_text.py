"""Which of the teacher's samples become the text that students learn: more of them, or a chosen share.

    all             as they were drawn
    likeliest       the share of samples with the highest probability, as they were drawn
    least_likely    the share with the lowest
    repeated        a share of the rows, over and over: less entropy without any preference for likely text

Choosing a share s by probability takes -log(s) nats of the choice off: the entropy of the chosen text is
E[-log p | chosen] + log(s) per sequence, as it has the density p / s. Of n rows repeated it is log(n) per sequence.
The rows that choose checkpoints are of the same distribution, for `repeated` of the samples as they were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm.corpus import Corpus
from kd_jax.lm.corpus.store import Arrival
from kd_jax.parallel import distributed
from kd_jax.runs import progress

CHOICES = ("all", "likeliest", "least_likely", "repeated")


class Text(NamedTuple):
    """The teacher's text that an arm learns.

    Attributes:
        rows: for training; 0 stands for config.num_train.
        choice: one of CHOICES.
        share: of the samples that are chosen, or of the rows that differ.
    """

    rows: int = 0
    choice: str = "all"
    share: float = 1.0

    @property
    def label(self) -> str:
        """What a stage's name says of the choice; empty where nothing is chosen."""
        parts = [f"rows-{self.rows}"] * (self.rows > 0)
        parts += [f"{self.choice}-{self.share:g}"] * (self.choice != "all")
        return "-".join(parts)

    def num_samples(self, num_train: int, num_validation: int) -> int:
        """How many samples the teacher has to draw for it, validation rows included."""
        rows = self.rows or num_train
        if self.choice == "repeated":
            return self.distinct(rows) + num_validation
        return math.ceil((rows + num_validation) / self.share)

    def distinct(self, rows: int) -> int:
        """How many rows of repeated text differ."""
        return max(1, round(self.share * rows))


def write(
    source: Corpus, folder: Path, text: Text, *, num_train: int, num_validation: int, command: str, label: str
) -> tuple[Corpus, np.ndarray, np.ndarray]:
    """Writes the chosen rows of a corpus of samples into a corpus of their own; it resumes.

    Args:
        source: text.num_samples(...) samples of the teacher.
        folder: the new corpus.
        text: with a choice.
        num_train, num_validation: rows of the new corpus, the latter at its end.
        command: for the manifest.
        label: of the progress bar.
    Returns: the corpus, and for each row that is trained on -log of its probability, nats, and its tokens: their sums'
        ratio is the entropy per token.
    """
    columns = source.columns("length", "prompt_length", "sample_log_prob")
    places = chosen(columns["sample_log_prob"], text, num_train, num_validation)
    settings = {**source.manifest["settings"], "num_samples": len(places), "selection": text.label}

    corpus = corpus_lib.open_for_all(folder, settings, command=command, kind=source.kind)
    with progress.bar(label, corpus.num_rows, len(places), "row") as bar:
        if distributed.leads() and not corpus.finished:
            arrivals = _arrivals(source, places, corpus.num_rows, settings["shard_size"])
            corpus_lib.write_rows(corpus, arrivals, lambda rows, _: bar.update(rows))
    distributed.wait(f"{folder} is written")
    tokens = (columns["length"] - columns["prompt_length"])[places[:num_train]]
    if text.choice == "repeated":
        surprise = np.full(num_train, math.log(text.distinct(num_train)))
    else:
        surprise = math.log(text.share) - columns["sample_log_prob"][places[:num_train]]
    return corpus_lib.open(folder), surprise, tokens


def chosen(log_prob: np.ndarray, text: Text, num_train: int, num_validation: int) -> np.ndarray:
    """The places of the chosen rows among the samples, in the order of the new corpus.

    Args:
        log_prob: of each sample as it was drawn, nats [text.num_samples(num_train, num_validation)].
    """
    if text.choice == "repeated":
        distinct = text.distinct(num_train)
        return np.concatenate([np.arange(num_train) % distinct, distinct + np.arange(num_validation)])
    order = np.argsort(log_prob, kind="stable")
    order = order[::-1] if text.choice == "likeliest" else order
    # in the order of the samples, so that the held-out rows at the end are as likely as the others
    return np.sort(order[: num_train + num_validation])


def _arrivals(source: Corpus, places: np.ndarray, first: int, step: int) -> Iterator[Arrival]:
    """The rows from `first` on, numbered anew, a shard at a time."""
    for start in range(first, len(places), step):
        part = places[start : start + step]
        low = int(part.min())
        rows = source.rows(low, int(part.max()) + 1)
        given = {name: column for name, column in rows._asdict().items() if column is not None}
        columns = {name: [column[i - low] for i in part] for name, column in given.items()}
        columns["index"] = list(range(start, start + len(part)))
        listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        yield Arrival(listed, 0)
