"""The collectives of a compiled program and their bytes, read from its text (`compiled.as_text()`)."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# the operation is the first word before a bracket that is not a type
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, or {} for all devices
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(mesh\[.*?\}|\{\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
)
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?\)?$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction of the program.

    Attributes:
        kind: one of KINDS.
        shapes: of the arrays on each device afterwards (for a reduce-scatter: before), as (dtype, sizes).
        times: how often one execution of the program runs it; in a loop, once a round.
        groups: which devices communicate with each other, as the program writes it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    groups: str = "{}"

    @property
    def bytes(self) -> int:
        """Total bytes over all executions."""
        return self.times * sum(_bits(dtype) * math.prod(sizes) for dtype, sizes in self.shapes) // 8


def read(text: str, *, rounds: int | None = None) -> list[Collective]:
    """All collectives of a compiled program for several devices.

    Args:
        rounds: of a loop whose number of rounds the program does not say; 1 gives the bytes of one sampling step.
    Raises: ValueError for a collective in a loop whose number of rounds is unknown, and for an asynchronous one.
    """
    bodies, entry = _computations(text)
    found = []
    for name, times in _times(bodies, entry, rounds).items():
        for shapes, operation, rest in bodies[name]:
            # GPUs and TPUs split a collective into start and done; such programs are refused below.
            kind = operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            if times is None or operation != kind:
                raise ValueError(f"{operation} in {name}: asynchronous, or in a loop of an unknown number of rounds")
            # The result of a reduce-scatter is a part; what is communicated is its operand.
            sizes = _shapes(rest.split(")")[0] if kind == "reduce-scatter" else shapes)
            groups = _GROUPS.search(rest)
            found.append(Collective(kind, sizes, times, groups[1] if groups else ""))
    return found


def totals(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes by kind, 0 for a kind that does not occur."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for one in collectives:
        found[one.kind] += one.bytes
    return dict(found)


def between_slices(collectives: Iterable[Collective], *, devices: int, slices: int) -> float:
    """Bytes that a device sends to devices of other slices in one execution, on average over the devices.

    Within a slice, parts are summed before and spread after they go over the network between slices, as NCCL and the
    TPU's runtime do: each slice then sends an array once, however many of its devices have it.

    Args:
        collectives: of the program.
        devices: all of them, in the order of the mesh.
        slices: equal parts of the devices.
    Raises: ValueError for groups in a form that is not known.
    """
    total = 0
    for one in collectives:
        in_slice = members(one.groups, devices) * slices // devices
        if one.kind == "collective-permute":
            total += one.bytes * int((in_slice[:, 0] != in_slice[:, 1]).sum())
            continue
        for group in in_slice:
            counts = np.unique_counts(group).counts
            if one.kind == "all-to-all":
                # Each device keeps or sends within its slice the parts for the devices there.
                total += one.bytes * int((counts * (len(group) - counts)).sum()) / len(group)
            else:
                # An all-reduce is a reduce-scatter and an all-gather; each sends the array to one slice less than all.
                total += one.bytes * (len(counts) - 1) * (2 if one.kind == "all-reduce" else 1)
    return total / devices


def members(groups: str, devices: int) -> np.ndarray:
    """The devices of each group [group, member], by their places in the mesh.

    Args:
        groups: as the program writes them.
        devices: how many there are.
    Raises: ValueError for a form that is not known.
    """
    if groups == "{}":
        return np.arange(devices)[None]
    if groups.startswith("{{"):
        return np.array(ast.literal_eval(groups.replace("{", "[").replace("}", "]")))
    if "<=" in groups:
        shape, _, source = groups.partition("<=")
        return _in_order(source, devices).reshape(ast.literal_eval(shape))
    if groups.startswith("mesh"):
        axes, _, names = groups.removesuffix("}").partition("{")
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        chosen = [list(sizes).index(name) for name in ast.literal_eval(f"[{names}]")]
        source = axes.partition("device_ids=(")[2].strip()
        ids = _in_order(source, devices).reshape(tuple(sizes.values()))
        count = math.prod(ids.shape[axis] for axis in chosen)
        return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, count)
    raise ValueError(f"groups of devices in a form that is not known: {groups!r}")


def _in_order(text: str, devices: int) -> np.ndarray:
    """Devices in the order of [4,2]T(1,0): numbered along an array of these sizes, whose axes are then permuted."""
    form = _ORDER.search(text)
    if form is None:
        return np.arange(devices)
    ids = np.arange(devices).reshape([int(size) for size in form[1].split(",")])
    return (ids.transpose([int(axis) for axis in form[2].split(",")]) if form[2] else ids).ravel()


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """(result types, operation, rest of the line) of each instruction by computation, and the entry computation."""
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
    return bodies, entry


def _times(bodies: dict[str, list[tuple[str, str, str]]], entry: str, rounds: int | None) -> dict[str, int | None]:
    """How often each computation runs; None where that is unknown."""
    found: dict[str, int | None] = {}

    def visit(name: str, times: int | None) -> None:
        # A computation that is called from several places runs once for each.
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
    # One branch runs, and which is not known: all are counted, an upper bound.
    for branches in _BRANCHES.findall(rest):
        for called in branches.split(","):
            yield called.strip().lstrip("%"), trips


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(text)
    )


def _bits(dtype: str) -> int:
    # A boolean takes a byte.
    return 8 if dtype == "pred" else int(re.match(r"[a-z]+(\d+)", dtype)[1])
