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
from kd_jax.gmm.specs import DIVERGENCES, GmmFrontierSpec
from kd_jax.runs.settings import freeze

Spec = GmmFrontierSpec  # what kd_jax.train freezes the config into
# Knobs of the teacher: (mixture, value) -> mixture.
TEACHERS = {"beta": sharpen, "top_k": top_k, "top_p": top_p}
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


def program_of(spec: Spec) -> Program:
    """The program of a spec."""
    setting = Setting(**{name: getattr(spec, name) for name in Setting._fields})
    return Program(setting, spec.num_draws, spec.num_updates, spec.teacher_components + 1)


def numbers_of(spec: Spec) -> Numbers:
    """The traced numbers of a spec."""
    values = {knob: getattr(spec.knobs, knob) for knob in TEACHERS}
    teachers = {knob: np.asarray(numbers, np.float32) for knob, numbers in values.items() if numbers}
    fields = [np.asarray(column, np.float32) for column in zip(*spec.divergences, strict=True)]
    return Numbers(teachers, Divergence(*fields), spec.separation, spec.tol, spec.learning_rate)


class Student(NamedTuple):
    """A student of every seed."""

    knob: str
    value: float | None  # of the knob, None where it is none
    part: str  # where `chain` has its scores
    index: tuple[int, ...]


def students(spec: Spec) -> list[Student]:
    """All students of a seed, in the order of the rows."""
    listed = [Student(DIRECT, None, DIRECT, ()), Student(PLAIN, None, "em", (0,))]
    selected = [(knob, value) for knob in TEACHERS for value in getattr(spec.knobs, knob)]
    listed += [Student(knob, value, "em", (1 + i,)) for i, (knob, value) in enumerate(selected)]
    for knob, make in DIVERGENCES.items():
        for value in getattr(spec.knobs, knob):
            listed.append(Student(knob, value, "gradient", (spec.divergences.index(make(value)),)))
    return listed


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    as_spec(config)


def as_spec(config) -> Spec:
    """The frozen spec of a config, or the spec itself."""
    return config if isinstance(config, Spec) else freeze(Spec, config)


def chunk_plan(spec: Spec) -> list[experiment.Chunk]:
    """The seeds in chunks that fit `spec.memory_gib`; depends on the spec alone."""
    program = program_of(spec)
    num_teachers = 1 + sum(len(getattr(spec.knobs, knob)) for knob in TEACHERS)
    size = experiment.chunk_size(program.setting, num_teachers, spec.memory_gib)
    return experiment.seed_chunks(spec, program.setting, spec.separation, size)


def run(config, folder: Path) -> dict:
    """Run the sweep of `config` into the run folder, carrying on after the chunks that were saved whole.

    Returns where the time went, in seconds, for the manifest.
    """
    began = time.perf_counter()
    spec = as_spec(config)
    program, numbers, plan = program_of(spec), numbers_of(spec), chunk_plan(spec)

    def compute(c: int) -> dict:
        found = sweep(program, plan[c].first + np.arange(plan[c].size), numbers)
        return jax.tree.map(lambda leaf: leaf[: plan[c].keep], found)

    def like(c: int) -> dict:
        shapes = jax.eval_shape(lambda seeds: _sweep(program, seeds, numbers), np.zeros(plan[c].keep, np.uint32))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    chunks.run(folder, len(plan), compute, lambda c, found: _rows(spec, plan[c], found), like)
    return {"sweep_seconds": time.perf_counter() - began}


def _rows(spec: Spec, chunk: experiment.Chunk, found: dict) -> list[dict]:
    """One row per student."""
    rows = []
    for s in range(chunk.keep):
        for student in students(spec):
            scores = {name: float(column[(s, *student.index)]) for name, column in found[student.part].items()}
            rows.append({"knob": student.knob, "value": student.value, "seed": chunk.first + s} | scores)
    return rows
