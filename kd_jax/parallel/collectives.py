"""What devices send each other in a compiled program, read from its text (`compiled.as_text()`)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# the first word with a bracket behind it that is no type is what the instruction does
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction of the program.

    Attributes:
        kind: one of KINDS.
        shapes: of the arrays that each device has afterwards (of a reduce-scatter: before), as (dtype, sizes).
        times: how often a run of the program comes by; a loop's body as often as the loop goes round.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int

    @property
    def bytes(self) -> int:
        """Of these arrays, all times together."""
        return self.times * sum(_bits(dtype) * math.prod(sizes) for dtype, sizes in self.shapes) // 8


def read(text: str, *, rounds: int | None = None) -> list[Collective]:
    """All collectives of a compiled program that runs over several devices.

    Args:
        rounds: how often a loop goes round where the program does not say; of sampling, 1 makes it a step's.
    Raises ValueError for a collective in a loop of which it is not known how often it goes round.
    """
    bodies, entry = _computations(text)
    found = []
    for name, times in _times(bodies, entry, rounds).items():
        for shapes, operation, rest in bodies[name]:
            kind = operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            if times is None:
                raise ValueError(f"{operation} in {name}: how often its loop goes round is not known")
            if operation != kind:
                raise ValueError(f"{operation} in {name}: only programs without asynchronous collectives can be read")
            found.append(Collective(kind, _shapes(rest.split(")")[0] if kind == "reduce-scatter" else shapes), times))
    return found


def totals(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes by kind; those that there are none of are 0."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for one in collectives:
        found[one.kind] += one.bytes
    return dict(found)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """(what comes out, operation, the rest of the line) of each instruction, by computation; which one is run."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins:
            name = begins[2]
            bodies[name] = []
            entry = name if begins[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            bodies[name].append(instruction.groups())
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return bodies, entry


def _times(bodies: dict[str, list[tuple[str, str, str]]], entry: str, rounds: int | None) -> dict[str, int | None]:
    """How often each computation is run; None where that is not known."""
    found: dict[str, int | None] = {}

    def visit(name: str, times: int | None) -> None:
        before = found.get(name, 0)
        found[name] = None if times is None or before is None else before + times
        for _, operation, rest in bodies[name]:
            for called, trips in _calls(operation, rest, rounds):
                visit(called, None if times is None or trips is None else times * trips)

    visit(entry, 1)
    return found


def _calls(operation: str, rest: str, rounds: int | None) -> Iterator[tuple[str, int | None]]:
    trips: int | None = 1
    if operation == "while":
        known = _TRIPS.search(rest)
        trips = int(known[1]) if known else rounds
    for called in _CALLED.findall(rest):
        yield called, trips
    for branches in _BRANCHES.findall(rest):
        for called in branches.split(","):
            yield called.strip().lstrip("%"), trips


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(text)
    )


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.match(r"[a-z]+(\d+)", dtype)[1])
