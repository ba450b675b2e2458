import itertools
import re

import pytest

from kd_jax.lm.instruct import CHECKERS, SPLITS, instructions
from kd_jax.lm.instruct.words import CATEGORIES, FACTS, NOUNS

SIZES = {"train": 1112, "validation": 84, "test": 284}


def test_splits_share_neither_wordings_nor_what_fills_them():
    templates, fillings = {}, {}
    for split, size in SIZES.items():
        all_of_it = instructions(split, size)
        with pytest.raises(ValueError, match=f"{split!r} has {size} instructions"):
            instructions(split, size + 1)
        assert len({one.prompt for one in all_of_it}) == size and {one.kind for one in all_of_it} == set(CHECKERS)
        templates[split] = {one.template for one in all_of_it}
        fillings[split] = {*CATEGORIES[split], *NOUNS[split], *FACTS[split]}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not templates[a] & templates[b] and not fillings[a] & fillings[b]
    with pytest.raises(ValueError, match="split='dev'"):
        instructions("dev", 1)


def test_order_is_the_seeds_and_more_begin_with_the_same():
    assert instructions("test", 60)[:20] == instructions("test", 20)
    assert instructions("test", 20, seed=1) != instructions("test", 20)
    assert [one.kind for one in instructions("train", len(CHECKERS))] == list(CHECKERS)
    assert [one.kind for one in instructions("test", 4, ("copy", "fact"))] == ["fact", "copy"] * 2
    with pytest.raises(ValueError, match="'test' has 0 instructions, not 4"):
        instructions("test", 4, ("copies",))


def test_arguments_are_what_the_prompts_ask_for():
    for split, size in SIZES.items():
        for one in instructions(split, size):
            if one.kind == "sort":
                words = one.prompt.partition(": ")[2].split(", ")
                assert one.arguments == {"items": sorted(words)} and words != sorted(words)
            elif one.kind == "count":
                words = one.prompt.partition(": ")[2].strip("?").split(", ")
                assert one.arguments == {"number": len(words)}
            elif one.kind == "copy":
                assert one.prompt.endswith(one.arguments["text"])
            elif one.kind in ("one_word", "fact"):
                # repeating the question is no answer
                assert not set(one.arguments["accepted"]) & set(re.findall(r"\w+", one.prompt))
            elif one.kind == "sentence":
                assert one.arguments["word"] in one.prompt
