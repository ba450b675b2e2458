"""Checkpoints: what is kept, what is newest, what comes back, onto other devices as well."""

import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.runs.checkpoint import Checkpoints
from kd_jax.storage.errors import RunError


def test_steps_are_ordered_as_numbers(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        for step in (9, 10, 100):
            saved.save(step, {"x": {"a": jnp.full(3, step)}})
    (tmp_path / "c" / "final").mkdir()
    (tmp_path / "c" / "100.tmp").mkdir()
    (tmp_path / "c" / "9").touch()
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.steps() == [9, 10, 100]
        np.testing.assert_array_equal(saved.load(100, {"x": {"a": jnp.zeros(3, jnp.int32)}})["x"]["a"], [100] * 3)


def test_the_last_ones_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2, best="loss", background=True) as saved:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5), (6, 1.7)):
            metrics = None if loss is None else {"loss": loss}
            saved.save(step, {"x": {"a": jnp.full(3, step)}}, {"loss": loss}, metrics=metrics)
        saved.wait()
        assert saved.steps() == [2, 5, 6]
        assert saved.values(2) == {"loss": 1.0}


def test_the_best_outlives_a_restart(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        with Checkpoints(tmp_path / "c", keep=1, best="loss") as saved:
            metrics = None if loss is None else {"loss": loss}
            saved.save(step, {"x": {"a": jnp.full(3, step)}}, metrics=metrics)
    with Checkpoints(tmp_path / "c", keep=1, best="loss") as saved:
        assert saved.steps() == [2, 5]


def test_what_was_half_removed_is_removed_by_the_next_start(tmp_path):
    with Checkpoints(tmp_path / "c") as saved:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5)):
            saved.save(step, {"x": {"a": jnp.full(3, step)}}, metrics={"loss": loss})
    shutil.rmtree(tmp_path / "c" / "3" / "x")
    (tmp_path / "c" / "1" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path / "c", keep=1) as saved:
        assert saved.steps() == [4]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["4"]


def test_leaving_waits_for_the_last(tmp_path):
    with Checkpoints(tmp_path / "c", background=True) as saved:
        for step in (3, 6, 7):
            saved.save(step, {"x": {"a": jnp.full((256, 1024), float(step))}})
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.steps()[-1] == 7
        assert float(saved.load(7, {"x": {"a": jnp.zeros((256, 1024))}})["x"]["a"].min()) == 7


def test_a_save_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError), Checkpoints(tmp_path / "c", background=True) as saved:
        saved.save(1, {"x": {"a": jnp.ones(3)}})
        saved.wait()
        shutil.rmtree(tmp_path / "c")
        (tmp_path / "c").write_text("in the way")
        saved.save(2, {"x": {"a": jnp.ones(3)}})


def test_a_path_that_orbax_cannot_read_back_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"c\[1\]: checkpoints cannot be read back from a path with \[ in it"):
        Checkpoints(tmp_path / "c[1]")
    assert not list(tmp_path.iterdir())


def test_what_is_saved_is_of_that_step_though_the_next_takes_its_memory(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((2048, 2048))
    with Checkpoints(tmp_path / "c", background=True) as saved:
        for step in range(1, 4):
            x = add(x)
            saved.save(step, {"x": {"a": x}})
    with Checkpoints(tmp_path / "c") as saved:
        for step in range(1, 4):
            found = saved.load(step, {"x": {"a": jnp.zeros((2048, 2048))}})["x"]["a"]
            assert (float(found.min()), float(found.max())) == (step, step)


@pytest.mark.slow
@pytest.mark.parametrize("mu_dtype", [jnp.float32, jnp.bfloat16])
def test_an_optimiser_comes_back_to_the_bit(tmp_path, mu_dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.bfloat16)}
    optimizer = optax.adamw(1e-2, mu_dtype=mu_dtype)
    gradient = jax.tree.map(lambda leaf: leaf * 0.1, params)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(1, {"optimizer": state, "weights": params})
        like = jax.eval_shape(lambda: state)
        found = saved.load(1, {"optimizer": like, "weights": params})
    assert jax.tree.structure(found["optimizer"]) == jax.tree.structure(state)
    for ours, wanted in zip(jax.tree.leaves(found["optimizer"]), jax.tree.leaves(state), strict=True):
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
    after, before = (optimizer.update(gradient, s, params)[0]["w"] for s in (found["optimizer"], state))
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))


DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np
count, folder = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", count)
from jax.sharding import NamedSharding, PartitionSpec
from kd_jax.parallel import mesh
from kd_jax.runs.checkpoint import Checkpoints
sharding = NamedSharding(mesh.one_axis("x"), PartitionSpec("x"))
values = np.arange(64.0, dtype=np.float32).reshape(16, 4)
with Checkpoints(folder) as saved:
    if count == 8:
        saved.save(5, {"t": {"a": jax.device_put(values, sharding)}}, {"note": "hello"})
    else:
        like = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)
        found = saved.load(5, {"t": {"a": like}})["t"]["a"]
        assert found.sharding == sharding and len(found.addressable_shards) == count
        np.testing.assert_array_equal(np.asarray(found), values)
    assert saved.values(5) == {"note": "hello"}
print("ok")
"""


@pytest.mark.long
def test_onto_another_number_of_devices(tmp_path):
    for count in (8, 1, 4):
        command = [sys.executable, "-c", DEVICES, str(count), str(tmp_path / "c")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip().endswith("ok"), done.stderr[-2000:]


def test_an_empty_step_is_removed_and_the_one_before_it_is_the_last(tmp_path, capsys):
    with Checkpoints(tmp_path) as saved:
        saved.save(10, {"t": {"a": jnp.arange(3.0)}})
    (tmp_path / "20/t").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as saved:
        assert saved.steps() == [10] and f"{tmp_path / '20'} is empty and is removed" in capsys.readouterr().err
        saved.save(20, {"t": {"a": jnp.arange(4.0)}})
    with Checkpoints(tmp_path) as saved:
        assert saved.steps() == [20]


def test_loggers_are_as_they_were_once_the_checkpoints_are_closed(tmp_path):
    before = {name: list(logging.getLogger(name).filters) for name in ("absl", "asyncio")}
    with Checkpoints(tmp_path):
        pass
    assert {name: logging.getLogger(name).filters for name in before} == before


@pytest.mark.long
def test_importing_every_module_changes_nothing_of_python_itself():
    script = """
import logging, pkgutil, signal, sys, importlib, threading
import absl.logging, jax, orbax.checkpoint, datasets, transformers  # whatever they do themselves
def state():
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "filters")}
    own = ("kd_jax", "matplotlib", "PIL", "wandb")
    kept = {name: (list(one.filters), one.level, list(one.handlers)) for name, one in loggers.items()}
    hooks = sys.unraisablehook, sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM)
    return hooks, {name: one for name, one in kept.items() if not name.startswith(own)}
before = state()
import kd_jax
for module in pkgutil.walk_packages(kd_jax.__path__, "kd_jax."):
    importlib.import_module(module.name)
after = state()
assert before[0] == after[0]
changed = [name for name, one in before[1].items() if one != after[1][name]]
assert not changed, changed
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
