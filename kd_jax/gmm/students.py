"""One seed of the mixture experiments: p* -> data -> teacher -> students -> scores. Pure functions, for `vmap`."""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.gmm import em
from kd_jax.gmm.mixture import Mixture, Randomness, blend, cool, log_prob, place, randomness, sharpen, weight_entropy
from kd_jax.metrics import Mean

# What a random key is for: fold_in(key(seed), purpose).
# The numbers decide every result: a new purpose goes to the end.
NUM_PURPOSES = 8
DATA, TEACHER, DISTILL, STUDENT, DIRECT_FIT, PRECISION, RECALL, COMPONENT = range(NUM_PURPOSES)

AXES = ("dim", "num_data", "teacher_components", "student_components", "num_distill", "separation")
# Students without a beta: fitted to the data, to the unchanged teacher, and to one component of the teacher.
DIRECT, PLAIN, CONTROLS = "direct", "plain", ("heaviest", "random", "lightest")
DISTILLED, CHOICE = "distilled", "random_choice"
COOLINGS = ("covariances", "weights")


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


class Sizes(NamedTuple):
    """Sizes within those of a Setting; traced, so that settings of many sizes are one program."""

    num_data: jax.Array
    teacher_components: jax.Array
    student_components: jax.Array
    num_distill: jax.Array


class Scores(NamedTuple):
    """Scores of one student, nats. Fields that end in `_se` are standard errors over the draws.

    precision = E_{x~student} log p*(x) and recall = E_{x~p*} log student(x), on fresh draws. The `_notebook` columns
    are the published notebook's: precision under the sharpened teacher, recall on the training data.
    kl_student_data = KL(student || p*) and kl_data_student = KL(p* || student). teacher_entropy is the entropy of what
    the student was fitted to, estimated on the draws it was fitted to; weight_entropy that of its component weights.
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


class Ground(NamedTuple):
    """What all students of one seed share."""

    p_star: Mixture
    data: jax.Array  # [num_data, D]
    fresh: jax.Array  # [num_recall, D], draws of p* that no model was fitted to
    of_teachers: Randomness  # of the num_distill draws of each teacher
    of_students: Randomness  # of the num_precision draws of each student
    teacher: Mixture
    direct: Mixture


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


def keys(seed: jax.Array) -> jax.Array:
    """The random keys of one seed, by purpose."""
    # One key for each purpose: another number of draws for one of them leaves the others as they are. All are made in
    # one call, since XLA compiles the generator anew for each.
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(NUM_PURPOSES))


def ground(
    setting: Setting, seed: jax.Array, separation: jax.Array, tol: jax.Array, sizes: Sizes | None = None
) -> Ground:
    """The data, the teacher and the direct student of one seed.

    With `sizes`, the teacher and the student have that many components and are fitted to the first sizes.num_data
    draws of `data`.

    Args:
        setting: sizes of the program.
        seed: traced.
        separation: distance between neighbouring modes of p*.
        tol: of EM, nats.
        sizes: traced sizes within those of the setting, or None.
    """
    key, fit = keys(seed), _fit(setting, tol)
    p_star = eight_modes(setting.dim, separation)
    purposes = {
        DATA: setting.num_data, RECALL: setting.num_recall, DISTILL: setting.num_distill,
        PRECISION: setting.num_precision,
    }  # fmt: skip
    numbers = randomness(key[np.array(list(purposes))], setting.dim, tuple(purposes.values()))
    of_data, of_fresh, of_teachers, of_students = numbers
    data = place(p_star, of_data)
    # Unused points have weight zero and unused components no points, so shapes do not depend on the sizes.
    of_teacher, of_student = {}, {}
    if sizes is not None:
        weights = _first(setting.num_data, sizes.num_data)
        of_teacher = {"sample_weights": weights, "num_active": sizes.teacher_components}
        of_student = {"sample_weights": weights, "num_active": sizes.student_components}
    teacher = fit(key[TEACHER], data, setting.teacher_components, **of_teacher).mixture
    direct = fit(key[DIRECT_FIT], data, setting.student_components, **of_student).mixture
    return Ground(p_star, data, place(p_star, of_fresh), of_teachers, of_students, teacher, direct)


def distil(
    setting: Setting, seed: jax.Array, shared: Ground, teachers: Mixture, tol: jax.Array, sizes: Sizes | None = None
) -> tuple[jax.Array, Mixture]:
    """Draws [T, num_distill, D] of each of the `teachers` (leading axis T), and the students fitted to them by EM.

    Args:
        setting, seed, tol, sizes: as of `ground`.
        shared: of the seed.
        teachers: stacked, T of them.
    """
    key, fit = keys(seed), _fit(setting, tol)
    # The same random numbers for all teachers: their draws differ as little as the teachers do.
    corpora = jax.vmap(place, (0, None))(teachers, shared.of_teachers)
    more = {}
    if sizes is not None:
        weights = _first(setting.num_distill, sizes.num_distill)
        more = {"sample_weights": weights, "num_active": sizes.student_components}
    return corpora, jax.vmap(lambda x: fit(key[STUDENT], x, setting.student_components, **more).mixture)(corpora)


def _first(count: int, used: jax.Array) -> jax.Array:
    """Weights [count] of one for the first `used` points and zero for the others."""
    return (jnp.arange(count) < used).astype(jnp.float32)


def _fit(setting: Setting, tol: jax.Array):
    fit = partial(em.fit, max_iter=setting.max_iter, num_starts=setting.num_starts, tol=tol)
    return partial(fit, covariance_type=setting.covariance_type)


def one_component(teacher: Mixture, component: jax.Array) -> Mixture:
    """The teacher with all weight on one of its components."""
    chosen = jnp.arange(teacher.log_weights.shape[0]) == component
    return teacher._replace(log_weights=jnp.where(chosen, 0.0, -jnp.inf))


def controls(teacher: Mixture, seed: jax.Array) -> Mixture:
    """Teachers of one component, stacked: the heaviest, one at random with equal chances, and the lightest.

    Their component weights have the same entropy, zero; only the first is selective for what is likely.

    Args:
        teacher: of the seed.
        seed: traced.
    Returns: a Mixture with a leading axis of three.
    """
    # Drawn for each seed anew, so that "random" does not stand for one component of the run.
    any_one = jax.random.randint(keys(seed)[COMPONENT], (), 0, teacher.log_weights.shape[0])
    chosen = jnp.stack([jnp.argmax(teacher.log_weights), any_one, jnp.argmin(teacher.log_weights)])
    return jax.vmap(one_component, (None, 0))(teacher, chosen)


def cooled(student: Mixture, temperature: jax.Array, by_weights: bool) -> Mixture:
    """The student at a sampling temperature: its covariances times T, or its weights to the power 1/T."""
    return sharpen(student, 1 / temperature) if by_weights else cool(student, temperature)


def score(shared: Ground, student: Mixture, teacher: Mixture, corpus: jax.Array) -> Scores:
    """Scores of one student.

    Args:
        shared: the seed's p*, data, fresh draws and random numbers.
        student: to be scored.
        teacher: that the student was fitted to.
        corpus: [N, D] draws of the teacher, on which its entropy is estimated.
    """
    p_star, fresh = shared.p_star, shared.fresh
    draws = place(student, shared.of_students)
    draws_star, draws_student = log_prob(p_star, draws), log_prob(student, draws)
    fresh_star, fresh_student = log_prob(p_star, fresh), log_prob(student, fresh)
    precision, recall, entropy = Mean.of(draws_star), Mean.of(fresh_student), Mean.of(-draws_student)
    # Divergences as means of differences on one set of draws are less noisy than differences of two means.
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


class Simple(NamedTuple):
    """Precision and recall of one student, nats: what its curve over sampling temperatures needs."""

    precision: jax.Array
    recall: jax.Array


def simple_score(shared: Ground, student: Mixture) -> Simple:
    """Precision and recall alone, on the draws that `score` uses.

    Args:
        shared, student: as of `score`.
    """
    draws = place(student, shared.of_students)
    return Simple(log_prob(shared.p_star, draws).mean(), log_prob(student, shared.fresh).mean())


def random_choice(
    shared: Ground, shares: jax.Array, one: Mixture, other: Mixture, scores: tuple[Simple, Simple]
) -> Simple:
    """A generator that draws from `other` with probability `shares` [M] and else from `one`; [M] each, exact.

    It is a mixture of the two. Its precision is the weighted mean of their precisions. Its recall is E log of the
    weighted sum of their densities, far above the weighted mean of their recalls (Jensen's inequality).

    Args:
        shared: the seed's fresh draws of p*.
        shares: [M], from 0 to 1.
        one, other: the two students.
        scores: of the two students.
    """
    recall = lambda share: log_prob(blend(share, one, other), shared.fresh).mean()  # noqa: E731
    # Precision is linear in the density that is drawn from, so the mean is exact.
    precision = (1 - shares) * scores[0].precision + shares * scores[1].precision
    return Simple(precision, jax.vmap(recall)(shares))
