"""Documents of text, of token ids or of conversations, out of data files here or on the Hugging Face hub."""

from __future__ import annotations

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
from huggingface_hub import errors as hub_errors

from kd_jax.lm.corpus import conversations, readers, shards
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import cache, packages, progress
from kd_jax.storage.errors import RunError

SOURCES = (
    f"a file, a glob of files or a folder of them ({readers.FORMATS}), or a data set on the Hugging Face hub, "
    "org/name or org/name@revision"
)
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
# Rows of a batch in the Arrow file.
_BATCH = 1000
# Files above this size are known by their size and this many blocks of a megabyte.
_LARGE, _BLOCKS = 1 << 30, 64
# Half of a pair of surrogates: no character, but JSON can spell it.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Columns(NamedTuple):
    """Which columns of the data a document is made of.

    Attributes:
        kind: "text", "ids" (lists of token ids), or "messages" (conversations).
        names: the column of texts, of ids or of messages; or the columns of the request, then the response's.
        whole_files: a .txt file is one document.
        max_length: ids of a row; a conversation has to have some of the assistant's among its first ones.
    """

    kind: str
    names: tuple[str, ...]
    whole_files: bool = False
    max_length: int = 0


class Documents(NamedTuple):
    """Documents on disk that are mapped into memory.

    Attributes:
        source: the name of the data, for messages.
        columns: what they are made of.
        batches: Arrow arrays of 1000 documents each: strings, lists of ids, or messages as JSON.
        tokenizer: what makes the texts ids, or whose the ids are.
    """

    source: str
    columns: Columns
    batches: list[pa.Array]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def is_hub_id(source: str) -> bool:
    """Whether a source is on the hub. Raises FileNotFoundError where it is neither there nor here."""
    # What exists here is a path, even if it looks like an id of the hub.
    if Path(source).expanduser().exists() or _matches(source):
        return False
    if not _HUB_ID.fullmatch(source) or readers.is_known(source):
        raise FileNotFoundError(f"{source} does not exist; data can be: {SOURCES}")
    return True


def commit(source: str) -> str:
    """The commit that a hub id stands for now; RunError where it cannot be known."""
    repository, revision = _HUB_ID.fullmatch(source).groups()
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise RunError(
            f"cannot look up the data set {source} on the Hugging Face hub: {error}. Without a network, give the "
            f"folder that `hf download {repository} --repo-type dataset --local-dir FOLDER` made"
        ) from error


def identity(source: str) -> str:
    """A digest (hex) of the content of all files of a source, of a package, or the commit of one on the hub.

    Nothing depends on the time of a file, which copies keep. A file above 1 GiB counts by its size and 64 blocks of
    1 MiB spread over it: a change between them is not seen.

    Raises: FileNotFoundError for a source that is not there, ValueError for a package that is not known, RunError for a
        commit that cannot be known.
    """
    package = packages.find(source)
    if package is not None:
        return package.sha256  # nothing is fetched for it
    if is_hub_id(source):
        return commit(source)
    root, digest = Path(source).expanduser(), hashlib.sha256()
    for file in _matches(source) or sorted(str(path) for path in root.rglob("*") if path.is_file()):
        # Relative names: the same files in another folder are the same data.
        name = os.path.relpath(file, root) if root.is_dir() else Path(file).name
        digest.update(f"{name} {_content(file)}\n".encode())
    return digest.hexdigest()


def _content(file: str) -> str:
    size = os.path.getsize(file)
    with open(file, "rb") as content:
        if size <= _LARGE:
            return hashlib.file_digest(content, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} bytes".encode())
        for block in range(_BLOCKS):
            # the first and the last block are the file's two ends
            content.seek((size - (1 << 20)) * block // (_BLOCKS - 1))
            digest.update(content.read(1 << 20))
        return digest.hexdigest()


def files(source: str, *, split: str, subset: str | None, revision: str | None = None) -> list[str]:
    """The files of a source: paths, or hf:// URLs of a data set on the hub.

    Which files a split has is for the `datasets` library to say: by their names, or by the folder's README.

    Raises: RunError where that fails; ValueError for a split or a subset that is not there, a format that is not read,
        or a folder of several formats, of which the library would take one.
    """
    paths = _matches(source)
    if paths and (split != "train" or subset is not None):
        raise ValueError(
            f"split={split!r}, subset={subset!r}: {source} is made of files, which have neither splits nor subsets"
        )
    if not paths:
        on_hub = is_hub_id(source)
        repository, asked = _HUB_ID.fullmatch(source).groups() if on_hub else (str(Path(source).expanduser()), None)
        if (Path(repository) / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
            raise RunError(f"{source} is what save_to_disk made, which is not read; write it with to_parquet instead")
        try:
            builder = datasets.load_dataset_builder(repository, name=subset, revision=revision or asked)
        except Exception as error:  # the library raises no narrower class
            raise RunError(f"cannot read {source} as data: {type(error).__name__}: {error}") from error
        # the library lists files by split; reading them is done here, where only the asked columns are read
        splits = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items()}
        if split not in splits:
            raise ValueError(f"{source} has no split {split!r}; there are {', '.join(splits) or 'none'}")
        paths = splits[split]
        if not on_hub:
            _check_formats(source, Path(repository), sum(splits.values(), []))
    unknown = [path for path in paths if not readers.is_known(path)]
    if unknown:
        raise ValueError(f"{unknown[0]} cannot be read; data can be: {SOURCES}")
    return paths


def _check_formats(source: str, folder: Path, used: list[str]) -> None:
    readme = folder / "README.md"
    if not used or (readme.exists() and "data_files:" in readme.read_text(errors="replace")):
        return  # a README chooses files on purpose
    # what lies above the data, such as a manifest, is about them
    top, endings = Path(os.path.commonpath(list(map(os.path.dirname, used)))), set(map(readers.suffix, used))
    for path in sorted(top.rglob("[!.]*")):
        about = path.name in datasets.data_files.FILES_TO_IGNORE or path.stem.lower() in ("license", "notice", "readme")
        no_data = about or "/." in str(path.relative_to(folder))
        ending = readers.suffix(path.name)
        if path.is_symlink() and not no_data and any(readers.is_known(str(file)) for file in path.rglob("*")):
            raise ValueError(
                f"{path} is a link to a folder, whose files would be left out; name the files with a glob, such as "
                f"{Path(source, '**', '*' + min(endings))}"
            )
        if path.is_file() and readers.is_known(path.name) and ending not in endings and not no_data:
            first = min(endings)
            raise ValueError(
                f"{source} has {first} files and {ending} files ({path.name}), of which only {first} would be read; "
                f"keep one format in a folder, or name the files with a glob, such as {Path(source, '*' + first)}"
            )


def load(source: str, paths: list[str], columns: Columns, tokenizer: Tokenizer, content: str) -> Documents:
    """The documents of some files, through a copy of their columns in the cache folder.

    Args:
        source: the name of the data.
        paths: its files.
        columns: what documents are made of.
        tokenizer: for the documents.
        content: the identity of the data; the copy is known by it, and so is never one of other data.

    Raises: RunError for files that cannot be read, ValueError for a column of another type.
    """
    # training and validation corpora take other documents of the same data: the copy is read by both
    key = hashlib.sha256(json.dumps([content, paths, columns]).encode()).hexdigest()
    path = cache.folder("data", f"{key}.arrow")
    if not path.exists():
        cache.make_folder(path.parent)
        # 64-bit offsets: a thousand long documents can have more than 2 GiB of text.
        kind = pa.large_list(pa.int32()) if columns.kind == "ids" else pa.large_string()
        schema = pa.schema({"document": kind})
        rows = stream(source, paths, columns)
        with cache.shared(path) as file, pa.ipc.new_file(file, schema) as arrow:
            while batch := list(itertools.islice(rows, _BATCH)):
                arrow.write_batch(pa.record_batch([pa.array(batch, kind)], schema=schema))
    # Mapped into memory: a document is read from disk when it is taken.
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return Documents(source, columns, table["document"].chunks, tokenizer)


def stream(source: str, paths: list[str], columns: Columns) -> Iterator[str | np.ndarray | None]:
    """The documents of some files, as they come: a text, int32 ids, or messages as JSON; None for none.

    Args:
        source: what messages call the data.
        paths: its files, in order.
        columns: what documents are made of.
    Raises: ValueError, naming the column, where it holds something else.
    """
    # types are checked by value, not by a schema over all files: a column may be null for long, or in one file only
    make = {"text": _as_text, "ids": _as_ids, "messages": _as_messages}[columns.kind]
    for path in paths:
        for number, values in enumerate(readers.rows(path, columns.names, columns.whole_files)):
            try:
                yield make(*values)
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{source}: column {columns.names[0]!r}, row {number} of {path}: {error}") from error


def _as_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} is not text; a column of lists of ids is named with ids_column")
    # Half of a surrogate pair is not a character, and no tokenizer takes it.
    return None if value is not None and _SURROGATE.search(value) else value or ""


def _as_ids(value: Any) -> np.ndarray | None:
    ids = np.asarray([] if value is None else value)
    if ids.size and not (ids.ndim == 1 and ids.dtype.kind in "iu"):
        raise ValueError(f"{str(value)[:40]} is not a list of ids; a column of text is named with text_column")
    if ids.size and not -(2**31) <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"id {ids.max() if ids.max() >= 2**31 else ids.min()} does not fit 32 bits")
    return ids.astype(np.int32)


def _as_messages(*values: Any) -> str | None:
    """Messages as JSON; a prompt and its response are two."""
    if len(values) > 1:
        *request, response = values
        pair = {"user": readers.request(*request), "assistant": response}
        return json.dumps([{"role": role, "content": content} for role, content in pair.items()])
    (messages,) = values
    if isinstance(messages, str):
        with contextlib.suppress(ValueError):  # a text that is no JSON is refused below
            messages = json.loads(messages) if messages.strip() else None
    if messages is None:
        return None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{str(messages)[:40]!r} is not a list of messages, each an object with a role and a content")
    return json.dumps(messages)


def survey(documents: Documents) -> tuple[np.ndarray, str, dict[str, int]]:
    """Reads all documents once.

    Returns: bool [n], which can be used; a SHA-256 (hex) of the documents in order, however they lie in files; how many
        cannot be used, by why.
    """
    digest, skipped, usable = hashlib.sha256(), collections.Counter(), []
    digest.update(documents.columns.kind.encode())
    with progress.bar("reading", 0, len(documents), "document") as bar:
        for batch in documents.batches:
            for row in _members(batch):
                # each document with its length, so that "ab", "c" and "a", "bc" differ
                # The width and byte order of ids are fixed, so that all machines agree on the digest.
                content = row.astype("<i8").tobytes() if isinstance(row, np.ndarray) else (row or "").encode()
                digest.update(len(content).to_bytes(8, "little") + content)
                reason = problem(documents.columns, documents.tokenizer, row, len(usable))
                usable.append(reason is None)
                skipped.update([reason] if reason else [])
            bar.update(len(batch))
    return np.array(usable, bool), digest.hexdigest(), dict(skipped)


def take(documents: Documents, indices: Sequence[int]) -> list[str] | list[np.ndarray]:
    """The documents with these indices: texts, int32 ids, or messages as JSON."""
    # not pyarrow's take, which copies all batches together first
    slices = (documents.batches[i // _BATCH].slice(i % _BATCH, 1) for i in map(int, indices))
    return [_members(one)[0] for one in slices]


def _members(batch: pa.Array) -> list[str | None] | list[np.ndarray]:
    return shards.members(batch) if pa.types.is_large_list(batch.type) else batch.to_pylist()


def problem(columns: Columns, tokenizer: Tokenizer, row: str | np.ndarray | None, index: int) -> str | None:
    """Why a document is left out, None where it is not.

    Args:
        columns: what documents are made of.
        tokenizer: for the documents.
        row: the document.
        index: its number, for messages.
    Raises: ValueError for an id that is not the tokenizer's (then the data are of another one), and for a conversation
        without a turn of the assistant, with calls of tools, or that the chat template refuses.
    """
    if columns.kind == "messages":
        if row is None:
            return "empty"
        try:
            learnt = conversations.encode(json.loads(row), tokenizer).learnt
        except conversations.Unusable as error:
            return error.reason
        except ValueError as error:
            raise ValueError(f"conversation {index}: {error}") from error
        return None if learnt[: columns.max_length].any() else "answer_beyond_max_length"
    if columns.kind == "text" and (row is None or tokenizer.lost_byte(row) is not None):
        return "not_encodable"
    if not len(row) or (columns.kind == "text" and not row.strip()):
        return "empty"
    if columns.kind == "text":
        return None
    # the smallest and the largest id decide for all
    for i in (int(row.min()), int(row.max())):
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(
                f"document {index} has the id {i}; the tokenizer's are from 0 to {tokenizer.vocab_size - 1}"
            )
    return None


def _matches(source: str) -> list[str]:
    """The file of a source, or those of a glob, in order of their names."""
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    matches = [] if path.exists() else glob.glob(str(path), recursive=True)
    return sorted(file for file in matches if Path(file).is_file())
