"""The plan of a run on devices that need not be here, stage by stage: `--dry_run --device 8xH100`.

Memory is XLA's analysis (kd_jax.lm.experiment.footprint). Time is floating-point operations at a stated share of the
peak rate (MFU); sampling takes at least the time of reading the weights and the cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from kd_jax.lm.corpus import batches
from kd_jax.lm.experiment import cost as cost_lib
from kd_jax.lm.experiment import footprint
from kd_jax.lm.experiment.cost import Cost
from kd_jax.lm.experiment.footprint import Memory, Program
from kd_jax.lm.experiment.specs import LmSpec, MeshSpec, make_mesh
from kd_jax.lm.model import flops
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.parallel.devices import GIB, Devices, Target

# Share of the memory's bandwidth that reading weights and cache is taken to reach.
BANDWIDTH_SHARE = 0.6


def over_slices(spec: LmSpec, devices: Devices) -> LmSpec:
    """The run with its meshes over the slices of the planned devices.

    CPU devices stand in for the planned ones and belong to no slice, so the settings have to name the slices.

    Args:
        spec: of the run. Where it sets config.mesh.slices, that stays.
        devices: the planned ones.
    Raises: ValueError where fsdp or tensor would span slices.
    """
    if devices.slices == 1:
        return spec

    def sliced(sizes: MeshSpec) -> MeshSpec:
        sizes = dataclasses.replace(sizes, slices=sizes.slices or devices.slices)
        make_mesh(sizes)  # raises before anything is compiled
        return sizes

    return dataclasses.replace(spec, mesh=sliced(spec.mesh), teacher_mesh=sliced(spec.teacher_mesh))


def show(spec: LmSpec, costs: dict[str, Cost], finished: Callable[[str], bool], target: Target) -> None:
    """Prints a table of stages by name, their total, and what does not fit. It compiles their programs first.

    Args:
        spec: of the run.
        costs: of its stages.
        finished: whether the stage of a name is finished.
        target: the devices to plan for.
    """
    programs = footprint.programs(spec, costs, target)
    print(_heading(spec, target))
    print(f"{'stage':24} {'GiB a device':>12} {'tokens':>15} {'FLOPs':>9} {'tokens/s':>12} {'hours':>9} {'disk GB':>9}"
          f" {'cost':>10}  state")  # fmt: skip
    hours = disk = 0.0
    for name, cost in costs.items():
        stage_hours, done = seconds(spec, cost, target, programs.get(name)) / 3600, finished(name)
        # Only what is left counts.
        hours, disk = hours + (0 if done else stage_hours), disk + (0 if done else cost.disk)
        # rows that are read or chosen take no time and no device
        rate = cost.tokens / stage_hours / 3600 if stage_hours else 0.0
        gib = programs[name].memory.total / GIB if name in programs else math.nan if cost.tokens else 0.0
        print(
            f"{name:24} {gib:12.1f} {cost.tokens:15,} {cost.flops:9.2e} {rate:12,.0f} "
            f"{stage_hours:9.2f} {cost.disk / 1e9:9.1f} {_price(stage_hours, target):>10}  "
            f"{'finished' if done else 'to do'}"
        )
    print(f"at most {hours:.1f} hours are left, {disk / 1e9:.0f} GB on disk, cost {_price(hours, target)}")
    for line in [
        _method(target),
        *_networks(spec, costs, programs, target),
        *_waste(spec),
        *_verdicts(spec, costs, programs, target),
    ]:
        print(line)


def seconds(spec: LmSpec, cost: Cost, target: Target, program: Program | None = None) -> float:
    """A stage's time; NaN where the config does not say the shape. Where a rate was measured, it is taken.

    Args:
        cost: of the stage.
        target: the devices to plan for.
        program: the stage's, as `footprint.programs` gives it.
    """
    if cost.shape is None:
        return math.nan
    if target.devices.chip.cpu:
        # On this machine a measurement says more than a peak.
        rate = None if program is None else program.rate
        if rate is None:
            dtype = spec.compute.dtype if cost.kind == "training" else spec.sampling.dtype
            rate = flops.ceiling(dtype) * cost_lib.SHARES[cost.kind]
        # writing goes on in the background, but takes the same cores
        return cost.flops / rate + (cost.written / cost_lib.writing_rate() if cost.written else 0)
    if cost.kind == "sampling":
        return _sampling_seconds(spec, cost, target)
    dtype, filled = spec.sampling.dtype, 1.0
    if cost.kind == "training":
        dtype, filled = spec.compute.dtype, min(1.0, _filled(spec, cost.train))
    # Padding is computed like tokens: a row that is half full takes as long as a full one.
    return cost.flops / (_peak(target, dtype) * target.mfu * filled) + _network_seconds(cost, target, program)


def _network_seconds(cost: Cost, target: Target, program: Program | None) -> float:
    """The time of what goes over the network between slices; 0 where its bandwidth is not known."""
    network = target.devices.chip.network
    return 0.0 if program is None or network is None else cost.tokens * program.sent / network


def _sampling_seconds(spec: LmSpec, cost: Cost, target: Target) -> float:
    """The longer of computing and of reading all weights and half of the cache at each step.

    Tensor parallelism splits both (the cache by whole heads); fsdp splits the slots alone, as sampling replicates the
    weights over it.
    """
    mesh, shape, dtype = make_mesh(spec.mesh), cost.shape, spec.sampling.dtype
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    parts = mesh_lib.batch_devices(mesh)
    slots = -(-spec.sampling.batch_size // parts)
    # Keys and values, of half the maximal length: sequences grow from nothing to all of it.
    cached = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * spec.sampling.max_length / 2
    # KV heads that tensor does not divide are whole on each device (kd_jax.lm.decode.slots).
    split = 1 if shape.num_key_value_heads % tensor else tensor
    read = shape.num_parameters / tensor + slots * cached / split
    step = read * jnp.dtype(dtype).itemsize / (target.devices.chip.bandwidth * BANDWIDTH_SHARE)
    # The slower of arithmetic and memory decides; at small batches it is memory.
    return max(cost.flops / (_peak(target, dtype) * target.mfu), cost.tokens / (slots * parts) * step)


def _peak(target: Target, dtype: str) -> float:
    chip = target.devices.chip
    return target.devices.count * (chip.float32 if dtype == "float32" else chip.bfloat16)


def _filled(spec: LmSpec, train: TrainSpec) -> float:
    """The share of an update's arrays that has tokens in it, if all sequences have the maximal length."""
    layout = footprint.layout(spec, train, make_mesh(spec.mesh))
    length = layout.row_length or layout.max_length
    return layout.sequences * layout.max_length / (batches.most_rows(layout) * length)


def _price(hours: float, target: Target) -> str:
    price = target.price_per_hour
    return "?" if price is None else f"{hours * price * target.devices.count:,.2f}"


def _heading(spec: LmSpec, target: Target) -> str:
    devices, mesh = target.devices, make_mesh(spec.mesh)
    sizes = {name: 1 for name in mesh_lib.AXES} if mesh is None else mesh.shape
    rows = " x ".join(f"{name}={sizes[name]}" for name in mesh_lib.AXES)
    slices = f" in {devices.slices} slices" if devices.slices > 1 else ""
    if devices.chip.cpu:
        return f"{devices.name}: this machine, {devices.chip.memory:.1f} GiB; mesh {rows}"
    return (
        f"{devices.name}: {devices.count} devices{slices} of {devices.chip.memory:.0f} GiB and "
        f"{devices.chip.bfloat16 / 1e12:.0f} TFLOP/s (bfloat16; float32 {devices.chip.float32 / 1e12:.0f}); mesh {rows}"
    )


def _method(target: Target) -> str:
    if target.devices.chip.cpu:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in cost_lib.SHARES.items())
        return (
            "time: programs were run a few times just now; sampling, and what is too large to run, is taken to reach "
            f"these shares of the rate of large products: {shares}; checkpoints as fast as one written just now\n"
            "memory: XLA's analysis of the compiled programs"
        )
    price = " (no --price_per_hour)" if target.price_per_hour is None else ""
    return (
        f"time: {target.mfu:.0%} of the peak rate (--mfu); sampling at least as long as reading weights and cache "
        f"takes at {BANDWIDTH_SHARE:.0%} of the bandwidth; all sequences of maximal length; checkpoints are written "
        f"in the background and take no time{price}\n"
        "memory: XLA's analysis of the programs compiled for as many CPU devices; compilers for GPUs and TPUs fuse, "
        "lay out and pad differently, and need more or less"
    )


def _networks(spec: LmSpec, costs: dict[str, Cost], programs: dict[str, Program], target: Target) -> list[str]:
    """Lines about what goes over the network between slices."""
    devices, network = target.devices, target.devices.chip.network
    if devices.slices == 1:
        return []
    if network is None:
        return [f"the network between slices is not counted: no bandwidth is known for {devices.name}"]
    lines = [
        f"between slices: {network / 1e9:g} GB/s a device (published), assumed not to overlap with arithmetic; latency "
        "and what sampling sends are not counted"
    ]
    seen: list[Program] = []
    for name, program in programs.items():
        if program.sent and program not in seen:
            seen.append(program)  # stages share programs
            total = costs[name].tokens * program.sent
            share = total / network / seconds(spec, costs[name], target, program)
            lines.append(f"{name}: each device sends {total / 1e6:,.1f} MB to other slices, {share:.0%} of the time")
    return lines


def _waste(spec: LmSpec) -> list[str]:
    train = spec.train_of("student")
    filled = _filled(spec, train)
    if filled > 0.95:
        return []
    layout = footprint.layout(spec, train, make_mesh(spec.mesh))
    return [
        f"{1 - filled:.0%} of each update's {batches.most_rows(layout)} rows is padding: "
        f"config.train.batch_size={layout.sequences} is not enough for {layout.row_multiple} devices (the times above "
        "include it)"
    ]


def _verdicts(spec: LmSpec, costs: dict[str, Cost], programs: dict[str, Program], target: Target) -> list[str]:
    """A line for each program that does not fit, or fits only if JAX is told to take more of the memory."""
    chip, lines, seen = target.devices.chip, [], set()
    for name, program in programs.items():
        need, gib = program.memory, program.memory.total / GIB
        if need in seen or gib <= chip.usable * chip.memory:
            continue
        # Stages share programs: each is named once.
        seen.add(need)
        # By default JAX leaves a part of a GPU's memory alone, and can be told to take it.
        if gib <= 0.95 * chip.memory:
            lines.append(
                f"{name} fits, but needs {gib:.1f} GiB of {chip.memory:.0f}, of which JAX takes {chip.usable:.0%} by "
                "itself: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
            )
        else:
            lines.append(
                f"{name} does not fit: needs {gib:.1f} GiB of {chip.memory:.0f}{_advice(spec, costs[name], need)}"
            )
    return lines or ["everything whose shape the config says fits"]


def _advice(spec: LmSpec, cost: Cost, need: Memory) -> str:
    resident, temporary = need.resident / GIB, need.temporary / GIB
    if cost.kind == "sampling":
        return f" ({resident:.1f} weights and cache): lower config.sampling.batch_size, or config.mesh.fsdp or tensor"
    if cost.kind == "scoring":
        return f" ({resident:.1f} weights): raise config.mesh.fsdp or tensor"
    ways = []
    # What takes the most memory is what to act on; where both are large, both ways are named.
    if temporary > resident / 2:
        if not spec.compute.remat:
            ways.append("config.compute.remat=True")
        ways.append(f"config.train.parts={2 * cost.train.parts}")
        ways.append("a smaller config.train.batch_size")
    if resident > temporary / 2:
        ways.append("a larger config.mesh.fsdp, which splits weights and moments")
    return f" ({resident:.1f} weights and moments, {temporary:.1f} gradients and activations): {', or '.join(ways)}"
