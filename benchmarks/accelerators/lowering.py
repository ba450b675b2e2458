"""Lowers the programs for GPUs and TPUs and checks what the lowered programs say."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from benchmarks.accelerators import stablehlo
from benchmarks.accelerators.programs import PROGRAMS, SHAPES, Setting, choosing_for
from kd_jax.lm.experiment import footprint
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.parallel.devices import GIB


class Result(NamedTuple):
    """A row of the table; `faults` says what is wrong, and is empty for a good program."""

    program: str
    platform: str
    devices: int
    kib: int  # of the program's text
    seconds: float  # to trace and lower
    donated: int
    widest: str  # the largest array of logits
    faults: tuple[str, ...]


def lower(name: str, setting: Setting) -> Result:
    """Lowers one program and checks it."""
    devices = 1 if setting.mesh is None else setting.mesh.size
    began = time.perf_counter()
    try:
        lowered = PROGRAMS[name].lower(setting)
        text = lowered.as_text()
    except Exception as error:  # the table says what does not lower, and goes on
        seconds, reason = time.perf_counter() - began, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Result(name, setting.platform, devices, 0, seconds, 0, "", (reason,))
    seconds = time.perf_counter() - began
    kept = sum(one.donated for one in jax.tree.leaves(lowered.args_info))
    logits = stablehlo.widest(text, setting.shape.student.vocab_size) if PROGRAMS[name].tokens else None
    return Result(
        name, setting.platform, devices, len(text) >> 10, seconds, stablehlo.donated(text), str(logits or ""),
        tuple(_faults(name, setting, text, kept, logits)),
    )  # fmt: skip


def _faults(name: str, setting: Setting, text: str, kept: int, logits: stablehlo.Array | None) -> list[str]:
    faults = [f"float64: {', '.join(arrays)}" for arrays in [stablehlo.float64(text)] if arrays]
    faults += [f"float32 product without HIGHEST: {one}" for one in stablehlo.rounded_products(text)]
    faults += [f"calls the host: {one}" for one in stablehlo.host_calls(text)]
    donated = stablehlo.donated(text)
    if donated != kept or PROGRAMS[name].donates != (donated > 0):
        faults.append(f"{donated} of {kept} donated arrays are marked")
    if logits is not None:
        # the last token of a row predicts nothing
        shape = setting.shape
        tokens = shape.rows * (shape.length - 1) * setting.devices
        if math.prod(logits.sizes) >= tokens * shape.student.vocab_size:
            faults.append(f"{logits} is as large as the logits of all {tokens} tokens")
    return faults


def run(shape: str, platforms: Sequence[str], programs: Sequence[str], devices: Sequence[int] = (1, 8)) -> list[Result]:
    """Lowers each program for each platform and number of devices, and prints the table.

    Args:
        shape: a key of SHAPES.
        platforms: of "cuda" and "tpu".
        programs: keys of PROGRAMS.
        devices: numbers of devices; JAX has to show as many.
    """
    print(f"{shape}, bfloat16; attention on a TPU by its kernel, on a GPU by blocks: cuDNN's needs cuDNN to be lowered")
    print(f"{'program':15}{'platform':>9}{'devices':>8}{'KiB':>7}{'s':>6}{'donated':>8}  {'widest logits':24} result")
    results = []
    for platform in platforms:
        for count in devices:
            # half of the devices split weights, as rows do
            mesh = None if count == 1 else mesh_lib.make(2, count // 2, devices=jax.devices()[:count])
            with choosing_for(platform):
                setting = Setting(SHAPES[shape], platform, mesh, "blocked" if platform == "cuda" else "auto")
                for name in programs:
                    results.append(lower(name, setting))
                    print(_line(results[-1]), flush=True)
    return results


def compile_for(topology: str, shape: str, programs: Sequence[str]) -> bool:
    """Compiles the programs by the TPU's own compiler, and prints the memory that each device needs.

    The compiler comes with the package libtpu, in the version that JAX's extra "tpu" names; it needs no TPU.

    Args:
        topology: "v5e:2x4", as jax.experimental.topologies takes it.
        shape: a key of SHAPES.
        programs: keys of PROGRAMS.
    Returns: whether all compile.
    """
    from jax.experimental import topologies

    # libtpu would ask the cloud where it runs
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices
    mesh = mesh_lib.make(min(2, len(devices)), max(1, len(devices) // 2), devices=devices)
    fine = True
    for name in programs:
        began = time.perf_counter()
        with choosing_for("tpu"):
            lowered = PROGRAMS[name].lower(Setting(SHAPES[shape], "tpu", mesh))
        try:
            need = footprint.memory(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            fine, verdict = False, str(error).splitlines()[0]
        else:
            verdict = f"{need.resident / GIB:.2f} GiB stay, {need.temporary / GIB:.2f} GiB for a while"
        print(f"{name:15} {topology:10} {shape:5} {time.perf_counter() - began:6.1f} s  {verdict}", flush=True)
    return fine


def _line(one: Result) -> str:
    verdict = "; ".join(one.faults) or "lowered"
    return (
        f"{one.program:15}{one.platform:>9}{one.devices:>8}{one.kib:>7}{one.seconds:>6.1f}{one.donated:>8}  "
        f"{one.widest:24} {verdict}"
    )
