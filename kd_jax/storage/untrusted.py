"""Reading what may come from a stranger: it is data, never run or unpickled, and its sizes are checked before use."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

# What a JSON file may be at most, in bytes and in lists or objects inside each other; what goes through a value
# recursively can rely on it. No real one is near either.
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 256 << 20, 64
# What reading a damaged .npz raises.
_DAMAGE = (
    ValueError, SyntaxError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, MemoryError, OSError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def inside(folder: str | os.PathLike, name: str) -> Path:
    """The path of a file that a list in a folder names, which may be a stranger's; it need not be there.

    Raises ValueError, naming it, where it lies outside the folder: by its name (absolute, "..", a drive or a backslash)
    or as a link. A snapshot in a Hugging Face cache is links, into the cache's blobs/, and those are inside.
    """
    pure, path = PurePosixPath(name), Path(folder) / name
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or not pure.parts
        or {"\\", "\0"} & set(name)
        or PureWindowsPath(name).drive
    ):
        raise ValueError(f"{name!r} lies outside the folder")
    here = Path(folder).resolve()
    roots = [here]
    if here.parent.name == "snapshots":
        roots.append((here.parent.parent / "blobs").resolve())
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{name!r} leads nowhere ({error})") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{name!r} lies outside the folder: it is a link to {real}")
    return path


def text(path: Path) -> str:
    """A text file that is to be parsed as a whole; ValueError for one that is no UTF-8, or larger than any would be."""
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, and may have {_MAX_JSON_BYTES}")
    return path.read_text(encoding="utf-8")


def parse_json(text: str, *, halves: bool = False) -> Any:
    """The value of a JSON text; ValueError for one that is none, is nested too deep or has what is no character.

    With `halves` half of a pair of surrogates may be in it: for texts that are shown as what they are.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [member for members in inside for member in members]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} deep")
    if (
        not halves and "\\ud" in text.lower()
    ):  # half of a pair is no character, and could be neither printed nor written
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_json(folder: Path) -> None:
    """Before a library reads a checkpoint: ValueError, naming the file, for JSON in it that `parse_json` refuses.

    Tensorstore takes lists within lists by recursion; where they are too deep, the process dies.
    """
    for path in sorted(folder.rglob("*")):
        # in d/ lie its own values, one after the other and with checksums
        if path.parent.name == "d" or not path.is_file():
            continue
        with open(path, "rb") as file:
            head = b" "
            while head and not head.strip():
                head = file.read(4096)
        if head.lstrip()[:1] in (b"{", b"["):
            try:
                parse_json(text(path))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON ({error})") from error


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that numpy.savez has written; ValueError, naming the file, where it is damaged.

    (numpy.load makes an array as large as a header says before it looks whether there is as much in the file.)
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()}
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # not compressed: what comes out is as large as what is in the file
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another version of NumPy's format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        # of objects, which would be pickles, this makes none
        return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if by_columns else "C")
