"""The memory that the stages of a run need: XLA's own analysis of their programs, compiled for devices that need not be
here (CPU devices stand in for them, see kd_jax.parallel.devices.pretend). Nothing is run: all arrays are shapes.
Only where the devices are this machine's CPU are a few runs timed.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Batch, Layout, Targets
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill import teacher_forward as teacher
from kd_jax.lm.experiment import cost
from kd_jax.lm.experiment import specs as settings_lib
from kd_jax.lm.experiment.arms import Arm
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.model import flops as flops_lib
from kd_jax.lm.training import step
from kd_jax.losses import head
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.parallel.devices import GIB, Target

# A run that is timed is to take about so long; longer ones are timed with fewer rows.
_PROBE_SECONDS = 10.0


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
        held: weights, moments, batch, cache: what is there between two runs of the program.
        temporary: gradients, activations, logits.
    """

    held: int
    temporary: int

    @property
    def total(self) -> int:
        return self.held + self.temporary


class Program(NamedTuple):
    """What is known of a stage's program.

    Attributes:
        memory: that it needs.
        rate: operations a second, as kd_jax.lm.experiment.cost counts them, that it was measured to reach on this
        machine; None     where it was not run.
    """

    memory: Memory
    rate: float | None = None


def programs(config, costs: dict[str, dict[str, Any]], arms: dict[str, Arm], target: Target) -> dict[str, Program]:
    """Of each stage of which the config says the shape; stages of the same program are compiled once."""
    there: dict[Any, Program] = {}
    found = {}
    for name, about in costs.items():
        if about.get("shape") is None:
            continue
        key, compiled = _program(config, about, arms.get(name), target)
        if key not in there:
            print(f"compiling what {name} runs ...", file=sys.stderr, flush=True)
            there[key] = compiled()
        found[name] = there[key]
    return found


def _program(config, about: dict[str, Any], arm: Arm | None, target: Target) -> tuple[Any, Callable[[], Program]]:
    """What tells a stage's program from others, and a function that compiles it."""
    shape, kind = about["shape"], about["kind"]
    if kind == "training":
        other = about.get("teacher"), about["count"], None if arm is None else arm.settings
        own = None if arm is None or arm.recording is None else arm.recording
        return (kind, shape, other, own), lambda: update(config, about, arm, target)
    if kind == "sampling":
        slots, dtype = config.sampling.batch_size, config.sampling.dtype
        return (kind, shape), lambda: Program(sampling(config, shape, slots, dtype, target))
    top_k = about.get("top_k")
    return (kind, shape, top_k), lambda: scoring(config, shape, top_k, target)


def update(config, about: dict[str, Any], arm: Arm | None, target: Target) -> Program:
    """An update of a training, and the student's own sampling before it where there is some."""
    made, arguments = _update(config, about, arm, target)
    compiled = made.lower(*arguments).compile()
    need = memory(compiled)
    if arm is not None and arm.rollouts:
        slots = arm.settings.rollout_batch_size or config.train.batch_size
        own = sampling(config, about["shape"], slots, config.compute.dtype, target, jnp.float32)
        # the weights are those of the state
        state = _bytes(arguments[0]) - _bytes(arguments[0].params)
        need = max(need, own._replace(held=own.held + state), key=lambda one: one.total)
    if not _can_run(need, target):
        return Program(need)
    length, count = config.sampling.max_length, about["count"]
    flops = flops_lib.training_flops(about["shape"], length)
    flops += 0 if about["teacher"] is None else flops_lib.forward_flops(about["teacher"], length)
    flops *= config.train.batch_size * length * count
    reckoned = flops / (flops_lib.ceiling(config.compute.dtype) * cost.SHARES["training"])
    if reckoned > 2 * _PROBE_SECONDS:
        rows = arguments[1].tokens.shape[-2]
        fewer = max(1, int(rows * _PROBE_SECONDS / reckoned))
        made, arguments = _update(config, about, arm, target, fewer)
        compiled, flops = made.lower(*arguments).compile(), flops * fewer / rows
    return Program(need, flops / _seconds(compiled, arguments, keeps=True))


def _update(config, about: dict[str, Any], arm: Arm | None, target: Target, rows: int | None = None):
    """The jitted update and the shapes of its arguments; of `rows` in each part, by default as many as there can be."""
    shape, count, mesh = about["shape"], about["count"], settings_lib.mesh(config)
    settings = settings_lib.training_settings(config)
    compute = _compute(target, mesh, **config.compute)
    optimizer, schedule = settings.optimizer(100), settings.schedule(100)
    arguments = [step.abstract(shape, optimizer, mesh), _batch(config, arm, shape, mesh, rows)]
    if count > 1:
        arguments = [_stacked(tree, count) for tree in arguments]
    loss = None
    if arm is not None and arm.settings is not None:
        distillation = _distillation(config, about, arm, target)
        loss = distill.loss(distillation, Model(shape, {}), compute, packed=config.train.row_length > 0)
        arguments.append(distill.guide(distillation))
    return step.make(shape, optimizer, schedule, compute, mesh, count, loss), arguments


def sampling(config, shape: Architecture, slots: int, dtype: str, target: Target, weights_dtype: Any = None) -> Memory:
    """The loop that draws samples, every slot with all of its pages."""
    mesh = settings_lib.mesh(config)
    compute = _compute(target, None, dtype=dtype)
    model = _model(shape, weights_dtype or compute.dtype, mesh)
    prompt = len(config.sampling.prompt_ids) or 1
    program = decode.lower(
        model, prompt, max_length=config.sampling.max_length, batch_size=slots, compute=compute, mesh=mesh
    )
    need = memory(program.compile())
    return need._replace(held=need.held + _bytes(model.params))  # the loop has them unstacked, as a copy


def scoring(config, shape: Architecture, top_k: int | None, target: Target) -> Program:
    """Scoring a batch of sequences, or recording a teacher's likeliest tokens of it."""
    mesh = settings_lib.mesh(config) if top_k is None else settings_lib.teacher_mesh(config)
    dtype = config.sampling.dtype if top_k is None else config.distill.teacher_dtype
    compute = _compute(target, mesh, dtype=dtype)
    model = _model(shape, compute.dtype, mesh)
    lengths = np.full(1, config.sampling.max_length)
    _, (rows, length) = next(score.batches(lengths, 4096, mesh_lib.batch_devices(mesh)))
    tokens = _shape((rows, length), np.int32, ("batch", None), mesh)
    arguments = [model.params, tokens]
    if top_k is None:
        compiled = score.lower(model, tokens, compute).compile()
    else:
        arguments.append(_shape((rows,), np.int32, ("batch",), mesh))

        def run(params, tokens, counts):
            return teacher.forward(params, shape, tokens, counts, want="top_k", k=top_k, compute=compute)

        compiled = jax.jit(run).lower(*arguments).compile()
    need = memory(compiled)
    if not _can_run(need, target):
        return Program(need)
    # what a row is filled up with is work, too
    flops = flops_lib.forward_flops(shape, config.sampling.max_length) * rows * config.sampling.max_length
    return Program(need, flops / _seconds(compiled, arguments))


def _can_run(need: Memory, target: Target) -> bool:
    chip = target.devices.chip
    return chip.cpu and need.total < 0.8 * chip.memory * GIB


def _seconds(compiled, arguments: list[Any], keeps: bool = False) -> float:
    """Of a run of a compiled program, median of three after a first; with `keeps`, its state goes from run to run."""
    values = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arguments)
    took = []
    for _ in range(4):
        began = time.perf_counter()
        out = jax.block_until_ready(compiled(*values))
        took.append(time.perf_counter() - began)
        values[0] = out[0] if keeps else values[0]
    return statistics.median(took[1:])


def memory(compiled) -> Memory:
    """What one device needs for a compiled program, by XLA's analysis of its buffers."""
    found = compiled.memory_analysis()
    # what is taken over (donated) counts once
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(held, found.temp_size_in_bytes)


def _compute(target: Target, mesh, *, dtype: str, **more) -> Compute:
    if target.devices.chip.cpu:
        return Compute(dtype=dtype, mesh=mesh, **more)
    # XLA's CPU compiler widens bfloat16 to float32 in places, but not float16, which is as large
    dtype = "float16" if dtype == "bfloat16" else dtype
    return Compute(dtype=dtype, mesh=mesh, chunk_tokens=head.TOKENS, **more)


def layout(config, mesh) -> Layout:
    """How the sequences of an update lie in rows."""
    longest, train = config.sampling.max_length, config.train
    row = train.row_length and max(train.row_length, longest)
    return Layout(train.batch_size, longest, row, train.parts, mesh_lib.batch_devices(mesh))


def _batch(config, arm: Arm | None, shape: Architecture, mesh, rows: int | None = None) -> Batch:
    how = layout(config, mesh)
    sizes = how.parts, rows or batches.most_rows(how) // how.parts, how.row_length or how.max_length

    def array(dtype, *more):
        return _shape((*sizes, *more), dtype, (None, "batch", None, *[None] * len(more)), mesh)

    targets = None
    if arm is not None and arm.recording is not None:
        number = np.uint16 if arm.recording.log_prob_format == "uint16" else np.float32
        ids = np.uint16 if shape.vocab_size <= 2**16 else np.uint32
        targets = Targets(array(ids, arm.recording.top_k), array(number, arm.recording.top_k), array(number))
    return Batch(array(np.int32), array(np.int32), array(np.int32), array(bool), targets)


def _distillation(config, about: dict[str, Any], arm: Arm, target: Target) -> distill.Distillation:
    if about.get("teacher") is None:
        return distill.Distillation(arm.settings)
    mesh = settings_lib.teacher_mesh(config)
    compute = _compute(target, mesh, **{**config.compute, "dtype": arm.knobs["teacher_dtype"], "remat": False})
    return distill.Distillation(arm.settings, _model(about["teacher"], compute.dtype, mesh), compute)


def _model(shape: Architecture, dtype, mesh) -> Model:
    leaves = model_lib.abstract(shape, jnp.dtype(dtype))
    if mesh is None:
        return Model(shape, leaves)
    where = mesh_lib.shardings(model_lib.logical_axes(shape), leaves, mesh)
    return Model(shape, jax.tree.map(lambda leaf, to: _struct(leaf.shape, leaf.dtype, to), leaves, where))


def _shape(sizes: tuple[int, ...], dtype, axes: tuple[str | None, ...], mesh) -> jax.ShapeDtypeStruct:
    return _struct(sizes, dtype, None if mesh is None else mesh_lib.sharding(axes, mesh))


def _struct(sizes, dtype, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def _stacked(tree: Any, count: int) -> Any:
    """The shapes of as many models trained together."""

    def one(leaf):
        to = leaf.sharding
        if isinstance(to, jax.sharding.NamedSharding):
            to = jax.sharding.NamedSharding(to.mesh, jax.sharding.PartitionSpec(None, *to.spec))
        return _struct((count, *leaf.shape), leaf.dtype, to)

    return jax.tree.map(one, tree)


def _bytes(tree: Any) -> int:
    """Of a tree of shapes, on one device."""
    sizes = ((leaf, leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))
             for leaf in jax.tree.leaves(tree))  # fmt: skip
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in sizes)
