"""Corpora of token ids on disk: rows in Parquet shards, and a manifest that says what they are.

    FOLDER/manifest.json               settings, counts, the list of shards, where the time went
    FOLDER/data/shard-00000.parquet    rows 0 .. shard_size - 1 in order of index, and so on (columns: SCHEMA, and
                                       TOP_K where a teacher was recorded: kd_jax.lm.distill.recorded_top_k)

The rows are samples of a model or come from data (the manifest's `kind`, "samples" or "data"). The ids are the data;
text is for reading. A shard enters the manifest once it is whole, and a run that was killed goes on after the last one
there. Sample i depends on the seed and on i alone, but for the rounding of the model's floats, so a corpus made in
several runs is the one made in one. `datasets.load_dataset(FOLDER)` opens a corpus as well.
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
from kd_jax.lm.corpus.shards import SCHEMA
from kd_jax.storage.errors import RunError
from kd_jax.storage.files import write_json

__all__ = [
    "Arrival", "DATA_SETTINGS", "SCHEMA", "SETTINGS", "Corpus", "Rows", "check", "create_or_resume", "fingerprint",
    "open", "padded", "text", "write", "write_rows",
]  # fmt: skip

# Settings that name what others identify: content read from elsewhere is the same.
_NAMES = ("source", "prompt", "tokenizer_source")
# Rows of a shard -> the same with further columns.
Complete = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class Rows(NamedTuple):
    """Rows of a corpus, a field for each column of SCHEMA: `tokens` a list of int32 arrays, the others arrays [n].

    Rows made from data have no log-probabilities: both are NaN.
    """

    index: np.ndarray
    tokens: list[np.ndarray]
    length: np.ndarray
    prompt_length: np.ndarray
    finished: np.ndarray
    log_prob: np.ndarray
    sample_log_prob: np.ndarray


class Corpus(NamedTuple):
    """A corpus to read, whole or as far as it has come. What is read is held to the manifest's sha256 first."""

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
        return self.manifest["status"] == "finished"

    def rows(self, start: int = 0, stop: int | None = None) -> Rows:
        """Rows start .. stop - 1 (default: all); reads the shards they are in and no others.

        Raises ValueError for a range that is not in the corpus, RunError, naming the file, for a damaged shard.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows {start} to {stop} are not in {self.folder}, which has {self.num_rows} rows")
        parts = []
        for shard in self.manifest["shards"]:
            low, high = max(start - shard["first"], 0), min(stop - shard["first"], shard["rows"])
            if low < high:
                parts.append(shards.read(self.folder, shard, SCHEMA.names).slice(low, high - low))
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        columns = {name: table[name].to_numpy() for name in SCHEMA.names if name != "tokens"}
        tokens = [row for chunk in table["tokens"].chunks for row in shards.split(chunk)]
        return Rows(tokens=tokens, **columns)

    def lengths(self) -> np.ndarray:
        """Lengths of all rows, int32 [num_rows]."""
        return self.columns("length")["length"]

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Some columns of numbers of all rows, [num_rows] each; the tokens are not read, and a shard is held at a time.

        Raises RunError, naming the file, for a damaged shard.
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
    """Rows on their way into a corpus.

    Attributes:
        rows: each a value for every column of SCHEMA.
        tokens: how many ids it took to make them, prompts not counted.
        utilisation: of the sampler, so far.
        about: what else the manifest is to say once they are in it.
    """

    rows: list[dict[str, Any]]
    tokens: int
    utilisation: float = 1.0
    about: dict[str, Any] = {}


def open(folder: str | os.PathLike) -> Corpus:
    """The corpus in a folder; one that is still being written is as long as the shards that are there.

    Raises RunError where the folder holds none, or where a shard is missing or of another size than it was.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest is None:
        raise RunError(f"{folder} holds no corpus: there is no manifest.json in it")
    for shard in manifest["shards"]:
        shards.check_file(folder, shard)
    return Corpus(folder, manifest)


def check(folder: str | os.PathLike, settings: dict[str, Any], *, kind: str = "samples") -> dict[str, Any] | None:
    """Refuses, with RunError and before any work, a folder that cannot take rows of this kind and these settings.

    `settings` may be some of those of the kind (SETTINGS, or DATA_SETTINGS of "data"): those that are known before the
    model is loaded. Writes nothing; returns the manifest of the corpus that is there already, None for a new one.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest is None:
        # a .tmp of ours is what a kill during the very first write leaves
        foreign = sorted(set(os.listdir(folder)) - {"manifest.json.tmp"}) if folder.exists() else []
        if foreign:
            raise RunError(
                f"{folder} is not empty and holds no corpus (no manifest.json, but {foreign[0]}); choose another folder"
            )
        there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise RunError(f"cannot write the corpus folder {folder}: {there} is not a folder that may be written to")
        return None
    manifests.compare(folder, manifest, manifests.plain(settings), kind)
    for shard in manifest["shards"]:
        shards.check_file(folder, shard)
    return manifest


def create_or_resume(
    folder: str | os.PathLike, settings: dict[str, Any], *, command: str, verify: bool = False, kind: str = "samples"
) -> Corpus:
    """Makes a corpus folder, or opens one of the same settings; rows from num_rows on are what it lacks.

    Args:
        settings: a value for each of SETTINGS (of DATA_SETTINGS, for the kind "data"). Of a corpus that is there only
            num_samples may differ, and only grow: a short last shard is then made again.
        command: what was typed, for the manifest.
        verify: also read the shards that are there.
        kind: "samples" or "data".

    Raises ValueError for settings that are incomplete, RunError for a folder that cannot take these rows.
    """
    folder, settings = Path(folder), manifests.plain(settings)
    manifests.check_settings(settings, kind)
    old = check(folder, {"teacher": None} | settings, kind=kind)  # with and without a teacher are two things
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
    """Writes a stream of kd_jax.lm.decode.Samples: a shard, and the manifest anew, as soon as all its rows are there.

    The stream yields each sample from corpus.num_rows on once, in any order; what is held is the rows of shards that
    are not whole yet. `progress(samples, tokens)` is told of each arrival, `tokens` being those generated.

    Raises ValueError where the stream is not what the settings say, or ends before all samples are there. The shards
    written until then stay, and the next `create_or_resume` goes on after them. Returns the corpus as it is then.
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
    """`write`, of a stream of rows that are made; it is for the caller to see that they are what the settings say.

    `complete` takes all rows of a shard, in order, before they are written, and returns them with further columns.
    """
    folder, manifest = corpus
    settings, before = manifest["settings"], manifest["speed"]
    start, made = time.perf_counter(), 0
    rows = {}  # by index, those not written yet
    for arrival in arrivals:
        for row in arrival.rows:
            if row["index"] in rows or row["index"] < manifest["counts"]["rows"]:
                raise ValueError(f"sample {row['index']} is there already")
            rows[row["index"]] = row
        made += arrival.tokens
        while ready := _whole_shard(rows, settings, manifest["counts"]["rows"]):
            ready = complete(ready) if complete is not None else ready
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
    """Rows as one array: tokens int32 [n, L], filled up with pad_id, and lengths int32 [n].

    L is max_length, by default the longest row's length. Raises ValueError for a row that is longer.
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
    """Rows as text, special tokens shown, and how many of them would not come back: encode(text) is not their ids.

    For reading; a sampled sequence of ids is often not the one that the tokenizer gives for its text.
    """
    tokens = corpus.rows(start, stop).tokens
    return [tokenizer.decode(ids) for ids in tokens], sum(not tokenizer.round_trips(ids) for ids in tokens)


def fingerprint(corpus: Corpus) -> str:
    """A SHA-256 (hex) of the rows that are there, to the byte, and of all settings that are no mere names.

    That is, without the place where the model, the data or the tokenizer came from: their fingerprints are settings.
    """
    settings = _content(corpus.manifest["settings"])
    content = [corpus.kind, settings, [shard["sha256"] for shard in corpus.manifest["shards"]]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _NAMES}
    return kept | ({"teacher": _content(kept["teacher"])} if "teacher" in kept else {})


def _row(batch: Any, i: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Sample i of a batch as a row of SCHEMA. Raises ValueError where it is not what the settings say."""
    index, length, start = int(batch.index[i]), int(batch.lengths[i]), int(batch.prompt_lengths[i])
    finished, generated = bool(batch.finished[i]), slice(start, length)
    tokens = np.array(batch.tokens[i, :length], np.int32)  # a copy, so that the sampler's own array can go
    # exactly rounded sums: the same to the last bit whatever the sampler's batch
    log_prob, sample_log_prob = (
        math.fsum(values[i, generated].tolist()) for values in (batch.log_probs, batch.sample_log_probs)
    )
    if not 0 <= index < settings["num_samples"]:
        problem = f"was not asked for (num_samples={settings['num_samples']})"
    elif not start == len(settings["prompt_ids"]) < length <= settings["max_length"]:
        problem = f"has length {length} and prompt_length {start}"
    elif tokens[:start].tolist() != settings["prompt_ids"]:
        problem = "does not begin with the prompt"
    elif finished != (int(tokens[-1]) in settings["eos_ids"]) or not (finished or length == settings["max_length"]):
        problem = f"has length {length}, finished={finished} and {tokens[-1]} as its last id, which do not go together"
    elif not (math.isfinite(log_prob) and math.isfinite(sample_log_prob)):
        problem = f"has log_prob {log_prob} and sample_log_prob {sample_log_prob}"
    else:
        return dict(zip(SCHEMA.names, (index, tokens, length, start, finished, log_prob, sample_log_prob), strict=True))
    raise ValueError(f"the sampler's sample {index} {problem}")


def _whole_shard(rows: dict[int, dict[str, Any]], settings: dict[str, Any], first: int) -> list[dict[str, Any]] | None:
    """Takes the rows of the shard that begins at `first` out of `rows`, in order; None until all of them are there."""
    wanted = range(first, min(first + settings["shard_size"], settings["num_samples"]))
    if len(rows) < len(wanted) or not all(index in rows for index in wanted):
        return None
    return [rows.pop(index) for index in wanted]
