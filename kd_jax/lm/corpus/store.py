"""Corpora of token ids on disk: rows in Parquet shards, and a manifest that says what they are.

    FOLDER/manifest.json               settings, counts, the list of shards, where the time went
    FOLDER/data/shard-00000.parquet    rows 0 .. shard_size - 1 in order of index, and so on (columns: SCHEMA, and
                                       TOP_K of a recorded teacher, LOSS_MASK of conversations)

Rows are samples of a model or come from data (the manifest's `kind`: "samples" or "data"). The ids are the data; text
is for reading. A shard enters the manifest once it is whole, and a killed run resumes after the last one. Sample i
depends on the seed and on i alone, up to the rounding of the model's floats: a corpus made in several runs equals one
made in one run. `datasets.load_dataset(FOLDER)` opens a corpus as well.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kd_jax.lm.corpus import manifest as manifests
from kd_jax.lm.corpus import shards
from kd_jax.lm.corpus.manifest import DATA_SETTINGS, SETTINGS
from kd_jax.lm.corpus.shards import SCHEMA, Rows
from kd_jax.parallel import distributed
from kd_jax.storage import lock
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import write_json

__all__ = [
    "Arrival", "DATA_SETTINGS", "SCHEMA", "SETTINGS", "Corpus", "Rows", "create_or_resume", "find", "fingerprint",
    "open", "open_for_all", "padded", "text", "write", "write_rows",
]  # fmt: skip

# Adds columns to the rows of a shard.
Complete = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class Corpus(NamedTuple):
    """A corpus to read, finished or not. The sha256 of each shard is checked before it is read."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """What the rows are: "samples" of a model, or "data"."""
        return self.manifest["kind"]

    @property
    def num_rows(self) -> int:
        """How many rows are on disk; those of an unfinished corpus are its first ones."""
        return self.manifest["counts"]["rows"]

    @property
    def finished(self) -> bool:
        """Whether all rows of the settings are on disk."""
        return self.manifest["status"] == "finished"

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start .. stop - 1 (default: all); reads the shards they are in and no others.

        Raises ValueError for a range that is not in the corpus, RunError, naming the file, for a damaged shard.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows {start} to {stop} are not in {self.folder}, which has {self.num_rows} rows")
        parts = self._tables(SCHEMA.names, start, stop)
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        columns = {name: table[name].to_numpy() for name in SCHEMA.names if name != "tokens"}
        tokens = [row for chunk in table["tokens"].chunks for row in shards.members(chunk)]
        return Rows(tokens=tokens, **columns, loss_mask=self.loss_masks(start, stop) if self.has_loss_mask else None)

    def _tables(self, columns: list[str], start: int, stop: int) -> list[pa.Table]:
        """Columns of rows start .. stop - 1, a table for each shard they are in."""
        tables = []
        for shard in self.manifest["shards"]:
            low, high = max(start - shard["first"], 0), min(stop - shard["first"], shard["rows"])
            if low < high:
                tables.append(shards.read(self.folder, shard, columns).slice(low, high - low))
        return tables

    @property
    def has_loss_mask(self) -> bool:
        """Whether rows say themselves which ids are learnt (conversations); else all after the prompt are."""
        return bool(self.manifest["settings"].get("messages_column") or self.manifest["settings"].get("prompt_column"))

    def loss_masks(self, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
        """Which ids of rows start .. stop - 1 are learnt, bool [length] each, of a corpus with loss masks."""
        tables = self._tables([shards.LOSS_MASK], start, self.num_rows if stop is None else stop)
        return [mask for table in tables for chunk in table[shards.LOSS_MASK].chunks for mask in shards.members(chunk)]

    def lengths(self) -> np.ndarray:
        """Lengths of all rows, int32 [num_rows]."""
        return self.columns("length")["length"]

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Columns of numbers (of SCHEMA, not `tokens`) of all rows, [num_rows] each; reads one shard at a time.
        Raises: RunError, naming the file, for a damaged shard.
        """
        parts = {name: [SCHEMA.empty_table()[name].to_numpy()] for name in names}
        for shard in self.manifest["shards"]:
            table = shards.read(self.folder, shard, list(names))
            for name in names:
                parts[name].append(table[name].to_numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def verify(self) -> None:
        """Reads every shard; RunError names the first that is missing or damaged."""
        for shard in self.manifest["shards"]:
            shards.read(self.folder, shard)


class Arrival(NamedTuple):
    """Rows to be written to a corpus.

    Attributes:
        rows: a value for each column of SCHEMA.
        tokens: ids generated for them, prompts not counted.
        utilisation: of the sampler so far.
        about: entries for the manifest, written with these rows.
    """

    rows: list[dict[str, Any]]
    tokens: int
    utilisation: float = 1.0
    about: dict[str, Any] = {}


def open(folder: str | os.PathLike) -> Corpus:
    """The corpus in a folder; an unfinished one has the rows of its whole shards.

    Raises: RunError where the folder holds none, or a shard is missing or of another size than it was written with.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest is None:
        raise RunError(f"{folder} holds no corpus: there is no manifest.json in it")
    # Sizes only, which is quick; the checksum of a shard is compared when it is read.
    for shard in manifest["shards"]:
        shards.locate(folder, shard)
    return Corpus(folder, manifest)


def find(folder: str | os.PathLike, settings: dict[str, Any], *, kind: str = "samples") -> dict[str, Any] | None:
    """The manifest of the corpus that rows of these settings would continue; None where the folder is new or empty.

    Args:
        folder: of the corpus; nothing is written.
        settings: of the kind; they may be in part, as those that are known before the model is loaded.
        kind: "samples" or "data".
    Raises: RunError where the folder holds something else, or a corpus of other settings.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest is None:
        # a .tmp of ours is what a kill during the very first write leaves
        foreign = [name for name in lock.contents(folder) if name != "manifest.json.tmp"]
        if foreign:
            raise RunError(f"{folder} holds {foreign[0]} and no corpus (no manifest.json); choose another folder")
        return None
    manifests.compare(folder, manifest, manifests.plain(settings), kind)
    for shard in manifest["shards"]:
        shards.locate(folder, shard)
    return manifest


def open_for_all(folder: str | os.PathLike, settings: dict[str, Any], *, command: str, kind: str = "samples") -> Corpus:
    """`create_or_resume` by process 0; the others get its manifest, and not a file that is being written.

    Args:
        folder, settings, command, kind: as of `create_or_resume`.
    """
    make = lambda: create_or_resume(folder, settings, command=command, kind=kind).manifest  # noqa: E731
    return Corpus(Path(folder), distributed.once(make, f"opening {folder}"))


def create_or_resume(
    folder: str | os.PathLike, settings: dict[str, Any], *, command: str, verify: bool = False, kind: str = "samples"
) -> Corpus:
    """Makes a corpus folder, or opens one of the same settings; rows from num_rows on are still to be written.

    Args:
        folder: of the corpus.
        settings: of the kind (manifest.SampleSpec, manifest.DataSpec). Those of an existing corpus have to be equal,
            but num_samples may grow: a short last shard is then made again.
        command: what was typed, for the manifest.
        verify: also read the existing shards.
        kind: "samples" or "data".
    Returns: the corpus.
    Raises: ValueError for a bad setting, RunError for a folder that cannot take these rows.
    """
    folder, settings = Path(folder), manifests.plain(settings)
    manifests.check_settings(settings, kind)
    # a corpus with and one without a recorded teacher are different corpora
    old = find(folder, {"teacher": None} | manifests.LATER | settings, kind=kind)
    settings = manifests.without_defaults(settings)
    if verify and old is not None:
        Corpus(folder, old).verify()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [folder / "manifest.json.tmp", *folder.glob("data/shard-*.tmp")]:
            path.unlink(missing_ok=True)  # what a kill left
        if old is not None and old["status"] == "finished" and old["settings"] == settings:
            return Corpus(folder, old)
        manifest = manifests.new(settings, command, kind) if old is None else manifests.restart(old, settings, command)
        write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise RunError(f"cannot write the corpus folder {folder}: {error}") from error
    return Corpus(folder, manifest)


def write(
    corpus: Corpus, samples: Iterable[Any], progress: Callable[[int, int], None] | None = None,
    complete: Complete | None = None,
) -> Corpus:  # fmt: skip
    """Writes a stream of samples, each shard as soon as its rows are complete.

    Args:
        corpus: from `create_or_resume`.
        samples: kd_jax.lm.decode.Samples, each sample from corpus.num_rows on once, in any order. Rows of incomplete
            shards are in memory.
        progress: is called with the samples and the generated tokens of each batch.
        complete: adds columns to the rows of a shard.

    Returns: the finished corpus.
    Raises: ValueError for a sample that does not fit the settings, or a stream that ends too early. Whole shards stay,
        and the next `create_or_resume` continues after them.
    """

    def arrivals():
        for batch in samples:
            rows = [_row(batch, i, corpus.manifest["settings"]) for i in range(len(batch.index))]
            yield Arrival(rows, int(np.sum(batch.lengths - batch.prompt_lengths)), float(batch.utilisation))

    return write_rows(corpus, arrivals(), progress, complete)


def write_rows(
    corpus: Corpus, arrivals: Iterable[Arrival], progress: Callable[[int, int], None] | None = None,
    complete: Complete | None = None,
) -> Corpus:  # fmt: skip
    """`write` for rows that are made already and fit the settings; Args, Returns and Raises are those of `write`."""
    folder, manifest = corpus
    settings, before = manifest["settings"], manifest["speed"]
    start, made = time.perf_counter(), 0
    rows = {}  # by index, those not written yet
    for arrival in arrivals:
        for row in arrival.rows:
            if row["index"] in rows or row["index"] < manifest["counts"]["rows"]:
                raise ValueError(f"sample {row['index']} came twice")
            rows[row["index"]] = row
        made += arrival.tokens
        # shards are written in order of index, so that the corpus on disk is always a prefix of the finished one
        while ready := _whole_shard(rows, settings, manifest["counts"]["rows"]):
            ready = complete(ready) if complete is not None else ready
            # The shard is on disk before the manifest names it: after a kill between the two, it is written again.
            listed = [*manifest["shards"], shards.write(folder, ready, settings["shard_size"])]
            speed = manifests.speed(before, time.perf_counter() - start, made, arrival.utilisation)
            manifest = manifests.with_shards(manifest | arrival.about | {"speed": speed}, listed)
            write_json(folder / "manifest.json", manifest)
        if progress is not None:
            progress(len(arrival.rows), arrival.tokens)
    if manifest["status"] != "finished":
        missing = next(i for i in range(manifest["counts"]["rows"], settings["num_samples"]) if i not in rows)
        raise ValueError(f"the rows end before sample {missing} of {settings['num_samples']}")
    return Corpus(folder, manifest)


def padded(rows: Rows, max_length: int | None = None, pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array.

    Args:
        rows: the rows.
        max_length: columns of the array; the longest row's length by default.
        pad_id: fills up rows.

    Returns: tokens int32 [n, max_length], lengths int32 [n].
    Raises: ValueError for a row that is longer than max_length.
    """
    longest = int(rows.length.max(initial=0))
    width = longest if max_length is None else max_length
    if longest > width:
        raise ValueError(f"a row of {longest} ids does not fit max_length={max_length}")
    tokens = np.full((len(rows.tokens), width), pad_id, np.int32)
    if rows.tokens:
        tokens[np.arange(width) < rows.length[:, None]] = np.concatenate(rows.tokens)
    return tokens, rows.length.astype(np.int32)


def text(corpus: Corpus, tokenizer: Any, start: int = 0, stop: int | None = None) -> tuple[list[str], int]:
    """Rows as text with special tokens, and how many of them the tokenizer encodes to other ids.

    For reading only: sampled ids are often not those that the tokenizer gives for their text.
    """
    tokens = corpus.rows(start, stop).tokens
    return [tokenizer.decode(ids) for ids in tokens], sum(not tokenizer.round_trips(ids) for ids in tokens)


def fingerprint(corpus: Corpus) -> str:
    """A SHA-256 (hex) of the rows on disk and of all settings but names.

    Where the model, the data or the tokenizer came from does not count; their fingerprints do.
    """
    settings = manifests.identity(corpus.manifest["settings"])
    content = [corpus.kind, settings, [shard["sha256"] for shard in corpus.manifest["shards"]]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _row(batch: Any, i: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Sample i of a batch as a row of SCHEMA. Raises ValueError where it does not fit the settings."""
    index, length, start = int(batch.index[i]), int(batch.lengths[i]), int(batch.prompt_lengths[i])
    finished, generated = bool(batch.finished[i]), slice(start, length)
    shared = settings["prompt_ids"]  # none where rows have prompts of their own
    longest = min(settings["max_length"], start + (settings.get("max_new_tokens") or settings["max_length"]))
    tokens = np.array(batch.tokens[i, :length], np.int32)  # a copy frees the sampler's array
    # exactly rounded sums do not depend on the sampler's batch size
    log_prob, sample_log_prob = (
        math.fsum(values[i, generated].tolist()) for values in (batch.log_probs, batch.sample_log_probs)
    )
    if not 0 <= index < settings["num_samples"]:
        problem = f"was not asked for (num_samples={settings['num_samples']})"
    elif (shared and start != len(shared)) or not 1 <= start < length <= longest:
        problem = f"has length {length} and prompt_length {start}"
    elif shared and tokens[:start].tolist() != shared:
        problem = "does not begin with the prompt"
    elif finished != (int(tokens[-1]) in settings["eos_ids"]) or not (finished or length == longest):
        problem = f"has length {length}, finished={finished} and {tokens[-1]} as its last id, which do not go together"
    elif not (math.isfinite(log_prob) and math.isfinite(sample_log_prob)):
        problem = f"has log_prob {log_prob} and sample_log_prob {sample_log_prob}"
    else:
        return dict(zip(SCHEMA.names, (index, tokens, length, start, finished, log_prob, sample_log_prob), strict=True))
    raise ValueError(f"the sampler's sample {index} {problem}")


def _whole_shard(rows: dict[int, dict[str, Any]], settings: dict[str, Any], first: int) -> list[dict[str, Any]] | None:
    """Removes the rows of the shard that begins at `first` from `rows`, in order; None while some are missing."""
    indices = range(first, min(first + settings["shard_size"], settings["num_samples"]))
    if len(rows) < len(indices) or not all(index in rows for index in indices):
        return None
    return [rows.pop(index) for index in indices]
