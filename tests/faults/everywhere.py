"""Kills a piece of work before each thing that it does to files, one after the other, and lets it go on.

    python -m tests.faults.everywhere checkpoints --stride 1

Every piece ends with the result it has when nobody kills it, and leaves nothing behind. --stride N takes each Nth of
the places alone. Children are forked before JAX has begun, so each has a JAX of its own, and nothing is imported again.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import sweep as chunks
from kd_jax.gmm.report import page as report
from kd_jax.lm import corpus as corpus_lib
from kd_jax.lm import model as model_lib
from kd_jax.lm import weights
from kd_jax.lm.model import PRESETS, Model
from kd_jax.runs import run, stages
from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage import files
from tests.faults.hook.sitecustomize import Hook
from tests.gmm.report import test_page as gmm
from tests.lm.corpus import test_store as corpora

LOSSES = (3.0, 1.0, 2.0, 1.5)


def checkpoints(folder):
    """A training of four steps: the state after them, which steps stay, and the state after the best."""
    like = {"x": {"a": jnp.zeros((8, 4))}}
    with Checkpoints(folder / "c", keep=1, best="loss", background=True) as saved:
        first = max(saved.steps(), default=0)
        x = saved.load(first, like)["x"]["a"] if first else like["x"]["a"]
        for step in range(first + 1, 5):
            x = 1.5 * x + step
            saved.save(step, {"x": {"a": x}}, {"step": step}, metrics={"loss": LOSSES[step - 1]})
        saved.wait()
        best = saved.load(2, like)["x"]["a"]
        return saved.steps(), saved.values(4), float(x.sum()), float(best.sum()), names(folder)


def sweep(folder):
    """A sweep of three chunks: its rows."""

    def compute(c):
        return {"scores": {"y": np.arange(3, dtype=np.float32) + c}}

    def rows(c, arrays):
        return [{"chunk": c, "y": float(y)} for y in arrays["scores"]["y"]]

    chunks.run(folder, 3, compute, rows, lambda c: {"scores": {"y": np.zeros(3, np.float32)}})
    return (folder / "metrics.jsonl").read_text(), names(folder)


def model(folder):
    """Other weights in the place of those that are there."""
    new = random_model(1)
    if (folder / "m").exists():
        assert weights.fingerprint(weights.load(folder / "m").params) in fingerprints()
    weights.save(new, folder / "m", overwrite=True)
    return weights.fingerprint(weights.load(folder / "m").params), sorted(path.name for path in folder.iterdir())


def random_model(seed):
    shape = PRESETS["tiny"]
    return Model(shape, model_lib.init(jax.random.key(seed), shape, jnp.float32), eos_ids=(2,))


def fingerprints():
    return [weights.fingerprint(random_model(seed).params) for seed in (0, 1)]


def corpus(folder):
    held = corpora.make(folder / "c")
    return corpora.digests(folder / "c"), corpus_lib.fingerprint(held), names(folder)


def page(folder):
    path = report.write(folder)
    png = (folder / "figures" / "frontier.png").read_bytes()
    text = path.read_text().replace(str(folder), "FOLDER")  # the page says whose it is
    return len(text), hashlib.sha256(png).hexdigest(), names(folder)


def chain(folder):
    """A run folder, two stages in it, and its end."""
    config = {"seed": 3}
    opened = run.open_run(folder / "w", config, argv=["train"], staged=True)
    if not opened.finished:

        def work(text):
            return lambda where, inputs: files.write_text(where / "made", text + str(len(inputs))) or {"text": text}

        listed = [stages.Stage("a", {}, (), work("a")), stages.Stage("b", {}, ("a",), work("b"))]
        stages.run(opened.folder, listed)
        run.finish(opened)
    made = sorted(path.read_text() for path in folder.rglob("made"))
    return made, json.loads((folder / "w" / "manifest.json").read_text())["status"], names(folder)


def names(folder):
    """All files there are, but for what is named by chance."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return sorted(name for name in found if "/d/" not in name)


class Piece(NamedTuple):
    """A piece of work: `work(folder)`, whose result is compared, on what `prepare(folder)` has made."""

    work: object
    prepare: object = lambda folder: None


PIECES = {
    "checkpoints": Piece(checkpoints),
    "sweep": Piece(sweep),
    "model": Piece(model, lambda folder: weights.save(random_model(0), folder / "m")),
    "corpus": Piece(corpus),
    "page": Piece(page, lambda folder: gmm.make_run(folder, gmm.make_rows(), with_panels=False)),
    "chain": Piece(chain),
}


def child(work, folder, kill_at=None):
    """What `work` returns, as JSON has it, in a process of its own; None where it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reading)
            if kill_at is not None:
                sys.addaudithook(Hook({"folder": str(folder), "kill_at": kill_at}))
            result = json.dumps(work(folder))
            with os.fdopen(writing, "w") as pipe:
                pipe.write(result)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"{folder}: code {code}, to be killed at {kill_at}"
    return None if code else json.loads(said)


def everywhere(name, home, stride=1):
    """How many places the work was killed at; AssertionError names the first after which it ends otherwise."""
    piece, kills = PIECES[name], 0

    def prepared(folder):
        folder.mkdir()
        child(lambda folder: piece.prepare(folder) and None, folder)
        return folder

    wanted = child(piece.work, prepared(home / "straight"))
    for place in range(1, 10**6, stride):
        folder = prepared(home / str(place))
        if child(piece.work, folder, kill_at=place) is not None:
            return kills
        kills += 1
        found = child(piece.work, folder)
        assert found == wanted, f"{name}, killed at {place} in {folder}:\n{found}\nnot\n{wanted}"
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=list(PIECES), help=", ".join(PIECES))
    parser.add_argument("--stride", type=int, default=1)
    args = parser.parse_args()
    for name in args.names:
        with tempfile.TemporaryDirectory() as home:
            print(f"{name}: killed at {everywhere(name, Path(home), args.stride)} places", flush=True)


if __name__ == "__main__":
    main()
