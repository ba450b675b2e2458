"""The mixture experiment (Cha & Cho, section 3) with its controls: which students, at which settings, and its rows.

One seed is a pure function, `chain`; a sweep is that function under `vmap` over seeds, one jitted program. beta,
sampling temperature, seed and separation are traced. Within a seed all students share their random numbers: differences
along the frontier are then less noisy than its points, and no number depends on which other betas were asked for.

The other settings (`spec.vary`) are cells: sizes within the largest, also traced, so that a capacity grid is two
programs, one for students of one component, whose EM is closed-form, and one for the others.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import findings
from kd_jax.gmm import students as lib
from kd_jax.gmm import sweep as chunks
from kd_jax.gmm.mixture import Mixture, sharpen
from kd_jax.gmm.specs import GmmSpec, SweepSpec
from kd_jax.gmm.students import (
    AXES,
    CHOICE,
    CONTROLS,
    COOLINGS,
    DIRECT,
    DISTILLED,
    PLAIN,
    Scores,
    Setting,
    Simple,
    Sizes,
)
from kd_jax.parallel import distributed
from kd_jax.storage.files import replacing

Spec = GmmSpec  # what kd_jax.train freezes the config into


class Chain(NamedTuple):
    """All that one seed makes. Students: direct, plain, one for each of B betas, one for each of CONTROLS."""

    data: jax.Array  # [num_data, D]
    teacher: Mixture
    sharpened: Mixture  # by the largest beta
    students: Mixture  # [students, ...]
    scores: Scores  # [students]
    curves: Simple  # [temperatures, coolings, students]
    choice: Simple  # [shares]


class Numbers(NamedTuple):
    """The traced numbers of a sweep."""

    betas: np.ndarray
    temperatures: np.ndarray
    shares: np.ndarray
    separation: float
    tol: float


class Cell(NamedTuple):
    """A setting other than the base: the axes' values."""

    dim: int
    num_data: int
    teacher_components: int
    student_components: int
    num_distill: int
    separation: float


class Chunk(NamedTuple):
    """Seeds that one program computes, and that are saved together."""

    setting: Setting
    first: int  # first seed
    size: int  # seeds in the program
    keep: int  # seeds that count
    cells: tuple[Cell, ...] = ()  # none for the base setting


def chain(setting: Setting, seed: jax.Array, numbers: Numbers) -> Chain:
    """One seed of the experiment."""
    shared = lib.ground(setting, seed, numbers.separation, numbers.tol)
    # All teachers in one batch, and all students in one: sampling and EM are then compiled once, and compiling takes
    # longer than running.
    sharpened = jax.vmap(sharpen, (None, 0))(shared.teacher, numbers.betas)
    teachers = _stack(_one(shared.teacher), sharpened, lib.controls(shared.teacher, seed))
    corpora, distilled = lib.distil(setting, seed, shared, teachers, numbers.tol)
    students = _stack(_one(shared.direct), distilled)
    # As in the notebook, the direct student's notebook column is under the last, most selective, teacher.
    last = jax.tree.map(lambda leaf: leaf[-1], sharpened)
    judges, draws = _stack(_one(last), teachers), jnp.concatenate([corpora[:1], corpora])
    scores = jax.vmap(partial(lib.score, shared))(students, judges, draws)
    # What the direct student was fitted to are draws of p*.
    entropy = -lib.log_prob(shared.p_star, shared.data).mean()
    scores = scores._replace(
        teacher_entropy=scores.teacher_entropy.at[0].set(entropy),
        weight_entropy=scores.weight_entropy.at[0].set(lib.weight_entropy(shared.p_star)),
    )
    simple = partial(lib.simple_score, shared)
    ways = [False, True] if setting.student_components > 1 else [False]

    def at_temperature(temperature):
        by = [jax.vmap(lambda m, way=way: simple(lib.cooled(m, temperature, way)))(students) for way in ways]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *by)

    # One temperature after the other: all at once need more memory and are no faster.
    curves = jax.lax.map(at_temperature, numbers.temperatures)
    # The choice is between the two ends of the knob, which is where a chord would be furthest from the truth.
    plain, selective = 1, 1 + len(numbers.betas)
    pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)  # noqa: E731
    pair = [Simple(scores.precision[index], scores.recall[index]) for index in (plain, selective)]
    choice = lib.random_choice(shared, numbers.shares, pick(students, plain), pick(students, selective), pair)
    return Chain(shared.data, shared.teacher, last, students, scores, curves, choice)


def _one(mixture: Mixture) -> Mixture:
    return jax.tree.map(lambda leaf: leaf[None], mixture)


def _stack(*mixtures: Mixture) -> Mixture:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *mixtures)


def cell(setting: Setting, seed: jax.Array, sizes: Sizes, separation, betas, tol) -> dict[str, jax.Array]:
    """One seed at sizes within those of `setting`: the direct student, then one for each beta, [1 + B]."""
    shared = lib.ground(setting, seed, separation, tol, sizes)
    teachers = jax.vmap(sharpen, (None, 0))(shared.teacher, betas)
    corpora, distilled = lib.distil(setting, seed, shared, teachers, tol, sizes)
    # Entropies and scores may use all draws of the largest size: only the fits depend on how many there are.
    scores = jax.vmap(partial(lib.simple_score, shared))(_stack(_one(shared.direct), distilled))
    entropies = jax.vmap(lambda teacher, corpus: -lib.log_prob(teacher, corpus).mean())(teachers, corpora)
    of_data = -lib.log_prob(shared.p_star, shared.data).mean()
    return {**scores._asdict(), "teacher_entropy": jnp.concatenate([of_data[None], entropies])}


def _cells(setting: Setting, seeds, sizes: Sizes, separations, betas, tol) -> dict[str, jax.Array]:
    """[S, C, 1 + B] for seeds [S] and cells [C], one cell after the other: each stops when its own EM has converged."""
    one = lambda c: jax.vmap(lambda seed: cell(setting, seed, *c, betas, tol))(seeds)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), jax.lax.map(one, (sizes, separations)))


def _chains(setting: Setting, seeds, numbers: Numbers) -> Chain:
    return jax.vmap(partial(chain, setting), (0, None))(seeds, numbers)


_sweep = jax.jit(_chains, static_argnums=0)
_cell_sweep = jax.jit(_cells, static_argnums=0)


def sweep(setting: Setting, seeds, numbers: Numbers, devices=None) -> Chain:
    """`chain` for many seeds [S], on all `devices` (default: every one there is)."""
    return chunks.over_seeds(lambda s, n: _sweep(setting, s, n), seeds, numbers, devices)


def cell_sweep(setting: Setting, seeds, cells: tuple[Cell, ...], betas, tol) -> dict[str, np.ndarray]:
    """`cell` for many seeds and cells: [S, C, 1 + B]."""
    sizes = Sizes(*(np.array([getattr(c, name) for c in cells]) for name in Sizes._fields))
    numbers = (sizes, np.array([c.separation for c in cells]), np.asarray(betas), tol)
    return chunks.over_seeds(lambda s, n: _cell_sweep(setting, s, *n), seeds, numbers)


def validate(spec: Spec) -> None:
    """Nothing: a spec that exists can run, since it was checked when it was made."""


def base_of(spec: SweepSpec) -> Setting:
    """The base setting of a spec."""
    return Setting(**{name: getattr(spec, name) for name in Setting._fields})


def numbers_of(spec: Spec) -> Numbers:
    """The traced numbers of a spec."""
    temperatures, shares = (np.asarray(values, np.float32) for values in (spec.temperatures, spec.shares))
    return Numbers(spec.betas, temperatures, shares, spec.separation, spec.tol)


def cells_of(spec: Spec) -> list[Cell]:
    """The settings of `spec.vary`, none twice and none the base itself."""
    base = Cell(*(getattr(spec, name) for name in AXES))
    listed = [base._replace(**{axis: value}) for axis in AXES for value in getattr(spec.vary, axis)]
    listed += [
        base._replace(teacher_components=teacher, student_components=student)
        for teacher in spec.vary.grid
        for student in spec.vary.grid
    ]
    return [c for c in dict.fromkeys(listed) if c != base]


def chunk_size(setting: Setting, num_students: int, memory_gib: float) -> int:
    """Seeds that fit the memory at once, by the live float32 arrays of a seed (measured: benchmarks/gmm_sweep.py).

    It does not depend on the number of devices: a run can be resumed on another.

    Args:
        num_students: students of a seed.
        memory_gib: memory for the arrays, GiB.
    """
    points = max(setting.num_distill, setting.num_precision, setting.num_recall)
    components = setting.student_components
    width = 3 * setting.dim + 6 * components + (0 if setting.dim <= 4 else 2 * setting.dim * components)
    return max(1, int(memory_gib * 2**30 / (8 * num_students * points * width)))


def seed_chunks(spec: SweepSpec, setting: Setting, size: int, seeds: int, cells: tuple[Cell, ...] = ()) -> list[Chunk]:
    """All seeds, at most `size` at a time."""
    size = min(seeds, size)
    return [Chunk(setting, spec.seed + f, size, min(size, seeds - f), cells) for f in range(0, seeds, size)]


def plan_of(spec: Spec) -> list[Chunk]:
    """The run in chunks that fit `spec.memory_gib`; depends on the spec alone."""
    base = base_of(spec)
    # a student for each beta, the direct and the plain one, and the controls
    size = chunk_size(base, spec.num_betas + 2 + len(CONTROLS), spec.memory_gib)
    plan = seed_chunks(spec, base, size, spec.seeds)
    # EM of one component is closed-form, and a cell of eight would make all of its program iterate.
    groups: dict[tuple, list[Cell]] = {}
    for c in cells_of(spec):
        groups.setdefault((c.dim, c.student_components == 1), []).append(c)
    for group in groups.values():
        largest = {name: max(getattr(c, name) for c in group) for name in ("dim", *Sizes._fields)}
        # One program for the group: sizes within the largest are traced.
        setting = base._replace(**largest)
        size = chunk_size(setting, 1 + len(spec.vary_betas), spec.memory_gib)
        plan += seed_chunks(spec, setting, size, min(spec.vary.seeds, spec.seeds), tuple(group))
    return plan


def run(spec: Spec, folder: Path) -> dict:
    """Runs the sweep into the run folder, resuming after the chunks that were saved whole.

    Returns where the time went, in seconds, for the manifest.
    """
    began = time.perf_counter()
    plan, numbers, first = plan_of(spec), numbers_of(spec), {}

    def program(chunk: Chunk, seeds) -> dict:
        if chunk.cells:
            return {"cells": cell_sweep(chunk.setting, seeds, chunk.cells, spec.vary_betas, spec.tol)}
        made = sweep(chunk.setting, seeds, numbers)
        return {name: _plain(value) for name, value in made._asdict().items()}

    def compute(c: int) -> dict:
        # The last chunk is computed in full, so that there is one program, and cut afterwards.
        arrays = program(plan[c], plan[c].first + np.arange(plan[c].size))
        return jax.tree.map(lambda leaf: leaf[: plan[c].keep], arrays)

    def rows(c: int, arrays: dict) -> list[dict]:
        # The first seed's arrays are kept for the contour panels.
        if c == 0:
            first.update(jax.tree.map(lambda leaf: np.asarray(leaf[0]), arrays))
        return list(_cell_rows(spec, plan[c], arrays["cells"]) if plan[c].cells else _rows(spec, plan[c], arrays))

    chunks.run(folder, len(plan), compute, rows, lambda c: _like(spec, plan[c]))
    swept = time.perf_counter()
    if spec.dim == 2 and distributed.leads():
        with replacing(folder / "checkpoints" / "panels.npz") as file:
            np.savez(file, **panels(spec, first))
    return {"sweep_seconds": swept - began, "panels_seconds": time.perf_counter() - swept}


def result(folder: Path) -> list[str]:
    """What a finished run found, in lines."""
    return findings.summary(folder)


def _plain(value):
    """Named tuples as dicts, which is what a checkpoint holds."""
    return value._asdict() if isinstance(value, tuple) else value


def _like(spec: Spec, chunk: Chunk) -> dict:
    """Arrays of the shapes and types that a chunk's program makes."""
    seeds, numbers = np.zeros(chunk.keep, np.uint32), jax.tree.map(np.float32, numbers_of(spec))
    if chunk.cells:
        shape = (chunk.keep, len(chunk.cells), 1 + len(spec.vary_betas))
        return {"cells": {name: np.zeros(shape, np.float32) for name in (*Simple._fields, "teacher_entropy")}}
    # Traced only: nothing is computed to learn the shapes.
    shapes = jax.eval_shape(partial(_chains, chunk.setting), seeds, numbers)
    shapes = {name: _plain(value) for name, value in shapes._asdict().items()}
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _arms(spec: Spec) -> list[tuple[str, float | None]]:
    """Name and beta of each student of a chain, in its order."""
    return [(DIRECT, None), (PLAIN, None), *((DISTILLED, float(b)) for b in spec.betas), *((c, None) for c in CONTROLS)]


def _rows(spec: Spec, chunk: Chunk, arrays: dict):
    """Rows of each seed: one for each student at each of its sampling temperatures, and for each random choice."""
    setting = {name: getattr(spec, name) for name in AXES}
    scores, curves, choice = (
        {name: np.asarray(values, float) for name, values in arrays[key].items()}
        for key in ("scores", "curves", "choice")
    )
    for s in range(chunk.keep):
        own = setting | {"seed": chunk.first + s}
        for i, (arm, beta) in enumerate(_arms(spec)):
            who = own | {"arm": arm, "beta": beta}
            yield who | {"sample_temperature": 1.0} | {name: float(v[s, i]) for name, v in scores.items()}
            entropy = float(scores["teacher_entropy"][s, i])
            for t, temperature in enumerate(spec.temperatures):
                for w in range(curves["recall"].shape[2]):
                    at = {"sample_temperature": temperature, "cooling": COOLINGS[w], "teacher_entropy": entropy}
                    yield who | at | {name: float(v[s, t, w, i]) for name, v in curves.items()}
        for m, share in enumerate(spec.shares):
            who = own | {"arm": CHOICE, "beta": None, "share": share, "sample_temperature": 1.0}
            yield who | {name: float(v[s, m]) for name, v in choice.items()}


def _cell_rows(spec: Spec, chunk: Chunk, scores: dict):
    """A row for each student of each cell and seed."""
    for c, setting in enumerate(chunk.cells):
        for s in range(chunk.keep):
            for i, beta in enumerate((None, *map(float, spec.vary_betas))):
                who = {
                    "seed": chunk.first + s,
                    "arm": DISTILLED if i else DIRECT,
                    "beta": beta,
                    "sample_temperature": 1.0,
                }
                yield setting._asdict() | who | {name: float(v[s, c, i]) for name, v in scores.items()}


def panels(spec: Spec, first: dict) -> dict[str, np.ndarray]:
    """The data and mixtures of the first seed at the largest beta, for the contour panels.

    Args: first: the arrays of the first seed's chain.
    """
    take = lambda index: {name: leaf[index] for name, leaf in first["students"].items()}  # noqa: E731
    p_star = lib.eight_modes(2, spec.separation)._asdict()
    mixtures = {"p_star": p_star, "direct": take(0), "distilled": take(1 + spec.num_betas)}
    mixtures |= {name: first[name] for name in ("teacher", "sharpened")}
    arrays = {f"{name}_{field}": np.asarray(leaf) for name, m in mixtures.items() for field, leaf in m.items()}
    return arrays | {"data": first["data"], "beta": spec.betas[-1]}
