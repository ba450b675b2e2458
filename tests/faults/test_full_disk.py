"""A disk that gets full: what was there stays, the error says which file and what to do, and then it goes on."""

import errno
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.gmm.report import page
from kd_jax.lm import corpus as corpus_lib
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage import errors, files
from tests.faults import disks, runs
from tests.faults.targets import read_sums, write_sums
from tests.gmm.report import test_page as gmm
from tests.lm.corpus import test_store as corpora
from tests.lm.training import test_loop as trainings

# Bytes that are left on the disk: for nothing, for a name alone, for the first files of several.
ROOMS = (0, 4096, 12288, 40960)


@pytest.fixture
def disk(tmp_path):
    with disks.small(tmp_path / "disk") as found:
        yield found


def refused(work, folder):
    """`work` fails for want of room, and says so: where, and what is to be done."""
    with pytest.raises((OSError, errors.RunError)) as error:
        work()
    check_refusal(error.value, folder)


def check_refusal(error, folder):
    said = errors.explain(error)
    assert str(folder) in said and "No space left" in said and "make room there" in said, said
    assert errors.number(error) == errno.ENOSPC


def test_a_corpus(disk, tmp_path):
    corpora.make(tmp_path / "whole", shard_size=2)
    folder = disk.folder / "c"
    for room in ROOMS[:3]:
        disk.fill(room)
        refused(lambda: corpora.make(folder, shard_size=2), folder)
        disk.free()
        if (folder / "manifest.json").exists():
            corpus_lib.open(folder).verify()
        assert not list(folder.rglob("*.tmp"))
    assert corpora.make(folder, shard_size=2).finished
    assert corpora.digests(folder) == corpora.digests(tmp_path / "whole")


def test_files_keep_what_was_in_them(disk):
    text, rows, sums = disk.folder / "a.json", disk.folder / "rows.jsonl", disk.folder / "b.npz"
    files.write_json(text, {"old": 1})
    files.write_rows(rows, [{"old": i} for i in range(3)])
    write_sums(sums, {"old": 1}, np.zeros(3))
    big = "x" * 20000
    for room in (0, 4096):
        disk.fill(room)
        refused(lambda: files.write_json(text, {"new": big}), text)
        refused(lambda: files.write_rows(rows, [{"new": big}]), rows)
        refused(lambda: write_sums(sums, {"new": 1}, np.zeros(5000)), sums)
        assert files.read_json(text) == {"old": 1} and len(files.read_rows(rows)) == 3
        np.testing.assert_array_equal(read_sums(sums, {"old": 1}, 3), np.zeros(3))
        # rows that are added may come in part
        refused(lambda: files.append_rows(rows, [{"new": big}] * 3), rows)
        disk.free()
        assert files.read_rows(rows, cut=True)[:3] == [{"old": 0}, {"old": 1}, {"old": 2}]
        files.write_rows(rows, files.read_rows(rows, cut=True)[:3])
        assert sorted(path.name for path in disk.folder.iterdir()) == ["a.json", "b.npz", "rows.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint(disk, background):
    folder, rng = disk.folder / "c", np.random.default_rng(0)
    trees = [{"x": {"a": jnp.asarray(rng.normal(size=(128, 128)), jnp.float32)}} for _ in range(2)]

    def save(step):
        with Checkpoints(folder, keep=1, best="loss", background=background) as saved:
            saved.save(step, trees[step], {"step": step}, metrics={"loss": 1.0 - step})

    save(0)
    for room in (*ROOMS, 65536):
        disk.fill(room)
        refused(lambda: save(1), folder)
        disk.free()
        with Checkpoints(folder, keep=1, best="loss") as saved:
            assert saved.steps() == [0] and saved.values(0) == {"step": 0}
            jax.tree.map(np.testing.assert_array_equal, saved.load(0, trees[0]), trees[0])
    save(1)
    with Checkpoints(folder, keep=1, best="loss") as saved:
        assert saved.steps() == [1]
        jax.tree.map(np.testing.assert_array_equal, saved.load(1, trees[1]), trees[1])
    assert [path.name for path in folder.iterdir()] == ["1"]


@pytest.mark.long
def test_a_training(disk, tmp_path):
    corpus = trainings.make_corpus(tmp_path / "c")
    straight = trainings.train(tmp_path / "straight", corpus)
    folder = disk.folder / "t"
    again, refusals = None, 0
    while again is None:
        # more and more, until it is through
        disk.fill(0 if not refusals else 20_000 * 2**refusals)
        try:
            again = trainings.train(folder, corpus)
        except (OSError, errors.RunError) as error:
            check_refusal(error, folder)
            refusals += 1
        disk.free()
    assert refusals >= 3
    assert again["fingerprint"] == straight["fingerprint"]
    assert trainings.numbers(folder) == trainings.numbers(tmp_path / "straight")


@pytest.mark.long
def test_a_report(disk, tmp_path):
    gmm.make_run(tmp_path / "w", gmm.make_rows())
    whole = page.write(tmp_path / "w").read_bytes()
    folder = disk.folder / "w"
    gmm.make_run(folder, gmm.make_rows())
    for room in (0, 4096, 65536, 400_000):
        disk.fill(room)
        refused(lambda: page.write(folder), folder)
        disk.free()
    # what is shown is the same; the page names the folder it is of
    images = [data.count(b"data:image/svg+xml;base64,") for data in (whole, page.write(folder).read_bytes())]
    assert images[0] == images[1] > 1
    digests = [hashlib.sha256((home / "figures" / "frontier.png").read_bytes()) for home in (tmp_path / "w", folder)]
    assert digests[0].digest() == digests[1].digest()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.cluster
def test_a_run_from_its_command(disk, tmp_path):
    words = ("configs/gmm.py:smoke", "--config.memory_gib=1e-9")
    runs.run(runs.command(tmp_path / "whole", *words))
    folder = disk.folder / "run"
    for room in (0, 100_000, 400_000):
        disk.fill(room)
        said = runs.run(runs.command(folder, *words), code=2)
        assert str(disk.folder) in said and "make room there, and the same command resumes" in said
        disk.free()
    runs.run(runs.command(folder, *words))
    runs.check_whole(folder)
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder)
