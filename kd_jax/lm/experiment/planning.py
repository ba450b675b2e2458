"""What a run would take on devices that are not here, stage by stage: `--dry_run --device 8xH100`.

Memory is XLA's analysis (kd_jax.lm.experiment.footprint). Time is reckoned: floating-point operations at a stated
share of the peak (MFU), and where samples are drawn at least as long as it takes to read the weights and the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kd_jax.lm.corpus import batches
from kd_jax.lm.experiment import arms, cost, footprint
from kd_jax.lm.experiment import specs as settings_lib
from kd_jax.lm.experiment.footprint import Memory, Program
from kd_jax.lm.model import flops
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.parallel.devices import GIB, Target

# Of the memory's bandwidth, what reading weights and cache is taken to reach.
BANDWIDTH_SHARE = 0.6


def show(config, costs: dict[str, dict[str, Any]], finished: Callable[[str], bool], target: Target) -> None:
    """Prints a table of stages by name, what all take together, and what does not fit; compiles their programs first.

    `costs` as of kd_jax.lm.experiment.cost.
    """
    ways = {arm.name: arm for arm in arms.arms(config)}
    needs = footprint.programs(config, costs, {name: ways.get(name.split("/")[0]) for name in costs}, target)
    print(_heading(config, target))
    print(f"{'stage':24} {'GiB a device':>12} {'tokens':>15} {'FLOPs':>9} {'tokens/s':>12} {'hours':>9} {'disk GB':>9}"
          f" {'cost':>10}  state")  # fmt: skip
    hours = disk = 0.0
    for name, about in costs.items():
        took, done = seconds(config, about, target, needs.get(name)) / 3600, finished(name)
        hours, disk = hours + (0 if done else took), disk + (0 if done else about.get("disk", math.nan))
        gib = needs[name].memory.total / GIB if name in needs else math.nan
        print(
            f"{name:24} {gib:12.1f} {about['tokens']:15,} {about.get('flops', math.nan):9.2e} "
            f"{about['tokens'] / took / 3600:12,.0f} {took:9.2f} {about.get('disk', math.nan) / 1e9:9.1f} "
            f"{_cost(took, target):>10}  {'finished' if done else 'to do'}"
        )
    print(f"at most {hours:.1f} hours are left, {disk / 1e9:.0f} GB on disk, cost {_cost(hours, target)}")
    print(_reckoning(target))
    for line in [*_waste(config), *_verdicts(config, costs, needs, target)]:
        print(line)


def seconds(config, about: dict[str, Any], target: Target, program: Program | None = None) -> float:
    """A stage's time; NaN where the config does not say the shape. What was measured goes before what is reckoned."""
    if about["shape"] is None:
        return math.nan
    if target.devices.chip.cpu:
        rate = None if program is None else program.rate
        if rate is None:
            dtype = config.compute.dtype if about["kind"] == "training" else config.sampling.dtype
            rate = flops.ceiling(dtype) * cost.SHARES[about["kind"]]
        # both are work for the same cores, also where they go on at the same time
        written = about.get("written", 0)
        return about["flops"] / rate + (written / cost.writing_rate() if written else 0)
    if about["kind"] == "sampling":
        return _sampling_seconds(config, about, target)
    dtype, filled = config.sampling.dtype, 1.0
    if about["kind"] == "training":
        dtype, filled = config.compute.dtype, min(1.0, _filled(config))
    return about["flops"] / (_peak(target, dtype) * target.mfu * filled)


def _sampling_seconds(config, about: dict[str, Any], target: Target) -> float:
    """The larger of what the operations take, and reading: at each step all weights, and half of the cache.

    Tensor splits both (the cache by whole heads), fsdp the slots alone: sampling has the weights whole there.
    """
    mesh, shape, dtype = settings_lib.mesh(config), about["shape"], config.sampling.dtype
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    parts = mesh_lib.batch_devices(mesh)
    slots = -(-config.sampling.batch_size // parts)
    cached = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * config.sampling.max_length / 2
    split = 1 if shape.num_key_value_heads % tensor else tensor
    read = shape.num_parameters / tensor + slots * cached / split
    step = read * jnp.dtype(dtype).itemsize / (target.devices.chip.bandwidth * BANDWIDTH_SHARE)
    return max(about["flops"] / (_peak(target, dtype) * target.mfu), about["tokens"] / (slots * parts) * step)


def _peak(target: Target, dtype: str) -> float:
    chip = target.devices.chip
    return target.devices.count * (chip.float32 if dtype == "float32" else chip.bfloat16)


def _filled(config) -> float:
    """How much of an update's arrays has tokens in it, where all sequences are as long as they can be."""
    layout = footprint.layout(config, settings_lib.mesh(config))
    length = layout.row_length or layout.max_length
    return layout.sequences * layout.max_length / (batches.most_rows(layout) * length)


def _cost(hours: float, target: Target) -> str:
    price = target.price_per_hour
    return "?" if price is None else f"{hours * price * target.devices.count:,.2f}"


def _heading(config, target: Target) -> str:
    devices, mesh = target.devices, settings_lib.mesh(config)
    sizes = {name: 1 for name in mesh_lib.AXES} if mesh is None else mesh.shape
    rows = " x ".join(f"{name}={sizes[name]}" for name in mesh_lib.AXES)
    if devices.chip.cpu:
        return f"{devices.name}: this machine, {devices.chip.memory:.1f} GiB; mesh {rows}"
    return (
        f"{devices.name}: {devices.count} devices of {devices.chip.memory:.0f} GiB and "
        f"{devices.chip.bfloat16 / 1e12:.0f} TFLOP/s (bfloat16; float32 {devices.chip.float32 / 1e12:.0f}); mesh {rows}"
    )


def _reckoning(target: Target) -> str:
    if target.devices.chip.cpu:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in cost.SHARES.items())
        return (
            "time: by a few runs of the programs just now, but of sampling (and of what is too large to run) these "
            f"shares of what large products reach: {shares}; and checkpoints at the pace of one written just now\n"
            "memory: by XLA's analysis of the compiled programs"
        )
    price = " (no --price_per_hour)" if target.price_per_hour is None else ""
    return (
        f"time: {target.mfu:.0%} of the peak (--mfu); of sampling at least what reading weights and cache takes at "
        f"{BANDWIDTH_SHARE:.0%} of the bandwidth; tokens as if all sequences were as long as they can be; checkpoints, "
        f"which are written beside the updates, take no time{price}\n"
        "memory: by XLA's analysis of the programs as it compiles them for as many CPU devices; a GPU's or TPU's "
        "compiler fuses, lays out and pads otherwise, and needs more or less"
    )


def _waste(config) -> list[str]:
    filled = _filled(config)
    if filled > 0.95:
        return []
    layout = footprint.layout(config, settings_lib.mesh(config))
    return [
        f"{1 - filled:.0%} of each update's {batches.most_rows(layout)} rows is empty: "
        f"config.train.batch_size={layout.sequences} is not enough for {layout.row_multiple} devices (the times say so)"
    ]


def _verdicts(config, costs: dict[str, dict[str, Any]], needs: dict[str, Program], target: Target) -> list[str]:
    """A line for each program that does not fit, or that there is one that fits only if JAX is told to take more."""
    chip, lines, seen = target.devices.chip, [], set()
    for name, (need, _) in needs.items():
        gib = need.total / GIB
        if need in seen or gib <= chip.usable * chip.memory:
            continue
        seen.add(need)
        if gib <= 0.95 * chip.memory:
            lines.append(
                f"{name} fits, but needs {gib:.1f} GiB of {chip.memory:.0f}, of which JAX takes {chip.usable:.0%} by "
                "itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
            )
        else:
            lines.append(
                f"{name} does not fit: needs {gib:.1f} GiB of {chip.memory:.0f}{_advice(config, costs[name], need)}"
            )
    return lines or ["everything whose shape the config says fits"]


def _advice(config, about: dict[str, Any], need: Memory) -> str:
    held, temporary = need.held / GIB, need.temporary / GIB
    if about["kind"] == "sampling":
        return f" ({held:.1f} weights and cache): lower config.sampling.batch_size, or config.mesh.fsdp or tensor"
    if about["kind"] == "scoring":
        return f" ({held:.1f} weights): raise config.mesh.fsdp or tensor"
    ways = []
    if temporary > held / 2:
        if not config.compute.remat:
            ways.append("config.compute.remat=True")
        ways.append(f"config.train.parts={2 * config.train.parts}")
        ways.append("a smaller config.train.batch_size")
    if held > temporary / 2:
        ways.append("a larger config.mesh.fsdp, which splits weights and moments")
    return f" ({held:.1f} weights and moments, {temporary:.1f} gradients and activations): {', or '.join(ways)}"
