"""Strategies that damage a file: any bytes, values of JSON and rows, arrays, headers of safetensors."""

import copy
import io
import json
import struct

import numpy as np
from hypothesis import strategies as st

# What breaks arithmetic on sizes and offsets.
_INTEGERS = [0, 1, 2, 3, 7, 31, 32, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**62,
             2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
_HUGE = "\0huge\0"  # stands for a number that json.dumps does not write
_DEEP = "\0deep\0"
_TWICE = "\0twice\0"  # in front of a key that is there already
_NAMES = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "C:\\x", "..\\x", "a\0b", "\ud800", "x" * 5000, "é"]
# What a page or a figure would take for its own.
_MARKUP = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "--></style><svg onload=alert(1)>",
           "{{ 7 * 7 }}{% raw %}", "$\\frac{$ $\\input{x}$", "a$b$c_\0\x1b\n", "_hidden", "javascript:x"]  # fmt: skip
_VALUES = st.one_of(
    st.sampled_from(_MARKUP),
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"a": 1}, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from([0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400]),
    st.sampled_from([_HUGE, _DEEP, *_NAMES, "1", "NaN", "Infinity", "true", "x" * 100000]),
    st.text(max_size=4),
    st.integers(),
    st.floats(),
)


@st.composite
def any_bytes(draw, data):
    """One to three changes of bytes: flipped bits, others in their place, some in between, some out, the end off."""
    data = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not data:
            break
        # headers are at the front, or at the end
        at = draw(st.integers(0, min(draw(st.sampled_from([64, 1024, 2**40])), len(data)) - 1))
        at = len(data) - 1 - at if draw(st.booleans()) else at
        change = draw(st.sampled_from(["flip", "flip", "write", "insert", "remove", "cut", "number", "repeat"]))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "write":
            new = draw(st.binary(min_size=1, max_size=16))
            data[at : at + len(new)] = new
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=64))
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif change == "cut":
            del data[at:]
        elif change == "number":
            new = struct.pack("<Q", draw(st.sampled_from(_INTEGERS)))[: draw(st.sampled_from([1, 2, 4, 8]))]
            data[at : at + len(new)] = new
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 256))]
    return bytes(data)


@st.composite
def json_file(draw, data):
    """One or two changes of a JSON file's values and keys, or of its bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(any_bytes(data))
    tree = json.loads(data)
    for _ in range(draw(st.integers(1, 2))):
        tree = draw(_changed(tree))
    return _dump(tree)


@st.composite
def json_lines(draw, data):
    """The same of one line, or of the bytes of them all."""
    lines = data.splitlines(keepends=True)
    if not lines or draw(st.integers(0, 3)) == 0:
        return draw(any_bytes(data))
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(json_file(lines[at])) + b"\n"
    return b"".join(lines)


@st.composite
def values(draw, data):
    """What is still JSON, or rows of it: values of another kind or size in one row or in all, rows gone or twice."""
    try:
        rows, one = [json.loads(data)], True
    except ValueError:
        rows, one = [json.loads(line) for line in data.splitlines()], False
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(rows) - 1))
        change = (
            "one" if one or not isinstance(rows[at], dict) else draw(st.sampled_from(["one", "one", "all", "rows"]))
        )
        if change == "one":
            rows[at] = draw(_changed(rows[at]))
        elif change == "all" and rows[at]:
            key, value = draw(st.sampled_from(sorted(rows[at]))), draw(_VALUES)
            rows = [row | {key: value} if isinstance(row, dict) and key in row else row for row in rows]
        elif change == "rows":
            rows = draw(st.lists(st.sampled_from(rows), min_size=1, max_size=len(rows)))
    return b"\n".join(map(_dump, rows)) + b"\n"


@st.composite
def arrays(draw, data):
    """An .npz with one of its arrays gone, of another shape or type, or with other values."""
    with np.load(io.BytesIO(data)) as file:
        held = dict(file)
    name = draw(st.sampled_from(sorted(held)))
    value = held[name]
    change = draw(st.sampled_from(["gone", "shape", "type", "fill", "one", "empty", "swap"]))
    if change == "gone":
        del held[name]
    elif change == "shape":
        flat = value.ravel()
        held[name] = draw(st.sampled_from([value[None], flat[:1], value.T, flat[:0], flat, flat.reshape(-1, 1)]))
    elif change == "type":
        held[name] = value.astype(draw(st.sampled_from(["U5", "S3", "?", "c16", "i8", "f2", "M8[s]"])))
    elif change in ("fill", "one"):
        held[name] = value.astype(float)
        place = ... if change == "fill" or not value.ndim else (0,) * value.ndim
        held[name][place] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e308, -1e308, 1e-320, 1e20, 1e9, -3.5])
        )
    elif change == "empty":
        held[name] = np.zeros((0,) * value.ndim)
    else:
        held[name] = held[draw(st.sampled_from(sorted(held)))]
    file = io.BytesIO()
    np.savez(file, **held)
    return file.getvalue()


@st.composite
def safetensors(draw, data):
    """A changed header (its JSON, its length), or changed bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(any_bytes(data))
    (size,) = struct.unpack_from("<Q", data)
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw(st.booleans()):
        about = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key == "dtype":
            about[key] = draw(st.sampled_from(["F16", "BF16", "F64", "F8_E4M3", "F4", "I8", "BOOL", "C64", "X", ""]))
        else:
            at = draw(st.integers(0, len(about[key]) - 1))
            about[key][at] = draw(st.sampled_from([*_INTEGERS, -1, -(2**63), 2**64, 10**30]))
    else:
        header = draw(_changed(header))
    text = _dump(header)
    size = draw(st.sampled_from([len(text)] * 6 + [size, *_INTEGERS]))
    return struct.pack("<Q", size % 2**64) + text + rest


def _paths(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


@st.composite
def _changed(draw, tree):
    """A JSON value with one value in it changed, left out, or under another key."""
    tree = copy.deepcopy(tree)
    # first how deep, since most values of a file are in its longest list
    paths = list(_paths(tree))
    depth = draw(st.sampled_from(sorted({len(path) for path in paths})))
    path = draw(st.sampled_from([path for path in paths if len(path) == depth]))
    if not path:
        return draw(_VALUES)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    change = draw(st.sampled_from(["value", "value", "value", "remove", "key", "twice", "swap"]))
    if change == "remove":
        del parent[path[-1]]
    elif change == "key" and isinstance(parent, dict):
        parent[draw(st.one_of(st.sampled_from(_NAMES), st.text(max_size=3)))] = parent.pop(path[-1])
    elif change == "twice" and isinstance(parent, dict):
        parent[_TWICE + path[-1]] = draw(_VALUES)
    elif change == "swap":  # the value of another place
        value = tree
        for key in draw(st.sampled_from(paths)):
            value = value[key]
        parent[path[-1]] = copy.deepcopy(value)
    else:
        parent[path[-1]] = draw(_VALUES)
    return tree


def _dump(tree):
    text = json.dumps(tree)
    text = text.replace(json.dumps(_HUGE), "1e999").replace(json.dumps(_DEEP), "[" * 100000 + "]" * 100000)
    return text.replace(json.dumps(_TWICE)[:-1], '"').encode()
