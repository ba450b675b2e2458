"""What devices send each other, by mesh: bytes of each kind of collective, read from the compiled program.

    python -m benchmarks.collectives [--json] [POLICY ...] [DATA,FSDP,TENSOR ...]

The programs: an update that learns from text (training) or from a teacher (online); a step of sampling, from the whole
softmax or after top-k and top-p (truncated); scoring a batch; recording the likeliest tokens of a batch (top_k); and a
sweep of mixtures, whose mesh has a single axis.

Virtual CPU devices, a small model, two rows for each device of data x fsdp. A number is the size of what one device
holds after the collectives, summed over all rounds of a loop; a ring sends about twice that for all-reduce, and once
for the others. XLA's CPU compiler makes no reduce-scatter: where a GPU or TPU has one (gradients over fsdp), the CPU
program has an all-reduce, of which each device keeps its part.
"""

import dataclasses
import json
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.gmm import experiment
from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill import teacher_forward as teacher
from kd_jax.lm.model import Architecture, Compute, Model
from kd_jax.lm.model.kv_cache import PAGE
from kd_jax.lm.training import optimizer as optim
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.parallel import collectives
from kd_jax.parallel import mesh as mesh_lib

# Axes differ in size (the two kinds of heads aside), also split over 2, 4 or 8 devices: a size names its axis.
STUDENT = Architecture(
    vocab_size=3072, hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=8, head_dim=12, rope_theta=10000.0,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, hidden_size=176, intermediate_size=464, num_hidden_layers=2)
ROWS, LENGTH, TOP_K = 2, 36, 8
MESHES = (
    (1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 2, 1), (4, 2, 1),
    (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 1, 2), (4, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 2),
)  # fmt: skip
POLICIES = ("training", "online", "sampling", "truncated", "scoring", "top_k", "mixtures")
# These loops end by their data, so the program does not say how many rounds there are: one round is counted.
ENDLESS = ("sampling", "truncated", "mixtures")


def compiled(policy: str, sizes: tuple[int, int, int], teacher_sizes: tuple[int, int, int] | None = None):
    """The program of a policy over a mesh of these sizes; `teacher_sizes` are the teacher's of "online"."""
    if policy in ("training", "online"):
        return _update(policy, sizes, teacher_sizes)
    if policy == "mixtures":
        return _mixtures(jax.devices()[: int(np.prod(sizes))])
    mesh = mesh_lib.make(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    model, rows = Model(STUDENT, _weights(STUDENT, mesh)), ROWS * mesh_lib.batch_devices(mesh)
    compute = Compute(mesh=mesh, chunk_tokens=16)
    if policy in ("sampling", "truncated"):
        cut = {"top_k": 40, "top_p": 0.9} if policy == "truncated" else {}
        return decode.lower(model, 1, max_length=2 * PAGE, batch_size=rows, mesh=mesh, **cut).compile()

    def array(*shape):
        axes = ("batch", *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=mesh_lib.sharding(axes, mesh))

    if policy == "scoring":
        return score.lower(model, array(rows, LENGTH), compute).compile()

    def run(params, tokens, lengths):
        return teacher.forward(params, STUDENT, tokens, lengths, want="top_k", k=TOP_K, compute=compute)

    return jax.jit(run).lower(model.params, array(rows, LENGTH), array(rows)).compile()


def _update(policy: str, sizes: tuple[int, int, int], teacher_sizes: tuple[int, int, int] | None):
    """The update of a student, learning text or from a teacher, over a mesh of these sizes."""
    mesh = mesh_lib.make(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    compute = Compute(mesh=mesh, chunk_tokens=16)  # small, so that there are several chunks of logits
    schedule = optim.wsd(1e-3, 100, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    rows = ROWS * mesh_lib.batch_devices(mesh)
    where = mesh_lib.sharding((None, "batch", None), mesh)
    dtypes = np.int32, np.int32, np.int32, bool
    batch = batches.Batch(*(jax.ShapeDtypeStruct((1, rows, LENGTH), dtype, sharding=where) for dtype in dtypes))
    arguments: list[Any] = [state_lib.abstract(STUDENT, optimizer, mesh), batch]
    loss = distill.cross_entropy(STUDENT, compute)
    if policy == "online":
        over = mesh_lib.make(*(teacher_sizes or sizes), devices=list(mesh.devices.flat))
        distillation = distill.Distillation(
            distill.DistillSpec(policy="online"), Model(TEACHER, _weights(TEACHER, over))
        )
        loss = distill.loss(distillation, Model(STUDENT, {}), compute)
        arguments.append(distill.guide(distillation))
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), STUDENT, optimizer, mesh)
    return update.lower(*arguments).compile()


def _mixtures(devices):
    """A sweep of beta, its seeds spread over the devices."""
    mesh = mesh_lib.one_axis("seeds", devices)
    seeds = jax.ShapeDtypeStruct((2 * len(devices),), np.uint32, sharding=NamedSharding(mesh, PartitionSpec("seeds")))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = experiment.Numbers((5,), (2,), (2,), (), ())
    numbers = [jax.ShapeDtypeStruct(shape, np.float32, sharding=whole) for shape in shapes]
    setting = experiment.Setting(2, 100, 4, 1, 1000, 2000, 2000, 100, 5, "diag")
    return experiment._sweep.lower(setting, seeds, experiment.Numbers(*numbers)).compile()


def _weights(architecture: Architecture, mesh) -> Any:
    shapes = model_lib.abstract(architecture)
    where = mesh_lib.shardings(model_lib.logical_axes(architecture), shapes, mesh)
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, where)


def main(argv: list[str]) -> None:
    as_json = "--json" in argv
    policies, meshes = [], []
    for word in argv:
        if word in POLICIES:
            policies.append(word)
        elif word != "--json":
            meshes.append(tuple(map(int, word.split(","))))
    # The programs are compiled and never run: no time is spent on making them fast.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if not as_json:
        print(f"{'KiB a device':20}" + "".join(f"{kind:>20}" for kind in collectives.KINDS))
    for policy in policies or POLICIES:
        for sizes in meshes or MESHES:
            # A word of six numbers has the student's mesh and then the teacher's.
            text = compiled(policy, sizes[:3], sizes[3:] or None).as_text()
            found = collectives.read(text, rounds=1 if policy in ENDLESS else None)
            if as_json:
                print(json.dumps([policy, sizes, [one._asdict() for one in found]]), flush=True)
                continue
            numbers = "".join(f"{size / 1024:20.1f}" for size in collectives.totals(found).values())
            print(f"{policy:9} {','.join(map(str, sizes)):10}{numbers}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
