import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_jax.lm import corpus
from kd_jax.storage.errors import RunError

PROMPT, EOS, MAX_LENGTH, SHARD = [7, 1], 2, 9, 4
COLUMNS = ["index", "tokens", "length", "prompt_length", "finished", "log_prob", "sample_log_prob"]


class Samples(NamedTuple):
    """What the sampler yields, as it is declared."""

    index: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    finished: np.ndarray
    log_probs: np.ndarray
    sample_log_probs: np.ndarray
    utilisation: float
    steps: int


def settings(**changes):
    return {
        "source": "a model", "model_fingerprint": "ab12", "tokenizer_fingerprint": None, "dtype": "float32",
        "prompt": None, "prompt_ids": PROMPT, "eos_ids": [EOS], "sample_temperature": 0.1 + 0.2, "top_k": None,
        "top_p": 0.9, "seed": 3, "max_length": MAX_LENGTH, "num_samples": 10, "shard_size": SHARD, **changes,
    }  # fmt: skip


def sample(i):
    """Sample i as a row: a function of i alone. Its log-probabilities are multiples of 1/64, so that sums are exact."""
    rng = np.random.default_rng([5, i])
    length, finished = (int(rng.integers(3, MAX_LENGTH + 1)), True) if i % 3 else (MAX_LENGTH, False)
    ids = rng.integers(3, 49152, length - len(PROMPT)).tolist()
    ids[-1] = EOS if finished else ids[-1]
    values = rng.integers(-900, 0, (2, length - len(PROMPT))) / 64
    return PROMPT + ids, finished, values


def expected(i):
    ids, finished, (log_probs, sample_log_probs) = sample(i)
    return dict(zip(COLUMNS, (i, ids, len(ids), 2, finished, sum(log_probs), sum(sample_log_probs)), strict=True))


def batch(indices):
    n, rng = len(indices), np.random.default_rng(0)
    tokens = rng.integers(-5, 5, (n, MAX_LENGTH)).astype(np.int32)  # beyond the length there may be anything
    log_probs, sample_log_probs = np.full((2, n, MAX_LENGTH), -0.5, np.float32)  # of no token: not to be counted
    lengths, finished = np.zeros(n, np.int32), np.zeros(n, bool)
    for row, i in enumerate(indices):
        ids, finished[row], values = sample(i)
        lengths[row] = len(ids)
        tokens[row, : len(ids)] = ids
        log_probs[row, 2 : len(ids)], sample_log_probs[row, 2 : len(ids)] = values
    index, prompt_lengths = np.array(indices, np.int64), np.full(n, 2, np.int32)
    return Samples(index, tokens, lengths, prompt_lengths, finished, log_probs, sample_log_probs, 0.8, 10)


def stream(first, num_samples, size=3, killed_after=None):
    """Samples out of order within a window of 5, as one array that is used again; raises after so many arrivals."""
    order = np.random.default_rng(1).random(num_samples - first) * 5 + np.arange(first, num_samples)
    order = (np.argsort(order) + first).tolist()
    for arrival, start in enumerate(range(0, len(order), size)):
        if arrival == killed_after:
            raise KeyboardInterrupt
        samples = batch(order[start : start + size])
        yield samples
        samples.tokens[:], samples.lengths[:], samples.log_probs[:] = -1, 0, np.nan


def make(folder, killed_after=None, **changes):
    held = corpus.create_or_resume(folder, settings(**changes), command="sample it")
    if held.finished:
        return held
    total = held.manifest["settings"]["num_samples"]
    return corpus.write(held, stream(held.num_rows, total, killed_after=killed_after))


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "data").iterdir())}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "deep" / "corpus"
    make(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    for name, data in files(whole).items():
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_bytes(data)
    return tmp_path / "c"


def test_pyarrow_reads_what_went_in(whole):
    paths = sorted((whole / "data").iterdir())
    assert [path.name for path in paths] == [f"shard-0000{k}.parquet" for k in range(3)]
    tables = [pq.read_table(path) for path in paths]
    assert [table["index"].to_pylist() for table in tables] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    types = [pa.int64(), pa.list_(pa.int32()), pa.int32(), pa.int32(), pa.bool_(), pa.float64(), pa.float64()]
    assert tables[0].schema.names == COLUMNS and tables[0].schema.types == types
    assert pa.concat_tables(tables).to_pylist() == [expected(i) for i in range(10)]
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).column(1).compression == "ZSTD"


@pytest.mark.parametrize("shard_size", [4, 10])
@pytest.mark.parametrize("pattern", [None, "data/*.parquet"])
def test_datasets_reads_what_went_in(tmp_path, pattern, shard_size):
    import datasets

    folder = tmp_path / "test-eval"  # a name that could be taken for a split's
    make(folder, shard_size=shard_size)
    (folder / "data" / "shard-00003.tmp").write_bytes(b"what a kill leaves")
    where = {"path": str(folder)} if pattern is None else {"path": "parquet", "data_files": str(folder / pattern)}
    rows = datasets.load_dataset(**where, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.to_list() == [expected(i) for i in range(10)]


def test_manifest_says_what_is_there(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    rows = [expected(i) for i in range(10)]
    assert (manifest["format"], manifest["kind"], manifest["status"]) == (1, "samples", "finished")
    assert manifest["settings"] == settings() and manifest["settings"]["sample_temperature"] == 0.30000000000000004
    assert manifest["counts"] == {
        "rows": 10,
        "tokens": sum(row["length"] for row in rows),
        "finished": sum(row["finished"] for row in rows),
    }
    for shard, (first, last) in zip(manifest["shards"], [(0, 4), (4, 8), (8, 10)], strict=True):
        data = (whole / shard["file"]).read_bytes()
        assert (shard["first"], shard["rows"]) == (first, last - first)
        assert shard["tokens"] == sum(row["length"] for row in rows[first:last])
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    generated = sum(row["length"] - 2 for row in rows)
    speed = manifest["speed"]
    assert speed["generated_tokens"] == generated and speed["utilisation"] == pytest.approx(0.8)
    assert speed["tokens_per_second"] > 0 and manifest["started"] <= manifest["finished"]
    assert manifest["command"] == "sample it" and manifest["versions"]["pyarrow"] == pa.__version__


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 4), (3, 5), (5, 7), (1, 10), (9, 10), (4, 4), (10, 10)])
def test_rows_of_any_range(whole, start, stop):
    rows = corpus.open(whole).rows(start, stop)
    wanted = [expected(i) for i in range(start, stop)]
    assert [ids.tolist() for ids in rows.tokens] == [row["tokens"] for row in wanted]
    assert all(ids.dtype == np.int32 for ids in rows.tokens)
    for name in set(COLUMNS) - {"tokens"}:
        assert getattr(rows, name).tolist() == [row[name] for row in wanted]
    assert (rows.index.dtype, rows.length.dtype, rows.finished.dtype, rows.log_prob.dtype) == (
        np.int64, np.int32, np.bool_, np.float64,
    )  # fmt: skip


def test_rows_reads_only_the_shards_it_needs(copy):
    held = corpus.open(copy)
    (copy / "data" / "shard-00000.parquet").unlink()
    assert held.rows(4, 10).index.tolist() == list(range(4, 10))
    with pytest.raises(RunError, match="shard-00000"):
        held.rows(3, 5)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 11), (11, 11)])
def test_rows_out_of_range(whole, start, stop):
    with pytest.raises(ValueError, match="10 rows"):
        corpus.open(whole).rows(start, stop)


def test_lengths_and_defaults(whole):
    held = corpus.open(whole)
    assert held.lengths().tolist() == [expected(i)["length"] for i in range(10)] and held.lengths().dtype == np.int32
    assert held.num_rows == 10 and held.finished and held.rows().index.tolist() == list(range(10))
    held.verify()


def test_padded(whole):
    rows = corpus.open(whole).rows(1, 9)
    tokens, lengths = corpus.padded(rows, max_length=12, pad_id=-3)
    wanted = [(expected(i)["tokens"] + [-3] * 12)[:12] for i in range(1, 9)]
    assert tokens.tolist() == wanted and tokens.dtype == np.int32 and lengths.dtype == np.int32
    assert lengths.tolist() == [expected(i)["length"] for i in range(1, 9)]
    assert corpus.padded(rows)[0].shape == (8, MAX_LENGTH)
    assert corpus.padded(corpus.open(whole).rows(2, 2))[0].shape == (0, 0)
    with pytest.raises(ValueError, match=f"{MAX_LENGTH} ids does not fit max_length=8"):
        corpus.padded(rows, max_length=8)


def test_text_counts_what_does_not_come_back(whole):
    class Tokenizer:
        def decode(self, ids):
            return " ".join(map(str, ids))

        def round_trips(self, ids):
            return len(ids) < MAX_LENGTH

    texts, changed = corpus.text(corpus.open(whole), Tokenizer(), 2, 7)
    assert texts == [" ".join(map(str, expected(i)["tokens"])) for i in range(2, 7)]
    assert changed == sum(expected(i)["length"] == MAX_LENGTH for i in range(2, 7)) > 0


def test_fingerprint_is_of_the_rows_and_of_what_made_them(whole, tmp_path):
    first = corpus.fingerprint(corpus.open(whole))
    assert len(first) == 64 and first == corpus.fingerprint(make(tmp_path / "named", source="another", prompt="seven"))
    others = [
        make(tmp_path / "model", model_fingerprint="cd34"), make(tmp_path / "more", num_samples=11),
        make(tmp_path / "shards", shard_size=5),
    ]  # fmt: skip
    assert len({first, *map(corpus.fingerprint, others)}) == 4
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "part", killed_after=3)
    assert corpus.fingerprint(corpus.open(tmp_path / "part")) != first


@pytest.mark.parametrize("killed_after", [0, 1, 2, 3])
def test_killed_while_sampling_then_resumed_gives_the_same_files(whole, tmp_path, killed_after):
    folder = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        make(folder, killed_after=killed_after)
    there = corpus.open(folder)
    assert there.num_rows % SHARD == 0 and not there.finished
    assert there.rows().index.tolist() == list(range(there.num_rows))
    held = make(folder)
    assert held.finished and digests(folder) == digests(whole)
    assert held.manifest["shards"] == corpus.open(whole).manifest["shards"]
    assert [entry["command"] for entry in held.manifest["resumed"]] == ["sample it"]


def test_killed_before_any_write_to_disk_gives_the_same_files(whole, tmp_path, monkeypatch):
    """Each file is put in its place by one os.replace: the run is killed before the first of them, the second, ..."""
    replace, folder = os.replace, tmp_path / "c"
    for survived in range(100):
        left = iter(range(survived))

        def killed(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            make(folder)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
            # what a kill leaves is no data to those who go by the name
            assert not [path for path in folder.rglob("*.tmp") if ".parquet" in path.name]
            make(folder)
        else:
            break
        assert digests(folder) == digests(whole) and not list(folder.rglob("*.tmp"))
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert survived == 1 + 2 * 3  # the first manifest, and for each of three shards the shard and the manifest


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_shards_that_the_manifest_does_not_list_are_made_again(whole, copy, kept):
    def cut(manifest):
        shards = manifest["shards"][:kept]
        counts = {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "finished")}
        manifest.update(shards=shards, counts=counts, status="running")

    edit(copy, cut)
    (copy / "data" / "shard-00002.parquet").write_bytes(b"of a run that was killed")
    assert make(copy).finished and digests(copy) == digests(whole)


def test_finished_corpus_is_left_alone(copy):
    before = files(copy)
    assert make(copy).finished and files(copy) == before


@pytest.mark.parametrize("total", [11, 12, 13, 25])
def test_growing_gives_the_files_of_the_larger_corpus(copy, tmp_path, total):
    grown, fresh = make(copy, num_samples=total), make(tmp_path / "fresh", num_samples=total)
    assert digests(copy) == digests(tmp_path / "fresh") and grown.num_rows == total
    assert {key: grown.manifest[key] for key in ("settings", "counts", "shards", "status")} == {
        key: fresh.manifest[key] for key in ("settings", "counts", "shards", "status")
    }
    whole_shards = 2 * SHARD  # of the ten rows there were; the two of the short shard are sampled again
    again = sum(expected(i)["length"] - 2 for i in [*range(10), *range(whole_shards, total)])
    assert grown.manifest["speed"]["generated_tokens"] == again


def test_shrinking_is_refused(copy):
    before = files(copy)
    with pytest.raises(RunError, match="num_samples: 10 -> 9"):
        make(copy, num_samples=9)
    assert files(copy) == before


def test_other_settings_are_refused_by_name(copy):
    before = files(copy)
    with pytest.raises(RunError) as error:
        make(copy, sample_temperature=0.3, top_k=5, prompt_ids=[7], num_samples=20)
    text = str(error.value)
    assert "sample_temperature: 0.30000000000000004 -> 0.3;" in text and "top_k: null -> 5" in text
    assert "prompt_ids: [7, 1] -> [7]" in text and "seed" not in text and "num_samples" not in text
    assert files(copy) == before


def test_check_takes_what_is_known_so_far(copy, tmp_path):
    assert corpus.find(copy, {"seed": 3, "num_samples": 12})["settings"] == settings()
    assert corpus.find(tmp_path / "new" / "one", {"seed": 3}) is None and not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="seed: 3 -> 4"):
        corpus.find(copy, {"seed": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"shard_size": 2.0}, "shard_size: 2.0 must be int"),
        ({"shard_size": 2**28}, "2\\*\\*31"),
        ({"top_p": float("nan")}, "JSON"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "c", **changes)
    assert not (tmp_path / "c").exists()


def test_columns_are_those_of_the_rows(copy):
    held = corpus.open(copy)
    rows, columns = held.rows(), held.columns("length", "sample_log_prob")
    np.testing.assert_array_equal(columns["length"], rows.length)
    np.testing.assert_array_equal(columns["sample_log_prob"], rows.sample_log_prob)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_truncated_or_missing_shard_is_named_at_once(copy):
    path = copy / "data" / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    for use in (corpus.open, make, lambda folder: make(folder, num_samples=30)):
        with pytest.raises(RunError, match="shard-00001.parquet is damaged"):
            use(copy)
    path.unlink()
    for use in (corpus.open, make):
        with pytest.raises(RunError, match="shard-00001.parquet is missing"):
            use(copy)


def test_flipped_bit_is_found_by_reading(copy):
    path = copy / "data" / "shard-00001.parquet"
    flip(path)
    held = corpus.open(copy)
    held.rows(0, 4)
    for use in (
        lambda: held.rows(4, 5),
        held.lengths,
        held.verify,
        lambda: corpus.create_or_resume(copy, settings(), command="", verify=True),
    ):
        with pytest.raises(RunError, match="shard-00001.parquet is damaged"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "format 1"),
        (lambda m: m.update(kind="run"), "not the manifest of a corpus"),
        (lambda m: m["shards"].pop(0), "counts"),
        (lambda m: m["counts"].update(rows=9), "counts"),
        (lambda m: m["shards"][0].pop("rows"), "rows"),
        (lambda m: m.pop("settings"), "settings"),
    ],
)
def test_broken_manifest_is_named(copy, change, message):
    edit(copy, change)
    for use in (corpus.open, make):
        with pytest.raises(RunError, match=message) as error:
            use(copy)
        assert "manifest.json" in str(error.value)


def test_manifest_that_is_no_json(copy):
    (copy / "manifest.json").write_text('{"kind": ')
    with pytest.raises(RunError, match="manifest.json is not JSON"):
        corpus.open(copy)


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="holds thesis.txt and no corpus"):
        make(tmp_path)
    with pytest.raises(RunError, match="thesis.txt.*(is no folder|Not a directory)"):
        make(tmp_path / "thesis.txt")
    with pytest.raises(RunError, match="thesis.txt.*(is no folder|Not a directory)"):
        make(tmp_path / "thesis.txt" / "c")
    with pytest.raises(RunError, match="holds no corpus"):
        corpus.open(tmp_path / "nothing")
    assert files(tmp_path) == {"thesis.txt": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot write the corpus folder"):
        corpus.find(tmp_path / "c", {})
    tmp_path.chmod(0o700)


def test_disk_that_refuses_is_an_error_naming_the_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="cannot write the corpus folder .*c: no"):
        make(tmp_path / "c")


def test_temporary_files_of_ours_go_and_others_stay(copy):
    for name in ("manifest.json.tmp", "data/shard-00007.tmp", "data/mine.tmp", "notes.txt"):
        (copy / name).write_bytes(b"x")
    make(copy)
    left = set(files(copy))
    assert {"data/mine.tmp", "notes.txt"} < left
    assert not left & {"manifest.json.tmp", "data/shard-00007.tmp"}


def test_progress_is_told_of_every_arrival(tmp_path):
    calls = []
    held = corpus.create_or_resume(tmp_path / "c", settings(), command="")
    corpus.write(held, stream(0, 10), lambda samples, tokens: calls.append((samples, tokens)))
    assert [samples for samples, _ in calls] == [3, 3, 3, 1]
    assert sum(tokens for _, tokens in calls) == sum(expected(i)["length"] - 2 for i in range(10))


def test_shard_is_on_disk_as_soon_as_its_rows_are_there(tmp_path):
    held = corpus.create_or_resume(tmp_path / "c", settings(), command="")
    seen = []

    def arrivals():
        for indices in ([1, 3], [0, 5], [2], [4, 7, 6], [9, 8]):
            yield batch(indices)
            seen.append((sorted(path.name for path in tmp_path.glob("c/data/*")), corpus.open(tmp_path / "c").num_rows))

    corpus.write(held, arrivals())
    names = [f"shard-0000{k}.parquet" for k in range(3)]
    assert seen == [([], 0), ([], 0), (names[:1], 4), (names[:2], 8), (names, 10)]


def change_row(**fields):
    """A batch of samples 0 and 1 with one field of the second changed."""
    samples = batch([0, 1])
    for name, value in fields.items():
        getattr(samples, name)[1] = value
    return samples


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (lambda: change_row(index=0), "sample 0 came twice"),
        (lambda: change_row(index=10), "sample 10 was not asked for"),
        (lambda: change_row(index=-1), "sample -1 was not asked for"),
        (lambda: change_row(prompt_lengths=1), "sample 1 has length . and prompt_length 1"),
        (lambda: change_row(lengths=2), "sample 1 has length 2"),
        (lambda: change_row(tokens=EOS), "sample 1 does not begin with the prompt"),
        (lambda: change_row(finished=False), "do not go together"),
        (lambda: change_row(log_probs=np.nan), "sample 1 has log_prob nan"),
        (lambda: change_row(sample_log_probs=-np.inf), "sample_log_prob -inf"),
    ],
)
def test_stream_that_is_not_what_was_asked_for_stops(tmp_path, samples, message):
    held = corpus.create_or_resume(tmp_path / "c", settings(), command="")
    with pytest.raises(ValueError, match=message):
        corpus.write(held, [samples()])
    assert corpus.open(tmp_path / "c").num_rows == 0


def test_stream_that_ends_early_or_repeats_what_is_on_disk(tmp_path):
    held = corpus.create_or_resume(tmp_path / "c", settings(), command="")
    with pytest.raises(ValueError, match="before sample 4 of 10"):
        corpus.write(held, [batch([0, 1, 2, 3]), batch([5])])
    held = corpus.create_or_resume(tmp_path / "c", settings(), command="")
    assert held.num_rows == 4
    with pytest.raises(ValueError, match="sample 3 came twice"):
        corpus.write(held, [batch([3])])
