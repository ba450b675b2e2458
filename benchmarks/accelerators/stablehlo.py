"""Reads a lowered program (StableHLO as text): what an accelerator would be slow at, or wrong about."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_TENSOR = re.compile(r"tensor<((?:\d+x)*)([a-z]\w*)>")
_PRODUCT = re.compile(r"stablehlo\.dot_general (%[\w#]+), (%[\w#]+)")
_WIDENED = re.compile(r"(%\w+) = stablehlo\.convert .*xbf16>\) -> tensor<.*xf32>")
_CUSTOM_CALL = re.compile(r"stablehlo\.custom_call @([\w.$]+)")
_DONATED = ("jax.buffer_donor = true", "tf.aliasing_output = ")


class Array(NamedTuple):
    """Dtype and sizes of an array of the program; of all devices together."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.sizes) * int(bits[0] if bits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


def arrays(text: str) -> set[Array]:
    """All kinds of arrays that occur."""
    return {Array(dtype, tuple(map(int, sizes.split("x")[:-1]))) for sizes, dtype in _TENSOR.findall(text)}


def float64(text: str) -> list[str]:
    """The arrays of 64-bit floats."""
    return sorted(str(one) for one in arrays(text) if one.dtype == "f64")


def rounded_products(text: str) -> list[str]:
    """Matrix products of float32 factors that an accelerator may round first (TF32, bfloat16).

    Factors that were bfloat16 just before lose nothing by it, and are left out.
    """
    rounded, widened = set(), set()
    for line in text.splitlines():
        if "func.func" in line:
            widened = set()  # names are those of one function
        if convert := _WIDENED.search(line):
            widened.add(convert[1])
        product = _PRODUCT.search(line)
        if product is None or "precision = [HIGHEST, HIGHEST]" in line:
            continue
        left, right = (Array(d, tuple(map(int, s.split("x")[:-1]))) for s, d in _TENSOR.findall(line)[:2])
        if "f32" in (left.dtype, right.dtype) and not widened.issuperset(product.groups()):
            rounded.add(f"{left} x {right}")
    return sorted(rounded)


def host_calls(text: str) -> list[str]:
    """Calls of the host: Python callbacks, and what is sent to it or received from it."""
    calls = {name for name in _CUSTOM_CALL.findall(text) if "callback" in name}
    return sorted(calls | set(re.findall(r"stablehlo\.(infeed|outfeed|send|recv)\b", text)))


def donated(text: str) -> int:
    """Number of arguments whose buffers the program takes over."""
    main = next(line for line in text.splitlines() if "func.func public @main(" in line)
    return sum(map(main.count, _DONATED))


def widest(text: str, size: int) -> Array | None:
    """The largest array with an axis of this size and two axes or more; None where there is none."""
    wide = [one for one in arrays(text) if size in one.sizes and len(one.sizes) > 1]
    return max(wide, key=lambda one: (one.bytes, str(one)), default=None)
