"""Documents, of text or of token ids, out of whatever the `datasets` library reads."""

from __future__ import annotations

import collections
import glob
import gzip
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import errors as hub_errors
from tqdm import tqdm

from kd_jax.lm.corpus import parquet_pages, shards
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.storage import untrusted
from kd_jax.storage.errors import RunError

SOURCES = (
    "a Parquet, JSON lines (.jsonl, .json, also .gz) or .txt file, a glob of such files, a folder of them, or a data "
    "set on the Hugging Face hub, org/name or org/name@revision"
)
# What reads a file, by how its name ends.
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
_BATCH = 1000
_DEEPEST, _LONGEST_LINE = 500, 1 << 28
# Of a line of JSON: strings (empty in what findall gives), brackets, and null.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([\[\]{}]|null)')


class Documents(NamedTuple):
    """One column of a data set.

    Attributes:
        source: the name of the data, for messages.
        column: the name of the column.
        of_text: whether it holds texts, else lists of ids.
        data: a datasets.Dataset, or an IterableDataset, which can only be read from its beginning.
        tokenizer: what makes the texts ids, or whose the ids are.
    """

    source: str
    column: str
    of_text: bool
    data: Any
    tokenizer: Tokenizer


def is_hub_id(source: str) -> bool:
    """Whether a source is one on the hub, not here. Raises FileNotFoundError where it can be neither."""
    if Path(source).expanduser().exists() or _files(source):
        return False
    if not _HUB_ID.fullmatch(source) or _reader(source):
        raise FileNotFoundError(f"{source} does not exist; data can be: {SOURCES}")
    return True


def commit(source: str) -> str:
    """The commit that a hub id stands for now; RunError where it cannot be known."""
    repository, revision = _HUB_ID.fullmatch(source).groups()
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise RunError(
            f"cannot look up the data set {source} on the Hugging Face hub: {error}. With streaming=False, a copy in "
            "the cache will do"
        ) from error


def identity(source: str) -> str:
    """A digest (hex) of data before they are read: of all files of a source, or the commit of one on the hub.

    Raises FileNotFoundError for a source that is not there, RunError for a commit that cannot be known.
    """
    if is_hub_id(source):
        return commit(source)
    root, digest = Path(source).expanduser(), hashlib.sha256()
    files = _files(source) or sorted(str(path) for path in root.rglob("*") if path.is_file())
    for file in files:
        name = os.path.relpath(file, root) if root.is_dir() else Path(file).name
        with open(file, "rb") as content:
            digest.update(f"{name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load(source: str, *, split: str, subset: str | None, streaming: bool, revision: str | None = None) -> Any:
    """The datasets.Dataset of a source, an IterableDataset where it is streamed.

    Raises RunError, with what the library says, for data that is not there or not what it should be; ValueError for a
    split or a subset of files, which have none.
    """
    files = _files(source)
    if files and (split != "train" or subset is not None):
        raise ValueError(f"split={split!r}, subset={subset!r}: {source} is of files, which have no such parts")
    if files:
        where = {"path": _reader_of(files), "data_files": [glob.escape(file) for file in files]}
    elif is_hub_id(source):
        repository, asked = _HUB_ID.fullmatch(source).groups()
        where = {"path": repository, "name": subset, "revision": revision or asked}
    else:
        where = {"path": str(Path(source).expanduser()), "name": subset}
        if Path(where["path"], datasets.config.DATASET_STATE_JSON_FILENAME).exists():
            raise RunError(f"{source} is what save_to_disk made, which is not read; write it with to_parquet instead")
    for file in files or map(str, Path(source).expanduser().rglob("*")):
        if Path(file).is_file() and _reader(file) in _CHECKS:
            _CHECKS[_reader(file)](file)
    try:
        # what load_dataset does, with a look at the files in between: it would list them once more
        builder = datasets.load_dataset_builder(**where)
        _check_places(where["path"], None if files else builder.config.data_files)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except RunError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise _unreadable(source, error) from error


def _check_places(source: str, listed: dict[str, list[str]] | None) -> None:
    """RunError where the README of a folder, or of a data set on the hub, names files that lie elsewhere here."""
    here = Path(source).is_dir()
    roots = (Path(source).absolute(), Path(source).resolve()) if here else ()
    for file in itertools.chain.from_iterable((listed or {}).values()):
        root = next((root for root in roots if Path(file).is_relative_to(root)), None)
        try:
            if root is not None:
                untrusted.inside(root, Path(file).relative_to(root).as_posix())
            elif here or "://" not in file:
                raise ValueError(f"{file!r} lies outside the folder")
        except ValueError as error:
            raise RunError(f"{source}: what it names as its data, {error}") from error


def _check_json(file: str) -> None:
    """RunError for JSON that the library dies of, and the process with it: nested too deep, or null in place of a row.

    Quicker by far than parsing: strings and what is between them are passed over.
    """
    depth = 0
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as content:
            for number, line in enumerate(iter(lambda: content.readline(_LONGEST_LINE), b""), start=1):
                if len(line) == _LONGEST_LINE:
                    raise RunError(f"{file}, line {number}: longer than {_LONGEST_LINE - 1} bytes")
                for token in _TOKENS.findall(line):
                    depth += 1 if token in (b"[", b"{") else -1 if depth and token in (b"]", b"}") else 0
                    if depth > _DEEPEST:
                        raise RunError(f"{file}, line {number}: nested more than {_DEEPEST} deep")
                    if not depth and token == b"null":
                        raise RunError(f"{file}, line {number}: null in place of a row")
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"cannot read {file}: {error}") from error


def _check_parquet(file: str) -> None:
    """RunError for a Parquet file that takes memory out of all proportion to its size (a row group is read whole)."""
    try:
        with pq.ParquetFile(file) as held, open(file, "rb") as content:
            for chunks in parquet_pages.groups(content, held.metadata):
                parquet_pages.check_memory(chunks)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise RunError(f"cannot read {file} as data: {type(error).__name__}: {error}") from error


_CHECKS = {"json": _check_json, "parquet": _check_parquet}


def _unreadable(source: str, error: Exception) -> RunError:
    # where the library failed to read a file, the reason is what made it fail
    reason = error.__cause__ or error
    return RunError(f"cannot read {source} as data: {type(reason).__name__}: {reason}")


def select(data: Any, source: str, column: str | None, of_text: bool, tokenizer: Tokenizer) -> Documents:
    """A column of the data, `text` by default. Raises ValueError, naming the columns there are, where it has none."""
    names = data.column_names
    if names is None:  # of a stream that does not say, and nothing where it is empty
        names = next((table.column_names for table in _tables(data.with_format("arrow"), source, 1)), [])
    column = column or "text"
    if column not in names:
        raise ValueError(
            f"{source} has no column {column!r}; there are {', '.join(map(repr, names)) or 'none'}: name one with "
            "text_column, or ids_column for lists of ids"
        )
    return Documents(source, column, of_text, data.select_columns([column]).with_format("arrow"), tokenizer)


def survey(documents: Documents) -> tuple[np.ndarray, str, dict[str, int]]:
    """Reads all documents once: (bool [n], which can be used; a fingerprint; how many cannot, by why).

    The fingerprint is a SHA-256 (hex) of the documents in order, however they lie in files.
    """
    digest, skipped, usable = hashlib.sha256(), collections.Counter(), []
    digest.update(b"text" if documents.of_text else b"ids")
    with tqdm(total=len(documents.data), unit="document", desc="reading", mininterval=1, dynamic_ncols=True) as bar:
        for table in _tables(documents.data, documents.source, _BATCH):
            rows = _rows(documents, table)
            for row in rows:
                content = b"" if row is None else row.encode() if documents.of_text else row.astype("<i8").tobytes()
                digest.update(len(content).to_bytes(8, "little") + content)
                problem = _problem(documents, row, len(usable))
                usable.append(problem is None)
                if problem is not None:
                    skipped[problem] += 1
            bar.update(len(rows))
    return np.array(usable, bool), digest.hexdigest(), dict(skipped)


def take(documents: Documents, indices: np.ndarray) -> list[str] | list[np.ndarray]:
    """The documents with these indices, texts or ids int64."""
    return _rows(documents, documents.data[indices.tolist()])


def stream(documents: Documents, skipped: collections.Counter) -> Iterator[str | np.ndarray]:
    """The documents that can be used, as they come; `skipped` is told how many cannot, by why."""
    index = 0
    for table in _tables(documents.data, documents.source, _BATCH):
        for row in _rows(documents, table):
            problem = _problem(documents, row, index)
            if problem is None:
                yield row
            else:
                skipped[problem] += 1
            index += 1


def _problem(documents: Documents, row: str | np.ndarray | None, index: int) -> str | None:
    """Why a document is left out; ValueError for one that shows the whole to be something else."""
    if documents.of_text:
        if row is None or not row.strip():
            return "empty"
        return None if documents.tokenizer.lost_byte(row) is None else "not_encodable"
    if not len(row):
        return "empty"
    for i in (int(row.min()), int(row.max())):
        if not 0 <= i < documents.tokenizer.vocab_size:
            raise ValueError(
                f"{documents.source}: document {index} has the id {i}; the tokenizer's are from 0 to "
                f"{documents.tokenizer.vocab_size - 1}"
            )
    return None


def _tables(data: Any, source: str, size: int) -> Iterator[pa.Table]:
    """The data, so many documents at a time; a stream is read from its files only here."""
    tables = data.iter(size)
    while True:
        try:
            table = next(tables, None)
        except Exception as error:  # the library raises no narrower class
            raise _unreadable(source, error) from error
        if table is None:
            return
        yield table


def _rows(documents: Documents, table: pa.Table) -> list[str | None] | list[np.ndarray]:
    """The documents in a table. ValueError, naming the column, where it holds something else."""
    column = table[documents.column]
    name, kind = f"{documents.source}: column {documents.column!r}", column.type
    if pa.types.is_null(kind):  # nothing in it yet says what it would hold
        return [None if documents.of_text else np.zeros(0, np.int64)] * len(column)
    if documents.of_text:
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ValueError(f"{name} holds {kind}, not text; a column of lists of ids is named with ids_column")
        return column.to_pylist()
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        raise ValueError(f"{name} holds {kind}, not lists of ids; a column of text is named with text_column")
    rows = []
    for chunk in column.cast(pa.large_list(pa.int64())).chunks:
        if chunk.flatten().null_count:
            raise ValueError(f"{name} has a list with a null in it")
        rows += shards.split(chunk)
    return rows


def _files(source: str) -> list[str]:
    """The file of a source, or those of a glob, in order of their names."""
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    found = [] if path.exists() else glob.glob(str(path), recursive=True)
    return sorted(file for file in found if Path(file).is_file())


def _reader(file: str) -> str | None:
    return _READERS.get(Path(file.removesuffix(".gz")).suffix)


def _reader_of(files: list[str]) -> str:
    readers = {_reader(file) for file in files}
    if len(readers) > 1 or None in readers:
        raise ValueError(f"{files[0]}{' and others' * (len(files) > 1)}: data can be {SOURCES}, all of one kind")
    return readers.pop()
