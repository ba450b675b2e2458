"""Types of the values in a run folder's rows, checked once where a page reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Numbers in this range can be squared, divided and drawn; float32 lies within it.
_LEAST, _MOST = 1e-100, 1e100

TEXT, INTEGER, NUMBER, ANY_NUMBER = "text", "an integer", "a number", "a number of any size"
FINITE, FROM_ZERO, SIZE = "a finite number", "a number from 0", "a finite number from 0"


def check(row: Mapping[str, Any], where: str, kinds: Mapping[str, str]) -> None:
    """Raises ValueError, naming `where` and the field, for a value that is neither of its field's kind nor null.

    Args:
        row: to be checked.
        where: file and row, for the message.
        kinds: kind of each field.
    """
    for name, kind in kinds.items():
        if row.get(name) is not None and not is_kind(row[name], kind):
            raise ValueError(f"{where}: {name} is {row[name]!r:.40}, not {kind}{_range(row[name], kind)}")


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value of a row has this kind, one of those above."""
    if kind == TEXT:
        return isinstance(value, str)
    # A bool is an int to Python.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if kind == INTEGER:
        # The range of NumPy's int64.
        return isinstance(value, int) and abs(value) < 2**63
    if kind == ANY_NUMBER:
        # Python's integers have no bound, floats end at about 2**1024.
        return isinstance(value, float) or abs(value) < 2**1000
    # comparisons only: an integer may be too large for a float
    finite = value == 0 or _LEAST <= abs(value) <= _MOST
    if kind in (FINITE, SIZE):
        return finite and (kind == FINITE or value >= 0)
    return (finite or value != value or abs(value) == math.inf) and (kind == NUMBER or not value < 0)


def _range(value: Any, kind: str) -> str:
    """The end of the message for a number that is too large or too small."""
    out = kind in (NUMBER, FINITE, FROM_ZERO, SIZE) and is_kind(value, ANY_NUMBER) and not is_kind(value, NUMBER)
    return f" between {_LEAST:g} and {_MOST:g}, or 0" if out else ""
