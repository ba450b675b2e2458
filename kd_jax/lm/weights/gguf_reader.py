"""What is in a GGUF file. Nothing in it is believed: each length and offset is held to the file's size before use.

(The library's own reader makes arrays of each item of a list, and follows lists of lists as deep as they go.)
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
# Types that are no blocks, as what they are; all others as bytes.
_DTYPES = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}


class Tensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        kind: how it is stored.
        shape: outermost dimension first (in the file it is last).
        data: what gguf.quants.dequantize takes; a view of the file, [*shape[:-1], bytes or values of a row].
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class _Field(NamedTuple):
    """Where the value of a key is; `count` is None where it is no list."""

    kind: int
    count: int | None
    offset: int


class _Cursor:
    """Reads on from a place; ValueError where what is asked for would go beyond the end."""

    def __init__(self, data: memoryview, at: int = 0):
        self._data, self.at = data, at

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self._data):
            raise ValueError(f"it says that there is something up to byte {end}")
        taken, self.at = self._data[self.at : end], end
        return taken

    def number(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> memoryview:
        return self.take(self.number("<Q"))

    def text(self) -> str:
        return str(self.string(), "utf-8")


class Reader:
    """A GGUF file: `get` gives the value of a key, `tensors` is a dict of Tensor by name.

    Raises ValueError, naming the file, where it is no GGUF file, or cut short or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.tensors: dict[str, Tensor] = {}
        self._fields: dict[str, _Field] = {}
        try:
            self._bytes = np.memmap(self.path, mode="r")
            self._data = memoryview(self._bytes)
            self._read(_Cursor(self._data))
        except ValueError as error:
            size = self.path.stat().st_size
            raise ValueError(
                f"{path} ({size} bytes) is no GGUF file, or cut short or damaged; fetch it again: {error}"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key: a number, a str, or a list of one of them. ValueError where it is not UTF-8."""
        field = self._fields.get(key)
        if field is None:
            return default
        count = 1 if field.count is None else field.count
        if field.kind == _STRING:
            cursor = _Cursor(self._data, field.offset)
            try:
                values = [cursor.text() for _ in range(count)]
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path} is damaged: {key} is not UTF-8 ({error})") from error
        else:
            values = np.frombuffer(self._data, _SCALARS[field.kind], count, field.offset).tolist()
        return values[0] if field.count is None else values

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.number("<I")
        if version & 0xFFFF == 0:
            raise ValueError("it is big-endian; only little-endian files are known")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}; known are {', '.join(map(str, _VERSIONS))}")
        num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
        # whatever these are: what lies beyond the end of the file is an error, and each takes some bytes of it
        for _ in range(num_keys):
            key = cursor.text()
            if key in self._fields:
                raise ValueError(f"it has {key} twice")
            self._fields[key] = _field(cursor, key)
        self._place([_info(cursor) for _ in range(num_tensors)], cursor.at)

    def _place(self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], at: int) -> None:
        """The tensors, whose data begin after byte `at`."""
        alignment = self.get(_ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} is {alignment!r}; it has to be a power of two")
        start = -(-at // alignment) * alignment
        end = 0  # of the tensor before: where two lie in the same place, one of them is wrong
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            if name in self.tensors:
                raise ValueError(f"it has {name} twice")
            block, size = GGML_QUANT_SIZES[kind]
            if not shape or min(shape) < 1 or shape[-1] % block:
                raise ValueError(f"{name} has shape {shape}, in blocks of {block}")
            if offset % alignment or offset < end:
                raise ValueError(f"{name} does not begin where it says, at byte {start + offset}")
            end = offset + math.prod(shape) // block * size
            if start + end > len(self._data):
                raise ValueError(f"{name} ends at byte {start + end}")
            data = self._bytes[start + offset : start + end].view(_DTYPES.get(kind, "u1"))
            self.tensors[name] = Tensor(kind, shape, data.reshape(*shape[:-1], -1))


def _field(cursor: _Cursor, key: str) -> _Field:
    """Passes over a value."""
    kind, count = cursor.number("<I"), None
    if kind == _ARRAY:
        kind, count = cursor.number("<I"), cursor.number("<Q")
    field = _Field(kind, count, cursor.at)
    if kind == _STRING:
        for _ in range(1 if count is None else count):
            cursor.string()
    elif kind in _SCALARS:
        cursor.take(np.dtype(_SCALARS[kind]).itemsize * (1 if count is None else count))
    else:
        raise ValueError(f"{key} is of type {kind}{'' if count is None else ' in a list'}, which is not known")
    return field


def _info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """(name, kind, shape, offset) of a tensor."""
    name, count = cursor.text(), cursor.number("<I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has {count} dimensions; there can be {_MAX_DIMENSIONS}")
    shape = tuple(cursor.number("<Q") for _ in range(count))
    return name, GGMLQuantizationType(cursor.number("<I")), shape[::-1], cursor.number("<Q")
