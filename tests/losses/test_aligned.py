"""Divergences between vocabularies against NumPy, from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from kd_jax import losses
from kd_jax.losses import Shared, Start

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("sizes", [(7, 7), (9, 5), (5, 9)])
def test_universal_distance(sizes):
    teacher, student = (3 * RANDOM.standard_normal((4, size)) for size in sizes)
    wanted = []
    for p, q in zip(softmax(teacher / 2.0, -1), softmax(student / 2.0, -1), strict=True):
        p, q = (np.pad(np.sort(x)[::-1], (0, 9 - len(x))) for x in (p, q))
        wanted.append(np.abs(p - q).sum())
    found = losses.universal_distance(
        teacher_logits=jnp.float32(teacher), student_logits=jnp.float32(student), temperature=2.0
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_universal_distance_ignores_which_token_it_is():
    logits = jnp.float32(RANDOM.standard_normal(8))
    assert float(losses.universal_distance(teacher_logits=logits, student_logits=logits[::-1])) < 1e-6


@pytest.mark.slow
def test_gradient_of_the_universal_distance():
    teacher, student = (jnp.float32(RANDOM.standard_normal(size)) for size in (6, 9))
    gradient = jax.grad(lambda q: losses.universal_distance(teacher_logits=teacher, student_logits=q))(student)
    step = 1e-3 * np.eye(9)
    up, down = (
        losses.universal_distance(teacher_logits=teacher, student_logits=jnp.float32(student + s))
        for s in (step, -step)
    )
    np.testing.assert_allclose(gradient, (up - down) / 2e-3, rtol=0, atol=2e-4)


def start(logits, first, later=None):
    later = np.zeros(len(first)) if later is None else np.asarray(later)
    return Start(jnp.float32(logits), jnp.int32(first), jnp.float32(later), jnp.asarray(later == 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_with_one_vocabulary_it_is_the_plain_divergence(name):
    teacher, student = (2 * RANDOM.standard_normal((5, 7)) for _ in range(2))
    first = RANDOM.randint(0, 7, 5)
    ids = jnp.arange(7)

    def aligned(student):
        return losses.aligned_divergence(
            name,
            teacher=start(teacher, first),
            student=start(student, first),
            shared=Shared(ids, ids),
            whole=jnp.int32(first),
            temperature=1.5,
        )

    def plain(student):
        return losses.divergence(name, teacher_logits=jnp.float32(teacher), student_logits=student, temperature=1.5)

    student = jnp.float32(student)
    np.testing.assert_allclose(aligned(student), plain(student), rtol=2e-6, atol=1e-7)
    gradients = (jax.grad(lambda x, f=f: f(x).sum())(student) for f in (aligned, plain))
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_merge_by_hand():
    """Teacher: "ab", "a", "x", "y". Student: "a", "b", "x", "z". The text "ab" is one token, and two."""
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.6, 0.1, 0.25, 0.05])
    after = 0.7  # the student's probability of "b" after "a"
    # Events: "a" and not "ab"; "x"; "ab"; the rest ("y" of the teacher, "b" and "z" of the student).
    teacher, student = np.array([0.2, 0.2, 0.5, 0.1]), np.array([0.6 * (1 - after), 0.25, 0.6 * after, 0.15])
    np.testing.assert_allclose((teacher.sum(), student.sum()), 1, rtol=1e-12)
    shared = Shared(jnp.array([1, 2]), jnp.array([0, 2]))
    sides = start(np.log(p)[None], [0]), start(np.log(q)[None], [0], [np.log(after)])
    found = [
        np.exp(losses.event_log_probs(side, ids, jnp.array([-1])))[0]
        for side, ids in zip(sides, shared[:2], strict=True)
    ]
    np.testing.assert_allclose(found, (teacher, student), rtol=1e-6)
    value = losses.aligned_divergence(
        "forward_kl", teacher=sides[0], student=sides[1], shared=shared, whole=jnp.array([-1])
    )
    np.testing.assert_allclose(value, (teacher * np.log(teacher / student)).sum(), rtol=1e-6)
    value = losses.aligned_divergence(
        "reverse_kl", teacher=sides[0], student=sides[1], shared=shared, whole=jnp.array([-1])
    )
    np.testing.assert_allclose(value, (student * np.log(student / teacher)).sum(), rtol=1e-6)


def test_a_text_that_is_a_token_of_both_though_one_has_split_it():
    # "ab" is token 3 of the student, too; both ways to write it are one event
    q = np.array([0.6, 0.1, 0.1, 0.2])
    side = start(np.log(q)[None], [0], [np.log(0.7)])
    events = np.exp(losses.event_log_probs(side, jnp.array([3, 2]), jnp.array([0])))[0]
    np.testing.assert_allclose(events, [0.2 + 0.6 * 0.7, 0.1, 0, 0.1 + 0.6 * 0.3], rtol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_several_ids_that_end_a_text_are_one_event(name):
    """By hand, at a text's end with another of the ends as label, at a shared token, and at a text of two tokens."""
    temperature, after = 1.5, 0.6  # the student's probability of its second token
    logits = [2 * np.random.default_rng(0).standard_normal((3, size)) for size in (8, 7)]
    p, q = (softmax(one / temperature, -1) for one in logits)
    # (teacher's, student's) ids of the events: the end, two shared tokens, the rest
    events = [([1, 4, 6], [0, 5]), ([2], [3]), ([3], [2]), ([0, 5, 7], [1, 4, 6])]
    p, q = (np.array([[row[event[side]].sum() for event in events] for row in of]) for side, of in enumerate((p, q)))
    p, q = np.insert(p, 3, 0, axis=-1), np.insert(q, 3, 0, axis=-1)  # a text that is no shared token
    p[2, 3], p[2, 4] = softmax(logits[0][2] / temperature)[7], p[2, 4] - softmax(logits[0][2] / temperature)[7]
    split = softmax(logits[1][2] / temperature)[3] * after
    q[2, 3], q[2, 1] = split, q[2, 1] - split
    np.testing.assert_allclose((p.sum(-1), q.sum(-1)), 1, rtol=1e-12)
    with jax.enable_x64(True):
        later = jnp.array([0, 0, np.log(after)])
        teacher = Start(jnp.asarray(logits[0]), jnp.array([4, 2, 7]), jnp.zeros(3), jnp.ones(3, bool))
        student = Start(jnp.asarray(logits[1]), jnp.array([5, 3, 3]), later, jnp.array([True, True, False]))
        found = losses.aligned_divergence(
            name, teacher=teacher, student=student, temperature=temperature, whole=jnp.array([0, 1, -1]),
            shared=Shared(jnp.array([1, 2, 3]), jnp.array([0, 3, 2]), jnp.array([1, 4, 6]), jnp.array([0, 5])),
        )  # fmt: skip
    p, q = (p, q) if name == "forward_kl" else (q, p)
    np.testing.assert_allclose(found, (p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum(-1), rtol=1e-12)


def test_one_id_that_ends_a_text_changes_no_bit():
    sides = [start(RANDOM.standard_normal((2, size)), [1, 2]) for size in (6, 5)]
    ids = jnp.array([1, 2, 4]), jnp.array([2, 1, 0])
    one, other = (
        losses.aligned_divergence(
            "forward_kl", teacher=sides[0], student=sides[1], shared=Shared(*ids, *ends), whole=jnp.array([0, -1])
        )
        for ends in ((), (jnp.array([4]), jnp.array([0])))
    )
    np.testing.assert_array_equal(one, other)


def test_there_is_no_rest_where_all_else_ends_a_text():
    p, q = RANDOM.standard_normal((1, 4)), RANDOM.standard_normal((1, 3))
    found = losses.aligned_divergence(
        "reverse_kl", teacher=start(p, [0]), student=start(q, [0]), whole=jnp.array([1]),
        shared=Shared(jnp.array([1, 0]), jnp.array([2, 0]), jnp.array([1, 2, 3])),
    )  # fmt: skip
    p, q = softmax(p[0]), softmax(q[0, [2, 0]])  # the student's third token is no event
    p = np.array([p[1:].sum(), p[0]])
    np.testing.assert_allclose(found, [(q * np.log(q / p)).sum()], rtol=1e-5)


@pytest.mark.slow
def test_a_vocabulary_within_the_other():
    """There is no rest: the events that are left are normalised, and the value is finite."""
    p, q = RANDOM.standard_normal((3, 6)), RANDOM.standard_normal((3, 4))
    ids = np.array([5, 0, 2, 3])
    first = np.array([0, 1, 3])
    found = losses.aligned_divergence(
        "forward_kl",
        teacher=start(p, ids[first]),
        student=start(q, first),
        shared=Shared(jnp.array(ids), jnp.arange(4)),
        whole=jnp.array(first),
    )
    log_p, log_q = log_softmax(p[:, ids], -1), log_softmax(q, -1)
    np.testing.assert_allclose(found, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_gradients_of_merged_spans_are_finite_differences(name):
    random = np.random.default_rng(0)
    p, q, later = random.standard_normal((2, 6)), random.standard_normal((2, 5)), np.array([-0.4, -1.2])
    with jax.enable_x64(True):
        shared, whole = Shared(jnp.array([0, 2, 4]), jnp.array([1, 2, 4])), jnp.array([-1, 2])
        single = jnp.array([False, False])
        teacher = Start(jnp.asarray(p), jnp.array([3, 4]), jnp.zeros(2), single)

        @jax.jit
        def value(q, later):
            student = Start(q, jnp.array([1, 3]), later, single)
            return losses.aligned_divergence(name, teacher=teacher, student=student, shared=shared, whole=whole).sum()

        gradients = jax.grad(value, argnums=(0, 1))(jnp.asarray(q), jnp.asarray(later))
        for i in np.ndindex(2, 5):
            step = np.zeros((2, 5))
            step[i] = 1e-5
            slope = (value(q + step, later) - value(q - step, later)) / 2e-5
            np.testing.assert_allclose(gradients[0][i], slope, rtol=0, atol=1e-7)
        for i in range(2):
            step = 1e-5 * np.eye(2)[i]
            slope = (value(q, later + step) - value(q, later - step)) / 2e-5
            np.testing.assert_allclose(gradients[1][i], slope, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_certain_continuation_has_finite_gradients():
    q = jnp.float32([[4.0, 0.0, 1.0]])

    def value(q, later):
        student = Start(q, jnp.array([0]), later, jnp.array([False]))
        shared = Shared(jnp.array([0, 1]), jnp.array([0, 1]))
        return losses.aligned_divergence(
            "forward_kl", teacher=start(np.ones((1, 4)), [3]), student=student, shared=shared, whole=jnp.array([-1])
        )[0]

    gradients = jax.grad(value, argnums=(0, 1))(q, jnp.float32([0.0]))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
