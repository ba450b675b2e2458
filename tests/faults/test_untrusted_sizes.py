"""Sizes and depths that a file of a stranger claims are held to what is there before anything is made of them."""

import json
import struct
import zipfile

import numpy as np
import pytest

from kd_jax.storage import files
from kd_jax.storage.errors import RunError
from tests.faults.targets import built, read_sums, refused, write_sums


def safetensors_file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({}, size=2**63), safetensors_file({}, size=2**64 - 1), safetensors_file({}, size=100_000_001),
        safetensors_file({"a": ONE | {"shape": [2**62, 2**62]}}, bytes(8)),
        safetensors_file({"a": ONE | {"shape": [2**40]}}, bytes(8)),
        safetensors_file({"a": ONE | {"data_offsets": [0, 2**60]}}, bytes(8)),
        safetensors_file({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
        safetensors_file({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8)),
        safetensors_file({"a": ONE, "b": ONE}, bytes(8)),
        safetensors_file({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
        safetensors_file({"a": ONE | {"dtype": "F1"}}, bytes(8)),
        safetensors_file({"a": ONE}, bytes(7)), safetensors_file({"a": ONE}, bytes(9)),
        safetensors_file(b"[" * 100000 + b"]" * 100000),
        safetensors_file(b'{"a": ' + json.dumps(ONE).encode() + b', "a": ' + json.dumps(ONE).encode() + b"}", bytes(8)),
    ],
)  # fmt: skip
def test_safetensors_headers_are_not_believed(tmp_path, content):
    folder = built("safetensors", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    refused("safetensors", folder, r"model\.safetensors|/m (lacks|has 1 tensors)")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [-1, 0, 1.5, float("nan"), True, "2", [2]])
def test_sizes_in_a_config_that_are_none(tmp_path, key, value):
    folder = built("config", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    refused("config", folder, "/m")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000,
     '{"a": 1' + "0" * 5000 + "}", "\xff", "", "null", "{}x"],
    ids=["lists", "objects", "digits", "latin", "empty", "null", "more"],
)  # fmt: skip
def test_json_that_a_parser_or_printer_dies_of(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"x\.json is not (JSON|a JSON object)"):
        files.read_json(path)
    with pytest.raises(ValueError, match=r"x\.json is not (JSON|a JSON object)"):
        files.read_json(path, ValueError)
    if text:
        with pytest.raises(RunError, match=r"x\.json, line 1: is not (JSON|a JSON object)"):
            files.read_rows(path)


def test_line_separators_in_a_row_do_not_end_it(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\x0bd"}, {"text": "\r"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert files.read_rows(path) == rows


def test_scores_of_another_size_are_refused(tmp_path):
    path, key = tmp_path / "sums.npz", {"a": 1}
    write_sums(path, key, np.array([1.0, np.nan]))
    np.testing.assert_array_equal(read_sums(path, key, 2), [1.0, np.nan])
    with pytest.raises(RunError, match=r"sums\.npz is damaged"):
        read_sums(path, key, 3)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log_prob.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(RunError, match=r"sums\.npz is damaged"):
        read_sums(path, key, 3)
