"""The files of a corpus: rows in Parquet, each file written whole and held to its checksum when it is read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
# token after the prompt the teacher's likeliest ids in its place, their log-probabilities, and that of all other ids.
TOP_K = ("top_ids", "top_log_probs", "tail_log_prob")
# A column of conversations: whether each id is learnt, bool [length].
LOSS_MASK = "loss_mask"


class Rows(NamedTuple):
    """Rows of a corpus, a field for each column of SCHEMA: `tokens` a list of int32 arrays, the others arrays [n].

    Log-probabilities of rows made from data are NaN. `loss_mask` says of conversations which ids are the assistant's, a
    bool array [length] each; it is None where all ids after the prompt are learnt.
    """

    index: np.ndarray
    tokens: list[np.ndarray]
    length: np.ndarray
    prompt_length: np.ndarray
    finished: np.ndarray
    log_prob: np.ndarray
    sample_log_prob: np.ndarray
    loss_mask: list[np.ndarray] | None = None

    @property
    def num_learnt(self) -> np.ndarray:
        """How many ids of each row are learnt and scored, [n]."""
        if self.loss_mask is None:
            return self.length - self.prompt_length
        masks = zip(self.loss_mask, self.prompt_length, strict=True)
        return np.array([mask[start:].sum() for mask, start in masks], np.int64)

    def learnt(self, chosen: np.ndarray, width: int) -> np.ndarray:
        """Which ids of some rows are learnt, bool [row, width]; entry j is of id j + 1, which j predicts."""
        at, lengths = np.arange(1, width + 1), self.length[chosen]
        inside = (at >= np.maximum(self.prompt_length[chosen], 1)[:, None]) & (at < lengths[:, None])
        if self.loss_mask is not None:
            for place, row in enumerate(chosen):
                inside[place, : lengths[place] - 1] &= self.loss_mask[row][1:]
        return inside


def write(folder: Path, rows: list[dict[str, Any]], shard_size: int) -> dict[str, Any]:
    """Writes one shard and returns its entry for the manifest.

    Args:
        folder: of the corpus.
        rows: all of the shard, in order of index.
        shard_size: rows of a whole shard, which gives the file its number.
    """
    first = rows[0]["index"]
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names}
    # 32 bits: `manifest.check_settings` keeps the ids of a shard below 2^31.
    offsets = np.concatenate([[0], np.cumsum(columns["length"])]).astype(np.int32)
    columns["tokens"] = pa.ListArray.from_arrays(offsets, np.concatenate(columns["tokens"]))
    table, encodings = pa.table(columns, schema=SCHEMA), {}
    for name in TOP_K if TOP_K[0] in rows[0] else ():
        table = table.append_column(name, _lists([row[name] for row in rows]))
        # Parquet has no integer of 16 bits: cut into streams by byte, the empty halves compress to nothing
        encodings[".".join([name, *["list", "element"] * (rows[0][name].ndim)])] = "BYTE_STREAM_SPLIT"
    if LOSS_MASK in rows[0]:
        table = table.append_column(LOSS_MASK, _lists([row[LOSS_MASK] for row in rows]))
    # A column has either a dictionary or an encoding of its own, so the columns with a dictionary are named.
    plain = [name for name in SCHEMA.names if name != "tokens"] + ["tokens.list.element"]
    # Written to memory first: the checksum is of the bytes that were meant, not of what the disk has made of them.
    buffer = io.BytesIO()
    more = {"use_dictionary": plain, "column_encoding": encodings} if encodings else {}
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
    """A shard, or some columns of it. RunError, naming the file, unless it is to the byte what was written.

    Args:
        folder: of the corpus.
        shard: its entry in the manifest.
        columns: names; None for all.
    """
    path = locate(folder, shard)
    # The checksum needs the whole file, so it is read whole; only the columns asked for are decoded.
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise RunError(f"{path} is damaged: its sha256 is not the one in the manifest{again(folder)}")
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged: {error}{again(folder)}") from error


def locate(folder: Path, shard: dict[str, Any]) -> Path:
    """The path of a shard; RunError where it is missing or of another size than it was written with.

    Args:
        folder: of the corpus.
        shard: its entry in the manifest.
    """
    path = folder / shard["file"]
    # The size is a quick check, for when shards are only listed.
    size = path.stat().st_size if path.is_file() else None
    what = "missing" if size is None else f"damaged: it has {size} bytes"
    if size != shard["bytes"]:
        raise RunError(f"{path} is {what}; the manifest says {shard['bytes']} bytes{again(folder)}")
    return path


def members(lists: pa.ListArray) -> list[np.ndarray]:
    """The members of a list array of numbers [n], or of lists of k numbers [n, k]; views of its values."""
    # The offsets of a slice do not begin at 0, and `values` are those of the whole array: no copy is made.
    offsets, values = lists.offsets.to_numpy(), lists.values
    if pa.types.is_fixed_size_list(values.type):
        values = values.flatten().to_numpy().reshape(-1, values.type.list_size)
    else:
        values = values.to_numpy(zero_copy_only=False)  # booleans are bits
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
