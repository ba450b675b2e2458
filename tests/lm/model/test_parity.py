"""Live against transformers and torch; tests/lm/weights/test_golden.py is what runs without them."""

import copy
import functools
import shutil

import jax
import numpy as np
import pytest

from kd_jax.lm import decode, model, score, weights
from tests.golden import families, texts, tiny
from tests.lm.weights.test_golden import SOURCE, UNLIKELY, scored_part, table, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make = pytest.importorskip("tests.golden.make")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_torch_thread")]

# the longest sequences are left to the golden values
NAMES = (
    "story", "python", "json", "chinese", "arabic", "emoji", "numbers", "whitespace", "random", "first and last ids"
)  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return weights.load(SOURCE)


@pytest.fixture(scope="module")
def theirs():
    """The real weights in transformers, read from the GGUF file by transformers."""
    return make.real_model(weights.fetch(SOURCE))


@pytest.fixture(scope="module")
def rows(real):
    """Name -> ids."""
    each = make.sequences(real.tokenizer, real.architecture.vocab_size)
    return {name: np.array(each[name]) for name in NAMES}


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, architecture, tokens):
    return model.logits(params, architecture, model.forward(params, architecture, tokens))


def our_logits(of, ids):
    return np.asarray(_logits(of.params, of.architecture, np.asarray(ids)[None])[0])


@torch.inference_mode()
def their_logits(of, ids):
    return of(torch.as_tensor(np.asarray(ids))[None]).logits[0].numpy()


def assert_scores(ours, theirs, rows, log_prob_bound, entropy_bound):
    tokens, lengths = table(rows)
    log_probs, mask, entropies = score.log_prob(ours, tokens, lengths, entropy=True, batch_tokens=1000)
    found = zip(scored_part(log_probs, mask, lengths), scored_part(entropies, mask, lengths), strict=True)
    for row, (our_log_probs, our_entropies) in zip(rows, found, strict=True):
        log_probs, entropies = make.scores(theirs, row)
        np.testing.assert_allclose(our_log_probs, log_probs, rtol=0, atol=log_prob_bound, err_msg=str(row[:8]))
        np.testing.assert_allclose(our_entropies, entropies, rtol=0, atol=entropy_bound, err_msg=str(row[:8]))


# Small models


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_tiny_scores(name):
    config, seed = tiny.CONFIGS[name], list(tiny.CONFIGS).index(name)
    assert_scores(tiny_model(name), make.tiny_model(config, seed), tiny.sequences(config, seed), 1e-5, 1e-5)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_tiny_export(name, tmp_path):
    of, config, seed = tiny_model(name), tiny.CONFIGS[name], list(tiny.CONFIGS).index(name)
    weights.export(of, tmp_path / "exported")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    for key in config:
        if key != "rope_theta":
            assert getattr(theirs.config, key) == config[key], key
    assert theirs.config.rope_parameters["rope_theta"] == config["rope_theta"]
    for ids in tiny.sequences(config, seed)[-2:]:
        np.testing.assert_allclose(our_logits(of, ids), their_logits(theirs, ids), rtol=0, atol=1e-5)


# Every family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """From a name of tests.golden.families to the model here and in transformers."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def load(name):
        theirs = make.family_model(name)
        theirs.save_pretrained(folder / name)
        return weights.load(folder / name), theirs

    return load


@pytest.mark.parametrize("name", families.CONFIGS)
def test_family_scores(name, family):
    assert_scores(*family(name), families.sequences(name), 1e-5, 2e-5)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_family_export(name, family, tmp_path):
    ours, theirs = family(name)
    weights.export(ours, tmp_path / "out")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(theirs) and not any(report.values()), report
    for ids in families.sequences(name):
        assert torch.equal(again(torch.as_tensor(ids)[None]).logits, theirs(torch.as_tensor(ids)[None]).logits)


# The real weights


def test_real_scores(real, theirs, rows):
    # In float64: its own float32 is up to 1.4e-4 from that (for the ids at the ends of the vocabulary), on some CPUs on
    # the other side than ours. What ours may differ by is said at assert_log_probs.
    double = copy.deepcopy(theirs).double()
    assert_scores(real, double, [ids for name, ids in rows.items() if name not in UNLIKELY], 2.5e-4, 1e-3)
    assert_scores(real, double, [rows[name] for name in UNLIKELY if name in rows], 1e-3, 1e-3)


def test_real_logits_of_both_gguf_readers(real, theirs, rows):
    for name in ("json", "first and last ids"):
        np.testing.assert_allclose(
            our_logits(real, rows[name]), their_logits(theirs, rows[name]), rtol=0, atol=1e-2, err_msg=name
        )


def test_real_greedy_continuations(real, theirs):
    prompts = [real.tokenizer.encode(text) for text in texts.PROMPTS[:2]]
    length = max(map(len, prompts)) + make.NEW_TOKENS
    tokens, _, _ = decode.generate(
        real._replace(eos_ids=()), prompts, 2, max_length=length, sample_temperature=0, batch_size=2
    )
    for row, prompt in zip(tokens, prompts, strict=True):
        reference, _ = make.continue_greedily(theirs, prompt)
        np.testing.assert_array_equal(row[len(prompt) : len(prompt) + make.NEW_TOKENS], reference)


def test_real_export(real, theirs, rows, tmp_path):
    weights.export(real, tmp_path / "exported")
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=torch.float32, output_loading_info=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    shutil.rmtree(tmp_path / "exported")  # half a GB, which pytest would keep
    assert not any(report.values()), report
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for name, text in texts.TEXTS.items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == real.tokenizer.encode(text), name
    # Not of the ids that no text has: hidden states grow to 1200 there, where rounding alone takes each program in
    # float32 more than 3e-4 away from float64. Of 8 million logits of the others, four differ by 2.1 to 2.4e-4 where
    # XLA uses YNN's products (see test_golden.assert_log_probs).
    for name in ("json", "chinese", "numbers"):
        ours = our_logits(real, rows[name])
        np.testing.assert_allclose(ours, their_logits(exported, rows[name]), rtol=0, atol=3e-4, err_msg=name)
