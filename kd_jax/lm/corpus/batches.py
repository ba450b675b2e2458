"""Batches of token sequences from a corpus: which rows each update sees, and how they lie in arrays.

Everything is a function of (corpus, settings, seed, update), so the position in the data is one number: resuming at
update `u` needs no batch before it. grain reads ahead in threads.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import datasets
import grain
import jax
import numpy as np

from kd_jax.lm.corpus import shards
from kd_jax.lm.corpus.store import Corpus, fingerprint
from kd_jax.runs import progress
from kd_jax.storage.errors import number

# Raised when `Sequences.mixed` takes other rows: finished stages are then not reused.
MIXED = 2
# The number of rows of a packed batch is rounded up to one of 8 sizes: each size compiles one more program.
_SHAPES = 8


class Targets(NamedTuple):
    """A recorded teacher's distribution of the token AFTER each position (kd_jax.lm.distill.recorded_top_k).

    Attributes:
        ids: the k likeliest tokens, unsigned [..., position, k].
        log_probs: their log-probabilities, [..., position, k]; uint16 codes, or float32 nats.
        tail: log-probability of all other tokens together, [..., position], in the same form.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray


class Spans(NamedTuple):
    """Pieces of text whose ends two tokenizations share, in one of them; int32 [..., row, span].

    Attributes:
        first: position of the first token; 1 where there is no span.
        length: how many tokens; 1 where there is no span.
    """

    first: np.ndarray
    length: np.ndarray


class Pair(NamedTuple):
    """The sequences of a batch in the tokens of a teacher with another vocabulary (kd_jax.lm.distill.pairing).

    Rows hold the same sequences in the same order as the batch's; positions and their number are the teacher's.

    Attributes:
        tokens, segments, positions: as of a Batch.
        teacher, student: the spans that are compared, in both models' tokens.
        whole: int32 [..., row, span], which of the shared tokens is the span's text; -1 for none.
        mask: bool [..., row, span], where there is a span to compare.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    teacher: Spans
    student: Spans
    whole: np.ndarray
    mask: np.ndarray


class Batch(NamedTuple):
    """The sequences of an update, in parts that are computed one after the other. All arrays [part, row, position].

    Attributes:
        tokens: int32 ids; 0 is padding where segments is 0.
        segments: int32; 0 in padding, else 1, 2, ... for the sequences of a row.
        positions: int32, from 0 in each sequence.
        mask: bool; whether the token AFTER this one is learnt: it belongs to the same sequence and not to the prompt.
        targets: Targets of these positions, or None; 0 outside of the mask.
        pair: the same text in a teacher's tokens, or None.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    targets: Targets | None = None
    pair: Pair | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch of sequences becomes arrays.

    Attributes:
        sequences: sequences of an update.
        max_length: ids of the longest sequence.
        row_length: ids of a row that several sequences share (packing); 0 gives each sequence a row of max_length.
        parts: parts of an update, whose gradients are summed.
        row_multiple: rows of a part are a multiple of this: the number of devices they are split over.
    """

    sequences: int
    max_length: int
    row_length: int = 0
    parts: int = 1
    row_multiple: int = 1


class Sequences:
    """The rows of a corpus by number, from Arrow files that are mapped into memory."""

    def __init__(self, table: datasets.Dataset):
        self._table = table
        # Lengths of all rows are in memory, four bytes a row each; the ids stay on disk.
        numbers = table.select_columns(["length", "prompt_length"]).with_format("numpy")
        self.lengths = np.asarray(numbers["length"][:], np.int32)
        self.prompt_lengths = np.asarray(numbers["prompt_length"][:], np.int32)
        self._tokens = table.select_columns("tokens").with_format("arrow")

    @classmethod
    def of(cls, corpus: Corpus, cache_dir: str, targets: bool = False) -> Sequences:
        """All rows of a corpus, after a check of its checksums.

        Args:
            corpus: the corpus.
            cache_dir: folder for the Arrow files.
            targets: whether to read a recorded teacher as well.

        Raises: ValueError where the corpus has no recorded teacher; OSError for a full disk.
        """
        if targets and not corpus.manifest["settings"].get("teacher"):
            raise ValueError(f"{corpus.folder} has no top-k columns; record them with python -m kd_jax.teacher")
        # Checked once, here: the Arrow files are copies, and nobody checks them later.
        corpus.verify()
        files = [str(corpus.folder / shard["file"]) for shard in corpus.manifest["shards"]]
        columns = ["tokens", "length", "prompt_length", *(shards.TOP_K if targets else ())]
        columns += [shards.LOSS_MASK] if corpus.has_loss_mask else []
        try:
            # the library knows files by their times, which copies keep: a folder for each content
            folder = os.path.join(cache_dir, fingerprint(corpus)[:16])
            with progress.no_dataset_bars():
                return cls(datasets.Dataset.from_parquet(files, cache_dir=folder, columns=columns))
        except (OSError, datasets.exceptions.DatasetGenerationError) as error:
            # the library names a lock file, or nothing
            code = errno.ENOSPC if "Not enough disk space" in str(error) else number(error)
            if code is None:
                raise
            raise OSError(code, os.strerror(code), cache_dir) from error

    def part(self, start: int, stop: int) -> Sequences:
        """Rows start .. stop - 1."""
        return Sequences(self._table.select(range(start, stop)))

    def mixed(self, other: Sequences, share: float) -> Sequences:
        """As many rows as here: the first ones of this corpus, and a `share` from `other`, from the places that follow.

        Args:
            other: another corpus.
            share: of its rows, from 0 to 1.
        Raises: ValueError where it has too few rows.
        """
        num_other = round(share * len(self))
        if num_other > len(other):
            raise ValueError(f"{num_other} rows of the second corpus are wanted; it has {len(other)}")
        # Rows in the same place of both corpora may answer the same prompt; from other places, each prompt comes once.
        stop = min(len(self), len(other))
        tables = self.part(0, len(self) - num_other)._table, other.part(stop - num_other, stop)._table
        return Sequences(datasets.concatenate_datasets(tables))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, rows: np.ndarray) -> list[np.ndarray]:
        """The ids of these rows, an int32 array each."""
        return shards.members(self._tokens[np.asarray(rows)]["tokens"].combine_chunks())

    def masks(self, rows: np.ndarray) -> list[np.ndarray] | None:
        """Which ids of these rows are learnt, bool [length] each; None where all after the prompt are."""
        if shards.LOSS_MASK not in self._table.column_names:
            return None
        column = self._table.select_columns(shards.LOSS_MASK).with_format("arrow")[np.asarray(rows)]
        masks = shards.members(column[shards.LOSS_MASK].combine_chunks())
        # Rows of another corpus that were mixed in may have none: all after the prompt is learnt.
        return [mask if len(mask) else np.ones(n, bool) for mask, n in zip(masks, self.lengths[rows], strict=True)]

    def targets(self, rows: np.ndarray) -> list[Targets] | None:
        """The recorded teacher's Targets of the tokens after the prompt, a row each; None where none was recorded."""
        if shards.TOP_K[0] not in self._table.column_names:
            return None
        table = self._table.select_columns(list(shards.TOP_K)).with_format("arrow")[np.asarray(rows)]
        columns = (shards.members(table[name].combine_chunks()) for name in shards.TOP_K)
        return [Targets(*row) for row in zip(*columns, strict=True)]


class Updates:
    """The batches of a training, by number of the update: a source for grain.

    Args:
        sequences: of the corpus.
        layout: of a batch.
        seed: of the order.
        epochs: passes over the corpus.
        complete: adds to a batch what else an update needs; in threads, ahead of its use.
        count: updates in all, where `epochs` is 0; the last epoch is then as long as is left.
    """

    def __init__(
        self, sequences: Sequences, layout: Layout, seed: int, epochs: int,
        complete: Callable[[Batch], Batch] = lambda batch: batch, *, count: int = 0,
    ):  # fmt: skip
        if len(sequences) < layout.sequences:
            raise ValueError(f"a batch of {layout.sequences} sequences needs as many; the corpus has {len(sequences)}")
        self.sequences, self.layout, self.seed, self._complete = sequences, layout, seed, complete
        self.per_epoch = len(sequences) // layout.sequences
        self._count = count or epochs * self.per_epoch
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self._count

    def rows(self, update: int) -> np.ndarray:
        """Numbers of the sequences of an update.

        The order of an epoch is a permutation by (seed, epoch). Each sequence comes once; those left over at its end,
        too few for an update, are other ones each epoch.
        """
        epoch, batch = divmod(int(update), self.per_epoch)
        last_epoch, order = self._order
        # A permutation of the whole corpus is made once an epoch, not for each batch.
        if last_epoch != epoch:
            # by (seed, epoch) alone: hosts agree on it without communicating, whatever their number
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.sequences))
            self._order = (epoch, order)
        return order[batch * self.layout.sequences : (batch + 1) * self.layout.sequences]

    def __getitem__(self, update: int) -> Batch:
        rows = self.rows(update)
        sequences = self.sequences
        batch = arrange(
            sequences.tokens(rows), sequences.prompt_lengths[rows], self.layout, sequences.targets(rows),
            sequences.masks(rows),
        )  # fmt: skip
        return self._complete(batch)

    def start(self, update: int, prefetch: int = 4) -> Iterator[Batch]:
        """Batches from `update` on, made ahead of their use.

        Args:
            update: the first, from 0.
            prefetch: batches made ahead.
        """
        if update == len(self):
            return iter(())
        # A slice of the source: batches before it are never made.
        source = grain.MapDataset.source(self)[int(update) :]
        return iter(
            source.to_iter_dataset(grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch))
        )


def arrange(
    tokens: list[np.ndarray], prompt_lengths: np.ndarray, layout: Layout, targets: list[Targets] | None = None,
    masks: list[np.ndarray] | None = None,
) -> Batch:  # fmt: skip
    """Sequences as a Batch, packed or one a row.

    Args:
        tokens: int32 ids [length] of each sequence.
        prompt_lengths: [sequences]; ids after the prompt are learnt.
        layout: of the batch.
        targets: of each sequence, for the ids after its prompt.
        masks: bool [length] of each sequence, which of the ids after its prompt are learnt; all by default.

    Returns: the batch.
    """
    length = layout.row_length or layout.max_length
    bins = _first_fit([len(ids) for ids in tokens], length) if layout.row_length else [[i] for i in range(len(tokens))]
    rows = num_rows(len(bins), layout)
    # Zeros are padding because `segments` is 0 there: 0 is an id like any other.
    batch = Batch(*(np.zeros((rows, length), dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
    if targets is not None:
        like = targets[0]
        batch = batch._replace(targets=Targets(*(np.zeros((rows, length, *a.shape[1:]), a.dtype) for a in like)))
    for row, members in enumerate(bins):
        start = 0
        # From 1, as 0 is padding.
        for segment, i in enumerate(members, start=1):
            stop = start + len(tokens[i])
            batch.tokens[row, start:stop] = tokens[i]
            batch.segments[row, start:stop] = segment
            batch.positions[row, start:stop] = np.arange(stop - start)
            # position j predicts j + 1: the first to predict is the last of the prompt; a row's first id is predicted
            # by nothing, also where there is no prompt
            learnt = slice(start + max(1, prompt_lengths[i]) - 1, stop - 1)
            batch.mask[row, learnt] = True if masks is None else masks[i][max(1, prompt_lengths[i]) :]
            if targets is not None:
                for array, values in zip(batch.targets, targets[i], strict=True):
                    array[row, learnt] = values
            start = stop
    # every part gets rows of all lengths: rows go round the parts
    parts = range(layout.parts)
    return jax.tree.map(lambda array: np.stack([array[part :: layout.parts] for part in parts]), batch)


def _first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """First-fit decreasing: numbers of the sequences in each row."""
    bins, free = [], []
    # longest first needs at most 11/9 of the fewest rows (Johnson, 1973)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(free) if left >= lengths[i]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(room)
        bins[place].append(i)
        free[place] -= lengths[i]
    return bins


def most_rows(layout: Layout) -> int:
    """The most rows that an update can need, all parts together: when each sequence has the longest length."""
    together = layout.row_length // layout.max_length if layout.row_length else 1
    return num_rows(-(-layout.sequences // together), layout)


def num_rows(filled: int, layout: Layout) -> int:
    """The number of rows of all parts together: at least `filled`, rounded up to one of a few sizes.

    Args:
        filled: rows with sequences in them.
        layout: of the batch.
    """
    unit = layout.parts * layout.row_multiple
    most = -(-layout.sequences // unit) * unit
    # Packed batches fill varying numbers of rows. A step is an eighth of the most rows, in whole rows of each device.
    step = max(unit, -(-most // _SHAPES // unit) * unit) if layout.row_length else most
    return -(-filled // step) * step
