"""The knobs of selectivity on one frontier, for mixtures.

Some knobs make the teacher more selective, and EM fits the student to its draws: beta (the counterpart of a language
model's sampling temperature), top-k and top-p over the weights of its components. Others leave the teacher as it is and
choose what the student minimises: Jensen-Shannon divergences from forward to reverse KL, and skew KLs, by gradient.
All students of a seed share p*, data, teacher and random numbers, so knobs are compared seed by seed.

Which divergence, which beta and so on are traced, as in `kd_jax.gmm.experiment`: one program for all of them.
"""

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import experiment, gradient_fit
from kd_jax.gmm import sweep as chunks
from kd_jax.gmm.experiment import Setting
from kd_jax.gmm.gradient_fit import Divergence
from kd_jax.gmm.mixture import sharpen, top_k, top_p

# Knobs of the teacher: (mixture, value) -> mixture.
TEACHERS = {"beta": sharpen, "top_k": top_k, "top_p": top_p}
# Knobs of the student: value -> divergence.
DIVERGENCES = {
    "jensen_shannon": gradient_fit.jensen_shannon,
    "skew_forward_kl": gradient_fit.skew_forward_kl,
    "skew_reverse_kl": gradient_fit.skew_reverse_kl,
}
# Students without a knob: fitted to the data, and by EM to the teacher as it is.
DIRECT, PLAIN = "direct", "plain"
# What random keys are for, beside those of the experiment.
NOISE, HELD_OUT = 100, 101

_SCORES = (
    "precision", "precision_se", "recall", "recall_se", "teacher_entropy", "weight_entropy", "student_entropy",
    "kl_student_data", "kl_student_data_se", "kl_data_student", "kl_data_student_se",
)  # fmt: skip


class Program(NamedTuple):
    """What fixes a program; every field is a compile-time constant."""

    setting: Setting
    num_draws: int
    num_updates: int
    num_starts: int


class Numbers(NamedTuple):
    """What a program is given, all traced."""

    teachers: dict[str, jax.Array]  # values of each knob of the teacher
    divergences: Divergence  # [D] each
    separation: jax.Array
    tol: jax.Array
    learning_rate: jax.Array


def chain(program: Program, seed: jax.Array, numbers: Numbers) -> dict[str, dict[str, jax.Array]]:
    """One seed: scores of the direct student, of T students by EM, the plain one first, and of D by gradient.

    The latter also have `divergence` (on fresh draws), `objective` (on those of the fit), `gradient_norm` and `start`.
    """
    setting = program.setting
    shared = experiment.ground(setting, seed, numbers.separation, numbers.tol)
    teachers = [jax.tree.map(lambda leaf: leaf[None], shared.teacher)]
    for knob, select in TEACHERS.items():
        if knob in numbers.teachers:
            teachers.append(jax.vmap(select, (None, 0))(shared.teacher, numbers.teachers[knob]))
    teachers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *teachers)
    corpora, students = experiment.distil(setting, seed, teachers, numbers.tol)
    corpus, key = corpora[0], experiment.keys(seed)
    starts = gradient_fit.starts_of(shared.teacher, jax.tree.map(lambda leaf: leaf[0], students), program.num_starts)

    def score(student, teacher, corpus):
        scores = experiment.score(setting, seed, shared, student, teacher, corpus)
        return {name: getattr(scores, name) for name in _SCORES}

    def by_gradient(target: Divergence):
        fit = gradient_fit.fit(
            key(NOISE), target, shared.teacher, corpus, starts, num_draws=program.num_draws,
            num_updates=program.num_updates, learning_rate=numbers.learning_rate,
        )  # fmt: skip
        fresh = gradient_fit.held_out(key(HELD_OUT), target, shared.teacher, fit.mixture, setting.num_precision)
        about = {"divergence": fresh, "objective": fit.objective[-1], "gradient_norm": fit.gradient_norm}
        return score(fit.mixture, shared.teacher, corpus) | about | {"start": fit.start.astype(jnp.float32)}

    return {
        DIRECT: score(shared.direct, shared.teacher, corpus),
        "em": jax.vmap(score)(students, teachers, corpora),
        # One after the other, each for all seeds and starts: all at once no longer fit the processor's cache.
        "gradient": jax.lax.map(by_gradient, numbers.divergences),
    }


def _sweep(program: Program, seeds: jax.Array, numbers: Numbers) -> dict[str, dict[str, jax.Array]]:
    return jax.vmap(partial(chain, program), (0, None))(seeds, numbers)


_jitted = jax.jit(_sweep, static_argnums=0)


def sweep(program: Program, seeds, numbers: Numbers, devices=None) -> dict[str, dict[str, np.ndarray]]:
    """`chain` for many seeds [S], spread over all `devices` (default: every one there is): [S], [S, T] and [S, D]."""
    return chunks.over_seeds(lambda s, n: _jitted(program, s, n), seeds, numbers, devices)


def program_of(config) -> Program:
    """The program of a config."""
    setting = Setting(**{name: config[name] for name in Setting._fields})
    return Program(setting, config.num_draws, config.num_updates, config.teacher_components + 1)


def numbers_of(config) -> Numbers:
    """The traced numbers of a config."""
    teachers = {knob: np.asarray(config.knobs[knob], np.float32) for knob in TEACHERS if len(config.knobs[knob])}
    columns = zip(*_divergences(config), strict=True)
    fields = [np.asarray(column, np.float32) for column in columns]
    return Numbers(teachers, Divergence(*fields), config.separation, config.tol, config.learning_rate)


def _divergences(config) -> list[Divergence]:
    """Every divergence that is asked for, once: knobs share their ends."""
    return list(dict.fromkeys(make(value) for knob, make in DIVERGENCES.items() for value in config.knobs[knob]))


class Student(NamedTuple):
    """A student of every seed."""

    knob: str
    value: float | None  # of the knob, None where it is none
    part: str  # where `chain` has its scores
    index: tuple[int, ...]


def students(config) -> list[Student]:
    """All students of a seed, in the order of the rows."""
    found = [Student(DIRECT, None, DIRECT, ()), Student(PLAIN, None, "em", (0,))]
    asked = [(knob, value) for knob in TEACHERS for value in config.knobs[knob]]
    found += [Student(knob, value, "em", (1 + i,)) for i, (knob, value) in enumerate(asked)]
    order = _divergences(config)
    for knob, make in DIVERGENCES.items():
        found += [Student(knob, value, "gradient", (order.index(make(value)),)) for value in config.knobs[knob]]
    return found


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    experiment.validate_sweep(config)
    if config.covariance_type != "diag":
        raise ValueError(f"config.covariance_type={config.covariance_type!r}: fits by gradient are diagonal")
    experiment.validate_setting(program_of(config).setting, config.separation)
    for name in ("num_draws", "num_updates"):
        if config[name] < 1:
            raise ValueError(f"config.{name}={config[name]} must be at least 1")
    if not 0 < config.learning_rate < np.inf:
        raise ValueError(f"config.learning_rate={config.learning_rate} must be above 0 and finite")
    ranges = {"beta": (0, np.inf), "top_k": (1, config.teacher_components), "top_p": (np.finfo(np.float32).tiny, 1)}
    for knob, (least, most) in ranges.items():
        for value in config.knobs[knob]:
            if not (least <= value <= most and np.isfinite(value)):
                raise ValueError(f"config.knobs.{knob}: {value} must be from {least:g} to {most:g}")
    for knob, make in DIVERGENCES.items():
        for value in config.knobs[knob]:
            try:
                make(value)
            except ValueError as error:
                raise ValueError(f"config.knobs.{knob}: {error}") from error
    if not _divergences(config):
        raise ValueError("config.knobs needs at least one divergence")
    for gain in config.gains:
        if not 0 < gain < np.inf:
            raise ValueError(f"config.gains: {gain} must be above 0 and finite")


def chunk_plan(config) -> list[experiment.Chunk]:
    """The seeds in chunks that fit `config.memory_gib`; depends on the config alone."""
    program = program_of(config)
    num_teachers = 1 + sum(len(config.knobs[knob]) for knob in TEACHERS)
    size = experiment.chunk_size(program.setting, num_teachers, config.memory_gib)
    return experiment.seed_chunks(config, program.setting, config.separation, size)


def run(config, folder: Path) -> dict:
    """Run the sweep of `config` into the run folder, carrying on after the chunks that were saved whole.

    Returns where the time went, in seconds, for the manifest.
    """
    began = time.perf_counter()
    program, numbers, plan = program_of(config), numbers_of(config), chunk_plan(config)

    def compute(c: int) -> dict:
        found = sweep(program, plan[c].first + np.arange(plan[c].size), numbers)
        return jax.tree.map(lambda leaf: leaf[: plan[c].keep], found)

    def like(c: int) -> dict:
        shapes = jax.eval_shape(lambda seeds: _sweep(program, seeds, numbers), np.zeros(plan[c].keep, np.uint32))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    chunks.run(folder, len(plan), compute, lambda c, found: _rows(config, plan[c], found), like)
    return {"sweep_seconds": time.perf_counter() - began}


def _rows(config, chunk: experiment.Chunk, found: dict) -> list[dict]:
    """One row per student."""
    rows = []
    for s in range(chunk.keep):
        for student in students(config):
            scores = {name: float(column[(s, *student.index)]) for name, column in found[student.part].items()}
            rows.append({"knob": student.knob, "value": student.value, "seed": chunk.first + s} | scores)
    return rows
