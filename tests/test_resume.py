"""What is begun on one layout of devices goes on on each other, with the numbers that one device gives."""

import shutil
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest

from kd_jax.storage.files import read_rows
from tests import processes
from tests.processes import ROOT, run

# Of eight devices: data x fsdp x tensor; one device has no mesh.
MESHES = {"one": None, "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
LAYOUTS = ((1, 1), (1, 8), (2, 4), (4, 2))  # processes x devices of each

# A training of 20 updates and samples of it. It stops by itself before update 8, or goes on from what is there.
WORK = """
    import sys
    from pathlib import Path

    import jax
    import numpy as np

    from kd_jax.runs import cache
    from kd_jax.parallel import mesh as mesh_lib
    from kd_jax.lm import corpus as corpus_lib, decode, training, weights
    from kd_jax.lm.model import PRESETS, Compute, Model
    from kd_jax.storage.files import read_rows

    cache.enable_compilation_cache()
    SETTINGS = training.TrainSpec(
        epochs=5, batch_size=8, learning_rate=3e-3, validations=2, log_every=1, keep_checkpoints=True
    )


    class Halt:
        # asked to stop before update 8, if at all; the last process alone knows
        def __init__(self, stops):
            self.updates, self.stops = 0, stops and jax.process_index() == jax.process_count() - 1

        @property
        def asked(self):
            self.updates += 1
            return self.stops and self.updates >= 7


    def train(folder, mesh, stops):
        model = Model(PRESETS["tiny"], None, eos_ids=(2,))
        member = training.Member(corpus_lib.open(arguments["corpus"]), 8, 5, Path(folder))
        try:
            training.train(SETTINGS, model, [member], compute=Compute(), mesh=mesh, stop=Halt(stops))
        except KeyboardInterrupt:
            assert stops
        else:
            assert not stops


    def result(folder, mesh):
        rows = read_rows(Path(folder) / "metrics.jsonl")
        model = weights.load(Path(folder) / "model", mesh=mesh)
        tokens, lengths, log_probs = decode.generate(model, [1], 24, max_length=16, batch_size=8, seed=4, mesh=mesh)
        return {
            "loss": [row["loss"] for row in rows if row["kind"] == "training"],
            "gradient_norm": [row["gradient_norm"] for row in rows if row["kind"] == "training"],
            "validation": [row["loss"] for row in rows if row["kind"] == "validation"],
            "log_probs": log_probs.tolist(), "tokens": tokens.tolist(),
        }
"""

IN_ONE_PROCESS = (
    WORK
    + """
    import shutil

    assert jax.device_count() == 8
    root = Path(arguments["folder"])
    meshes = {name: sizes and mesh_lib.make(*sizes) for name, sizes in arguments["meshes"].items()}
    train(root / "whole", None, False)
    out = {"whole": result(root / "whole", None)}
    for name, mesh in meshes.items():
        train(root / name, mesh, True)
        for other, onto in meshes.items():
            if other == name:
                continue
            folder = root / f"{name} {other}"
            shutil.copytree(root / name, folder)
            train(folder, onto, False)
            out[f"{name} {other}"] = result(folder, onto)
    say(**out)
"""
)

IN_SEVERAL = (
    WORK
    + """
    mesh = None if jax.device_count() == 1 else mesh_lib.make(fsdp=2, tensor=2)
    train(arguments["folder"], mesh, arguments["stops"])
    distributed.wait("rows")
    out = {} if arguments["stops"] else result(arguments["folder"], mesh)
    distributed.end()
    say(**out)
"""
)


def same(found, whole, name):
    assert len(whole["loss"]) == 20 and whole["loss"][-1] < whole["loss"][0]
    assert found["tokens"] == whole["tokens"], name
    for key in ("loss", "gradient_norm", "validation", "log_probs"):
        np.testing.assert_allclose(found[key], whole[key], rtol=1e-5, atol=1e-5, err_msg=f"{name}: {key}")


@pytest.mark.long
def test_a_training_saved_on_one_mesh_goes_on_on_each_other(counting, tmp_path):
    arguments = {"corpus": counting, "folder": str(tmp_path), "meshes": MESHES}
    (found,) = run(IN_ONE_PROCESS, 1, 8, arguments)
    whole = found.pop("whole")
    assert set(found) == {f"{one} {other}" for one, other in permutations(MESHES, 2)}
    for name, one in found.items():
        same(one, whole, name)


@pytest.mark.cluster
def test_a_training_saved_by_some_processes_goes_on_in_any_others(counting, tmp_path):
    def work(layout, folder, stops):
        return run(IN_SEVERAL, *layout, {"corpus": counting, "folder": str(folder), "stops": stops})

    whole = work((1, 1), tmp_path / "whole", False)[0]
    for layout in LAYOUTS:
        begun = tmp_path / f"{layout}"
        work(layout, begun, True)
        for other in LAYOUTS:
            if other == layout:
                continue
            folder = tmp_path / f"{layout} {other}"
            shutil.copytree(begun, folder)
            each = work(other, folder, False)
            assert all(one == each[0] for one in each)
            same(each[0], whole, f"{layout} {other}")


@pytest.mark.cluster
def test_the_stages_of_a_chain_on_a_mesh_each(tmp_path):
    """One command a stage, each with other axes; and again in one go on one device."""
    config = ["--config", "configs/lm_laptop.py:smoke", "--config.seeds=1", "--config.taus=(0.5,)"]

    def train(folder, devices, *flags):
        command = [sys.executable, "-m", "kd_jax.train", *config, f"--workdir={folder}", *flags]
        environment = processes.environment(devices)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    train(tmp_path / "one", 1)
    on = {"p_star": "fsdp=8", "teacher": "tensor=2", "samples": "data=8", "direct": "fsdp=4", "tau-0.5": "tensor=4"}
    for stage, axis in on.items():
        train(tmp_path / "each", 8, f"--stages={stage}", f"--config.mesh.{axis}")
    said = train(tmp_path / "each", 8, "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert "the config has changed" in said and "stage 1 of" not in said  # another mesh makes no stage anew
    one, each = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "each"))
    kinds = ("training", "validation", "evaluation")
    one, each = ([row for row in rows if row["kind"] in kinds] for rows in (one, each))
    assert [(row["kind"], row["name"], row.get("step")) for row in one] == [
        (row["kind"], row["name"], row.get("step")) for row in each
    ]
    for a, b in zip(one, each, strict=True):
        for key in ("loss", "precision", "recall", "entropy"):
            if a.get(key) is not None:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-5, atol=1e-5, err_msg=f"{key} of {a['name']}")
