"""--dry_run --device: memory by the compiled programs, time and cost by reckoning, and what is said of them."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import lm_laptop, lm_paper, lm_prose_laptop
from kd_jax import train
from kd_jax.lm.corpus import batches
from kd_jax.lm.experiment import corpora, cost, footprint, planning
from kd_jax.lm.experiment.arms import Recording, arms
from kd_jax.lm.experiment.footprint import Memory, Program
from kd_jax.lm.experiment.specs import LmSpec, MeshSpec, planned_shape
from kd_jax.lm.model import PRESETS
from kd_jax.lm.model.kv_cache import PAGE
from kd_jax.lm.training import state as state_lib
from kd_jax.parallel import devices
from kd_jax.runs.settings import freeze

GIB = 2**30


def target(text="1xH100", mfu=0.5, price=None):
    return devices.target(text, mfu, price)


def smoke(**changes):
    config = lm_laptop.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return freeze(LmSpec, config)


def test_rows_of_data_are_read_not_sampled(tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    config = lm_prose_laptop.get_config("smoke")
    config.data.source = str(tmp_path / "rows.txt")
    spec = freeze(LmSpec, config)
    price = corpora.validation(spec, "x").cost
    assert price.tokens == price.flops == 0 and price.disk > 0
    planning.show(spec, {"p_star/validation": price}, lambda _: False, target())
    assert re.search(r"p_star/validation +0.0 +0 +0.00e\+00 +0 +0.00 ", capsys.readouterr().out)
    assert corpora.validation(smoke(), "x").cost.flops > 0


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_memory_of_an_update_is_that_of_its_arrays():
    config = smoke()
    shape = planned_shape(config, "student")
    need = footprint.update(config, cost.training(config, shape), target()).memory
    state = state_lib.init(jax.random.key(0), shape, config.train.optimizer(10))
    # 16 sequences of 16 ids, in rows of 64
    batch = batches.Batch(*(np.zeros((1, 4, 64), dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
    held = num_bytes(state) + num_bytes(batch)
    assert held <= need.resident <= 1.01 * held + 512
    # the gradient; and the logits of all 256 tokens, as less than 4096 are held at once
    assert need.temporary >= 4 * shape.num_parameters + 4 * 256 * shape.vocab_size
    assert need.total == need.resident + need.temporary


@pytest.mark.slow
def test_a_teacher_and_records_are_held_too():
    shape = planned_shape(smoke(), "student")
    online = smoke(**{"distill.policy": "online"})
    plain = footprint.update(online, cost.training(online, shape), target()).memory
    teacher = planned_shape(online, "teacher")
    both = footprint.update(
        online, cost.training(online, shape, arm=arms(online)[-1], teacher=teacher), target()
    ).memory
    assert both.resident - plain.resident == pytest.approx(4 * teacher.num_parameters, rel=0.02)
    offline = smoke(**{"distill.policy": "offline", "distill.record_top_k": 8})
    arm = arms(offline)[-1]
    assert arm.recording == Recording(8, "uint16", "float32")
    recorded = footprint.update(offline, cost.training(offline, shape, arm=arm), target()).memory
    assert recorded.resident - plain.resident == pytest.approx(256 * (8 * 2 + 8 * 2 + 2), abs=512)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 4])
def test_scoring_is_run_and_timed_on_this_machine(top_k):
    config = smoke()
    program = footprint.scoring(config, planned_shape(config, "p_star"), top_k, target("1xCPU"))
    assert 1e6 < program.rate < 1e13


@pytest.mark.long
def test_another_vocabulary_needs_the_text_once_more():
    online = smoke(**{"distill.policy": "online", "distill.vocabulary": "aligned"})
    shape, teacher = planned_shape(online, "student"), dataclasses.replace(PRESETS["tiny"], vocab_size=50)
    need = footprint.update(online, cost.training(online, shape, arm=arms(online)[-1], teacher=teacher), target())
    state = state_lib.init(jax.random.key(0), shape, online.train.optimizer(10))
    arrays = 4 * teacher.num_parameters + 4 * 64 * (3 * 4 + 1) + 4 * 64 * (8 * 4 + 1)
    assert need.memory.resident - num_bytes(state) == pytest.approx(arrays, rel=0.02)


@pytest.mark.slow
def test_memory_of_sampling_is_weights_and_cache():
    shape = PRESETS["tiny"]
    config = smoke(**{"sampling.max_length": 3 * PAGE, "sampling.prompt_ids": (1, 2)})
    need = footprint.sampling(config, shape, 8, "float32", target())
    cache = 4 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 8 * 3 * PAGE
    # ids and two log-probabilities of 8 samples in the slots, and of 64 that are done
    rows = 4 * 3 * (8 + 64) * 3 * PAGE
    wanted = 2 * 4 * shape.num_parameters + cache + rows
    assert wanted <= need.resident <= 1.05 * wanted
    half = footprint.sampling(config, shape, 8, "bfloat16", target())
    assert need.resident - half.resident == pytest.approx(4 * shape.num_parameters + cache / 2, rel=0.02)


def test_time_of_training_is_that_of_its_operations():
    config = freeze(LmSpec, lm_paper.get_config())
    about = cost.training(config, PRESETS["smollm2-135m"])
    # 6 operations a weight and token; attention and validation are some more
    tokens = 5 * 10_000_000 * 512
    assert about.tokens == tokens and 1 < about.flops / (6 * 134_515_008 * tokens) < 1.1
    found = planning.seconds(config, about, target("8xH100", 0.5))
    assert found == pytest.approx(about.flops / (8 * 989e12 * 0.5))
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="float32"))
    assert planning.seconds(config, about, target("8xH100", 0.5)) == pytest.approx(about.flops / (8 * 67e12 * 0.5))


def test_time_here_is_what_was_measured_and_that_of_writing(monkeypatch):
    monkeypatch.setattr(cost, "writing_rate", lambda: 1e8)
    config = smoke(**{"num_train": 320, "train.batch_size": 16, "train.epochs": 2, "train.validations": 3})
    shape, here = planned_shape(config, "student"), target("1xCPU")
    # two models; weights and two moments of each, three times, and its weights
    written = 2 * (3 * 3 + 1) * 4 * shape.num_parameters
    about = cost.training(config, shape, count=2)
    found = planning.seconds(config, about, here, Program(Memory(1, 1), 1e12))
    assert found == pytest.approx(about.flops / 1e12 + written / 1e8)
    # 40 updates: every fifth is saved, too
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=5))
    more = planning.seconds(config, cost.training(config, shape, count=2), here, Program(Memory(1, 1), 1e12))
    assert more - found == pytest.approx(2 * 8 * 12 * shape.num_parameters / 1e8)


@pytest.mark.slow
def test_the_pace_of_writing_is_that_of_half_a_gibibyte(monkeypatch):
    class Slow(cost.Checkpoints):
        def save(self, step, trees):
            time.sleep(0.5)
            super().save(step, trees)

    monkeypatch.setattr(cost, "Checkpoints", Slow)
    began = time.perf_counter()
    rate = cost.writing_rate.__wrapped__()
    # the one that counts took its half second, and no longer than all
    assert 2**29 / (time.perf_counter() - began) < rate < 2**29 / 0.5


def test_time_of_sampling_is_at_least_that_of_reading_the_weights(monkeypatch):
    shape = PRESETS["smollm2-1.7b"]

    def with_slots(batch_size):
        config = lm_paper.get_config()
        config.sampling.batch_size = batch_size
        return freeze(LmSpec, config)

    config = with_slots(1)
    about = cost.sampling(config, shape, 10)
    cached = 2 * 24 * 32 * 64 * 256
    step_seconds = 2 * (1_711_376_384 + cached) / (3.35e12 * 0.6)
    assert planning.seconds(config, about, target()) == pytest.approx(10 * 512 * step_seconds)
    # eight slots of four devices' rows, each with all weights but for what tensor splits
    config = with_slots(8)
    over = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 4})
    with monkeypatch.context() as patch:
        patch.setattr(planning, "make_mesh", lambda sizes: over)
        found = planning.seconds(config, about, target("16xH100"))
    step_seconds = 2 * (1_711_376_384 + 2 * cached) / 4 / (3.35e12 * 0.6)
    assert found == pytest.approx(10 * 512 / 8 * step_seconds)
    config = with_slots(100_000)
    found = planning.seconds(config, about, target("1xH100", 1e-4))
    assert found == pytest.approx(about.flops / (989e12 * 1e-4))


def shown(monkeypatch, capsys, needs, finished=(), price=None, **changes):
    config = smoke(**changes)
    shape = planned_shape(config, "student")
    costs = {"samples/tau-1": cost.sampling(config, shape, 32), "direct/seed-0": cost.training(config, shape)}
    programs = {
        name: Program(Memory(*(round(gib * GIB) for gib in need))) for name, need in zip(costs, needs, strict=True)
    }
    monkeypatch.setattr(footprint, "programs", lambda *_: programs)
    planning.show(config, costs, lambda name: name in finished, target("1xH100", price=price))
    return capsys.readouterr().out


def test_what_fits_and_what_does_not(monkeypatch, capsys):
    said = shown(monkeypatch, capsys, [(10, 10), (10, 20)])
    assert "everything whose shape the config says fits" in said and "mesh data=1 x fsdp=1 x tensor=1" in said
    assert re.search(r"^direct/seed-0 +30\.0 ", said, re.M)
    said = shown(monkeypatch, capsys, [(10, 10), (30, 70)])
    assert "direct/seed-0 does not fit: needs 100.0 GiB of 80 (30.0 weights and moments, 70.0 gradients" in said
    assert (
        "config.compute.remat=True" in said and "config.train.parts=2" in said and "fsdp" not in said.split("fit:")[1]
    )
    said = shown(monkeypatch, capsys, [(90, 1), (90, 1)], **{"compute.remat": True})
    assert "samples/tau-1 does not fit: needs 91.0 GiB of 80" in said and "config.sampling.batch_size" in said
    assert "config.mesh.fsdp" in said and "remat" not in said
    # of a GPU, JAX takes three quarters
    said = shown(monkeypatch, capsys, [(10, 10), (30, 40)])
    assert "direct/seed-0 fits, but needs 70.0 GiB of 80" in said and "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in said


def test_cost_is_the_price_of_what_is_left(monkeypatch, capsys):
    # so dear that the cost of so little can be seen
    said = shown(monkeypatch, capsys, [(1, 1), (1, 1)], price=1e9)
    costs = {line.split()[0]: float(line.split()[7].replace(",", "")) for line in said.splitlines()[2:4]}
    config = smoke()
    about = cost.training(config, planned_shape(config, "student"))
    hours = about.flops / (67e12 * 0.5) / 3600
    assert costs["direct/seed-0"] == pytest.approx(1e9 * hours, rel=1e-3)
    total = float(re.search(r"cost ([\d,.]+)$", said, re.M)[1].replace(",", ""))
    assert total == pytest.approx(sum(costs.values()), rel=1e-3)
    said = shown(monkeypatch, capsys, [(1, 1), (1, 1)], finished=("samples/tau-1",), price=1e9)
    left = float(re.search(r"cost ([\d,.]+)$", said, re.M)[1].replace(",", ""))
    assert left == pytest.approx(costs["direct/seed-0"], rel=1e-3)
    assert "cost ?" in shown(monkeypatch, capsys, [(1, 1), (1, 1)])


def test_meshes_of_a_plan_lie_over_the_slices_of_its_devices(monkeypatch):
    eight = jax.devices()[:1] * 8
    monkeypatch.setattr(jax, "devices", lambda: eight)
    config = smoke(**{"mesh.fsdp": 4})
    assert planning.over_slices(config, devices.parse("v5e-8")) is config
    planned = planning.over_slices(config, devices.parse("2x 4xH100"))
    assert planned.mesh == MeshSpec(fsdp=4, slices=2) and planned.teacher_mesh == MeshSpec(slices=2)
    with pytest.raises(ValueError, match="fsdp x tensor = 4 devices do not fit into a slice"):
        planning.over_slices(config, devices.parse("4x 2xH100"))
    # all axes over all devices, where the config says so
    config = smoke(**{"mesh.fsdp": 8, "mesh.slices": 1})
    assert planning.over_slices(config, devices.parse("2x 4xH100")).mesh == config.mesh


def test_time_over_the_network_between_slices(monkeypatch, capsys):
    config = smoke()
    shape = planned_shape(config, "student")
    costs = {"direct/seed-0": cost.training(config, shape), "evaluation": cost.evaluation(config, shape, shape)}
    silent = Program(Memory(1, 1))
    programs = {"direct/seed-0": silent._replace(sent=1e9), "evaluation": silent}
    slices = target("2x v5e-4")
    alone, over = (
        planning.seconds(config, costs["direct/seed-0"], slices, program)
        for program in (silent, programs["direct/seed-0"])
    )
    # a gigabyte for each token, at 25 Gbit/s
    assert over - alone == pytest.approx(costs["direct/seed-0"].tokens * 1e9 / 3.125e9)
    monkeypatch.setattr(footprint, "programs", lambda *_: programs)
    planning.show(config, costs, lambda name: False, slices)
    said = capsys.readouterr().out
    assert "2x v5e-4: 8 devices in 2 slices of 16 GiB" in said and "between slices: 3.125 GB/s a device" in said
    assert re.search(r"^direct/seed-0: each device sends [\d,.]+ MB to other slices, 100% of the time$", said, re.M)
    assert "evaluation: each" not in said
    planning.show(config, costs, lambda name: False, target("2x v4-8"))
    assert "no bandwidth is known for 2x v4-8" in capsys.readouterr().out


def command(workdir, *words):
    return ["--config=configs/lm_laptop.py:smoke", f"--workdir={workdir}", "--dry_run", *words]


def test_an_unknown_device_ends_before_anything_is_compiled(tmp_path, capsys):
    assert train.main(["train", *command(tmp_path / "w", "--device=8xFoo")]) == 2
    said = capsys.readouterr().err
    assert "--device=8xFoo is not known" in said and "H100" in said and "v6e-N" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.mesh.fsdp=3"], "mesh data=-1 x fsdp=3 x tensor=1 does not fit 8 devices"),
        (
            ["--config.mesh.tensor=8", "--config.student.mlp=36"],
            "config.student cannot be split over config.mesh: ['layers']['down']: axis 'mlp' of size 36 cannot",
        ),
        (
            ["--config.teacher_mesh.fsdp=8", "--config.teacher.width=36", "--config.distill.policy=offline"],
            "config.teacher cannot be split over config.teacher_mesh: ['embedding']: axis 'embed' of size 36",
        ),
    ],
)
def test_a_mesh_that_cannot_be(tmp_path, words, message):
    """Said before any work, also where the devices are here and stages come before it."""
    words = command(tmp_path / "w", *words)
    for start in ([*words, "--device=8xH100"], [word for word in words if word != "--dry_run"]):
        done = subprocess.run(
            [sys.executable, "-m", "kd_jax.train", *start], capture_output=True, text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "compiling" not in done.stderr and not (tmp_path / "w").exists()


@pytest.mark.long
def test_plan_of_a_chain_over_four_devices(tmp_path):
    words = command(
        tmp_path / "w", "--device=2x 2xH100", "--config.mesh.fsdp=2", "--price_per_hour=2.5", "--mfu=0.3",
        "--config.distill.policy=on_policy",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "kd_jax.train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "4 devices in 2 slices of 80 GiB and 989 TFLOP/s" in said and "mesh data=2 x fsdp=2 x tensor=1" in said
    assert "30% of the peak rate (--mfu)" in said and "everything whose shape the config says fits" in said
    # of data alone: updates sum gradients over it, and nothing else goes from slice to slice
    sends = re.findall(r"^(\S+): each device sends .* MB to other slices", said, re.M)
    assert "teacher" in sends and not any(name.startswith(("samples", "evaluation")) for name in sends)
    for stage in ("p_star/train", "teacher", "samples/tau-1", "direct/seed-1", "on_policy/seed-0", "evaluation"):
        assert re.search(rf"^{stage} +\d+\.\d +[\d,]+ +\d\.\d\de", said, re.M), said
    assert not (tmp_path / "w").exists()
