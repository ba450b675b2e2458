"""What rows of a run folder may hold, checked once where a page reads them: they may be somebody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Sizes that can be squared, divided by each other and drawn; what float32 holds is between them.
_LEAST, _MOST = 1e-100, 1e100

TEXT, INTEGER, NUMBER, ANY_NUMBER = "text", "an integer", "a number", "a number of any size"
FINITE, FROM_ZERO, SIZE = "a finite number", "a number from 0", "a finite number from 0"


def check(row: Mapping[str, Any], where: str, kinds: Mapping[str, str]) -> None:
    """ValueError, naming the place and the field, for a value in a row that is not of its field's kind, nor null."""
    for name, kind in kinds.items():
        if row.get(name) is not None and not is_kind(row[name], kind):
            raise ValueError(f"{where}: {name} is {row[name]!r:.40}, not {kind}{_range(row[name], kind)}")


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value of a row is of one of the kinds above."""
    if kind == TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if kind == INTEGER:
        return isinstance(value, int) and abs(value) < 2**63
    if kind == ANY_NUMBER:
        return isinstance(value, float) or abs(value) < 2**1000
    # by comparisons alone: an integer can be beyond what a float holds
    finite = value == 0 or _LEAST <= abs(value) <= _MOST
    if kind in (FINITE, SIZE):
        return finite and (kind == FINITE or value >= 0)
    return (finite or value != value or abs(value) == math.inf) and (kind == NUMBER or not value < 0)


def _range(value: Any, kind: str) -> str:
    """Why something that is a number is not one here."""
    out = kind in (NUMBER, FINITE, FROM_ZERO, SIZE) and is_kind(value, ANY_NUMBER) and not is_kind(value, NUMBER)
    return f" between {_LEAST:g} and {_MOST:g}, or 0" if out else ""
