"""What is in a safetensors or a GGUF file, read from the formats' definitions alone: what the loaders are held to."""

import json
import math
import struct
from typing import NamedTuple

import numpy as np

_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_Q8_0 = 8


def safetensors(data):
    """Tensors by name, as float32."""
    (size,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + size]), {}
    for name, about in header.items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            values = np.frombuffer(data[8 + size + first : 8 + size + last], _SAFETENSORS[about["dtype"]])
            if about["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            with np.errstate(all="ignore"):
                tensors[name] = values.reshape(about["shape"]).astype(np.float32)
    return tensors


class Field(NamedTuple):
    """Where an integer of a GGUF file's header is, its struct format, and what it says."""

    offset: int
    format: str
    what: str


class GGUF:
    """A GGUF file: `metadata` by key, `tensors` by name, as float32, and `fields`, the integers of its header.

    Tensors of other types than F32, F16 and Q8_0 are None.
    """

    def __init__(self, data):
        self._data, self._at, self.fields = data, 4, []
        self.metadata, self.tensors = {}, {}
        self._take("I", "version")
        num_tensors, num_keys = self._take("Q", "tensor count"), self._take("Q", "key count")
        for _ in range(num_keys):
            key = self._string("key")
            self.metadata[key] = self._value(self._take("I", "type of a key"))
        infos = [self._info() for _ in range(num_tensors)]
        self.alignment = self.metadata.get("general.alignment", 32)
        self.data_offset = -(-self._at // self.alignment) * self.alignment
        for name, shape, kind, offset in infos:
            self.tensors[name] = self._tensor(shape, kind, self.data_offset + offset)

    def _take(self, format, what):
        self.fields.append(Field(self._at, format, what))
        (value,) = struct.unpack_from("<" + format, self._data, self._at)
        self._at += struct.calcsize("<" + format)
        return value

    def _string(self, what):
        size = self._take("Q", f"length of a {what}")
        self._at += size
        return self._data[self._at - size : self._at].decode()

    def _value(self, kind):
        if kind == _STRING:
            return self._string("value")
        if kind == _ARRAY:
            of, count = self._take("I", "type of an array"), self._take("Q", "length of an array")
            return [self._value(of) for _ in range(count)]
        return self._take(_SCALARS[kind], "value")

    def _info(self):
        name, count = self._string("tensor's name"), self._take("I", "number of dimensions")
        shape = [self._take("Q", "dimension") for _ in range(count)][::-1]
        return name, shape, self._take("I", "type of a tensor"), self._take("Q", "offset of a tensor")

    def _tensor(self, shape, kind, start):
        count = math.prod(shape)
        if kind in (0, 1):  # F32, F16
            values = np.frombuffer(self._data, (np.float32, np.float16)[kind], count, start)
            return values.reshape(shape).astype(np.float32)
        if kind != _Q8_0:
            return None
        # blocks of a float16 scale and 32 int8
        blocks = np.frombuffer(self._data, np.dtype([("scale", "<f2"), ("values", "i1", 32)]), count // 32, start)
        with np.errstate(all="ignore"):
            return (blocks["scale"].astype(np.float32)[:, None] * blocks["values"].astype(np.float32)).reshape(shape)
