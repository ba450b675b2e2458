"""Instructions with checkable answers, from templates of our own.

Splits are by template and by noun: neither a wording nor a word that fills it is in two splits. What a model learnt
from one split says how well it follows instructions it has not seen, not which answers it remembers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_jax.lm.instruct.words import CATEGORIES, FACTS, NOUNS

SPLITS = ("train", "validation", "test")
# Raised when the templates or their words change: runs that used them are then other runs.
INSTRUCTIONS = "instructions 2"

WORDINGS = {
    "name_three": {
        "train": ("Name three {}.", "List three {}."),
        "validation": ("Give me the names of three {}.",),
        "test": ("Can you tell me three {}?", "Write down three different {}."),
    },
    "sentence": {
        "train": ("Write one sentence that contains the word {}.", 'Use the word "{}" in a sentence.'),
        "validation": ("Make a single sentence with the word {}.",),
        "test": ('Please write a sentence in which the word "{}" appears.', "Write one sentence about a {}."),
    },
    "one_word": {
        "train": ("What is {}? Answer with one word.", "Answer with one word: what is {}?"),
        "validation": ("Tell me {} in a single word.",),
        "test": ("In one word, what is {}?", "What is {}? Reply with just one word."),
    },
    "fact": {
        "train": ("What is {}?", "Please tell me {}."),
        "validation": ("Do you know {}?",),
        "test": ("Can you tell me {}?", "I would like to know {}."),
    },
    "sort": {
        "train": ("Sort these words alphabetically: {}", "Put these words in alphabetical order: {}"),
        "validation": ("Arrange these words from A to Z: {}",),
        "test": ("Write these words in alphabetical order: {}", "List these words alphabetically: {}"),
    },
    "count": {
        "train": ("How many words are in this list: {}?", "Count the words: {}"),
        "validation": ("How many items does this list have: {}?",),
        "test": ("Tell me how many words there are here: {}", "What is the number of words in this list: {}?"),
    },
    "copy": {
        "train": ("Repeat this exactly: {}", "Copy this text: {}"),
        "validation": ("Write this again, word for word: {}",),
        "test": ("Say exactly this and nothing else: {}", "Repeat after me: {}"),
    },
}


class Instruction(NamedTuple):
    """A prompt and what its answer is checked for.

    Attributes:
        prompt: what the user says.
        kind: a key of checkers.CHECKERS.
        arguments: of that checker.
        template: the wording, with {} where the words go.
    """

    prompt: str
    kind: str
    arguments: dict[str, Any]
    template: str


def instructions(split: str, count: int, kinds: Sequence[str] = (), *, seed: int = 0) -> list[Instruction]:
    """The first `count` instructions of a split: kinds in turn, each in a random order of its own.

    More of them begin with the same ones. Where a kind has no more, the others go on.

    Args:
        split: one of SPLITS.
        count: how many.
        kinds: keys of WORDINGS; none takes all.
        seed: of the order.

    Raises: ValueError where the split has fewer of these kinds, or is not one of SPLITS.
    """
    mixed = every(split, kinds, seed=seed)
    if count > len(mixed):
        raise ValueError(f"split {split!r} has {len(mixed)} instructions, not {count}")
    return mixed[:count]


def every(split: str, kinds: Sequence[str] = (), *, seed: int = 0) -> list[Instruction]:
    """All instructions of a split, or those of some kinds, in the order of `instructions`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    each = [list(_kind(kind, split, seed)) if kind in (kinds or WORDINGS) else [] for kind in WORDINGS]
    for number, several in enumerate(each):
        # A generator for each kind: a kind that gets more instructions leaves the order of the others alone.
        order = np.random.default_rng((seed, SPLITS.index(split), number)).permutation(len(several))
        several[:] = [several[i] for i in order]
    # In turn, so that any first part has about as many of each kind.
    return [one for row in itertools.zip_longest(*each) for one in row if one is not None]


def _kind(kind: str, split: str, seed: int) -> Iterator[Instruction]:
    for template in WORDINGS[kind][split]:
        for text, arguments in _FILLINGS[kind](split, seed):
            yield Instruction(template.format(text), kind, arguments, template)


def _categories(split: str, _: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, {"members": members.split()}) for name, members in CATEGORIES[split].items())


def _nouns(split: str, _: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((noun, {"word": noun}) for noun in NOUNS[split])


def _facts(split: str, _: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((question, {"accepted": accepted.split()}) for question, accepted in FACTS[split].items())


def _lists(split: str, seed: int) -> Iterator[list[str]]:
    """Lists of 3 to 5 different nouns, each noun first in one of them."""
    random = np.random.default_rng((seed, SPLITS.index(split), 100))
    for noun in NOUNS[split]:
        others = [other for other in NOUNS[split] if other != noun]
        yield [noun, *(others[i] for i in random.permutation(len(others))[: random.integers(2, 5)])]


def _to_sort(split: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    # a list that is in order already would be right by copying
    lists = (words if words != sorted(words) else words[::-1] for words in _lists(split, seed))
    return ((", ".join(words), {"items": sorted(words)}) for words in lists)


def _to_count(split: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((", ".join(words), {"number": len(words)}) for words in _lists(split, seed))


def _to_copy(split: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for words in _lists(split, seed):
        text = f"The {words[0]} is near the {words[1]}."
        yield text, {"text": text}


_FILLINGS = {
    "name_three": _categories, "sentence": _nouns, "one_word": _facts, "fact": _facts, "sort": _to_sort,
    "count": _to_count, "copy": _to_copy,
}  # fmt: skip
