"""Rows of data files: the asked columns of Parquet, JSON, CSV and text, compressed or not.

Only the asked columns are read, so that no other column has to have one type in all rows and all files.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from kd_jax.lm.corpus import shards
from kd_jax.storage.errors import RunError

FORMATS = (
    "Parquet, JSON lines (.jsonl, .ndjson, .json), a JSON array (.json), .csv, .tsv or .txt (a document a line, or a "
    "file with whole_files); all but Parquet also as .gz or .zst"
)
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def suffix(file: str) -> str:
    """The ending that says how a file is read, in lower case and without that of its compression."""
    path = PurePath(file.lower())
    return (path.with_suffix("") if path.suffix in _COMPRESSIONS else path).suffix


def is_known(file: str) -> bool:
    """Whether the ending of a file is one that can be read."""
    return suffix(file) in _READERS


def names(paths: Sequence[str]) -> list[str]:
    """The columns of some files, by the first row of the first one that has any."""
    return next(filter(None, map(_names, paths)), [])


def _names(file: str) -> list[str]:
    return next((list(row) for row in _rows(file, None, False)), [])


def check_columns(source: str, paths: list[str], columns: Sequence[str]) -> None:
    """Raises ValueError, naming the columns there are, where a file lacks one. Of the hub's files the first is read.

    Args:
        source: what messages call the data.
        paths: its files.
        columns: the names of those that are wanted.
    """
    first = True
    for path in paths:
        if not first and "://" in path:
            return  # each would be a request
        present = _names(path)
        # a file without a row, as Spark writes them, lacks nothing
        if present:
            _check_columns(source if first else path, present, columns)
            first = False
    if first:
        _check_columns(source, [], columns)


def _check_columns(source: str, present: list[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        raise ValueError(
            f"{source} has no column {missing[0]!r}; there are {', '.join(map(repr, present)) or 'none'}: name one "
            "with text_column, ids_column (lists of ids), messages_column, or prompt_column and response_column"
        )


def rows(file: str, columns: Sequence[str], whole_files: bool = False) -> Iterator[list[Any]]:
    """The values of the columns in each row of a file; None where a row lacks one.

    Lists of numbers in Parquet are arrays, all else is as Python's JSON has it.

    Args:
        file: a path, or a URL that fsspec opens (hf://...).
        columns: their names.
        whole_files: a .txt file is one document.

    Raises: RunError, naming the file and the row, for what is not of the format that the ending says.
    """
    return ([row.get(name) for name in columns] for row in _rows(file, columns, whole_files))


def request_columns(column: str) -> tuple[str, ...]:
    """The columns of a request: of an `instruction` also `input`, what it is about (Alpaca's form), where it is there.

    Args:
        column: that is asked for.
    """
    # asked for in any case: rows of JSON may leave out what is empty, the first one too
    return (column, "input") if column == "instruction" else (column,)


def request(value: Any, about: str | None = None) -> Any:
    """The values of `request_columns` in one: a text and what it is about, if that is not empty."""
    return f"{value}\n\n{about}" if isinstance(value, str) and about else value


def _rows(file: str, columns: Sequence[str] | None, whole_files: bool) -> Iterator[dict[str, Any]]:
    # The error names the row: in a file of millions of rows, "invalid JSON" alone would not help.
    number = 0
    try:
        with fsspec.open(file, "rb") as content:
            for row in _READERS[suffix(file)](file, content, columns, whole_files):
                number += 1
                yield row
    except (ValueError, RecursionError, OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read {file} as data, after {number} rows: {type(error).__name__}: {error}") from error


def _text(file: str, content: Any) -> io.TextIOBase:
    compression = _COMPRESSIONS.get(PurePath(file).suffix.lower())
    stream = pa.input_stream(content, compression=compression)
    # a byte order mark is not part of the text; lines end with a line feed and nothing else (U+2028 is inside a line)
    return io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="\n")


def _parquet(file: str, content: Any, columns: Sequence[str] | None, _: bool) -> Iterator[dict[str, Any]]:
    parquet = pq.ParquetFile(content)
    if columns is None:
        # From the schema: no row is read for this.
        yield dict.fromkeys(parquet.schema_arrow.names)
        return
    present = [name for name in columns if name in parquet.schema_arrow.names]
    # batches keep a row group of any size out of memory; columns that nobody asked for are not even decompressed
    for batch in parquet.iter_batches(batch_size=1000, columns=present):
        values = [_values(batch.column(name)) for name in present]
        yield from (dict(zip(present, row, strict=True)) for row in zip(*values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    # lists of ids stay arrays: as Python integers a corpus of 1e8 ids takes minutes and gigabytes
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if lists and pa.types.is_integer(kind.value_type) and not column.null_count:
        flat = column.cast(pa.large_list(kind.value_type))
        if not flat.flatten().null_count:
            return shards.members(flat)
    return column.to_pylist()


def _json(file: str, content: Any, *_: Any) -> Iterator[dict[str, Any]]:
    lines = _text(file, content)
    filled = (line for line in lines if not line.isspace())
    first = next(filled, "")
    # ".json" is both: an array of rows, which is one JSON value, or a row a line
    if first.lstrip().startswith("["):
        rows = json.loads(first + lines.read())
    else:
        rows = (json.loads(line) for line in itertools.chain([first] if first else [], filled))
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{str(row)[:40]} is not an object with columns")
        yield row


def _csv(file: str, content: Any, *_: Any) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # by default a document ends after 128 KiB
    delimiter = "\t" if suffix(file) == ".tsv" else ","
    # strict: a quote that nothing closes would make one value of all rows after it
    rows = csv.DictReader(_text(file, content), delimiter=delimiter, strict=True)
    try:
        names = [name for name in rows.fieldnames or () if name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two columns are named {twice!r}; give each a name of its own")
        for row in rows:
            if any(row.pop(None, ())):
                raise ValueError(
                    f"the next row has more than {len(rows.fieldnames)} values; put a text with {delimiter!r} in it in "
                    "double quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{error}: a value that begins with a double quote has to end with one, and those inside it are doubled"
        ) from error


def _txt(file: str, content: Any, _: Any, whole_files: bool) -> Iterator[dict[str, Any]]:
    lines = _text(file, content)
    if whole_files:
        yield {"text": lines.read()}
    else:
        yield from ({"text": line.removesuffix("\n").removesuffix("\r")} for line in lines)


_READERS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet, ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt,
}  # fmt: skip
