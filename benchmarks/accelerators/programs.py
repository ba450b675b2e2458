"""The programs of kd_jax at real sizes, from shapes alone: no weight is allocated, and nothing is run.

A program is lowered for a platform that need not be here. kd_jax asks jax.default_backend() where a CPU needs another
form than an accelerator (chunks of logits, sums, attention), so that function is replaced while a program is traced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import gmm as gmm_config
from kd_jax.gmm import experiment
from kd_jax.gmm.specs import GmmSpec
from kd_jax.lm import decode, score
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus.batches import Batch, Targets
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.distill import teacher_forward as teacher
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model
from kd_jax.lm.model.frozen import ALL, Part
from kd_jax.lm.model.lora import Lora
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import mesh as mesh_lib
from kd_jax.runs.settings import freeze

PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}  # name of jax.export -> that of jax.default_backend()
TOP_K = 64
# Seeds of a mixture sweep: each has a student for each beta, and controls.
SEEDS = 1024


class Shape(NamedTuple):
    """What a program is lowered for.

    Attributes:
        student, teacher: architectures.
        rows: sequences of a batch on one device.
        length: tokens of a sequence.
        slots: samples at a time on one device.
    """

    student: Architecture
    teacher: Architecture
    rows: int
    length: int
    slots: int


SHAPES = {
    "tiny": Shape(PRESETS["tiny"], PRESETS["tiny"], 24, 256, 16),
    "135m": Shape(PRESETS["smollm2-135m"], PRESETS["smollm2-1.7b"], 16, 512, 256),
    "360m": Shape(PRESETS["smollm2-360m"], PRESETS["smollm2-1.7b"], 16, 512, 256),
    "1.7b": Shape(PRESETS["smollm2-1.7b"], PRESETS["smollm2-1.7b"], 16, 512, 256),
}


class Setting(NamedTuple):
    """Where and how a program is lowered.

    Attributes:
        shape: sizes of the models and batches.
        platform: a key of PLATFORMS.
        mesh: of data x fsdp x tensor; None for one device.
        attention: see kd_jax.lm.model.attention.causal.
    """

    shape: Shape
    platform: str
    mesh: Mesh | None = None
    attention: str = "auto"

    @property
    def compute(self) -> Compute:
        return Compute(dtype="bfloat16", attention=self.attention, mesh=self.mesh, columns=False)

    @property
    def devices(self) -> int:
        return mesh_lib.batch_devices(self.mesh)

    def array(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        """An array's shape, split by its logical axes."""
        sharding = None if self.mesh is None else mesh_lib.sharding(axes, self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def model(self, architecture: Architecture, dtype: str = "bfloat16") -> Model:
        """A model with shapes in place of weights."""
        leaves = model_lib.abstract(architecture, jnp.dtype(dtype))
        if self.mesh is not None:
            to = mesh_lib.shardings(model_lib.logical_axes(architecture), leaves, self.mesh)
            leaves = jax.tree.map(lambda leaf, to: leaf.update(sharding=to), leaves, to)
        return Model(architecture, leaves)


@contextlib.contextmanager
def choosing_for(platform: str) -> Iterator[None]:
    """kd_jax takes the forms that it has for this platform, a key of PLATFORMS."""
    # Functions under jit that were traced for another platform would be found again.
    jax.clear_caches()
    with mock.patch.object(jax, "default_backend", lambda: PLATFORMS[platform]):
        yield
    jax.clear_caches()


# --- updates ----------------------------------------------------------------------------------------------------------


def update(setting: Setting, policy: str, *, packed: bool = False, part: Part = ALL) -> jax.stages.Lowered:
    """An update that learns from text ("sequence"), from a teacher ("online") or from recorded tokens ("offline")."""
    shape, compute = setting.shape, setting.compute
    train = TrainSpec()
    optimizer, schedule = train.optimizer(1000), train.schedule(1000)
    state = state_lib.abstract(shape.student, optimizer, setting.mesh, part)
    guide = None
    if policy == "sequence":
        loss = distill.cross_entropy(shape.student, compute, packed=packed)
    else:
        spec = distill.DistillSpec(policy=policy, teacher_dtype="bfloat16")
        model = setting.model(shape.teacher) if policy == "online" else None
        distillation = distill.Distillation(spec, model, compute)
        loss = distill.loss(distillation, Model(shape.student, {}), compute, packed=packed)
        guide = distill.guide(distillation)
    if not part.is_all:
        loss = update_lib.of_part(loss, shape.student, part)
        guide = state_lib.abstract_frozen(shape.student, setting.mesh, part), guide
    program = update_lib.make(loss, optimizer, schedule)
    program = update_lib.compiled(program, shape.student, optimizer, setting.mesh, part=part)
    traced = program.trace(state, _batch(setting, policy == "offline"), guide)
    return traced.lower(lowering_platforms=(setting.platform,))


def _batch(setting: Setting, recorded: bool) -> Batch:
    rows, length = setting.shape.rows * setting.devices, setting.shape.length

    def array(dtype, *more):
        axes = (None, "batch", None, *[None] * len(more))
        return setting.array((1, rows, length, *more), dtype, axes)

    targets = Targets(array(np.uint16, TOP_K), array(np.uint16, TOP_K), array(np.uint16)) if recorded else None
    return Batch(array(np.int32), array(np.int32), array(np.int32), array(bool), targets)


# --- sampling and scoring ---------------------------------------------------------------------------------------------


def sampling(setting: Setting, dtype: str = "bfloat16") -> jax.stages.Lowered:
    """The loop that draws samples; dtype is that of the weights (float32 for a student in training)."""
    shape = setting.shape
    return decode.lower(
        setting.model(shape.student, dtype), 1, max_length=shape.length, batch_size=shape.slots * setting.devices,
        compute=setting.compute, mesh=setting.mesh, platform=setting.platform,
    )  # fmt: skip


def prompts(setting: Setting) -> jax.stages.Lowered:
    """The program that runs a batch of prompts, before their samples start; weights are float32, as in training."""
    shape = setting.shape
    return decode.lower_prompts(
        setting.model(shape.student, "float32"), shape.length // 2, max_length=shape.length,
        batch_size=shape.slots * setting.devices, compute=setting.compute, mesh=setting.mesh,
        platform=setting.platform,
    )  # fmt: skip


def scoring(setting: Setting) -> jax.stages.Lowered:
    """Log-probabilities of a batch under the teacher."""
    tokens = setting.array((setting.shape.rows * setting.devices, setting.shape.length), np.int32, ("batch", None))
    return score.lower(setting.model(setting.shape.teacher), tokens, setting.compute, setting.platform)


def recording(setting: Setting) -> jax.stages.Lowered:
    """The teacher's most probable tokens of a batch."""
    architecture, rows = setting.shape.teacher, setting.shape.rows * setting.devices
    tokens = setting.array((rows, setting.shape.length), np.int32, ("batch", None))
    lengths = setting.array((rows,), np.int32, ("batch",))

    def run(params, tokens, lengths):
        return teacher.forward(
            params, architecture, tokens, lengths, want="top_k", k=TOP_K, compute=setting.compute
        )  # fmt: skip

    traced = jax.jit(run).trace(setting.model(architecture).params, tokens, lengths)
    return traced.lower(lowering_platforms=(setting.platform,))


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixtures(setting: Setting, **changes: Any) -> jax.stages.Lowered:
    """A sweep of beta over seeds, which fits all students by EM; `changes` to the base setting of configs/gmm.py."""
    spec = freeze(GmmSpec, gmm_config.get_config())
    numbers = jax.tree.map(np.float32, experiment.numbers_of(spec))
    if setting.mesh is None:
        seeds = jax.ShapeDtypeStruct((SEEDS,), np.uint32)
        shapes = [jax.ShapeDtypeStruct(np.shape(number), np.float32) for number in numbers]
    else:
        # as kd_jax.gmm.sweep.over_seeds lays them out
        mesh = mesh_lib.one_axis("seeds", list(setting.mesh.devices.flat))
        to, whole = NamedSharding(mesh, PartitionSpec("seeds")), NamedSharding(mesh, PartitionSpec())
        seeds = jax.ShapeDtypeStruct((SEEDS * mesh.size,), np.uint32, sharding=to)
        shapes = [jax.ShapeDtypeStruct(np.shape(number), np.float32, sharding=whole) for number in numbers]
    base = experiment.base_of(spec)._replace(**changes)
    traced = experiment._sweep.trace(base, seeds, experiment.Numbers(*shapes))
    return traced.lower(lowering_platforms=(setting.platform,))


class Program(NamedTuple):
    """A program and what it has to satisfy.

    Attributes:
        lower: for a setting.
        donates: whether it takes over the buffers of its state.
        tokens: whether it goes through the tokens of a whole batch, whose logits it must not hold together.
    """

    lower: Callable[[Setting], jax.stages.Lowered]
    donates: bool = False
    tokens: bool = False


PROGRAMS = {
    "update_text": Program(functools.partial(update, policy="sequence"), donates=True, tokens=True),
    "update_packed": Program(functools.partial(update, policy="sequence", packed=True), donates=True, tokens=True),
    "update_online": Program(functools.partial(update, policy="online"), donates=True, tokens=True),
    "update_offline": Program(functools.partial(update, policy="offline"), donates=True, tokens=True),
    "update_lora": Program(
        functools.partial(update, policy="online", part=Part(lora=Lora())), donates=True, tokens=True
    ),
    "rollouts": Program(functools.partial(sampling, dtype="float32"), donates=True),
    "prompts": Program(prompts, donates=True),
    "sampling": Program(sampling, donates=True),
    "scoring": Program(scoring, tokens=True),
    "recording": Program(recording, tokens=True),
    "mixtures": Program(mixtures),
    "mixtures_wide": Program(functools.partial(mixtures, dim=8, covariance_type="full", student_components=2)),
}
