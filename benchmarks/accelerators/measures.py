"""What is timed on an accelerator: updates, losses, sampling, mixtures and attention. A case returns a row's fields."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerators import peers
from configs import gmm as gmm_config
from kd_jax import fused
from kd_jax.gmm import experiment
from kd_jax.gmm.specs import GmmSpec
from kd_jax.gmm.students import CONTROLS
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.decode import slots as slots_lib
from kd_jax.lm.decode import start as start_lib
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.model import PRESETS, Architecture, Compute, Model, attention, flops, kv_cache
from kd_jax.lm.sampler_spec import WHOLE
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training.recipe import TrainSpec
from kd_jax.parallel import devices
from kd_jax.runs.settings import freeze

DTYPE = "bfloat16"
Case = Callable[[], dict[str, Any]]


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        models: students by name; the largest is the teacher.
        rows, length: of an update's batch.
        tokens: of the loss beside its peers.
        slots: samples at a time.
        steps: of sampling that are timed.
        students: of the mixture sweep.
    """

    models: dict[str, Architecture]
    rows: int
    length: int
    tokens: int
    slots: tuple[int, ...]
    steps: int
    students: int


WHOLE_SIZE = Sizes(
    {name: PRESETS[f"smollm2-{name}"] for name in ("135m", "360m", "1.7b")}, 16, 1024, 8192, (64, 256, 1024), 64, 10**5
)
TINY = Sizes({"tiny": PRESETS["tiny"]}, 2, 64, 128, (8,), 4, 64)


def seconds(run: Callable[[], Any], at_least: float = 1.0) -> float:
    """Seconds of a run: the quickest of three or more, after one that compiles."""
    jax.block_until_ready(run())
    took, began = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - began < at_least and len(took) < 50:
        start = time.perf_counter()
        # JAX returns before the work is done
        jax.block_until_ready(run())
        took.append(time.perf_counter() - start)
    return min(took)


# --- the device -------------------------------------------------------------------------------------------------------


def chip() -> devices.Chip | None:
    """The data sheet of this device; None where it is not in kd_jax.parallel.devices."""
    kind = jax.devices()[0].device_kind
    tpus = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
    if kind in tpus:
        return devices.TPUS[tpus[kind]]
    # "NVIDIA A100-SXM4-80GB" is A100-80GB: every word of the table's name occurs, and the longest such name counts
    words = set(kind.replace("RTX ", "RTX").replace("-", " ").split())
    names = [name for name in devices.GPUS if words.issuperset(name.split("-"))]
    return devices.GPUS[max(names, key=len)] if names else None


@functools.cache
def bandwidth() -> float:
    """Bytes a second of this device's memory: an array is read and written."""
    size = 2**22 if jax.default_backend() == "cpu" else 2**29
    array, add = jnp.zeros(size, jnp.bfloat16), jax.jit(lambda x: x + 1)
    return 4 * size / seconds(lambda: add(array), 0.2)


def of_device(_: Sizes) -> dict[str, Case]:
    """Rates that the other parts are held against."""

    def product():
        sheet, rate = chip(), flops.ceiling(DTYPE) / jax.device_count()
        return {"value": rate / 1e12, "unit": "TFLOP/s", "data_sheet": sheet and sheet.bfloat16 / 1e12}

    def memory():
        sheet = chip()
        return {"value": bandwidth() / 1e9, "unit": "GB/s", "data_sheet": sheet and sheet.bandwidth / 1e9}

    return {"bfloat16 product": product, "memory": memory}


# --- updates ----------------------------------------------------------------------------------------------------------


def updates(sizes: Sizes) -> dict[str, Case]:
    """Updates on text and from a teacher."""
    *_, teacher = sizes.models.values()
    cases: dict[str, Case] = {}
    for name, shape in sizes.models.items():
        cases[f"{name}, text"] = functools.partial(update, shape, None, sizes)
        cases[f"{name}, online"] = functools.partial(update, shape, teacher, sizes)
    return cases


def update(shape: Architecture, teacher: Architecture | None, sizes: Sizes) -> dict[str, Any]:
    """Tokens a second of an update, and the share of the peak that its model FLOPs are (MFU)."""
    compute, spec = Compute(dtype=DTYPE), TrainSpec()
    optimizer, schedule = spec.optimizer(1000), spec.schedule(1000)
    loss, guide = distill.cross_entropy(shape, compute, packed=False), None
    work = flops.training_flops(shape, sizes.length)
    if teacher is not None:
        settings = distill.DistillSpec(policy="online", teacher_dtype=DTYPE)
        distillation = distill.Distillation(settings, Model(teacher, random_weights(teacher)), compute)
        loss, guide = distill.loss(distillation, Model(shape, {}), compute, packed=False), distill.guide(distillation)
        work += flops.forward_flops(teacher, sizes.length)
    state = state_lib.init(jax.random.key(0), shape, optimizer)
    ids = np.random.default_rng(0).integers(1, shape.vocab_size, (sizes.rows, sizes.length)).astype(np.int32)
    batch = batches.arrange(list(ids), np.ones(sizes.rows, int), batches.Layout(sizes.rows, sizes.length))
    batch = state_lib.place(batch, None)
    program = update_lib.compiled(update_lib.make(loss, optimizer, schedule), shape, optimizer)
    program = program.lower(state, batch, guide).compile()

    def run():
        nonlocal state
        state, metrics = program(state, batch, guide)
        return metrics.loss

    tokens = sizes.rows * sizes.length
    rate = work * tokens / seconds(run)
    return {
        "value": rate / work, "unit": "tokens/s", "temporary_gib": _temporary(program), **utilisation(rate)
    }  # fmt: skip


def utilisation(rate: float) -> dict[str, float | None]:
    """FLOPs a second as shares of the data sheet's peak (MFU) and of the measured rate of a large product."""
    sheet = chip()
    return {
        "mfu": sheet and rate / sheet.bfloat16,
        "of_measured": rate / flops.ceiling(DTYPE) * jax.device_count(),
    }


def _temporary(program) -> float:
    return program.memory_analysis().temp_size_in_bytes / devices.GIB


def random_weights(shape: Architecture) -> Any:
    """bfloat16 weights; float32 ones never exist beside them."""
    init = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(DTYPE), model_lib.init(key, shape)))
    return init(jax.random.key(1))


# --- the loss ---------------------------------------------------------------------------------------------------------


def losses(sizes: Sizes) -> dict[str, Case]:
    """Forward KL with gradients, in chunks and with all logits, and the peers of torch."""
    shape = next(iter(sizes.models.values()))
    width, vocab = shape.hidden_size, shape.vocab_size
    keys = jax.random.split(jax.random.key(0), 4)
    sides = [(sizes.tokens, width), (vocab, width)] * 2

    def arrays():
        return [
            jax.random.normal(key, size, DTYPE) * width**-0.25 for key, size in zip(keys, sides, strict=True)
        ]  # fmt: skip

    def chunks(hidden, head, teacher_hidden, teacher_head):
        return fused.linear_distillation(
            student_hidden=hidden, student_head=head, teacher_hidden=teacher_hidden, teacher_head=teacher_head,
            labels=None, mask=jnp.ones(sizes.tokens, bool),
        )[0].mean  # fmt: skip

    def dense(hidden, head, teacher_hidden, teacher_head):
        log_q = jax.nn.log_softmax(fused.project(hidden, head))
        log_p = jax.nn.log_softmax(fused.project(teacher_hidden, teacher_head))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()

    def ours(loss):
        inputs = arrays()
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
        value, took = float(program(*inputs)[0]), seconds(lambda: program(*inputs))
        return {"value": 1e3 * took, "unit": "ms", "temporary_gib": _temporary(program), "loss": value}

    cases = {"kd_jax, chunks": lambda: ours(chunks), "JAX, all logits": lambda: ours(dense)}
    return cases | {name: functools.partial(peers.loss, name, arrays) for name in peers.NAMES}


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling(sizes: Sizes) -> dict[str, Case]:
    """Steps of the sampling loop with full pools of pages."""
    return {f"{slots} slots": functools.partial(sample, slots, sizes) for slots in sizes.slots}


def sample(slots: int, sizes: Sizes) -> dict[str, Any]:
    """Tokens a second, beside those that the memory's measured bandwidth allows (weights and cache are read once)."""
    shape = next(iter(sizes.models.values()))
    compute, params = Compute(dtype=DTYPE), model_lib.unstack(random_weights(shape))
    length = kv_cache.PAGE * max(2, sizes.length // 2 // kv_cache.PAGE)
    settings = start_lib.settings(Model(shape, {}), [1], 4 * slots, length, WHOLE, 0)
    # Every slot has all of its pages, as after a while.
    pages = length // kv_cache.PAGE
    cache = start_lib.resident(params, np.ones(1, np.int32), shape, 1, slots, length, pages, compute)
    state = jax.device_put(start_lib.idle(cache, slots, length, 0, 1), jax.devices()[0])
    steps = np.int32(sizes.steps)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        state = slots_lib.run(state, params, settings, shape, compute, steps)
        ran = int(state.active_steps)
        took.append((time.perf_counter() - began) / max(1, int(state.steps)))
        state = state._replace(steps=jnp.zeros_like(state.steps), active_steps=jnp.zeros_like(state.active_steps))
    assert ran == slots * sizes.steps
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state.cache.keys, state.cache.values)))
    rate, possible = slots / min(took[1:]), slots * bandwidth() / read
    return {"value": rate, "unit": "tokens/s", "roofline": possible, "of_roofline": rate / possible}


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixtures(sizes: Sizes) -> dict[str, Case]:
    """The sweep of configs/gmm.py."""
    return {f"{sizes.students} students": functools.partial(sweep, sizes.students)}


def sweep(students: int) -> dict[str, Any]:
    """Students a second, EM fits and scores, in chunks that fit 4 GiB."""
    spec = freeze(GmmSpec, gmm_config.get_config())
    setting, numbers = experiment.base_of(spec), experiment.numbers_of(spec)
    each = len(numbers.betas) + 2 + len(CONTROLS)
    seeds = -(-students // each)
    size = min(seeds, experiment.chunk_size(setting, each, memory_gib=4))
    experiment.sweep(setting, np.arange(size), numbers, devices=jax.devices()[:1])
    began = time.perf_counter()
    for first in range(0, seeds, size):
        experiment.sweep(setting, np.arange(first, first + size), numbers, devices=jax.devices()[:1])
    took, made = time.perf_counter() - began, -(-seeds // size) * size * each
    return {"value": made / took, "unit": "students/s", "seconds": took}


# --- attention --------------------------------------------------------------------------------------------------------


def attentions(sizes: Sizes) -> dict[str, Case]:
    """The kinds of attention, forward and backward, on rows of one sequence and on packed ones."""
    return {
        f"{kind}, {'packed' if packed else 'one sequence a row'}": functools.partial(attend, kind, packed, sizes)
        for packed in (False, True) for kind in attention.KINDS if kind != "auto"
    }  # fmt: skip


def attend(kind: str, packed: bool, sizes: Sizes) -> dict[str, Any]:
    """Time of value and gradients of one layer, and the largest error of the outputs beside float32."""
    shape = next(iter(sizes.models.values()))
    try:
        attention.check(kind, DTYPE)
    except ValueError as error:
        return {"skipped": str(error)}
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (sizes.rows, sizes.length, count, shape.head_dim), DTYPE)
        for key, count in zip(keys, heads, strict=True)
    )
    # four sequences in a row
    segments = jnp.broadcast_to(1 + 4 * jnp.arange(sizes.length) // sizes.length, q.shape[:2]) if packed else None

    def loss(q, k, v):
        out = attention.causal(q, k, v, segments, kind)
        return (out.astype(jnp.float32) ** 2).sum(), out

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    exact = jax.jit(lambda *arrays: attention.causal(*(a.astype(jnp.float32) for a in arrays), segments, "blocked"))
    error = jnp.abs(program(q, k, v)[0][1].astype(jnp.float32) - exact(q, k, v)).max()
    return {"value": 1e3 * seconds(lambda: program(q, k, v)), "unit": "ms", "error": float(error)}
