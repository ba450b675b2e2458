"""Files that are written whole or not at all: JSON, rows of JSON, arrays."""

import contextlib
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kd_jax.storage.errors import RunError, writing

# JSON has no such numbers. Python's NaN token is not JSON, and other readers refuse it.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# What reading a damaged .npz raises.
_DAMAGE = (
    ValueError, SyntaxError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, MemoryError, OSError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def without_brackets(folder: str | os.PathLike) -> Path:
    """The absolute path of a folder for checkpoints. RunError where it has a [: orbax could not read them back."""
    # It lists a checkpoint's files by a pattern, in which [ has a meaning.
    folder = Path(folder).expanduser().absolute()
    if "[" in f"{folder}{folder.resolve()}":
        raise RunError(f"{folder}: checkpoints cannot be read back from a path with [ in it; choose another folder")
    return folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to fill, which replaces `path` when the block ends; where it fails, nothing is left of it.

    Args:
        partial: where the file is until then; by default beside `path`, with .tmp at the end.
    Raises: OSError, naming the file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp") if partial is None else partial
    with writing(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                # On disk before the rename: after a power cut, the name must not belong to an empty file.
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # of a write that failed: a full disk needs the room


def remove(path: Path) -> None:
    """Removes a file or a whole folder, if it is there. Raises OSError that names it."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON file whole or not at all."""
    write_text(path, dump(value, indent=2) + "\n")


def read_json(
    path: Path, error: type[Exception] = RunError, *, needs: dict[str, Any] | None = None, hint: str = ""
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        error: raised where the file holds no object, or one without a key of `needs`.
        needs: keys that must be there, with the types of their values.
        hint: end of the error's message.
    Raises: `error`, naming the file; OSError where it cannot be read.
    """
    path = Path(path)
    try:
        return _object(path.read_bytes(), needs or {})
    except ValueError as reason:
        raise error(f"{path} {reason}{hint}") from reason


def _object(text: bytes, needs: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a text, which has these keys; ValueError says what is wrong with it."""
    try:
        value = json.loads(str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    problem = _lack(value, needs) if isinstance(value, dict) else "is not a JSON object"
    if problem:
        raise ValueError(problem)
    return value


def _lack(value: dict[str, Any], needs: dict[str, Any]) -> str | None:
    """Which value of `needs` an object lacks, or has of another type."""
    for key, kind in needs.items():
        if not isinstance(value.get(key), kind):
            return f"has no {key}" if key not in value else f"has {key}={value[key]!r:.40}, which it cannot be"
    return None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON lines file whole or not at all."""
    write_text(path, _lines(rows))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows at the end of a JSON lines file.

    Args:
        path: of the file, which is made if necessary.
        rows: plain values by name.
    """
    text = _lines(rows)  # all of it first: a row that cannot be written adds nothing
    # Appended, not replaced: a log would be written again as a whole for every row.
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_rows(
    path: Path, needs: dict[str, Any] | None = None, *, cut: bool = False, texts: Collection[str] = ()
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a JSON lines file; none where there is no file.

    Args:
        needs: keys that every row must have, with the types of their values.
        cut: leave out a last line without an end: it is what a kill or a full disk leaves of an `append_rows`.
        texts: keys whose values are texts of models or users, where "NaN" is a word and not a number.
    Raises: RunError, naming the line that is broken.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    # line by line from the file, not by splitlines: U+2028 ends a line for it, and may stand in a JSON string
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not (cut and not line.endswith(b"\n")):
                try:
                    row = _object(line, needs or {})
                    rows.append({key: value if key in texts else _decode(value) for key, value in row.items()})
                except ValueError as reason:
                    raise RunError(f"{path}, line {number}: {reason}") from reason
    return rows


def absolute(source: str | os.PathLike) -> str:
    """The absolute path of a source that exists here, any other source unchanged: what a manifest keeps.

    The next start may come from another folder.
    """
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else str(source)


def read_arrays(path: Path, *, hint: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises RunError, which names the file and ends in `hint`, where it is damaged."""
    try:
        # A pickle could run any code.
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except _DAMAGE as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}{hint}") from error


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(dump(row) + "\n" for row in rows)


def dump(value: Any, indent: int | None = None) -> str:
    """JSON of plain values, arrays, paths and numbers that JSON does not have (as texts, see _NON_FINITE).

    Args:
        value: nested dicts and lists of these.
        indent: spaces for each level; None for one line.
    """
    # allow_nan: a number that slipped through is an error here, not in another program that reads the file.
    return json.dumps(_encode(value), indent=indent, allow_nan=False)


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _encode(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(member) for member in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _encode(value.tolist())
    # A text in place of the number: every JSON reader takes it.
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_decode(member) for member in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
