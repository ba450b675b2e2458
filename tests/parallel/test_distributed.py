"""One run in several processes: the same numbers, and an end when one of them ends."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kd_jax.parallel import cluster, distributed
from kd_jax.storage.errors import Absent, RunError
from kd_jax.storage.files import read_rows
from tests import processes
from tests.processes import ROOT, free_port, run, spawn, start

LAYOUTS = ((1, 1), (1, 8), (2, 4), (4, 2))  # processes x devices of each


def train_command(folder, *flags, config="configs/gmm.py:smoke"):
    return [sys.executable, "-m", "kd_jax.train", "--config", config, "--workdir", folder, *flags]


# a machine that is busy with other things may stop everything for a while
PATIENT = ("--initialization_timeout=3600", "--heartbeat_timeout=3600")


def cluster_flags(port, count, index, timeout=120):
    return (
        f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}",
        f"--initialization_timeout={timeout}",
    )  # fmt: skip


def end(process, timeout=180):
    """Exit code and what was said on stderr."""
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, err


def test_with_one_process_nothing_is_asked_of_others():
    assert not distributed.several() and distributed.leads() and distributed.name() == ""
    assert distributed.once(lambda: (1, 2), "nothing") == (1, 2)  # no trip through JSON
    assert distributed.same(3) == 3
    assert distributed.Agreement(2)(True) and not distributed.Agreement(2)(False)
    np.testing.assert_array_equal(distributed.fetch(np.arange(3)), [0, 1, 2])
    with pytest.raises(RunError, match="mine"):
        distributed.once(lambda: (_ for _ in ()).throw(RunError("mine")), "nothing")


def test_others_that_cannot_be_joined_or_waited_for_are_absent(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("UNAVAILABLE")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fails)
    with pytest.raises(Absent, match="process 1 of 2 .* could not join the others .*UNAVAILABLE"):
        distributed.start(cluster.Cluster("srun", 2, "127.0.0.1:1", 1))
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: fails)
    monkeypatch.setattr(distributed, "_started", True)
    with pytest.raises(Absent, match="not all processes came to .*the end"):
        distributed.wait("the end")


HELPERS = """
    from pathlib import Path

    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kd_jax.storage.errors import RunError

    index, out = jax.process_index(), {"name": distributed.name(), "leads": distributed.leads()}
    out["once"] = distributed.once(lambda: {"by": index, "long": "x" * 1000}, "a")
    for wrong in (ValueError("too small"), RunError("not there"), OSError("disk full")):
        try:
            distributed.once(lambda: (_ for _ in ()).throw(wrong), "b")
        except (ValueError, RunError, OSError) as error:
            out.setdefault("errors", []).append([type(error).__name__, str(error)])
    log = Path(arguments["folder"]) / "order"
    with distributed.first_alone("c"):
        with open(log, "a") as file:
            file.write(f"{index} in\\n")
            file.write(f"{index} out\\n")
    distributed.wait("d")
    out["order"] = log.read_text().split()
    out["same"] = distributed.same(10 + index)

    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["x"], []))
    vector = distributed.spread(np.arange(8.0), split)
    out["own"] = sorted(float(v) for shard in vector.addressable_shards for v in np.asarray(shard.data))
    tree = {"split": vector, "whole": distributed.spread(np.float32(2.5), whole), "host": np.arange(10)}
    out["fetched"] = {k: v.tolist() for k, v in distributed.fetch(tree).items()}
    out["sum"] = float(distributed.fetch(jax.jit(lambda v: v.sum())(vector)))

    agreed = distributed.Agreement(2)
    # the second process alone says yes, in its third call
    out["agreed"] = [agreed(index == 1 and call == 2) for call in range(6)]
    distributed.end()
    say(**out)
"""


@pytest.mark.slow
def test_helpers_with_two_processes(tmp_path):
    first, second = run(HELPERS, 2, devices=2, arguments={"folder": str(tmp_path)})
    assert (first["name"], first["leads"]) == ("process 0 of 2: ", True)
    assert (second["name"], second["leads"]) == ("process 1 of 2: ", False)
    assert first["errors"] == [["ValueError", "too small"], ["RunError", "not there"], ["OSError", "disk full"]]
    assert second["errors"] == [["RunError", f"process 0 cannot go on: {text}"] for _, text in first["errors"]]
    assert first["own"] + second["own"] == list(map(float, range(8)))  # no part is sent twice
    for one in (first, second):
        assert one["once"] == {"by": 0, "long": "x" * 1000}
        assert one["order"] == ["0", "in", "0", "out", "1", "in", "1", "out"]
        assert one["same"] == 10
        assert one["fetched"] == {"split": list(range(8)), "whole": 2.5, "host": list(range(10))}
        assert one["sum"] == 28
        assert one["agreed"] == [False, False, False, False, True, False]


# Twenty updates each of training and of online distillation, sampling, scoring.
NUMBERS = """
    from pathlib import Path

    import jax
    import numpy as np

    from kd_jax.parallel import mesh as mesh_lib
    from kd_jax.lm import corpus as corpus_lib
    from kd_jax.lm import decode, model as model_lib, score, training, weights
    from kd_jax.lm.distill import loss as distill
    from kd_jax.lm.model import PRESETS, Compute, Model
    from kd_jax.storage.files import read_rows

    folder = Path(arguments["folder"])
    mesh = None if jax.device_count() == 1 else mesh_lib.make(fsdp=2)
    where = None
    if mesh is not None:
        axes = model_lib.logical_axes(PRESETS["tiny"])
        where = mesh_lib.shardings(axes, model_lib.abstract(PRESETS["tiny"]), mesh)
    params = jax.jit(model_lib.init, static_argnums=1, out_shardings=where)(jax.random.key(3), PRESETS["tiny"])
    model = Model(PRESETS["tiny"], params, eos_ids=(2,))
    out = {"fingerprint": weights.fingerprint(params)}
    settings = training.TrainSpec(
        epochs=5, batch_size=8, learning_rate=3e-3, validations=4, log_every=1, keep_checkpoints=True
    )
    corpus = corpus_lib.open(arguments["corpus"])
    ways = {"text": None, "online": distill.Distillation(distill.DistillSpec(policy="online"), model)}
    for name, distillation in ways.items():
        member = training.Member(corpus, 8, 5, folder / name)
        training.train(settings, model, [member], compute=Compute(), mesh=mesh, distillation=distillation)
        distributed.wait("rows")
        rows = read_rows(folder / name / "metrics.jsonl")
        out[name] = {
            "loss": [row["loss"] for row in rows if row["kind"] == "training"],
            "gradient_norm": [row["gradient_norm"] for row in rows if row["kind"] == "training"],
            "validation": [row["loss"] for row in rows if row["kind"] == "validation"],
        }
    tokens, lengths, log_probs = decode.generate(model, [1], 40, max_length=16, batch_size=8, seed=4, mesh=mesh)
    out["tokens"], out["sampled"] = tokens.tolist(), log_probs.tolist()
    out["scored"] = score.log_prob(model, tokens[:13], lengths[:13], batch_tokens=128, mesh=mesh)[0].tolist()
    distributed.end()
    say(**out)
"""


@pytest.mark.cluster
def test_any_number_of_processes_gives_the_same_numbers(counting, tmp_path):
    found = {}
    for count, devices in LAYOUTS:
        folder = tmp_path / f"{count}x{devices}"
        each = run(NUMBERS, count, devices, {"folder": str(folder), "corpus": counting})
        assert all(one == each[0] for one in each)  # every process has it all
        found[count, devices] = each[0]
    alone = found.pop((1, 1))
    assert len(alone["text"]["loss"]) == 20 and alone["text"]["loss"][-1] < alone["text"]["loss"][0]
    for layout, one in found.items():
        assert one["fingerprint"] == alone["fingerprint"], layout  # the start, to the bit
        assert one["tokens"] == alone["tokens"], layout
        for name in ("text", "online"):
            for key, values in alone[name].items():
                np.testing.assert_allclose(one[name][key], values, rtol=1e-5, atol=1e-5, err_msg=f"{layout} {key}")
        for key in ("sampled", "scored"):
            np.testing.assert_allclose(one[key], alone[key], rtol=0, atol=1e-5, err_msg=f"{layout} {key}")


STOPPED = """
    import os
    import signal
    import sys
    from pathlib import Path

    import jax

    from kd_jax.parallel import mesh as mesh_lib
    from kd_jax.lm import corpus as corpus_lib, training
    from kd_jax.lm.model import PRESETS, Compute, Model
    from kd_jax.storage.files import read_rows
    from kd_jax.runs.run import Stop

    mesh = None if jax.device_count() == 1 else mesh_lib.make(fsdp=2)
    settings = training.TrainSpec(
        epochs=5, batch_size=8, learning_rate=3e-3, validations=2, log_every=1, keep_checkpoints=True
    )
    model, steps = Model(PRESETS["tiny"], None, eos_ids=(2,)), []
    member = training.Member(corpus_lib.open(arguments["corpus"]), 8, 5, Path(arguments["folder"]))

    class Told(Stop):
        # the last process alone gets the signal, before its seventh update
        @property
        def asked(self):
            steps.append(0)
            last = jax.process_index() == jax.process_count() - 1
            if arguments.get("stop") and last and len(steps) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return self._told

        @asked.setter
        def asked(self, value):
            self._told = value

    try:
        with Told() as stop:
            training.train(settings, model, [member], compute=Compute(), mesh=mesh, stop=stop)
    except KeyboardInterrupt:
        pass
    distributed.wait("rows")
    rows = read_rows(member.folder / "metrics.jsonl")
    out = {"loss": [row["loss"] for row in rows if row["kind"] == "training"]}
    out["checkpoints"] = sorted(int(p.name) for p in (member.folder / "checkpoints").iterdir() if p.name.isdigit())
    distributed.end()
    say(**out)
"""


@pytest.mark.cluster
def test_a_signal_to_one_stops_all_and_any_layout_goes_on(counting, tmp_path):
    arguments = {"corpus": counting}
    (whole,) = run(STOPPED, 1, 1, {**arguments, "folder": str(tmp_path / "whole")})
    for count, devices in ((1, 1), (2, 4)):
        folder = str(tmp_path / f"{count}x{devices}")
        stopped = run(STOPPED, count, devices, {**arguments, "folder": folder, "stop": True})
        assert all(one == stopped[0] for one in stopped)
        # one process stops at once; several two updates later, when all know of it
        last = 7 if count == 1 else 9
        assert len(stopped[0]["loss"]) == last and stopped[0]["checkpoints"][-1] == last
        other = {1: (2, 2), 2: (1, 1)}[count]
        went_on = run(STOPPED, *other, {**arguments, "folder": folder})
        assert len(went_on[0]["loss"]) == 20
        np.testing.assert_allclose(went_on[0]["loss"], whole["loss"], rtol=1e-5)


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_at_once(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = end(spawn(train_command(tmp_path / "run", *cluster_flags(port, 2, 0))))
    assert code == 2 and re.search(rf"error: the coordinator's port, 127.0.0.1:{port}, is taken", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_one_that_waits_in_vain_says_for_whom(tmp_path, index):
    port, began = free_port(), time.monotonic()
    code, said = end(spawn(train_command(tmp_path / "run", *cluster_flags(port, 2, index, timeout=5))))
    assert code == 75 and time.monotonic() - began < 60
    assert f"process {index} of 2 (the command line): not all processes were at 127.0.0.1:{port} within 5 s" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_with_one_number_do_not_start(tmp_path):
    port = free_port()
    each = [spawn(train_command(tmp_path / "run", *cluster_flags(port, 3, i, timeout=10))) for i in (0, 1, 1)]
    ended = [end(process) for process in each]
    assert all(code != 0 for code, _ in ended), ended
    assert any("process_id" in said for _, said in ended) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_bad_config_is_said_by_all_and_ends_all(tmp_path):
    port, began = free_port(), time.monotonic()
    flags = "--config.seeds=0"
    each = [spawn(train_command(tmp_path / "run", flags, *cluster_flags(port, 2, i))) for i in range(2)]
    for i, process in enumerate(each):
        code, said = end(process)
        assert code == 2 and f"error: process {i} of 2: config.seeds=0 must be at least 1" in said
    assert time.monotonic() - began < 120 and not (tmp_path / "run").exists()


# Updates without end; arguments say which process ends at which update, and how.
ENDLESS = """
    import os
    import signal
    import sys
    import traceback

    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    split = NamedSharding(Mesh(np.asarray(jax.devices()), ("x",)), PartitionSpec("x"))
    total = jax.jit(lambda v: v.sum())
    try:
        for update in range(10**9):
            if update == 3 and jax.process_index() == arguments["who"]:
                if arguments["how"] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("out of data")
            print(update, float(total(distributed.spread(np.ones(jax.device_count()), split))), flush=True)
    except Exception:
        traceback.print_exc()
        distributed.leave(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises"])
@pytest.mark.parametrize("who", [0, 1])
def test_the_end_of_one_is_the_end_of_all(who, how):
    each = start(ENDLESS, 2, arguments={"who": who, "how": how, "heartbeat": distributed.HEARTBEAT})
    began = time.monotonic()
    ended = [end(process, distributed.HEARTBEAT + distributed.GRACE + 60) for process in each]
    assert all(code != 0 for code, _ in ended), ended
    assert time.monotonic() - began < distributed.HEARTBEAT + distributed.GRACE + 30
    if how == "raises":
        assert "out of data" in ended[who][1]
    else:
        assert ended[who][0] == -signal.SIGKILL
    assert ended[1 - who][1].strip()  # the other says something of it, too


def rows_of(folder, kinds=None):
    rows = read_rows(folder / "metrics.jsonl")
    return rows if kinds is None else [row for row in rows if row["kind"] in kinds]


def local(count, devices, *flags):
    """Exit code of launch/local.sh, and what was said."""
    command = [ROOT / "launch/local.sh", count, "--cpu", "--devices", devices, "--", *flags, *PATIENT]
    launcher = spawn(command, devices, env={"PYTHON": sys.executable})
    out, err = launcher.communicate(timeout=3600)
    return launcher.returncode, out + err


@pytest.mark.long
def test_mixtures_in_two_processes(tmp_path):
    subprocess.run(train_command(tmp_path / "one"), check=True, cwd=ROOT, env=processes.environment(1), timeout=300)
    for again in (False, True):
        code, said = local(2, 3, "--config", "configs/gmm.py:smoke", "--workdir", tmp_path / "two")
        assert code == 0, said
        assert said.count("finished, nothing left to do" if again else "report:") == 1  # one writer
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert {k: v for k, v in one.items() if not isinstance(v, float)} == {
            k: v for k, v in two.items() if not isinstance(v, float)
        }
        for key, value in one.items():
            if isinstance(value, float):
                # Members that share a program with others may end a rounding apart. Sharpening multiplies a
                # difference of log-weights by beta; the direct student is fitted to the data.
                rel = 1e-5 * max(one.get("beta") or 1, 1 if one["arm"] == "direct" else 10)
                assert two[key] == pytest.approx(value, rel=rel, abs=1e-5), key
    device = json.loads((tmp_path / "two/manifest.json").read_text())["device"]
    assert (device["count"], device["processes"]) == (6, 2)


@pytest.mark.cluster
def test_language_models_in_two_processes(tmp_path):
    flags = ["--config", "configs/lm_laptop.py:smoke", "--config.seeds=1", "--config.taus=(0.5,)"]
    command = train_command(tmp_path / "one", *flags[2:], config=flags[1])
    subprocess.run(command, check=True, cwd=ROOT, env=processes.environment(1), timeout=600)
    code, said = local(2, 1, *flags, "--workdir", tmp_path / "two")
    assert code == 0, said
    kinds = ("training", "validation", "evaluation")
    one, two = (rows_of(tmp_path / name, kinds) for name in ("one", "two"))
    assert [(row["kind"], row["name"], row.get("step")) for row in one] == [
        (row["kind"], row["name"], row.get("step")) for row in two
    ]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "precision", "recall", "entropy"):
            if a.get(key) is not None:
                assert b[key] == pytest.approx(a[key], abs=1e-5), (key, a["name"])
    # the corpora are the same, token by token
    assert [row["text"] for row in read_rows(tmp_path / "one/samples.jsonl")] == [
        row["text"] for row in read_rows(tmp_path / "two/samples.jsonl")
    ]


@pytest.mark.slow
def test_local_says_which_process_failed(tmp_path):
    code, said = local(2, 1, "--config", "configs/gmm.py:smoke", "--workdir", tmp_path / "run", "--config.seeds=0")
    assert code == 2
    assert "process 1 of 2" in said and "config.seeds=0 must be at least 1" in said
    assert "all processes have been ended" in said


@pytest.mark.cluster
def test_local_ends_all_when_one_is_killed(tmp_path):
    command = [
        ROOT / "launch/local.sh", "2", "--cpu", "--", "--config", "configs/gmm.py", "--workdir", tmp_path / "run",
        "--config.seeds=100000",
    ]  # fmt: skip
    env = {"PYTHON": sys.executable, "LOGS": str(tmp_path / "logs"), "GRACE": "5"}
    launcher = spawn(command, env=env)
    log = tmp_path / "logs/process-1.log"
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoints/chunks").exists():
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    victim = next(pid for pid in children if "--process_id=1" in open(f"/proc/{pid}/cmdline").read())
    subprocess.run(["kill", "-KILL", victim], check=True)
    code, said = end(launcher, 120)
    assert code != 0 and "error: process 1 of 2 ended with SIGKILL" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
