"""Every program lowers for GPUs and TPUs, on one device and on eight."""

import subprocess
import sys

import pytest

from benchmarks.accelerators import lowering, programs
from benchmarks.accelerators.programs import SHAPES, Setting, choosing_for


def lower(*arguments):
    """Exit code and rows of the command, in a process of its own: it needs eight devices."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--lower", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_two_programs_in_the_small_form():
    code, output = lower("--shape", "tiny", "--programs", "scoring,sampling")
    assert code == 0 and output.endswith("8 of 8 programs are as they should be\n"), output


@pytest.mark.long
@pytest.mark.parametrize("shape", ["tiny", "135m"])
@pytest.mark.parametrize("platform", programs.PLATFORMS)
def test_all_programs(shape, platform):
    code, output = lower("--shape", shape, "--platforms", platform)
    assert code == 0, output


@pytest.mark.long
def test_whole_logits_are_a_fault(monkeypatch):
    """A scorer that makes the logits of all tokens at once is found, and its size is named."""
    monkeypatch.setattr("kd_jax.losses.head.TOKENS", 2**20)
    with choosing_for("tpu"):
        result = lowering.lower("scoring", Setting(SHAPES["tiny"], "tpu", attention="blocked"))
    (fault,) = result.faults
    assert "[24,255,320] is as large as the logits of all 6120 tokens" in fault


@pytest.mark.slow
def test_what_does_not_lower_is_a_fault():
    # cuDNN is not installed with JAX for CPUs
    with choosing_for("cuda"):
        result = lowering.lower("scoring", Setting(SHAPES["tiny"], "cuda", attention="cudnn"))
    (fault,) = result.faults
    assert "cuDNN" in fault
