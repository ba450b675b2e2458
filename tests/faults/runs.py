"""Runs that something happens to: started as a user starts them, and what has to be equal of them at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

from kd_jax.storage import lock
from kd_jax.storage.files import read_rows

ROOT = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "hook"
# Of rows: what a run measures of itself, and where it is.
TIMED = (
    "tokens_per_second", "share_of_ceiling", "seconds", "starts", "share_of_data_logging_checkpoints",
    "share_of_rollouts", "source",
)  # fmt: skip


def command(workdir, config, *flags):
    return [sys.executable, "-m", "kd_jax.train", "--config", config, "--workdir", str(workdir), *flags]


def environment(faults=None, **more):
    """That of a program in this repository; `faults` are orders for hook/sitecustomize.py."""
    paths = [str(ROOT)] if faults is None else [str(HOOK), str(ROOT)]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", **more}
    return found if faults is None else {**found, "FAULTS": json.dumps(faults)}


def run(words, code=0, **options):
    """Runs a command, which has to end with this code and without a traceback of ours; returns what it said."""
    options.setdefault("env", environment())
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, **options)
    said = done.stdout + done.stderr
    assert done.returncode == code, f"code {done.returncode}\n{said[-4000:]}"
    # On a full disk, threads of tensorstore call orbax's event loop after it is closed, and Python prints that.
    assert f'File "{ROOT}/kd_jax' not in said, said[-4000:]
    return said


def numbers(workdir):
    """All that a finished run has worked out: its rows, its samples, the rows of its corpora, its weights."""
    workdir = Path(workdir)
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_rows(workdir / "metrics.jsonl")]
    found = {"rows": rows}
    for name in ("samples.jsonl", "answers.jsonl"):
        if (workdir / name).exists():
            found[name] = (workdir / name).read_text()
    for path in sorted(workdir.glob("stages/**/corpus/manifest.json")):
        shards = json.loads(path.read_text())["shards"]
        found[str(path.relative_to(workdir))] = [shard["sha256"] for shard in shards]
    for path in sorted(workdir.glob("stages/**/training.json")):
        result = json.loads(path.read_text())
        found[str(path.relative_to(workdir))] = {k: v for k, v in result.items() if k not in TIMED}
    return found


def finished_stages(workdir):
    """stage.json of each stage that is finished, by the stage's folder."""
    found = {path.parent: path.read_text() for path in Path(workdir).glob("stages/**/stage.json")}
    return {folder: text for folder, text in found.items() if json.loads(text)["status"] == "finished"}


def check_whole(workdir):
    """A finished run has its report, and nothing of what kills have left."""
    workdir = Path(workdir)
    assert json.loads((workdir / "manifest.json").read_text())["status"] == "finished"
    assert (workdir / "report.html").read_text().rstrip().endswith("</html>")
    left = [
        path
        for path in workdir.rglob("*")
        if path.suffix in (".tmp", ".old") or "orbax-checkpoint-tmp" in path.name or path.name.startswith(lock.NAME)
    ]
    assert not left, f"left behind: {left}"
