from types import SimpleNamespace

import pytest

from kd_jax.lm.instruct import prompts
from kd_jax.lm.instruct.templates import every


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
    templates = {tuple(one.prompt.encode()) for one in every("train")}
    both = prompts.load(sampling(source, "templates"), None, seed=1, needed=204)
    assert len(both) == 4 + len(templates)
    assert both != prompts.load(sampling(source, "templates"), None, seed=2, needed=204)
    # sources take turns until one has no more
    assert [tuple(ids) in templates for ids in both[:10]] == [False, True] * 4 + [True] * 2
    copies = prompts.load(sampling("templates"), None, seed=1, needed=1, kinds=("copy",))
    assert {tuple(ids) for ids in copies} == {tuple(one.prompt.encode()) for one in every("train", ["copy"])}


def test_corpora_of_a_run_share_no_prompt(tmp_path):
    spec = SimpleNamespace(
        sampling=sampling("templates"), teachers=2, num_train=50, num_validation=10, num_recall=60, seed=3,
        instruct=SimpleNamespace(kinds=()),
    )  # fmt: skip
    parts = [prompts.of_corpus(spec, None, first, 60) for first in (0, 60, 120)]
    chosen = [tuple(ids) for _, part in parts for ids in part]
    assert len(set(chosen)) == len(chosen) == 180
    assert len({settings["prompts_fingerprint"] for settings, _ in parts}) == 3
    # more of a teacher's text asks p*'s training prompts again, and its validation rows are p*'s
    _, own = prompts.of_corpus(spec, None, 60, 60)
    _, more = prompts.of_corpus(spec, None, 60, 130, text_rows=120)
    assert more == own[:50] + own[:50] + own[:20] + own[50:]
    # what a stage depends on, before anything is read
    assert prompts.settings(spec.sampling, 0) != prompts.settings(spec.sampling, 60)
    assert prompts.settings(spec.sampling, 0) != prompts.settings(spec.sampling, 0, ["copy"])
    assert prompts.settings(sampling(), 60) == {}
    with pytest.raises(FileNotFoundError):
        prompts.settings(sampling(str(tmp_path / "nothing.jsonl")), 0)


def test_ids_that_are_no_text_are_shown():
    assert prompts.Bytes().decode(prompts.Bytes().encode("é?")) == "é?"
    assert prompts.Bytes().decode([104, 105, 300, 255]) == "hi?\ufffd"
