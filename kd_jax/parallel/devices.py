"""Accelerators by name, for plans (`--dry_run --device 8xH100`)."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
    """One device, as JAX counts devices.

    Attributes:
        memory: in GiB.
        bfloat16: peak FLOP/s of dense bfloat16 products (float16 is the same).
        float32: peak FLOP/s of real float32 products, which kd_jax asks for where arrays are float32.
        bandwidth: of its memory, in bytes a second.
        usable: share of the memory that JAX allocates by default.
        cpu: whether it is this machine's CPU.
        mfu: share of the bfloat16 peak that trainings of others reached on it (docs/speed.md has the runs).
        network: bytes a second that a device can send to other slices or nodes; None where no figure was found.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    usable: float = 0.75  # of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION
    cpu: bool = False
    mfu: float = 0.35  # where no published run was found
    network: float | None = None


def _tpu(memory: float, bfloat16: float, bandwidth: float, network: float | None, mfu: float = 0.35) -> Chip:
    # a TPU computes float32 as six bfloat16 products (jax.lax.Precision.HIGHEST)
    return Chip(memory, bfloat16, bfloat16 / 6, bandwidth, usable=0.97, mfu=mfu, network=network)


# From NVIDIA's data sheets (those titled "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "HGX
# B200", "L4", "L40S" and the Ada GPU architecture white paper). Tensor cores without sparsity, where a sheet gives the
# number with sparsity half of it; float32 is that of the ordinary cores; SXM boards unless the name says PCIe. Network:
# of the DGX machines (data sheets "DGX A100", "DGX H100", "DGX H200", "DGX B200"), which have one adapter for each GPU,
# of 200 Gb/s (A100) or 400 Gb/s. Other machines may have much less.
GPUS = {
    "A100-40GB": Chip(40, 312e12, 19.5e12, 1.555e12, mfu=0.45, network=25e9),
    "A100-80GB": Chip(80, 312e12, 19.5e12, 2.039e12, mfu=0.45, network=25e9),
    "H100": Chip(80, 989e12, 67e12, 3.35e12, mfu=0.3, network=50e9),
    "H100-PCIe": Chip(80, 756e12, 51e12, 2.0e12),
    "H200": Chip(141, 989e12, 67e12, 4.8e12, network=50e9),
    "B200": Chip(180, 2250e12, 80e12, 8.0e12, network=50e9),
    "L4": Chip(24, 121e12, 30.3e12, 0.3e12),
    "L40S": Chip(48, 362e12, 91.6e12, 0.864e12),
    "RTX4090": Chip(24, 165e12, 82.6e12, 1.008e12),
}
# From Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": a chip. JAX takes a chip for one device. Network:
# their data center network, 50 Gb/s a chip of v5p, 6.4 and 25.6 Tb/s for the 256 chips of a v5e and v6e pod.
TPUS = {
    "v4": _tpu(32, 275e12, 1.2e12, None),
    "v5e": _tpu(16, 197e12, 0.819e12, 3.125e9),
    "v5p": _tpu(95, 459e12, 2.765e12, 6.25e9, mfu=0.6),
    "v6e": _tpu(32, 918e12, 1.64e12, 12.5e9, mfu=0.42),
}
# In these names the number counts TensorCores, two a chip; in the others it counts chips.
_COUNTS_CORES = ("v4", "v5p")
_SLICES = (1, 4, 8, 16, 32, 64, 128, 256)


class Devices(NamedTuple):
    """`count` devices of one kind in `slices` slices or nodes; `name` is the text they were asked for by."""

    name: str
    count: int
    chip: Chip
    slices: int = 1


class Target(NamedTuple):
    """What a plan is for.

    Attributes:
        devices: the devices of the planned run.
        mfu: share of their peak that training and scoring reach (model FLOPs utilisation).
        price_per_hour: of one device, in any currency; None where it is unknown.
    """

    devices: Devices
    mfu: float
    price_per_hour: float | None = None


def target(text: str, mfu: float | None, price_per_hour: float | None) -> Target:
    """The target of --device, --mfu and --price_per_hour. Raises ValueError out of range, and as `parse`.

    Args:
        text: of --device, as of `parse`.
        mfu: share of the peak that is reached, above 0 and at most 1; None for the chip's.
        price_per_hour: of one device; None where it is unknown.
    """
    devices = parse(text)
    mfu = devices.chip.mfu if mfu is None else mfu
    if not (0 < mfu <= 1 and 0 <= (price_per_hour or 0) < float("inf")):
        raise ValueError(f"--mfu={mfu} must be above 0 and at most 1, and --price_per_hour={price_per_hour} at least 0")
    return Target(devices, mfu, price_per_hour)


def parse(text: str) -> Devices:
    """Devices from --device, by name and number.

    "8xH100" or "H200": GPUs of one node; "2x 8xH100": of two. "v5e-64" (or "v5litepod-64"), "v4-32": a slice of TPUs;
    "4x v5e-64": four slices. "1xCPU": this machine. The space may be left out.

    Raises: ValueError, listing the known devices, for another name, or for a TPU slice that does not exist.
    """
    words = re.fullmatch(r"(?:([1-9]\d*)x ?)?(?:([1-9]\d*)x)?([\w-]+)", text)
    first, second, name = (int(words[1] or 1), words[2], words[3]) if words else (1, None, text)
    if name.lower() == "cpu" and first == 1 and second is None:
        return Devices(text, 1, _this_machine())
    # One number before a GPU's name counts GPUs, the first of two counts nodes. A TPU's name itself has the size.
    slices, count = (first, int(second)) if second else (1, first)
    for known, chip in GPUS.items():
        if name.lower() == known.lower():
            return Devices(text, slices * count, chip, slices)
    kind, _, number = name.lower().replace("v5litepod", "v5e").partition("-")
    if kind not in TPUS or not number.isdecimal() or second:
        raise ValueError(f"--device={text} is not known. These are:\n{known_devices()}")
    return Devices(text, first * _chips(text, kind, int(number)), TPUS[kind], first)


def _chips(text: str, kind: str, number: int) -> int:
    """Chips of a TPU slice."""
    cores = kind in _COUNTS_CORES  # two a chip, four chips a host
    if number % 8 or not number if cores else number not in _SLICES:
        sizes = "8, 16, ... TensorCores" if cores else f"{', '.join(map(str, _SLICES))} chips"
        raise ValueError(f"--device={text}: a {kind} slice has {sizes}, not {number}")
    return number // 2 if cores else number


def known_devices() -> str:
    """A table of the known devices, for messages."""
    lines = [f"  {'NxNAME':14} {'memory, GiB':>11} {'bf16 TFLOP/s':>13}"]
    lines += [f"  {'8x' + name:14} {chip.memory:11.0f} {chip.bfloat16 / 1e12:13.0f}" for name, chip in GPUS.items()]
    for name, chip in TPUS.items():
        counts = "TensorCores" if name in _COUNTS_CORES else "chips"
        lines.append(f"  {name + '-N':14} {chip.memory:11.0f} {chip.bfloat16 / 1e12:13.0f}  a chip; N counts {counts}")
    lines += ["  1xCPU          this machine, measured", 'Several nodes or slices: "2x 8xH100", "4x v5e-64"']
    return "\n".join(lines)


def pretend(devices: Devices) -> None:
    """Makes JAX show as many CPU devices, so that programs for `devices` can be compiled here.

    Raises: RuntimeError where JAX has started already.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices.count)


def limit() -> float | None:
    """Bytes of one of this process's accelerators, as far as JAX may take them; None for a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def memory() -> float:
    """`limit`; of a CPU, the bytes of the machine."""
    return limit() or _this_machine().memory * GIB


def _this_machine() -> Chip:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    # Rates of a CPU are measured (kd_jax.lm.model.flops.ceiling), not looked up.
    return Chip(memory, float("nan"), float("nan"), float("nan"), usable=1.0, cpu=True)
