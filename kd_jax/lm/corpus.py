"""Corpora of token ids on disk: samples in parquet shards, and a manifest that says what they are.

    FOLDER/manifest.json               settings, counts, the list of shards, where the time went
    FOLDER/data/shard-00000.parquet    rows 0 .. shard_size - 1 in order of index, and so on (columns: SCHEMA)

The ids are the data; text is for reading. A shard enters the manifest once it is whole, and a run that was killed goes
on after the last one there. Sample i depends on the seed and on i alone, but for the rounding of the model's floats,
so a corpus made in several runs is the one made in one. `datasets.load_dataset(FOLDER)` opens a corpus as well.
"""

import datetime
import hashlib
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import kd_jax
from kd_jax.run import RunError, write_json

FORMAT = 1
SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "tokens": pa.list_(pa.int32()),  # exactly `length` ids: the prompt, what was generated, the EOS where it came
        "length": pa.int32(),
        "prompt_length": pa.int32(),
        "finished": pa.bool_(),  # ended with an EOS id; otherwise cut at max_length
        "log_prob": pa.float64(),  # nats, the model's own (tau = 1), summed over what was generated
        "sample_log_prob": pa.float64(),  # the same under the distribution the sample was drawn from
    }
)
# What the samples are a function of, and how they lie in files; a corpus goes on only where all of these are equal.
SETTINGS = (
    "source", "model_fingerprint", "tokenizer_fingerprint", "dtype", "prompt", "prompt_ids", "eos_ids",
    "sample_temperature", "top_k", "top_p", "seed", "max_length", "num_samples", "shard_size",
)  # fmt: skip


class Rows(NamedTuple):
    """Rows of a corpus, a field for each column of SCHEMA: `tokens` a list of int32 arrays, the others arrays [n]."""

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
                parts.append(_read_shard(self.folder, shard).slice(low, high - low))
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        columns = {name: table[name].to_numpy() for name in SCHEMA.names if name != "tokens"}
        tokens = [row for chunk in table["tokens"].chunks for row in _split(chunk)]
        return Rows(tokens=tokens, **columns)

    def lengths(self) -> np.ndarray:
        """Lengths of all rows, int32 [num_rows]."""
        tables = [_read_shard(self.folder, shard, ["length"]) for shard in self.manifest["shards"]]
        return np.concatenate([np.zeros(0, np.int32), *(table["length"].to_numpy() for table in tables)])

    def verify(self) -> None:
        """Reads every shard; RunError names the first that is missing or damaged."""
        for shard in self.manifest["shards"]:
            _read_shard(self.folder, shard)


def open(folder: str | os.PathLike) -> Corpus:
    """The corpus in a folder; one that is still being written is as long as the shards that are there.

    Raises RunError where the folder holds none, or where a shard is missing or of another size than it was.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise RunError(f"{folder} holds no corpus: there is no manifest.json in it")
    for shard in manifest["shards"]:
        _check_file(folder, shard)
    return Corpus(folder, manifest)


def check(folder: str | os.PathLike, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Refuses, with RunError and before any work, a folder that cannot take samples of these settings.

    `settings` may be some of SETTINGS: those that are known before the model is loaded. Writes nothing; returns the
    manifest of the corpus that is there already, None for a new one.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
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
    _compare(folder, manifest["settings"], _plain(settings))
    for shard in manifest["shards"]:
        _check_file(folder, shard)
    return manifest


def create_or_resume(
    folder: str | os.PathLike, settings: dict[str, Any], *, command: str, verify: bool = False
) -> Corpus:
    """Makes a corpus folder, or opens one of the same settings; samples from num_rows on are what it lacks.

    Args:
        settings: a value for each of SETTINGS. Of a corpus that is there only num_samples may differ, and only grow: a
            short last shard is then made again.
        command: what was typed, for the manifest.
        verify: also read the shards that are there.

    Raises ValueError for settings that are incomplete, RunError for a folder that cannot take these samples.
    """
    folder, settings = Path(folder), _plain(settings)
    _check_settings(settings)
    old = check(folder, settings)
    if verify and old is not None:
        Corpus(folder, old).verify()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [folder / "manifest.json.tmp", *folder.glob("data/shard-*.tmp")]:
            path.unlink(missing_ok=True)  # what a kill left
        if old is not None and old["status"] == "finished" and old["settings"] == settings:
            return Corpus(folder, old)
        manifest = _new_manifest(settings, command) if old is None else _restart(old, settings, command)
        write_json(folder / "manifest.json", manifest)
    except OSError as error:
        raise RunError(f"cannot write the corpus folder {folder}: {error}") from error
    return Corpus(folder, manifest)


def write(corpus: Corpus, samples: Iterable[Any], progress: Callable[[int, int], None] | None = None) -> Corpus:
    """Writes a stream of kd_jax.lm.decode.Samples: a shard, and the manifest anew, as soon as all its rows are there.

    The stream yields each sample from corpus.num_rows on once, in any order; what is held is the rows of shards that
    are not whole yet. `progress(samples, tokens)` is told of each arrival, `tokens` being those generated.

    Raises ValueError where the stream is not what the settings say, or ends before all samples are there. The shards
    written until then stay, and the next `create_or_resume` goes on after them. Returns the corpus as it is then.
    """
    folder, manifest = corpus
    settings, before = manifest["settings"], manifest["speed"]
    start, made = time.perf_counter(), 0
    rows = {}  # by index, those not written yet
    for batch in samples:
        for row in (_row(batch, i, settings) for i in range(len(batch.index))):
            if row["index"] in rows or row["index"] < manifest["counts"]["rows"]:
                raise ValueError(f"the sampler's sample {row['index']} is there already")
            rows[row["index"]] = row
        generated = int(np.sum(batch.lengths - batch.prompt_lengths))
        made += generated
        while ready := _whole_shard(rows, settings, manifest["counts"]["rows"]):
            shards = [*manifest["shards"], _write_shard(folder, ready, settings)]
            speed = _speed(before, time.perf_counter() - start, made, float(batch.utilisation))
            manifest = _with_shards(manifest | {"speed": speed}, shards)
            write_json(folder / "manifest.json", manifest)
        if progress is not None:
            progress(len(batch.index), generated)
    if manifest["status"] != "finished":
        missing = next(i for i in range(manifest["counts"]["rows"], settings["num_samples"]) if i not in rows)
        raise ValueError(f"the sampler ended before sample {missing} of {settings['num_samples']}")
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


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a corpus is a folder")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != "samples":
        raise RunError(f"{path} is not the manifest of a corpus; choose another folder")
    if manifest.get("format") != FORMAT:
        raise RunError(f"{path} is of format {manifest.get('format')}; this version reads format {FORMAT}")
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    settings = manifest["settings"]
    _check_settings(settings)
    first = 0
    for shard in manifest["shards"]:
        path = PurePosixPath(shard["file"])
        if path.is_absolute() or ".." in path.parts or "\\" in shard["file"]:
            raise ValueError(f"shard {shard['file']!r} lies outside the folder")
        due = first, min(settings["shard_size"], settings["num_samples"] - first)
        if (shard["first"], shard["rows"]) != due:
            raise ValueError(f"shard {shard['file']!r} is not the {due[1]} rows from row {first} on")
        first += shard["rows"]
    status = "finished" if first == settings["num_samples"] else "running"
    if (manifest["counts"], manifest["status"]) != (_counts(manifest["shards"]), status):
        raise ValueError("its counts or status are not those of its shards")


def _check_file(folder: Path, shard: dict[str, Any]) -> Path:
    path = folder / shard["file"]
    if not path.is_file():
        raise RunError(f"{path} is missing; the manifest lists it with {shard['rows']} rows")
    if path.stat().st_size != shard["bytes"]:
        raise RunError(f"{path} is damaged: {path.stat().st_size} bytes, where the manifest says {shard['bytes']}")
    return path


def _check_settings(settings: dict[str, Any]) -> None:
    wrong = sorted(set(SETTINGS) ^ set(settings))
    if wrong:
        raise ValueError(f"settings are to be exactly SETTINGS, but {', '.join(wrong)} is missing or not one of them")
    for key in ("num_samples", "shard_size", "max_length"):
        if not (isinstance(settings[key], int) and settings[key] >= 1):
            raise ValueError(f"{key}={settings[key]!r} must be an integer from 1")
    # the lists in a shard have 32-bit offsets
    if settings["shard_size"] * settings["max_length"] >= 2**31:
        raise ValueError(f"shard_size={settings['shard_size']} times max_length must stay below 2**31; make it smaller")


def _compare(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [key for key in new if key != "num_samples" and new[key] != old[key]]
    changes = [f"{key}: {json.dumps(old[key])} -> {json.dumps(new[key])}" for key in names]
    if changes:
        raise RunError(f"{folder} holds a corpus with other settings ({'; '.join(changes)}); choose another folder")
    if new.get("num_samples", old["num_samples"]) < old["num_samples"]:
        raise RunError(
            f"{folder} is a corpus of {old['num_samples']} samples and cannot shrink "
            f"(num_samples: {old['num_samples']} -> {new['num_samples']}); choose another folder"
        )


def _new_manifest(settings: dict[str, Any], command: str) -> dict[str, Any]:
    manifest = {"format": FORMAT, "kind": "samples", "status": "running", "started": _now(), **_origin(command)}
    return _with_shards(manifest | {"settings": settings, "speed": _speed({}, 0.0, 0, 1.0)}, [])


def _origin(command: str) -> dict[str, Any]:
    """What made these samples, beside the settings."""
    devices = jax.devices()
    modules = {"jax": jax, "numpy": np, "pyarrow": pa, "kd_jax": kd_jax}
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **{name: m.__version__ for name, m in modules.items()}},
        "device": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
    }


def _restart(manifest: dict[str, Any], settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The manifest to go on from: of the shards, those that are whole for the number of samples wanted now."""
    size, total = settings["shard_size"], settings["num_samples"]
    shards = [shard for shard in manifest["shards"] if shard["rows"] == min(size, total - shard["first"])]
    resumed = [*manifest.get("resumed", []), {"when": _now(), **_origin(command)}]
    return _with_shards(manifest | {"settings": settings, "resumed": resumed}, shards)


def _with_shards(manifest: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest with these shards, which make it finished or not."""
    counts = _counts(shards)
    done = counts["rows"] == manifest["settings"]["num_samples"]
    status = {"status": "finished" if done else "running", "finished": _now() if done else None}
    return manifest | status | {"counts": counts, "shards": shards}


def _counts(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "finished")}


def _speed(before: dict[str, Any], seconds: float, tokens: int, utilisation: float) -> dict[str, Any]:
    """Totals over all runs that went into a corpus; `tokens` are those generated, kept or not."""
    seconds, slot_steps = seconds + before.get("seconds", 0), tokens / utilisation + before.get("slot_steps", 0)
    tokens += before.get("generated_tokens", 0)
    return {
        "seconds": round(seconds, 3),
        "generated_tokens": tokens,
        "slot_steps": round(slot_steps),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else None,
        "utilisation": round(tokens / slot_steps, 4) if tokens else None,
    }


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


def _write_shard(folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Writes one shard and returns its entry for the manifest."""
    first = rows[0]["index"]
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    offsets = np.concatenate([[0], np.cumsum(columns["length"])]).astype(np.int32)
    columns["tokens"] = pa.ListArray.from_arrays(offsets, np.concatenate(columns["tokens"]))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    data, file = buffer.getvalue(), f"data/shard-{first // settings['shard_size']:05d}.parquet"
    _write_bytes(folder / file, data)
    return {
        "file": file,
        "first": first,
        "rows": len(rows),
        "tokens": int(offsets[-1]),
        "finished": sum(columns["finished"]),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    # without ".parquet" in the name: `datasets` takes any file that has it for data
    tmp = path.with_suffix(".tmp")
    with tmp.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def _read_shard(folder: Path, shard: dict[str, Any], columns: list[str] | None = None) -> pa.Table:
    """A shard, or some columns of it. RunError, naming the file, unless it is to the byte what was written."""
    path = _check_file(folder, shard)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise RunError(f"{path} is damaged: its sha256 is not the one in the manifest")
    table = pq.ParquetFile(pa.BufferReader(data)).read(columns)
    if table.num_rows != shard["rows"]:
        raise RunError(f"{path} has {table.num_rows} rows, where the manifest says {shard['rows']}")
    return table


def _split(lists: pa.ListArray) -> list[np.ndarray]:
    """The members of a list array, as views of its values."""
    offsets = lists.offsets.to_numpy()
    return np.split(lists.values.to_numpy(), offsets)[1:-1]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    # through JSON and back, so that it compares equal with what is read from the manifest; floats come back exactly
    return json.loads(json.dumps(settings, allow_nan=False))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
