"""The mixture experiment (Cha & Cho, section 3): p* -> data -> teacher -> sharpen -> students -> scores.

One seed is a pure function, `chain`; a sweep is that function under `vmap` over seeds, with the students under `vmap`
over beta, in one jitted program per `Setting`. beta, seed and separation are traced, so that a sweep compiles once for
each set of shapes. Within a seed all betas share their random numbers: the differences along the frontier are then less
noisy than the points, and no number depends on which other betas were asked for.
"""

import itertools
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import em
from kd_jax.gmm import sweep as chunks
from kd_jax.gmm.mixture import Mixture, log_prob, sample, sharpen, weight_entropy
from kd_jax.gmm.specs import GmmSpec, SweepSpec
from kd_jax.metrics import Mean
from kd_jax.parallel import distributed
from kd_jax.runs.settings import freeze
from kd_jax.storage.files import replacing

Spec = GmmSpec  # what kd_jax.train freezes the config into
# What a random key is for: fold_in(key(seed), purpose).
DATA, TEACHER, DISTILL, STUDENT, DIRECT, PRECISION, RECALL = range(7)
AXES = ("dim", "num_data", "teacher_components", "student_components", "separation")


class Setting(NamedTuple):
    """What fixes the shapes of a program; every field is a compile-time constant."""

    dim: int
    num_data: int
    teacher_components: int
    student_components: int
    num_distill: int
    num_precision: int
    num_recall: int
    max_iter: int
    num_starts: int
    covariance_type: str


class Scores(NamedTuple):
    """Scores of one student, nats. The fields ending in `_se` are standard errors over the draws.

    precision = E_{x~student} log p*(x) and recall = E_{x~p*} log student(x), on fresh draws. The two `_notebook`
    columns are the published notebook's: precision under the sharpened teacher, recall on the training data.
    kl_student_data = KL(student || p*) and kl_data_student = KL(p* || student).
    """

    precision: jax.Array
    precision_se: jax.Array
    recall: jax.Array
    recall_se: jax.Array
    precision_notebook: jax.Array
    recall_notebook: jax.Array
    weight_entropy: jax.Array
    teacher_entropy: jax.Array
    student_entropy: jax.Array
    student_entropy_se: jax.Array
    kl_student_data: jax.Array
    kl_student_data_se: jax.Array
    kl_data_student: jax.Array
    kl_data_student_se: jax.Array


class Chain(NamedTuple):
    """All that one seed makes; `distilled`, `sharpened` and their scores have a leading axis over beta."""

    data: jax.Array
    teacher: Mixture
    direct: Mixture
    sharpened: Mixture
    distilled: Mixture
    direct_scores: Scores
    distilled_scores: Scores


def eight_modes(dim: int, separation: float | jax.Array = 1.0, variance: float = 0.025) -> Mixture:
    """p*: 8 Gaussians of equal weight at separation * {-1, 0, 1}^2 without the origin, covariance variance * I.

    In more than two dimensions the modes lie in the plane of the first two axes and every other coordinate is
    N(0, variance), so the density is known exactly and distances between modes stay those of two dimensions.
    Raises ValueError for less than two dimensions.
    """
    if dim < 2:
        raise ValueError(f"p* needs at least 2 dimensions, not {dim}")
    modes = np.zeros((8, dim), np.float32)
    modes[:, :2] = [m for m in itertools.product((-1, 0, 1), repeat=2) if m != (0, 0)]
    means = jnp.asarray(modes) * separation
    return Mixture(jnp.full(8, -np.log(8), means.dtype), means, jnp.full((8, dim), variance, means.dtype))


class Ground(NamedTuple):
    """What all students of one seed share."""

    p_star: Mixture
    data: jax.Array  # [num_data, D]
    fresh: jax.Array  # [num_recall, D], draws of p* that no model was fitted to
    teacher: Mixture
    direct: Mixture


def keys(seed: jax.Array):
    """Purpose -> random key of one seed."""
    return partial(jax.random.fold_in, jax.random.key(seed))


def ground(setting: Setting, seed: jax.Array, separation: jax.Array, tol: jax.Array) -> Ground:
    """The data, the teacher and the direct student of one seed."""
    key, fit = keys(seed), _fit(setting, tol)
    p_star = eight_modes(setting.dim, separation)
    data = sample(key(DATA), p_star, setting.num_data)
    teacher = fit(key(TEACHER), data, setting.teacher_components).mixture
    direct = fit(key(DIRECT), data, setting.student_components).mixture
    return Ground(p_star, data, sample(key(RECALL), p_star, setting.num_recall), teacher, direct)


def distil(setting: Setting, seed: jax.Array, teachers: Mixture, tol: jax.Array) -> tuple[jax.Array, Mixture]:
    """Draws [T, num_distill, D] of each of the `teachers` (leading axis T), and the students fitted to them by EM."""
    key, fit = keys(seed), _fit(setting, tol)
    corpora = jax.vmap(sample, (None, 0, None))(key(DISTILL), teachers, setting.num_distill)
    return corpora, jax.vmap(lambda x: fit(key(STUDENT), x, setting.student_components).mixture)(corpora)


def _fit(setting: Setting, tol: jax.Array):
    fit = partial(em.fit, max_iter=setting.max_iter, num_starts=setting.num_starts, tol=tol)
    return partial(fit, covariance_type=setting.covariance_type)


def score(setting: Setting, seed: jax.Array, shared: Ground, student: Mixture, teacher: Mixture, corpus) -> Scores:
    """Scores of one student. `corpus` are draws of its `teacher`, of which that one's entropy is estimated."""
    p_star, fresh = shared.p_star, shared.fresh
    draws = sample(keys(seed)(PRECISION), student, setting.num_precision)
    draws_star, draws_student = log_prob(p_star, draws), log_prob(student, draws)
    fresh_star, fresh_student = log_prob(p_star, fresh), log_prob(student, fresh)
    precision, recall, entropy = Mean.of(draws_star), Mean.of(fresh_student), Mean.of(-draws_student)
    # The divergences as means of differences on one set of draws: less noisy than the difference of two means.
    kl_student, kl_data = Mean.of(draws_student - draws_star), Mean.of(fresh_star - fresh_student)
    return Scores(
        precision=precision.mean,
        precision_se=precision.standard_error,
        recall=recall.mean,
        recall_se=recall.standard_error,
        precision_notebook=log_prob(teacher, draws).mean(),
        recall_notebook=log_prob(student, shared.data).mean(),
        weight_entropy=weight_entropy(teacher),
        teacher_entropy=-log_prob(teacher, corpus).mean(),
        student_entropy=entropy.mean,
        student_entropy_se=entropy.standard_error,
        kl_student_data=kl_student.mean,
        kl_student_data_se=kl_student.standard_error,
        kl_data_student=kl_data.mean,
        kl_data_student_se=kl_data.standard_error,
    )


def chain(setting: Setting, seed: jax.Array, betas: jax.Array, separation: jax.Array, tol: jax.Array) -> Chain:
    """One seed of the experiment: `betas` [B] -> the students and their scores."""
    shared = ground(setting, seed, separation, tol)
    sharpened = jax.vmap(sharpen, (None, 0))(shared.teacher, betas)
    corpora, distilled = distil(setting, seed, sharpened, tol)
    judge = partial(score, setting, seed, shared)
    # As in the notebook, the direct student's notebook column is under the last, most selective, teacher.
    last = jax.tree.map(lambda leaf: leaf[-1], sharpened)
    own = sample(keys(seed)(DISTILL), shared.teacher, setting.num_distill)
    direct_scores = judge(shared.direct, last, own)._replace(
        weight_entropy=weight_entropy(shared.teacher), teacher_entropy=-log_prob(shared.teacher, own).mean()
    )
    distilled_scores = jax.vmap(judge)(distilled, sharpened, corpora)
    return Chain(shared.data, shared.teacher, shared.direct, sharpened, distilled, direct_scores, distilled_scores)


def _scores(setting: Setting, seeds, betas, separation, tol) -> tuple[Scores, Scores]:
    """Scores of the direct [S] and the distilled [S, B] students of many seeds [S]."""
    chains = jax.vmap(partial(chain, setting), (0, None, None, None))(seeds, betas, separation, tol)
    return chains.direct_scores, chains.distilled_scores


_sweep = jax.jit(_scores, static_argnums=0)
_one_chain = jax.jit(chain, static_argnums=0)


def sweep(setting: Setting, seeds, betas, separation=1.0, tol=1e-3, devices=None) -> tuple[Scores, Scores]:
    """Scores of the direct [S] and distilled [S, B] students, on all `devices` (default: every one there is).

    Seeds are spread over the devices; where they do not divide evenly the last ones are computed twice and dropped.
    """
    program = lambda seeds, numbers: _sweep(setting, seeds, *numbers)  # noqa: E731
    return chunks.over_seeds(program, seeds, (np.asarray(betas), separation, tol), devices)


def validate(config) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    as_spec(config)


def as_spec(config) -> Spec:
    """The frozen spec of a config, or the spec itself."""
    return config if isinstance(config, Spec) else freeze(Spec, config)


def settings(spec: Spec) -> list[tuple[Setting, float]]:
    """The base setting, then the base with each value of `spec.vary` alone; no setting twice."""
    changes = [{}] + [{axis: value} for axis in AXES for value in getattr(spec.vary, axis)]
    pairs = []
    for change in changes:
        values = {name: change.get(name, getattr(spec, name)) for name in (*Setting._fields, "separation")}
        separation = values.pop("separation")
        pairs.append((Setting(**values), separation))
    return list(dict.fromkeys(pairs))


def chunk_size(setting: Setting, num_betas: int, memory_gib: float) -> int:
    """Seeds that fit the memory at once, by the live float32 arrays of a seed (measured: benchmarks/gmm_sweep.py).

    Not by the number of devices: a run may be resumed on another.
    """
    points = max(setting.num_distill, setting.num_precision, setting.num_recall)
    components = setting.student_components
    width = 3 * setting.dim + 6 * components + (0 if setting.dim <= 4 else 2 * setting.dim * components)
    return max(1, int(memory_gib * 2**30 / (8 * num_betas * points * width)))


class Chunk(NamedTuple):
    """A part of a sweep that is computed, and saved, at once."""

    setting: Setting
    separation: float
    first: int  # first seed
    size: int  # seeds in the program
    keep: int  # seeds that count


def chunk_plan(spec: Spec) -> list[Chunk]:
    """The sweep in chunks of seeds that fit `spec.memory_gib`; depends on the spec alone."""
    plan = []
    for setting, separation in settings(spec):
        plan += seed_chunks(spec, setting, separation, chunk_size(setting, spec.num_betas, spec.memory_gib))
    return plan


def seed_chunks(spec: SweepSpec, setting: Setting, separation: float, size: int) -> list[Chunk]:
    """All seeds of the spec, at most `size` at a time."""
    size = min(spec.seeds, size)
    firsts = range(0, spec.seeds, size)
    return [Chunk(setting, separation, spec.seed + f, size, min(size, spec.seeds - f)) for f in firsts]


def _rows(chunk: Chunk, betas, scores: dict[str, dict]) -> list[dict]:
    """One row per student."""
    shape = {name: getattr(chunk.setting, name) for name in AXES[:4]} | {"separation": chunk.separation}
    rows = []
    for s in range(chunk.keep):
        arms = [("direct", betas[-1], (s,))] + [("distilled", beta, (s, b)) for b, beta in enumerate(betas)]
        for arm, beta, index in arms:
            values = {name: float(scores[arm][name][index]) for name in Scores._fields}
            rows.append(shape | {"arm": arm, "beta": float(beta), "seed": chunk.first + s} | values)
    return rows


def run(config, folder: Path) -> dict:
    """Run the sweep of `config` into the run folder, carrying on after the chunks that were saved whole.

    Returns where the time went, in seconds, for the manifest.
    """
    began = time.perf_counter()
    spec = as_spec(config)
    betas, plan = spec.betas, chunk_plan(spec)

    def compute(c: int) -> dict:
        # A chunk past the last seed is computed in full, so that there is one program, and cut afterwards.
        chunk = plan[c]
        seeds = chunk.first + np.arange(chunk.size)
        scores = sweep(chunk.setting, seeds, betas, chunk.separation, spec.tol)
        direct, distilled = (jax.tree.map(lambda leaf: leaf[: chunk.keep], arm) for arm in scores)
        return {"direct": direct._asdict(), "distilled": distilled._asdict()}

    def like(c: int) -> dict:
        shapes = {"direct": plan[c].keep, "distilled": (plan[c].keep, len(betas))}
        return {arm: {name: np.zeros(shape, np.float32) for name in Scores._fields} for arm, shape in shapes.items()}

    chunks.run(folder, len(plan), compute, lambda c, trees: _rows(plan[c], betas, trees), like)
    swept = time.perf_counter()
    if spec.dim == 2 and distributed.leads():
        _write_panels(folder / "checkpoints" / "panels.npz", panels(spec))
    return {"sweep_seconds": swept - began, "panels_seconds": time.perf_counter() - swept}


def panels(spec: Spec, grid_size: int = 160) -> dict[str, np.ndarray]:
    """The first seed's chain at the largest beta, for the contour panels: log densities on a grid, and samples."""
    setting, separation = settings(spec)[0]
    one = _one_chain(setting, jnp.uint32(spec.seed), jnp.asarray(spec.betas), separation, spec.tol)
    last = jax.tree.map(lambda leaf: leaf[-1], (one.sharpened, one.distilled))
    mixtures = {
        "p_star": eight_modes(2, separation),
        "teacher": one.teacher,
        "direct": one.direct,
        "distilled": last[1],
    }
    axis = jnp.linspace(-2.0, 2.0, grid_size) * max(separation, 0.75)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1)
    arrays = {"grid_x": axis, "grid_y": axis, "data": one.data, "beta": spec.betas[-1]}
    arrays |= {f"log_{name}": jax.jit(log_prob)(mixture, grid) for name, mixture in mixtures.items()}
    mixtures["teacher"] = last[0]  # the samples shown are the sharpened teacher's
    key = jax.random.key(spec.seed)
    draw = jax.jit(sample, static_argnums=2)
    arrays |= {f"samples_{name}": draw(key, mixture, 500) for name, mixture in mixtures.items()}
    return {name: np.asarray(value) for name, value in arrays.items()}


def _write_panels(path: Path, arrays: dict) -> None:
    with replacing(path) as file:
        np.savez(file, **arrays)
