"""The knobs of selectivity on one frontier, for mixtures.

Some knobs make the teacher more selective, and EM fits the student to its draws: beta (the counterpart of a language
model's sampling temperature), top-k and top-p over the weights of its components. Others leave the teacher as it is and
choose what the student minimises: Jensen-Shannon divergences from forward to reverse KL, and skew KLs, by gradient.
All students of a seed share p*, data, teacher and random numbers, so knobs are compared seed by seed. Two ways need no
knob and are what knobs have to beat: sampling a student at a lower temperature, and a random choice between two.

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
from kd_jax.gmm import students as lib
from kd_jax.gmm import sweep as chunks
from kd_jax.gmm.gradient_fit import Divergence
from kd_jax.gmm.mixture import sharpen, top_k, top_p
from kd_jax.gmm.specs import DIVERGENCES, GmmFrontierSpec
from kd_jax.gmm.students import Setting
from kd_jax.metrics.statistics import show, t_interval
from kd_jax.reporting import page

Spec = GmmFrontierSpec  # what kd_jax.train freezes the config into
# Knobs of the teacher: (mixture, value) -> mixture.
TEACHERS = {"beta": sharpen, "top_k": top_k, "top_p": top_p}
# Students without a knob: fitted to the data, and by EM to the teacher as it is.
DIRECT, PLAIN = "direct", "plain"
# Ways without a knob: the two students above at lower sampling temperatures, and a random choice between the plain
# student and the one of the last beta.
COOLED, CHOICE = {DIRECT: "cooled_direct", PLAIN: "cooled_plain"}, "random_choice"
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
    temperatures: jax.Array
    shares: jax.Array
    separation: jax.Array
    tol: jax.Array
    learning_rate: jax.Array


def chain(program: Program, seed: jax.Array, numbers: Numbers) -> dict[str, dict[str, jax.Array]]:
    """One seed: scores of the direct student, of T students by EM, the plain one first, and of D by gradient.

    The latter also have `divergence` (on fresh draws), `objective` (on those of the fit), `gradient_norm` and `start`.
    """
    setting = program.setting
    shared = lib.ground(setting, seed, numbers.separation, numbers.tol)
    # All teachers in one batch, the unchanged one first: sampling and EM are compiled once.
    teachers = [jax.tree.map(lambda leaf: leaf[None], shared.teacher)]
    for knob, select in TEACHERS.items():
        if knob in numbers.teachers:
            teachers.append(jax.vmap(select, (None, 0))(shared.teacher, numbers.teachers[knob]))
    teachers = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *teachers)
    corpora, students = lib.distil(setting, seed, shared, teachers, numbers.tol)
    corpus, key = corpora[0], partial(jax.random.fold_in, jax.random.key(seed))
    starts = gradient_fit.starts_of(shared.teacher, jax.tree.map(lambda leaf: leaf[0], students), program.num_starts)

    def score(student, teacher, corpus):
        scores = lib.score(shared, student, teacher, corpus)
        return {name: getattr(scores, name) for name in _SCORES}

    def by_gradient(target: Divergence):
        # The same noise for all divergences: differences between them are less noisy.
        fit = gradient_fit.fit(
            key(NOISE), target, shared.teacher, corpus, starts, num_draws=program.num_draws,
            num_updates=program.num_updates, learning_rate=numbers.learning_rate,
        )  # fmt: skip
        # On draws that the fit has not seen: its own objective is optimistic.
        fresh = gradient_fit.held_out(key(HELD_OUT), target, shared.teacher, fit.mixture, setting.num_precision)
        ending = {"divergence": fresh, "objective": fit.objective[-1], "gradient_norm": fit.gradient_norm}
        return score(fit.mixture, shared.teacher, corpus) | ending | {"start": fit.start.astype(jnp.float32)}

    # Index 0 is the plain student; the last beta's follows the others of its knob.
    pick = lambda index: jax.tree.map(lambda leaf: leaf[index], students)  # noqa: E731
    em_scores = jax.vmap(score)(students, teachers, corpora)
    cooled = lambda student: jax.vmap(  # noqa: E731
        lambda t: lib.simple_score(shared, lib.cooled(student, t, by_weights=False))._asdict()
    )(numbers.temperatures)
    choice, selective = {}, len(numbers.teachers.get("beta", ()))
    if selective:
        pair = [lib.Simple(em_scores["precision"][i], em_scores["recall"][i]) for i in (0, selective)]
        choice[CHOICE] = lib.random_choice(shared, numbers.shares, pick(0), pick(selective), pair)._asdict()
    # The direct student was fitted to draws of p*, not of the teacher.
    of_data = {"teacher_entropy": -lib.log_prob(shared.p_star, shared.data).mean()}
    of_data["weight_entropy"] = lib.weight_entropy(shared.p_star)
    return {
        DIRECT: score(shared.direct, shared.teacher, corpus) | of_data,
        COOLED[DIRECT]: cooled(shared.direct),
        COOLED[PLAIN]: cooled(pick(0)),
        **choice,
        "em": em_scores,
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
    # A start at EM's student, and one at each component of the teacher.
    return Program(setting, spec.num_draws, spec.num_updates, spec.teacher_components + 1)


def numbers_of(spec: Spec) -> Numbers:
    """The traced numbers of a spec."""
    values = {knob: getattr(spec.knobs, knob) for knob in TEACHERS}
    teachers = {knob: np.asarray(numbers, np.float32) for knob, numbers in values.items() if numbers}
    # One array for each of the four numbers of a divergence, over which the program maps.
    fields = [np.asarray(column, np.float32) for column in zip(*spec.divergences, strict=True)]
    temperatures, shares = (np.asarray(numbers, np.float32) for numbers in (spec.temperatures, spec.shares))
    return Numbers(teachers, Divergence(*fields), temperatures, shares, spec.separation, spec.tol, spec.learning_rate)


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
    for knob in COOLED.values():
        listed += [Student(knob, value, knob, (i,)) for i, value in enumerate(spec.temperatures)]
    # between the plain student and the most selective one
    shares = spec.shares if spec.knobs.beta else ()
    return listed + [Student(CHOICE, value, CHOICE, (i,)) for i, value in enumerate(shares)]


def validate(spec: Spec) -> None:
    """Nothing: a spec that exists can run, since it was checked when it was made."""


def chunk_plan(spec: Spec) -> list[experiment.Chunk]:
    """The seeds in chunks that fit `spec.memory_gib`; depends on the spec alone."""
    program = program_of(spec)
    num_teachers = 1 + sum(len(getattr(spec.knobs, knob)) for knob in TEACHERS)
    size = experiment.chunk_size(program.setting, num_teachers, spec.memory_gib)
    return experiment.seed_chunks(spec, program.setting, size, spec.seeds)


def run(spec: Spec, folder: Path) -> dict:
    """Runs the sweep of `spec` into the run folder, resuming after the chunks that were saved whole.

    Returns where the time went, in seconds, for the manifest.
    """
    began = time.perf_counter()
    program, numbers, plan = program_of(spec), numbers_of(spec), chunk_plan(spec)

    def compute(c: int) -> dict:
        # The last chunk is computed in full, so that there is one program, and cut afterwards.
        scores = sweep(program, plan[c].first + np.arange(plan[c].size), numbers)
        return jax.tree.map(lambda leaf: leaf[: plan[c].keep], scores)

    def like(c: int) -> dict:
        shapes = jax.eval_shape(lambda seeds: _sweep(program, seeds, numbers), np.zeros(plan[c].keep, np.uint32))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    chunks.run(folder, len(plan), compute, lambda c, scores: _rows(spec, plan[c], scores), like)
    return {"sweep_seconds": time.perf_counter() - began}


def result(folder: Path) -> list[str]:
    """What a finished run found, in lines: precision and recall of the first and the last setting of each knob."""
    values: dict[str, dict] = {}
    for row in page.read_rows(folder):
        values.setdefault(row["knob"], {}).setdefault(row["value"], []).append((row["precision"], row["recall"]))
    lines = []
    for knob, settings in values.items():
        for value in list(dict.fromkeys((next(iter(settings)), list(settings)[-1]))):
            cells = (t_interval(column) for column in np.array(settings[value], float).T)
            precision, recall = (show(cell.mean, cell.error) for cell in cells)
            name = knob if value is None else f"{knob} {value:g}"
            lines.append(f"{name}: precision {precision}, recall {recall} nats")
    return lines


def _rows(spec: Spec, chunk: experiment.Chunk, scores: dict) -> list[dict]:
    """One row per student."""
    rows = []
    for s in range(chunk.keep):
        for student in students(spec):
            columns = scores[student.part].items()
            values = {name: float(column[(s, *student.index)]) for name, column in columns}
            rows.append({"knob": student.knob, "value": student.value, "seed": chunk.first + s} | values)
    return rows
