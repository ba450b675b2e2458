"""The files of a corpus: rows in Parquet, each file written whole and held to its checksum when it is read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_jax.lm.corpus import parquet_pages
from kd_jax.lm.corpus.parquet_pages import Chunk
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import replacing

SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "tokens": pa.list_(pa.int32()),  # exactly `length` ids: the prompt, what follows it, the EOS where it came
        "length": pa.int32(),
        "prompt_length": pa.int32(),
        "finished": pa.bool_(),  # ended with an EOS id; otherwise cut at max_length (or data without EOS)
        # both NULL in rows made from data
        "log_prob": pa.float64(),  # nats, the model's own (tau = 1), summed over what was generated
        "sample_log_prob": pa.float64(),  # the same under the distribution the sample was drawn from
    }
)
# Columns that a corpus has beside SCHEMA where a teacher was recorded (kd_jax.lm.distill.recorded_top_k): for each
# token after the
# prompt the teacher's likeliest ids in its place, their log-probabilities, and that of all other ids together.
TOP_K = ("top_ids", "top_log_probs", "tail_log_prob")
_NUMBERS = ("BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE")  # as Parquet has them


def write(folder: Path, rows: list[dict[str, Any]], shard_size: int) -> dict[str, Any]:
    """Writes one shard and returns its entry for the manifest."""
    first = rows[0]["index"]
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    offsets = np.concatenate([[0], np.cumsum(columns["length"])]).astype(np.int32)
    columns["tokens"] = pa.ListArray.from_arrays(offsets, np.concatenate(columns["tokens"]))
    table, how = pa.table(columns, schema=SCHEMA), {}
    for name in TOP_K if TOP_K[0] in rows[0] else ():
        table = table.append_column(name, _lists([row[name] for row in rows]))
        # Parquet has no integer of 16 bits. Cut into streams by byte, the empty halves vanish in the compression.
        how[".".join([name, *["list", "element"] * (rows[0][name].ndim)])] = "BYTE_STREAM_SPLIT"
    plain = [name for name in SCHEMA.names if name != "tokens"] + ["tokens.list.element"]
    buffer = io.BytesIO()
    more = {"use_dictionary": plain, "column_encoding": how} if how else {}
    pq.write_table(table, buffer, compression="zstd", **more)
    data, file = buffer.getvalue(), f"data/shard-{first // shard_size:05d}.parquet"
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


def read(folder: Path, shard: dict[str, Any], columns: list[str] | None = None) -> pa.Table:
    """A shard, or some columns of it.

    RunError, naming the file, unless it is to the byte what was written, and its rows go together: a stranger's corpus
    has the checksums of a stranger's shards.
    """
    path = check_file(folder, shard)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise RunError(f"{path} is damaged: its sha256 is not the one in the manifest{again(folder)}")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        _check_sizes([*parquet_pages.groups(io.BytesIO(data), file.metadata)], file.metadata, shard)
        table = file.read(columns)
        table.validate(full=True)
        _check_rows(table, shard)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise RunError(f"{path} is damaged: {error}{again(folder)}") from error
    return table


def _check_sizes(groups: list[list[Chunk]], metadata: pq.FileMetaData, shard: dict[str, Any]) -> None:
    """Before the columns are read: that there is as much in them as the manifest says, and pages hold no more."""
    rows, tokens = shard["rows"], shard["tokens"]
    if metadata.num_rows != rows:
        raise ValueError(f"it has {metadata.num_rows} rows, where the manifest says {rows}")
    chunks = [chunk for group in groups for chunk in group]
    for chunk in chunks:
        name, _, of_lists = chunk.name.partition(".")
        if name not in (*SCHEMA.names, *TOP_K) or chunk.type not in _NUMBERS:
            raise ValueError(f"column {name!r} is of type {chunk.type}")
        if name not in TOP_K and chunk.values > (tokens if of_lists else rows):
            raise ValueError(f"column {name!r} has {chunk.values} values")
        # of a value 8 bytes, in a dictionary or as it is, 4 to find it there, and what places it in its list
        if chunk.size > 16 * chunk.values + 1024 * chunk.pages:
            raise ValueError(f"column {name!r} has {chunk.values} values in {chunk.size} bytes")
    parquet_pages.check_memory(chunks)


def _check_rows(table: pa.Table, shard: dict[str, Any]) -> None:
    """That the columns have their types, and that what they say of a row agrees."""
    for name in table.column_names:
        kind = table.schema.field(name).type
        if name not in TOP_K and (name not in SCHEMA.names or kind != SCHEMA.field(name).type):
            raise ValueError(f"column {name!r} is of type {kind}")
        if table[name].null_count and not name.endswith("log_prob"):
            raise ValueError(f"column {name!r} has rows without a value")
    held = {name: table[name].combine_chunks() for name in table.column_names}
    index, length, prompt = (
        held[name].to_numpy() if name in held else None for name in ("index", "length", "prompt_length")
    )
    if index is not None and not np.array_equal(index, shard["first"] + np.arange(shard["rows"])):
        raise ValueError(f"its rows are not those from {shard['first']} on")
    if length is None:
        return
    if length.min() < 1 or length.sum(dtype=np.int64) != shard["tokens"]:
        raise ValueError(f"its lengths are not those of {shard['tokens']} ids")
    if "tokens" in held:
        _check_lists("tokens", held["tokens"], length)
        if held["tokens"].flatten().to_numpy().min() < 0:
            raise ValueError("it has an id below 0")
    if prompt is not None:
        if prompt.min() < 0 or (prompt > length).any():
            raise ValueError("it has a prompt that is longer than its row")
        for name in TOP_K:
            if name in held:
                _check_lists(name, held[name], length - np.maximum(1, prompt))


def _check_lists(name: str, lists: pa.ListArray, lengths: np.ndarray) -> None:
    if lists.flatten().null_count or not np.array_equal(pc.list_value_length(lists).to_numpy(), lengths):
        raise ValueError(f"column {name!r} does not have the lengths that its rows have")


def check_file(folder: Path, shard: dict[str, Any]) -> Path:
    path = folder / shard["file"]
    if not path.is_file():
        raise RunError(f"{path} is missing; the manifest lists it with {shard['rows']} rows{again(folder)}")
    if path.stat().st_size != shard["bytes"]:
        size = path.stat().st_size
        raise RunError(f"{path} is damaged: {size} bytes, where the manifest says {shard['bytes']}{again(folder)}")
    return path


def split(lists: pa.ListArray) -> list[np.ndarray]:
    """The members of a list array, as views of its values."""
    offsets = lists.offsets.to_numpy()
    return np.split(lists.values.to_numpy(), offsets)[1:-1]


def members(lists: pa.ListArray) -> list[np.ndarray]:
    """The members of a list array of numbers [n], or of lists of k numbers [n, k]; views of its values."""
    offsets, values = lists.offsets.to_numpy(), lists.values
    if pa.types.is_fixed_size_list(values.type):
        values = values.flatten().to_numpy().reshape(-1, values.type.list_size)
    else:
        values = values.to_numpy()
    return [values[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    """Arrays [n] or [n, k] as a list array, with the k as a fixed size."""
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate(arrays)
    flat = pa.array(values.reshape(-1))
    return pa.ListArray.from_arrays(
        offsets, flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    )


def _write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    # without ".parquet" in the name: `datasets` takes any file that has it for data
    with replacing(path, path.with_suffix(".tmp")) as file:
        file.write(data)
