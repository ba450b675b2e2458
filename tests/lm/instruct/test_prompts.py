from types import SimpleNamespace

import pytest

from kd_jax.lm.instruct import instructions, prompts


def sampling(*sources, max_length=200):
    return SimpleNamespace(prompts=sources, prompts_column="", max_length=max_length, prompt="", prompt_ids=())


def test_prompts_of_a_run_are_different_and_in_an_order_by_the_seed(tmp_path):
    texts = ["one", "two", "three", "two", "x" * 40]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n")
    source = str(tmp_path / "p.txt")
    # without a tokenizer a text's bytes are its ids; 40 of 48 leave less than a quarter for an answer
    loaded = prompts.load(sampling(source, max_length=48), None, seed=1, needed=3)
    assert sorted(prompts.Bytes().decode(ids) for ids in loaded) == ["one", "three", "two"]
    assert loaded == prompts.load(sampling(source, max_length=48), None, seed=1, needed=3)
    with pytest.raises(ValueError, match="has 3 different prompts.*need 4"):
        prompts.load(sampling(source, max_length=48), None, seed=1, needed=4)
    both = prompts.load(sampling(source, "templates"), None, seed=1, needed=204)
    assert len(both) == 4 + len({one.prompt for one in instructions("train", 200)})
    assert both != prompts.load(sampling(source, "templates"), None, seed=2, needed=204)


def test_corpora_of_a_run_share_no_prompt(tmp_path):
    spec = SimpleNamespace(
        sampling=sampling("templates"), teachers=2, num_train=50, num_validation=10, num_recall=60, seed=3
    )
    parts = [prompts.of_corpus(spec, None, first, 60) for first in (0, 60, 120)]
    chosen = [tuple(ids) for _, part in parts for ids in part]
    assert len(set(chosen)) == len(chosen) == 180
    assert len({settings["prompts_fingerprint"] for settings, _ in parts}) == 3
    # what a stage depends on, before anything is read
    assert prompts.settings(spec.sampling, 0) != prompts.settings(spec.sampling, 60)
    assert prompts.settings(sampling(), 60) == {}
    with pytest.raises(FileNotFoundError):
        prompts.settings(sampling(str(tmp_path / "nothing.jsonl")), 0)


def test_ids_that_are_no_text_are_shown():
    assert prompts.Bytes().decode(prompts.Bytes().encode("é?")) == "é?"
    assert prompts.Bytes().decode([104, 105, 300, 255]) == "hi?\ufffd"
