"""Sizes and depths that a file of a stranger claims are held to what is there before anything is made of them."""

import hashlib
import io
import json
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax.lm import weights
from kd_jax.lm.corpus import documents, parquet_pages, shards
from kd_jax.lm.evaluation import scores
from kd_jax.storage import files
from kd_jax.storage.errors import RunError
from tests.faults.targets import built, refused


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


def gguf_file(keys=b"", num_keys=0, infos=b"", num_tensors=0, data=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + infos + data


def gguf_string(text, size=None):
    return struct.pack("<Q", len(text) if size is None else size) + text


def gguf_info(name, *shape, kind=0, offset=0, dimensions=None):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if dimensions is None else dimensions, *shape)
    return gguf_string(name) + sizes + struct.pack("<IQ", kind, offset)


ARRAY, NESTED = struct.pack("<I", 9), struct.pack("<IQ", 9, 1)
EMPTY_STRINGS = gguf_string(b"k") + ARRAY + struct.pack("<IQ", 8, 500_000) + bytes(8 * 500_000)


@pytest.mark.parametrize(
    "content",
    [
        gguf_file(num_tensors=2**60), gguf_file(num_keys=2**60), gguf_file(num_tensors=2**64 - 1, num_keys=0),
        gguf_file(gguf_string(b"k", 2**60), 1), gguf_file(gguf_string(b"k", 2**64 - 1), 1),
        gguf_file(gguf_string(b"k") + struct.pack("<I", 8) + gguf_string(b"v", 2**60), 1),
        gguf_file(gguf_string(b"k") + ARRAY + struct.pack("<IQ", 0, 2**60), 1),
        gguf_file(gguf_string(b"k") + ARRAY + struct.pack("<IQ", 8, 2**60), 1),
        gguf_file(gguf_string(b"k") + ARRAY + NESTED * 100_000 + struct.pack("<IQ", 0, 0), 1),
        gguf_file(gguf_string(b"general.alignment") + struct.pack("<II", 4, 0), 1),
        gguf_file(gguf_string(b"general.alignment") + struct.pack("<II", 4, 33), 1),
        gguf_file(gguf_string(b"general.alignment") + struct.pack("<I", 8) + gguf_string(b"32"), 1),
        gguf_file(infos=gguf_info(b"t", dimensions=2**32 - 1), num_tensors=1),
        gguf_file(infos=gguf_info(b"t", 2**32, 2**32, 2**32, 2**32), num_tensors=1),
        gguf_file(infos=gguf_info(b"t", 2**60), num_tensors=1),
        gguf_file(infos=gguf_info(b"t", 4, offset=2**63), num_tensors=1),
        gguf_file(infos=gguf_info(b"t", 4, kind=77), num_tensors=1),
        gguf_file(infos=gguf_info(b"t", 4) + gguf_info(b"t", 4, offset=32), num_tensors=2, data=bytes(200)),
        gguf_file(infos=gguf_info(b"t", 9) + gguf_info(b"u", 9, offset=32), num_tensors=2, data=bytes(200)),
        # these are well formed, and no model: there is nothing to be made of them, and not much memory is to be taken
        gguf_file(gguf_string(b"k") + ARRAY + struct.pack("<IQ", 0, 4 << 20) + bytes(4 << 20), 1),
        gguf_file(EMPTY_STRINGS, 1),
    ],
)  # fmt: skip
def test_gguf_headers_are_not_believed(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    refused("GGUF", tmp_path, r"model\.gguf")


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [10**9, 2**40, 10**400, -1, 0, 1.5, 1e300, float("nan"), True, "2", [2], {}])
def test_sizes_in_a_config_are_not_believed(tmp_path, key, value):
    folder = built("config", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    if (key, value) == ("max_position_embeddings", 10**9):
        assert weights.load(folder).architecture.max_position_embeddings == 10**9  # nothing is made of that size
    else:
        refused("config", folder, "/m")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a": "\\ud800"}',
     '{"a": 1' + "0" * 5000 + "}", "\xff", "", "null", "{}x"],
    ids=["lists", "objects", "deep", "surrogate", "digits", "latin", "empty", "null", "more"],
)  # fmt: skip
def test_json_that_a_parser_or_printer_dies_of(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"x\.json is not (JSON|a JSON object)"):
        files.read_json(path)
    with pytest.raises(ValueError, match=r"x\.json is not (JSON|a JSON object)"):
        files.read_json(path, ValueError)
    if text:
        with pytest.raises(RunError, match=r"x\.json, line 1: not (JSON|a row)"):
            files.read_rows(path)


def test_large_json_is_refused_unread(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(RunError, match=r"x\.json is not JSON \(it has 1099511627776 bytes"):
        files.read_json(path)


def test_line_separators_in_a_row_do_not_end_it(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\x0bd"}, {"text": "\r"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert files.read_rows(path) == rows


@pytest.mark.parametrize(
    "text",
    ['null\n{"text": "a"}\n', "null null\n", '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n",
     '{"text":\n' + "[\n" * 50_000],
    ids=["null", "nulls", "deep", "lines"],
)  # fmt: skip
def test_json_lines_that_the_library_dies_of(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    for source in (path, tmp_path):
        with pytest.raises(
            RunError, match=r"data\.jsonl, line \d+: (null in place of a row|nested more than 500 deep)"
        ):
            documents.load(str(source), split="train", subset=None, streaming=False)
    path.write_text('{"text": "null [[[[ \\" {"}\n{"text": null}\n')
    data = documents.load(str(path), split="train", subset=None, streaming=True)
    assert [row["text"] for row in data] == ['null [[[[ " {', None]


def test_scores_of_another_size_are_refused(tmp_path):
    path, key = tmp_path / "sums.npz", {"a": 1}
    scores._write(path, key, np.array([1.0, np.nan]))
    np.testing.assert_array_equal(scores._read(path, key, 2), [1.0, np.nan])
    with pytest.raises(RunError, match=r"sums\.npz is damaged"):
        scores._read(path, key, 3)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log_prob.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(RunError, match=r"sums\.npz is damaged"):
        scores._read(path, key, 3)


@pytest.mark.parametrize("name, step", [("own checkpoint", "saved"), ("checkpoint of a training", "c/4")])
def test_deep_json_in_a_checkpoint_that_the_library_dies_of(tmp_path, name, step):
    folder = built(name, tmp_path / "m")
    (folder / step / "weights" / "_sharding").write_text(' {"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(name, folder, "_sharding is not JSON")


# Parquet


def varint(data, at):
    """The integer at a place as Thrift's compact protocol has it (before its sign is undone), and where it ends."""
    end = next(i for i in range(at, len(data)) if data[i] < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(data[at:end])), end


def claimed(data):
    """A Parquet file whose first page says that it is as large as can be said in as many bytes of the header."""
    column = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    _, at = varint(data, at + 1)  # the type, a field of its own byte and an integer
    assert data[at] == 0x15
    size, end = varint(data, at + 1)
    largest = b"\xfe" + b"\xff" * (end - at - 3) + b"\x7f"  # the lowest bit is the sign
    assert varint(largest, 0)[0] > 4 * size
    return data[: at + 1] + largest + data[end:]


def parquet(table, **more):
    file = io.BytesIO()
    pq.write_table(table, file, **more)
    return file.getvalue()


MIXED = pa.table(
    {
        "text": ["ab" * (i % 97) if i % 5 else None for i in range(3000)],
        "lists": [[i, None, i + 1][: i % 4] for i in range(3000)],
        "nested": [{"a": float(i), "b": [str(i % 7)] * (i % 3)} for i in range(3000)],
        "flag": [i % 3 == 0 for i in range(3000)],
        "fixed": pa.array([bytes([i % 256]) * 7 for i in range(3000)], pa.binary(7)),
    }
)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("more", [{}, {"use_dictionary": False, "write_page_checksum": True, "row_group_size": 999}])
def test_pages_are_those_of_the_footer(compression, version, more):
    """The footer says how large all pages of a column are with their headers, compressed and not."""
    data = parquet(MIXED, compression=compression, data_page_version=version, data_page_size=512, **more)
    metadata, pages = pq.ParquetFile(pa.BufferReader(data)).metadata, 0
    found = list(parquet_pages.groups(io.BytesIO(data), metadata))
    assert len(found) == metadata.num_row_groups
    for i, chunks in enumerate(found):
        assert len(chunks) == metadata.num_columns
        for j, chunk in enumerate(chunks):
            column = metadata.row_group(i).column(j)
            headers = column.total_compressed_size - chunk.stored
            assert (chunk.name, chunk.values) == (column.path_in_schema, column.num_values)
            assert chunk.size + headers == column.total_uncompressed_size and headers > 8 * chunk.pages
            pages += chunk.pages
        parquet_pages.check_memory(chunks)
    assert pages > 3 * metadata.num_columns


def test_page_of_a_data_set_is_no_larger_than_its_file_makes_likely(tmp_path, monkeypatch):
    path = tmp_path / "data.parquet"
    table = pa.table({"text": ["\0" * (2 << 20)] * 4})
    path.write_bytes(parquet(table, compression="zstd", use_dictionary=False))
    data = documents.load(str(path), split="train", subset=None, streaming=True)
    assert [len(row["text"]) for row in data] == [2 << 20] * 4  # not much is too much of nothing
    monkeypatch.setattr(parquet_pages, "FLOOR", 1 << 20)
    for source in (path, tmp_path):
        for streaming in (False, True):
            with pytest.raises(RunError, match=r"data\.parquet .*it has \d+ bytes in \d+: more than 256 to one"):
                documents.load(str(source), split="train", subset=None, streaming=streaming)
    # 8 MiB of something are in as many bytes
    noise = np.random.default_rng(0).integers(32, 127, (4, 2 << 20), np.uint8)
    path.write_bytes(parquet(pa.table({"text": [bytes(row).decode() for row in noise]})))
    assert sum(1 for _ in documents.load(str(path), split="train", subset=None, streaming=True)) == 4


def test_sizes_in_a_page_of_a_data_set_are_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "FLOOR", 100 << 20)
    path = tmp_path / "data.parquet"
    path.write_bytes(claimed(parquet(pa.table({"text": ["ab" * (1 << 20)]}), use_dictionary=False)))
    with pytest.raises(RunError, match=r"data\.parquet .*it has 134217\d+ bytes in"):
        documents.load(str(path), split="train", subset=None, streaming=False)
    path.write_bytes(parquet(pa.table({"text": ["ab"] * 9}))[:4] + bytes(50) + b"PAR1")
    with pytest.raises(RunError, match=r"cannot read .*data\.parquet"):
        documents.load(str(path), split="train", subset=None, streaming=False)


def shard_of(folder, rows=8, length=2000):
    noise = np.random.default_rng(0).integers(0, 5000, (rows, length), np.int32)
    about = {"length": length, "prompt_length": 1, "finished": False, "log_prob": -1.0, "sample_log_prob": -1.0}
    return shards.write(folder, [{"index": i, "tokens": noise[i], **about} for i in range(rows)], rows)


def signed(folder, entry, data, **more):
    (folder / entry["file"]).write_bytes(data)
    return entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | more


def test_sizes_in_a_page_of_a_corpus_are_not_believed(tmp_path):
    entry = shard_of(tmp_path, rows=64, length=9)
    assert shards.read(tmp_path, entry).num_rows == 64
    data = (tmp_path / entry["file"]).read_bytes()
    with pytest.raises(RunError, match=r"shard-00000\.parquet is damaged: column 'index' has 64 values in \d+ bytes"):
        shards.read(tmp_path, signed(tmp_path, entry, claimed(data)))


def test_corpus_of_next_to_nothing_is_refused(tmp_path, monkeypatch):
    """One that says itself, in its manifest too, that it has more than what is in its bytes."""
    rows, length = 64, 4096
    columns = {"index": np.arange(rows), "tokens": [np.full(length, 5, np.int32)] * rows}
    columns |= {"length": np.full(rows, length), "prompt_length": np.ones(rows), "finished": [False] * rows}
    columns |= {"log_prob": np.zeros(rows), "sample_log_prob": np.zeros(rows)}
    (tmp_path / "data").mkdir()
    data = parquet(pa.table(columns, schema=shards.SCHEMA), compression="zstd")
    entry = {"file": "data/x.parquet", "first": 0, "rows": rows, "tokens": rows * length}
    entry = signed(tmp_path, entry, data)
    assert shards.read(tmp_path, entry).num_rows == rows
    monkeypatch.setattr(parquet_pages, "FLOOR", 1 << 10)
    with pytest.raises(RunError, match=r"x\.parquet is damaged: it has \d+ bytes in \d+: more than 256 to one"):
        shards.read(tmp_path, entry)


def test_text_in_a_corpus_is_refused_unread(tmp_path):
    """Few bytes in a dictionary stand for many where each row is the same long text."""
    entry = shard_of(tmp_path, rows=64, length=9)
    table = shards.read(tmp_path, entry).append_column("text", pa.array(["x" * 5000] * 64))
    with pytest.raises(RunError, match=r"damaged: column 'text' is of type BYTE_ARRAY"):
        shards.read(tmp_path, signed(tmp_path, entry, parquet(table)), ["length"])
