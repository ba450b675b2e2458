"""Losses between models of different vocabularies, from hidden states and heads, against whole logits in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_jax import losses
from kd_jax.lm.distill import cross_vocabulary as cross
from kd_jax.lm.model import PRESETS, Model
from tests.lm.distill.test_alignment import OTHER, WORDS

RANDOM = np.random.RandomState(0)
TEXTS = ["the cat", "that the cat is", "a"]
WIDTH = 8


def model(tokenizer):
    return Model(PRESETS["tiny"], {}, (tokenizer.eos_id,), tokenizer=tokenizer)


def rows(tokenizer):
    # a row starts with an end, as packed text does, so that its first word is predicted
    return [[tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]


def setup(teacher, student):
    shared = cross.shared(model(teacher), model(student))
    pair = cross.pair(model(teacher), model(student), rows(teacher), rows(student), shared)
    arrays = []
    for text, tokenizer in ((pair.student, student), (pair.teacher, teacher)):
        arrays += [
            jnp.float32(RANDOM.standard_normal((*text.tokens.shape, WIDTH))),
            jnp.float32(RANDOM.standard_normal((tokenizer.vocab_size, WIDTH))),
        ]
    return pair, shared, arrays


def whole_log_probs(hidden, head, temperature):
    return log_softmax(np.float64(hidden) @ np.float64(head).T / temperature, -1)


@pytest.mark.fast(1)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_aligned_divergence_is_the_definition(name):
    """Events of every span, one after the other, by their bytes."""
    temperature = 1.5
    pair, shared, (student_hidden, student_head, teacher_hidden, teacher_head) = setup(WORDS, OTHER)
    log_probs = [
        whole_log_probs(teacher_hidden, teacher_head, temperature),
        whole_log_probs(student_hidden, student_head, temperature),
    ]
    shared_bytes = {WORDS.token_bytes[i] or "end" for i in np.asarray(shared.teacher)}
    values = []
    for row in range(len(TEXTS)):
        for span in np.flatnonzero(pair.mask[row]):
            masses = []
            for text, tokenizer, log_p in zip(pair[:2], (WORDS, OTHER), log_probs, strict=True):
                first, length = text.first[row, span], text.length[row, span]
                ids = text.tokens[row, first : first + length]
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
            values.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-15))
    found = cross.linear_aligned_divergence(
        student_hidden, student_head, teacher_hidden, teacher_head, pair, shared, divergence=name,
        temperature=temperature, chunk=3,
    )  # fmt: skip
    assert int(found.count) == len(values) == pair.mask.sum() > 10
    np.testing.assert_allclose(found.mean, temperature**2 * np.mean(values), rtol=1e-5)


@pytest.mark.fast(1)
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_with_one_tokenizer_it_is_the_plain_divergence(name):
    pair, shared, (student_hidden, student_head, teacher_hidden, teacher_head) = setup(WORDS, WORDS)

    def aligned(hidden, head):
        return cross.linear_aligned_divergence(
            hidden, head, teacher_hidden, teacher_head, pair, shared, divergence=name, temperature=2.0, chunk=4
        ).mean

    def plain(hidden, head):
        mask = np.arange(pair.student.tokens.shape[1]) < np.array([len(row) for row in rows(WORDS)])[:, None] - 1
        values = losses.divergence(
            name, teacher_logits=teacher_hidden @ teacher_head.T, student_logits=hidden @ head.T, temperature=2.0
        )
        return 4 * losses.masked_mean(values, jnp.asarray(mask)).mean

    found, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(student_hidden, student_head) for f in (aligned, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6 + 1e-4 * np.abs(theirs).max())


def test_universal_distance_of_spans():
    pair, shared, (student_hidden, student_head, teacher_hidden, teacher_head) = setup(WORDS, OTHER)
    found = cross.linear_aligned_divergence(
        student_hidden, student_head, teacher_hidden, teacher_head, pair, shared, divergence="universal"
    )
    values = []
    p, q = whole_log_probs(teacher_hidden, teacher_head, 1), whole_log_probs(student_hidden, student_head, 1)
    for row, span in zip(*np.nonzero(pair.mask), strict=True):
        a, b = (
            np.sort(np.exp(one[row, text.first[row, span] - 1]))[::-1]
            for one, text in ((p, pair.teacher), (q, pair.student))
        )
        size = max(len(a), len(b))
        values.append(np.abs(np.pad(a, (0, size - len(a))) - np.pad(b, (0, size - len(b)))).sum())
    np.testing.assert_allclose(found.mean, np.mean(values), rtol=1e-5)


@pytest.mark.slow
def test_chunks_change_nothing_and_the_teacher_has_no_gradient():
    pair, shared, arrays = setup(WORDS, OTHER)

    def loss(arrays, chunk):
        return cross.linear_aligned_divergence(*arrays, pair, shared, divergence="jensen_shannon", chunk=chunk).mean

    one, other = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, chunk) for chunk in (2, 1000))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)
    assert all((gradient != 0).any() for gradient in one[1][:2]) and not any(g.any() for g in one[1][2:])


def test_a_first_word_that_is_not_predicted_is_masked():
    both = model(WORDS), model(OTHER)
    shared = cross.shared(*both)
    pair = cross.pair(*both, [WORDS.encode("the cat")], [OTHER.encode("the cat")], shared)
    assert pair.mask.tolist() == [[False, *[True] * (pair.mask.shape[1] - 1)]] and pair.mask.any()
    with pytest.raises(ValueError, match="row 0: the texts differ from byte 0"):
        cross.pair(*both, [WORDS.encode("cat")], [OTHER.encode("the cat")], shared)
