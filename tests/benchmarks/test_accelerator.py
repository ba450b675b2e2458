"""The script that measures an accelerator, in its smallest form on a CPU."""

import json

import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.accelerators import measures, parity
from kd_jax.lm.model import attention
from kd_jax.parallel import devices


@pytest.mark.long
def test_it_runs_to_the_end(tmp_path):
    code = accelerator.main(["--tiny", "--json", str(tmp_path / "rows.json")])
    assert code == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    cases = {(row["part"], row["case"]) for row in found["rows"]}
    assert {f"{name}, {dtype}" for name in ("scores", "greedy", "losses") for dtype in parity.LIMITS} == {
        case for part, case in cases if part == "parity"
    }
    for part, (cases_of, _) in accelerator.PARTS.items():
        assert {case for p, case in cases if p == part} == set(cases_of(measures.TINY))
    skipped = {row["case"] for row in found["rows"] if "skipped" in row}
    # a CPU has neither a GPU's nor a TPU's kernels
    for_others = {f"{kind}, {rows}" for kind in ("cudnn", "splash") for rows in ("packed", "one sequence a row")}
    assert skipped == {"torch, all logits", "torch, Liger"} | for_others
    for row in found["rows"]:
        assert "skipped" in row or row["value"] >= 0
    losses = [row["loss"] for row in found["rows"] if row["part"] == "losses" and "loss" in row]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
    errors = [row["error"] for row in found["rows"] if row["part"] == "attention" and "error" in row]
    assert len(errors) == 2 * (len(attention.KINDS) - 3) and max(errors) < 0.03


def test_no_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "measure", lambda *_: [])
    assert accelerator.main(["--tiny", "--seconds", "0", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows and all(row["skipped"] == "no time was left" for row in rows)


def test_a_case_that_fails(tmp_path, monkeypatch):
    def out_of_memory():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    def wrong():
        raise ZeroDivisionError("of two numbers")

    monkeypatch.setattr(parity, "measure", lambda *_: [])
    monkeypatch.setattr(accelerator, "PARTS", {"one": (lambda sizes: {"a": out_of_memory, "b": wrong}, 1.0)})
    assert accelerator.main(["--tiny", "--json", str(tmp_path / "rows.json")]) == 1
    first, second = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert first["skipped"] == "it does not fit this device's memory"
    assert second["failed"] == "ZeroDivisionError: of two numbers"


def values():
    return parity.Values(np.full((2, 3), -5.0), np.zeros((2, 6), int), np.full(4, 5.0))


def cpu():
    one = values()
    return one._asdict() | {"float32": np.full((2, 2), 1e-6)}


def test_parity_of_equal_values():
    rows = parity.check({"float32": values()}, cpu())
    assert [row["value"] for row in rows] == [0.0, 1e-6, 0.0]


@pytest.mark.parametrize("changed", [0.01, np.nan])
@pytest.mark.parametrize("name", ["scores", "losses"])
def test_a_value_that_is_off(name, changed):
    device = values()
    getattr(device, name).flat[1] += changed
    with pytest.raises(SystemExit, match=f"parity: {name} in float32 are up to .* so no time was measured"):
        parity.check({"float32": device}, cpu())


def test_a_greedy_token_that_is_not_the_likeliest():
    with pytest.raises(SystemExit, match="parity: greedy in float32"):
        parity.check({"float32": values()}, cpu() | {"float32": np.array([0.0, 0.2])})


@pytest.mark.parametrize(
    "kind,chip",
    [
        ("NVIDIA H100 80GB HBM3", devices.GPUS["H100"]),
        ("NVIDIA H100 PCIe", devices.GPUS["H100-PCIe"]),
        ("NVIDIA A100-SXM4-80GB", devices.GPUS["A100-80GB"]),
        ("NVIDIA A100-SXM4-40GB", devices.GPUS["A100-40GB"]),
        ("NVIDIA GeForce RTX 4090", devices.GPUS["RTX4090"]),
        ("NVIDIA L40S", devices.GPUS["L40S"]),
        ("TPU v5 lite", devices.TPUS["v5e"]),
        ("cpu", None),
    ],
)
def test_data_sheets(kind, chip, monkeypatch):
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(measures.jax, "devices", lambda: [device])
    assert measures.chip() is chip
