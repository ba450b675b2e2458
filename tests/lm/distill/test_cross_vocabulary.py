"""Losses between models of different vocabularies, from hidden states and heads, against whole logits in NumPy."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_jax import losses
from kd_jax.lm.corpus import batches
from kd_jax.lm.corpus.batches import Layout
from kd_jax.lm.distill import cross_vocabulary as cross
from kd_jax.lm.distill.cross_vocabulary import Hidden
from kd_jax.lm.distill.pairing import Pairing
from tests.lm.distill.test_alignment import OTHER, WORDS, byte_level
from tests.lm.distill.test_pairing import batch_of, model, pairing_of

RANDOM = np.random.RandomState(0)
TEXTS = ["the cat", "that the cat is", "a"]
WIDTH = 8


def setup(teacher, student):
    """The first part of a batch, its pair, the shared tokens, and both models' random hidden states and heads."""
    pairing = pairing_of(teacher, student)
    batch = jax.tree.map(lambda array: array[0], pairing(batch_of(student, TEXTS)))
    sides = [
        Hidden(
            jnp.float32(RANDOM.standard_normal((*tokens.shape, WIDTH))),
            jnp.float32(RANDOM.standard_normal((tokenizer.vocab_size, WIDTH))), jnp.asarray(tokens),
        )
        for tokens, tokenizer in ((batch.tokens, student), (batch.pair.tokens, teacher))
    ]  # fmt: skip
    return batch, jax.tree.map(jnp.asarray, pairing.shared), *sides


def whole_log_probs(side, temperature):
    return log_softmax(np.float64(side.states) @ np.float64(side.head).T / temperature, -1)


@pytest.mark.fast(1)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_aligned_divergence_is_the_definition(name):
    """Events of every span, one after the other, by their bytes."""
    temperature, teacher_temperature = 1.5, 0.8
    batch, shared, student, teacher = setup(WORDS, OTHER)
    pair = batch.pair
    log_probs = whole_log_probs(teacher, teacher_temperature), whole_log_probs(student, temperature)
    shared_bytes = {WORDS.token_bytes[i] or "end" for i in np.asarray(shared.teacher)}
    wanted = np.zeros(pair.mask.shape)
    for row, span in zip(*np.nonzero(pair.mask), strict=True):
        masses = []
        for tokens, spans, tokenizer, log_p in zip(
            (pair.tokens, batch.tokens), (pair.teacher, pair.student), (WORDS, OTHER), log_probs, strict=True
        ):
            first, length = spans.first[row, span], spans.length[row, span]
            ids = tokens[row, first : first + length]
            name_of = [piece or "end" for piece in tokenizer.token_bytes]
            # special tokens that are no end have no text, and are part of the rest
            name_of = [n if n != "end" or i == tokenizer.eos_id else "rest" for i, n in enumerate(name_of)]
            of_text = b"".join(tokenizer.token_bytes[i] for i in ids) or "end"
            chain = np.exp(sum(log_p[row, first - 1 + n, i] for n, i in enumerate(ids)))
            mass = {of_text: 0.0}
            for i, p in enumerate(np.exp(log_p[row, first - 1])):
                if i == ids[0]:
                    p -= chain
                event = name_of[i] if name_of[i] in shared_bytes or name_of[i] == of_text else "rest"
                event = "rest" if event == of_text and event not in shared_bytes else event
                mass[event] = mass.get(event, 0) + p
            mass[of_text] += chain
            masses.append(mass)
        assert masses[0].keys() == masses[1].keys()
        p, q = (np.array([mass[event] for event in masses[0]]) for mass in masses)
        p, q = (p, q) if name == "forward_kl" else (q, p)
        wanted[row, span] = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-15)
    total, found = cross.linear_aligned_divergence(
        teacher=teacher, student=student, pair=pair, shared=shared, divergence=name, temperature=temperature,
        teacher_temperature=teacher_temperature, chunk=3,
    )  # fmt: skip
    assert pair.mask.sum() > 10 and float(total) == pytest.approx(wanted.sum(), rel=2e-5)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def test_the_end_of_a_text_is_the_sum_of_all_ids_that_end_it():
    """Events at the end of a text, by their bytes; the student's text ends with the second of its ends."""
    teacher, student = (
        byte_level([("a", "b")], ["<stop>", "<x>", "<end>"]),
        byte_level([("b", "c")], ["<end>", "<turn>"]),
    )
    ends = [[one.backend.token_to_id(name) for name in names]
            for one, names in ((teacher, ["<stop>", "<end>"]), (student, ["<end>", "<turn>"]))]  # fmt: skip
    pairing = Pairing(
        *(model(one)._replace(eos_ids=tuple(ids)) for one, ids in zip((teacher, student), ends, strict=True))
    )
    row = np.array([ends[1][0], *student.encode("ab"), ends[1][1]])
    batch = jax.tree.map(lambda array: array[0], pairing(batches.arrange([row], np.array([1]), Layout(1, len(row)))))
    pair, sides, masses = batch.pair, [], []
    (span,) = np.flatnonzero(pair.mask[0])[-1:]
    for one, of_side, tokens, spans in (
        (teacher, ends[0], pair.tokens, pair.teacher),
        (student, ends[1], batch.tokens, pair.student),
    ):
        logits = 2 * np.random.default_rng(len(sides)).standard_normal((*tokens.shape, one.vocab_size))
        sides.append(Hidden(jnp.float32(logits), jnp.eye(one.vocab_size), jnp.asarray(tokens)))
        log_p, mass = log_softmax(logits[0, spans.first[0, span] - 1]), collections.Counter()
        for i, piece in enumerate(one.token_bytes):
            event = "end" if i in of_side else piece if len(piece) == 1 else "rest"
            mass[event] += np.exp(log_p[i])
        masses.append(mass)
    wanted = sum(p * np.log(p / masses[1][event]) for event, p in masses[0].items())
    _, found = cross.linear_aligned_divergence(
        teacher=sides[0], student=sides[1], pair=pair, shared=jax.tree.map(jnp.asarray, pairing.shared)
    )
    np.testing.assert_allclose(found[0, span], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_with_one_tokenizer_it_is_the_plain_divergence(name):
    batch, shared, student, teacher = setup(WORDS, WORDS)

    def aligned(hidden, head):
        total, values = cross.linear_aligned_divergence(
            teacher=teacher, student=Hidden(hidden, head, student.tokens), pair=batch.pair, shared=shared,
            divergence=name, temperature=2.0, chunk=4,
        )  # fmt: skip
        return total, cross.at_first_tokens(values, batch.pair.student, batch.mask.shape[1])

    def plain(hidden, head):
        # The rows of the pair are filled up to another length.
        states = teacher.states[:, : batch.mask.shape[1]]
        logits = {"teacher_logits": states @ teacher.head.T, "student_logits": hidden @ head.T}
        values = jnp.where(batch.mask, losses.divergence(name, **logits, temperature=2.0), 0)
        return values.sum(), values

    (found, values), (wanted, plain_values) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(*student[:2]) for f in (aligned, plain)
    )
    np.testing.assert_allclose(values, plain_values, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6 + 1e-4 * np.abs(theirs).max())


def test_universal_distance_of_spans():
    batch, shared, student, teacher = setup(WORDS, OTHER)
    pair = batch.pair
    _, found = cross.linear_aligned_divergence(teacher=teacher, student=student, pair=pair, shared=shared, kind="uld")
    p, q = whole_log_probs(teacher, 1), whole_log_probs(student, 1)
    wanted = np.zeros(pair.mask.shape)
    for row, span in zip(*np.nonzero(pair.mask), strict=True):
        a, b = (
            np.sort(np.exp(one[row, spans.first[row, span] - 1]))[::-1]
            for one, spans in ((p, pair.teacher), (q, pair.student))
        )
        size = max(len(a), len(b))
        wanted[row, span] = np.abs(np.pad(a, (0, size - len(a))) - np.pad(b, (0, size - len(b)))).sum()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", cross.KINDS)
def test_its_gradient_is_that_of_whole_logits(kind):
    batch, shared, student, teacher = setup(WORDS, OTHER)
    pair = jax.tree.map(jnp.asarray, batch.pair)
    rows = jnp.arange(pair.mask.shape[0])[:, None]

    def start(states, head, side, spans):
        log_probs = jax.nn.log_softmax(states @ head.T)
        of_next = jnp.take_along_axis(log_probs, jnp.roll(side.tokens, -1, 1)[..., None], -1)[..., 0]
        # position by position, as far as the longest span goes
        later = sum(
            jnp.where(n < spans.length, of_next[rows, jnp.minimum(spans.first + n - 1, of_next.shape[1] - 1)], 0)
            for n in range(1, int(batch.pair.teacher.length.max()) + 2)
        )
        first = side.tokens[rows, spans.first]
        return losses.Start((states @ head.T)[rows, spans.first - 1], first, later, spans.length == 1)

    def dense(states, head):
        both = start(*teacher[:2], teacher, pair.teacher), start(states, head, student, pair.student)
        if kind == "uld":
            values = losses.universal_distance(teacher_logits=both[0].logits, student_logits=both[1].logits)
        else:
            whole = jnp.where(pair.mask, pair.whole, 0)
            values = losses.aligned_divergence(
                "reverse_kl", teacher=both[0], student=both[1], shared=shared, whole=whole
            )
        return jnp.where(pair.mask, values, 0).sum()

    def ours(states, head):
        return cross.linear_aligned_divergence(
            teacher=teacher, student=student._replace(states=states, head=head), pair=pair, shared=shared, kind=kind,
            divergence="reverse_kl", chunk=4,
        )[0]  # fmt: skip

    assert (pair.student.length > 1).any() and (pair.teacher.length > 1).any()
    (value, gradient), (wanted, wanted_gradient) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*student[:2]) for f in (ours, dense)
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, right in zip(gradient, wanted_gradient, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


@pytest.mark.slow
def test_chunks_change_nothing_and_the_teacher_has_no_gradient():
    batch, shared, *sides = setup(WORDS, OTHER)

    def loss(arrays, chunk):
        student, teacher = (
            side._replace(states=states, head=head) for side, (states, head) in zip(sides, arrays, strict=True)
        )
        return cross.linear_aligned_divergence(
            teacher=teacher, student=student, pair=batch.pair, shared=shared, divergence="jensen_shannon", chunk=chunk
        )[0]

    arrays = [side[:2] for side in sides]
    one, other = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, chunk) for chunk in (2, 1000))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)
    student, teacher = one[1]
    assert all((gradient != 0).any() for gradient in student) and not any(g.any() for g in teacher)


def test_which_tokens_are_in_spans():
    batch, *_ = setup(WORDS, OTHER)
    spans, length = batch.pair.student, batch.mask.shape[1]
    wanted = np.zeros(batch.mask.shape, bool)
    for row, span in zip(*np.nonzero(batch.pair.mask), strict=True):
        first = spans.first[row, span]
        wanted[row, first - 1 : first - 1 + spans.length[row, span]] = True
    found = cross.at_all_tokens(jnp.asarray(batch.pair.mask), jax.tree.map(jnp.asarray, spans), length)
    assert (np.asarray(found) == wanted).all() and (wanted == batch.mask).all()  # all of these texts is aligned


@pytest.mark.slow
@pytest.mark.parametrize("kind", cross.KINDS)
def test_masked_spans_are_never_read(kind):
    batch, shared, student, teacher = setup(WORDS, OTHER)
    pair = batch.pair._replace(mask=np.zeros_like(batch.pair.mask))
    teacher = teacher._replace(states=jnp.full_like(teacher.states, jnp.nan))

    def loss(states):
        side = student._replace(states=states)
        return cross.linear_aligned_divergence(
            teacher=teacher, student=side, pair=pair, shared=shared, kind=kind, divergence="reverse_kl"
        )[0]

    value, gradient = jax.value_and_grad(loss)(student.states)
    assert value == 0 and not np.asarray(gradient).any()
