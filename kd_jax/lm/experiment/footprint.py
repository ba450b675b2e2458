"""The memory that the programs of a run need, by XLA's own analysis.

They are compiled for devices that need not be here: CPU devices stand in for them (kd_jax.parallel.devices.pretend),
and all arrays are shapes. Programs are run, and timed, only where the devices are this machine's CPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax import losses
from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Batch, Layout, Pair, Spans, Targets
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill import teacher_forward as teacher
from kd_jax.lm.experiment import cost as cost_lib
from kd_jax.lm.experiment.cost import Cost
from kd_jax.lm.experiment.specs import LmSpec, make_mesh
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.model import flops as flops_lib
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.losses import head
from kd_jax.parallel import collectives
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.parallel.devices import GIB, Target

# A timed run should take about this long; longer ones are timed with fewer rows.
_PROBE_SECONDS = 10.0


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
        resident: weights, moments, batch, cache: what stays between two runs of the program.
        temporary: gradients, activations, logits.
    """

    resident: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes while the program runs."""
        return self.resident + self.temporary


class Program(NamedTuple):
    """A stage's program.

    Attributes:
        memory: that it needs.
        rate: FLOP/s (as kd_jax.lm.experiment.cost counts them) measured on this machine; None where it was not run.
        sent: bytes that a device sends to other slices for each token of the stage, on average.
    """

    memory: Memory
    rate: float | None = None
    sent: float = 0.0


def programs(spec: LmSpec, costs: dict[str, Cost], target: Target) -> dict[str, Program]:
    """The program of each stage that runs one, where the config says its shape; equal programs are compiled once.

    Args:
        costs: of the stages, by name.
        target: the devices to plan for.
    """
    compiled: dict[Any, Program] = {}
    by_stage = {}
    for name, cost in costs.items():
        if cost.shape is None or not cost.tokens:
            continue
        key = _key(cost)
        if key not in compiled:
            print(f"compiling what {name} runs ...", file=sys.stderr, flush=True)
            compiled[key] = _program(spec, cost, target)
        by_stage[name] = compiled[key]
    return by_stage


def _key(cost: Cost) -> Any:
    """What tells a stage's program from others."""
    # All that changes the program; names, seeds and corpora do not.
    arm = None if cost.arm is None else (cost.arm.distill, cost.arm.recording)
    return cost.kind, cost.shape, cost.count, cost.teacher, cost.top_k, arm, cost.train, cost.part


def _program(spec: LmSpec, cost: Cost, target: Target) -> Program:
    if cost.kind == "training":
        return update(spec, cost, target)
    if cost.kind == "sampling":
        return Program(sampling(spec, cost.shape, spec.sampling.batch_size, spec.sampling.dtype, target))
    return scoring(spec, cost.shape, cost.top_k, target)


def update(spec: LmSpec, cost: Cost, target: Target) -> Program:
    """The program of an update, or of the student's own sampling before it where that needs more memory.

    Args:
        cost: of the training.
        target: the devices to plan for.
    """
    program, arguments = _update(spec, cost, target)
    compiled = program.lower(*arguments).compile()
    need = memory(compiled)
    sent = _sent(compiled, target) / (cost.train.batch_size * spec.sampling.max_length * cost.count)
    if cost.arm is not None and cost.arm.rollouts:
        # Sampling and update take turns, so the larger of the two counts.
        slots = cost.arm.distill.rollout_batch_size or cost.train.batch_size
        rollout = sampling(spec, cost.shape, slots, spec.compute.dtype, target, jnp.float32)
        # the rollout's weights are the state's, and count once
        state = mesh_lib.device_bytes(arguments[0]) - mesh_lib.device_bytes(arguments[0].params)
        need = max(need, rollout._replace(resident=rollout.resident + state), key=lambda one: one.total)
    if not _can_run(need, target):
        return Program(need, sent=sent)
    length = spec.sampling.max_length
    flops = flops_lib.training_flops(cost.shape, length)
    flops += 0 if cost.teacher is None else flops_lib.forward_flops(cost.teacher, length)
    flops *= cost.train.batch_size * length * cost.count
    # Estimated first: a large model's update could take hours here.
    expected = flops / (flops_lib.ceiling(spec.compute.dtype) * cost_lib.SHARES["training"])
    if expected > 2 * _PROBE_SECONDS:
        # Operations grow with the rows, so an update with fewer of them gives the same rate.
        rows = arguments[1].tokens.shape[-2]
        fewer = max(1, int(rows * _PROBE_SECONDS / expected))
        program, arguments = _update(spec, cost, target, fewer)
        compiled, flops = program.lower(*arguments).compile(), flops * fewer / rows
    return Program(need, flops / _seconds(compiled, arguments, keeps=True))


def _update(spec: LmSpec, cost: Cost, target: Target, rows: int | None = None):
    """The jitted update and the shapes of its arguments; with `rows` in each part, by default the most there can be."""
    mesh = make_mesh(spec.mesh)
    compute = _compute(target, mesh, **vars(spec.compute))
    # The number of updates is a number in the program and changes no shape: any will do.
    optimizer, schedule = cost.train.optimizer(100), cost.train.schedule(100)
    arguments = [state_lib.abstract(cost.shape, optimizer, mesh, cost.part), _batch(spec, cost, mesh, rows)]
    if cost.count > 1:
        arguments = [_stacked(tree, cost.count) for tree in arguments]
    loss, guide = distill.cross_entropy(cost.shape, compute), None
    if cost.arm is not None and cost.arm.distill is not None:
        distillation = _distillation(spec, cost, target)
        loss = distill.loss(distillation, Model(cost.shape, {}), compute, packed=cost.train.row_length > 0)
        guide = distill.guide(distillation)
        if distillation.spec.vocabulary != "same":
            # At most: every token of the smaller vocabulary.
            ids = _shape((min(cost.shape.vocab_size, cost.teacher.vocab_size),), np.int32, (None,), mesh)
            guide = guide._replace(shared=losses.Shared(ids, ids))
    if not cost.part.is_all:
        loss = update_lib.of_part(loss, cost.shape, cost.part)
        guide = state_lib.abstract_frozen(cost.shape, mesh, cost.part), guide
    program = update_lib.make(loss, optimizer, schedule)
    return update_lib.compiled(program, cost.shape, optimizer, mesh, cost.count, cost.part), [*arguments, guide]


def sampling(
    spec: LmSpec, shape: Architecture, slots: int, dtype: str, target: Target, weights_dtype: Any = None
) -> Memory:
    """The memory of the loop that draws samples, every slot with all of its pages.

    Args:
        shape: of the model.
        slots: samples at a time.
        dtype: of activations and products.
        target: the devices to plan for.
        weights_dtype: of the weights; by default the same.
    """
    mesh = make_mesh(spec.mesh)
    compute = _compute(target, None, dtype=dtype)
    model = _model(shape, weights_dtype or compute.dtype, mesh)
    prompt = len(spec.sampling.prompt_ids) or 1
    program = decode.lower(
        model, prompt, max_length=spec.sampling.max_length, batch_size=slots, compute=compute, mesh=mesh
    )
    need = memory(program.compile())
    # The loop has the weights unstacked, as a copy.
    return need._replace(resident=need.resident + mesh_lib.device_bytes(model.params))


def scoring(spec: LmSpec, shape: Architecture, top_k: int | None, target: Target) -> Program:
    """Scoring a batch of sequences, or recording a teacher's likeliest tokens of it.

    Args:
        shape: of the model.
        top_k: tokens to record; None for scoring.
        target: the devices to plan for.
    """
    mesh = make_mesh(spec.mesh) if top_k is None else make_mesh(spec.teacher_mesh)
    dtype = spec.sampling.dtype if top_k is None else spec.distill.teacher_dtype
    compute = _compute(target, mesh, dtype=dtype)
    model = _model(shape, compute.dtype, mesh)
    # A batch of the longest rows, which needs the most memory.
    lengths = np.full(1, spec.sampling.max_length)
    chip = target.devices.chip
    at_once = score.tokens_at_once(model, mesh, None if chip.cpu else chip.usable * chip.memory * GIB)
    _, (rows, length) = next(score.batches(lengths, at_once, mesh_lib.batch_devices(mesh)))
    tokens = _shape((rows, length), np.int32, ("batch", None), mesh)
    arguments = [model.params, tokens]
    if top_k is None:
        compiled = score.lower(model, tokens, compute).compile()
        arguments.append((None,))  # no sampling temperature
    else:
        arguments.append(_shape((rows,), np.int32, ("batch",), mesh))

        def run(params, tokens, counts):
            return teacher.forward(params, shape, tokens, counts, want="top_k", k=top_k, compute=compute)

        compiled = jax.jit(run).lower(*arguments).compile()
    need = memory(compiled)
    if not _can_run(need, target):
        return Program(need, sent=_sent(compiled, target) / (rows * length))
    # what a row is filled up with is work, too
    flops = flops_lib.forward_flops(shape, spec.sampling.max_length) * rows * spec.sampling.max_length
    return Program(need, flops / _seconds(compiled, arguments))


def _can_run(need: Memory, target: Target) -> bool:
    chip = target.devices.chip
    # Not up to the last byte: the process itself, and the other programs of the machine, need some.
    return chip.cpu and need.total < 0.8 * chip.memory * GIB


def _seconds(compiled, arguments: list[Any], keeps: bool = False) -> float:
    """Seconds of a compiled program: the median of three runs, after one to warm up.

    Args:
        keeps: the first result is the first argument of the next run, as a donated state is gone after one run.
    """
    # Zeros will do: dense products take as long for any values.
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
    analysis = compiled.memory_analysis()
    # A donated argument and the output in its place are the same bytes, so they count once.
    resident = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(resident, analysis.temp_size_in_bytes)


def _sent(compiled, target: Target) -> float:
    """Bytes that a device sends to other slices in one execution of a program, on average."""
    if target.devices.slices == 1:
        return 0.0
    # Loops whose number of rounds the program does not say send a few bytes a round: one round is counted.
    parts = collectives.read(compiled.as_text(), rounds=1)
    return collectives.between_slices(parts, devices=target.devices.count, slices=target.devices.slices)


def _compute(target: Target, mesh, *, dtype: str, **more) -> Compute:
    if target.devices.chip.cpu:
        return Compute(dtype=dtype, mesh=mesh, **more)
    # XLA's CPU compiler widens bfloat16 to float32 in places, but not float16, which is as large
    dtype = "float16" if dtype == "bfloat16" else dtype
    return Compute(dtype=dtype, mesh=mesh, chunk_tokens=head.TOKENS, columns=False, **more)


def layout(spec: LmSpec, train: TrainSpec, mesh: Mesh | None) -> Layout:
    """How the sequences of an update lie in rows.

    Args:
        train: settings of the training.
        mesh: what rows are split over.
    """
    longest = spec.sampling.max_length
    row = train.row_length and max(train.row_length, longest)
    return Layout(train.batch_size, longest, row, train.parts, mesh_lib.batch_devices(mesh))


def _batch(spec: LmSpec, cost: Cost, mesh: Mesh | None, rows: int | None = None) -> Batch:
    arrangement = layout(spec, cost.train, mesh)
    # The largest batch that can come decides about memory.
    rows = rows or batches.most_rows(arrangement) // arrangement.parts
    sizes = arrangement.parts, rows, arrangement.row_length or arrangement.max_length

    def array(dtype, *more):
        return _shape((*sizes, *more), dtype, (None, "batch", None, *[None] * len(more)), mesh)

    targets, recording = None, None if cost.arm is None else cost.arm.recording
    if recording is not None:
        number = np.uint16 if recording.log_prob_format == "uint16" else np.float32
        # As kd_jax.lm.distill.recorded_top_k stores them.
        ids = np.uint16 if cost.shape.vocab_size <= 2**16 else np.uint32
        targets = Targets(array(ids, recording.top_k), array(number, recording.top_k), array(number))
    pair = None
    if cost.teacher is not None and cost.arm.distill.vocabulary != "same":
        # As kd_jax.lm.distill.pairing makes it of texts that have as many of the teacher's tokens.
        spans = Spans(array(np.int32), array(np.int32))
        pair = Pair(array(np.int32), array(np.int32), array(np.int32), spans, spans, array(np.int32), array(bool))
    return Batch(array(np.int32), array(np.int32), array(np.int32), array(bool), targets, pair)


def _distillation(spec: LmSpec, cost: Cost, target: Target) -> distill.Distillation:
    if cost.teacher is None:
        return distill.Distillation(cost.arm.distill)
    mesh = make_mesh(spec.teacher_mesh)
    compute = _compute(target, mesh, **{**vars(spec.compute), "dtype": cost.arm.distill.teacher_dtype, "remat": False})
    return distill.Distillation(cost.arm.distill, _model(cost.teacher, compute.dtype, mesh), compute)


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
