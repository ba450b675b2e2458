"""Files that are cut short or have a bit flipped: no wrong number, an error that names the file, and a way on."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_jax.gmm.report import page
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import weights
from kd_jax.lm.training import log
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.runs.run import Clock
from kd_jax.storage import errors, files
from kd_jax.storage.errors import RunError
from tests.faults.targets import read_sums, write_sums
from tests.gmm.report import test_page as gmm
from tests.lm.training import test_loop as trainings
from tests.lm.weights.checkpoints import TINY, config_of, tensors_of


def flipped(data, rng):
    """The bytes with one bit the other way."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def damages(data, rng, flips=2):
    return [data[: len(data) // 2], b"", *(flipped(data, rng) for _ in range(flips if data else 0))]


def all_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that orbax gives up
def test_every_file_of_a_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    trees = {
        "weights": {"a": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)},
        "optimizer": {"count": jnp.int32(7)},
    }
    about, metrics = {"seed": 3, "tokens": 12345}, {"loss": 0.5}
    with Checkpoints(tmp_path / "c", keep=1, best="loss") as saved:
        saved.save(8, trees, about, metrics=metrics)

    def read():
        with Checkpoints(tmp_path / "c", keep=1, best="loss") as saved:
            assert saved.steps() == [8]
            return saved.values(8), saved.load(8, trees), saved._manager.metrics(8)

    refused = 0
    for path in all_files(tmp_path / "c" / "8"):
        whole = path.read_bytes()
        for data in damages(whole, rng):
            path.write_bytes(data)
            try:
                values, found, there = read()
            except RunError as error:
                assert f"{tmp_path / 'c' / '8'} is damaged" in str(error) and "remove it" in str(error)
                refused += 1
            else:  # in what nobody needs
                assert (values, there) == (about, metrics), path
                jax.tree.map(np.testing.assert_array_equal, found, trees)
        path.write_bytes(whole)
    assert refused >= 20
    read()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return trainings.make_corpus(tmp_path_factory.mktemp("corpus") / "c")


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "t"
    return trainings.train(folder, corpus), trainings.numbers(folder)


def interrupted(folder, corpus, update):
    with pytest.raises(KeyboardInterrupt):
        trainings.train(folder, corpus, stop=trainings.StopAt(folder, update))


@pytest.mark.long
def test_a_training_goes_on_from_before_a_damaged_checkpoint(straight, corpus, tmp_path):
    folder = tmp_path / "t"
    interrupted(folder, corpus, 7)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    newest = folder / "checkpoints" / str(steps[-1])
    largest = max(all_files(newest / "weights"), key=lambda path: path.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes(), np.random.default_rng(1)))
    for use in (lambda: trainings.train(folder, corpus), lambda: weights.load(newest)):
        with pytest.raises((RunError, ValueError), match=re.escape(str(newest)) + ".* is damaged.*remove"):
            use()
    shutil.rmtree(newest)
    assert len(steps) > 1, "nothing to go on from"
    again = trainings.train(folder, corpus)
    assert again["fingerprint"] == straight[0]["fingerprint"] and trainings.numbers(folder) == straight[1]


@pytest.mark.slow
def test_rows_that_a_full_disk_cut_off_are_written_again(straight, corpus, tmp_path):
    folder = tmp_path / "t"
    interrupted(folder, corpus, 5)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "training", "step": 99, "loss": 0.1')
    again = trainings.train(folder, corpus)
    assert again["fingerprint"] == straight[0]["fingerprint"] and trainings.numbers(folder) == straight[1]


def test_a_broken_row_is_no_end_of_the_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 1: is not JSON"):
        log.Log(
            tmp_path, {"name": "x"}, 2, 9, 1, (), tokens_at_ceiling=1.0, clock=Clock(), quiet=True
        )  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xffep": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: is not JSON .*utf-8"):
        files.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.slow
def test_a_damaged_copy_of_the_corpus_is_not_trained_on(straight, corpus, tmp_path):
    folder = tmp_path / "t"
    interrupted(folder, corpus, 5)
    copies = [path for path in all_files(folder / "arrow") if path.suffix == ".arrow"]
    assert copies
    for path in copies:
        data = path.read_bytes()
        ids = np.asarray([3, 6, 9], np.int32).tobytes()  # somewhere in the rows: they count up by 3
        found = [m.start() for m in re.finditer(re.escape(ids[:4]), data)]
        assert found
        for at in found:
            data = data[:at] + b"\x05" + data[at + 1 :]
        path.write_bytes(data)
    again = trainings.train(folder, corpus)
    assert again["fingerprint"] == straight[0]["fingerprint"] and trainings.numbers(folder) == straight[1]


@pytest.mark.slow
def test_the_best_checkpoint_outlives_a_restart(tmp_path):
    """Rows to choose by that are unlike those that are learnt: the first validation is the best."""
    random = trainings.make_corpus(tmp_path / "random")
    rows, rng = random.rows(), np.random.default_rng(0)
    rows = rows._replace(tokens=[np.array(ids) for ids in rows.tokens])
    for ids in rows.tokens[-8:]:
        ids[1:-1] = rng.integers(3, 120, len(ids) - 2)
    columns = {name: column for name, column in rows._asdict().items() if column is not None}  # there is no loss_mask
    arrival = corpus_lib.Arrival(
        [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], 1
    )
    corpus = corpus_lib.write_rows(
        corpus_lib.create_or_resume(tmp_path / "c", random.manifest["settings"], command="test"), [arrival]
    )
    changes = {"learning_rate": 2e-2, "epochs": 8}
    alone = trainings.train(tmp_path / "alone", corpus, changes=changes)
    assert alone["chosen"] < alone["updates"], "the last is the best, which says nothing"
    folder = tmp_path / "t"
    with pytest.raises(KeyboardInterrupt):
        trainings.train(folder, corpus, changes=changes, stop=trainings.StopAt(folder, alone["chosen"] + 1))
    again = trainings.train(folder, corpus, changes=changes)
    assert (again["chosen"], again["fingerprint"]) == (alone["chosen"], alone["fingerprint"])


def test_scores_that_are_damaged_are_named(tmp_path):
    path, key = tmp_path / "recall.npz", {"model": "ab"}
    sums, rng = np.linspace(-9, -1, 50), np.random.default_rng(0)
    write_sums(path, key, sums)
    whole = path.read_bytes()
    for data in damages(whole, rng, flips=200):
        path.write_bytes(data)
        try:
            found = read_sums(path, key, 50)
        except RunError as error:
            assert str(path) in str(error) and "remove it" in str(error)
        else:  # of another key, as it seems, or in what the format does not use
            assert np.isnan(found).all() or np.array_equal(found, sums)


@pytest.mark.slow
def test_a_page_without_its_damaged_figure(tmp_path):
    folder = gmm.make_run(tmp_path / "w", gmm.make_rows())
    path = folder / "checkpoints" / "panels.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="panels.npz is damaged.*remove it"):
        page.write(folder)
    path.unlink()
    assert page.write(folder).exists()


def test_what_to_remove_is_all_of_the_stage(tmp_path):
    folder = tmp_path / "w" / "stages" / "samples" / "tau-1"
    corpus = trainings.make_corpus(folder / "corpus")
    shard = folder / "corpus" / corpus.manifest["shards"][1]["file"]
    shard.write_bytes(flipped(shard.read_bytes(), np.random.default_rng(0)))
    with pytest.raises(RunError, match=f"{re.escape(str(shard))} is damaged.*; remove {folder / 'corpus'},"):
        corpus.rows()
    (folder / "stage.json").write_text("{}")
    with pytest.raises(RunError, match=f"{re.escape(str(shard))} is damaged.*; remove {folder},"):
        corpus.rows()
    assert errors.again(folder / "corpus" / "data").startswith(f"; remove {folder},")


def test_every_flipped_bit_of_safetensors_shows(tmp_path):
    """The format has no checksum: what a flipped bit makes of a weight is either refused or known as another model."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(TINY)))
    path = folder / "model.safetensors"
    save_file(tensors_of(TINY), path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    fingerprint, identity = weights.fingerprint(weights.load(folder).params), weights.identity(folder)
    for i in range(24):
        part = (whole[:header], whole[header:])
        data = flipped(part[0], rng) + part[1] if i % 2 else part[0] + flipped(part[1], rng)
        path.write_bytes(data)
        assert weights.identity(folder) != identity
        try:
            found = weights.fingerprint(weights.load(folder).params)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            assert i % 2, "data are data"
        else:
            assert found != fingerprint or i % 2  # a bit of the header that says nothing of the tensors
    for length in (0, 7, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="model.safetensors .* is cut short or damaged"):
            weights.load(folder)
