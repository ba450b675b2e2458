"""Files that are written whole or not at all, and what is read of them: JSON, rows of JSON, arrays."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kd_jax.storage import untrusted
from kd_jax.storage.errors import RunError, writing

# JSON has no such numbers; Python's own NaN token is not JSON, and other readers refuse the line.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@contextlib.contextmanager
def replacing(path: str | os.PathLike, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` once the block is through; else nothing is left of it.

    `partial` is where it is until then, by default beside it with .tmp at the end. Raises OSError that names the file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp") if partial is None else partial
    with writing(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except Exception:
            partial.unlink(missing_ok=True)  # a full disk needs the room
            raise


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

    Raises `error`, which names the file and ends in `hint`, where it holds no object, or one without a value of the
    type that `needs` has for a key; OSError for one that cannot be read.
    """
    path = Path(path)
    try:
        value = untrusted.parse_json(untrusted.text(path))
    except ValueError as reason:
        raise error(f"{path} is not JSON ({reason}){hint}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object{hint}")
    problem = _lack(value, needs or {})
    if problem:
        raise error(f"{path} {problem}{hint}")
    return value


def _lack(value: dict[str, Any], needs: dict[str, Any]) -> str | None:
    """What an object does not have of a value of each of these types."""
    for key, kind in needs.items():
        if not isinstance(value.get(key), kind):
            return f"has no {key}" if key not in value else f"has {key}={value[key]!r:.40}, which it cannot be"
    return None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON lines file whole or not at all."""
    write_text(path, _lines(rows))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows at the end of a JSON lines file."""
    text = _lines(rows)  # all of it first: a row that cannot be written adds nothing
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def read_rows(
    path: Path, needs: dict[str, Any] | None = None, *, cut: bool = False, halves: bool = False
) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, none where there is no file; `halves` as of `untrusted.parse_json`.

    With `cut` a last line without an end is left out: it is what a kill or a full disk leaves of an `append_rows`.
    RunError names a line that is broken, or has no value of the type that `needs` has for a key.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    # not the whole at once, and not by splitlines: U+2028 ends a line for it, and may be in a JSON string as it is
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not (cut and not line.endswith(b"\n")):
                rows.append(_row(line, f"{path}, line {number}", needs or {}, halves))
    return rows


def _row(line: bytes, where: str, needs: dict[str, Any], halves: bool) -> dict[str, Any]:
    try:
        row = untrusted.parse_json(str(line, "utf-8"), halves=halves)
    except ValueError as error:
        raise RunError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RunError(f"{where}: not a row (a JSON object)")
    problem = _lack(row, needs)
    if problem:
        raise RunError(f"{where} {problem}")
    return _decode(row)


def read_arrays(path: Path, *, hint: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises RunError, which names the file and ends in `hint`, where it is damaged."""
    try:
        return untrusted.arrays(path)
    except ValueError as error:
        raise RunError(f"{error}{hint}") from error


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(dump(row) + "\n" for row in rows)


def dump(value: Any, indent: int | None = None) -> str:
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
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_decode(member) for member in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
