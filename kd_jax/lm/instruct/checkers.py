"""Checkers: pure functions that say whether an answer does what was asked. Each docstring says what counts.

All of them take the answer as text, without special tokens. An answer that goes on and on is wrong: a model that
repeats itself would otherwise say the right thing sooner or later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The longest right answer, in words.
MAX_WORDS = 40
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
# Apostrophes and hyphens inside a word belong to it: don't, t-shirt.
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# What a list puts before an item: "1.", "2)", "-", "*", and between items.
_BULLET = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
_BETWEEN = re.compile(r"\s*(?:,\s*and\b|,\s*then\b|,|;|\n|\band\b|<|>|->|→)\s*")


def words(text: str) -> list[str]:
    """The words of a text in lower case; numbers are words, punctuation is not."""
    return [word.casefold() for word in _WORD.findall(text)]


def names_three(answer: str, members: Sequence[str]) -> bool:
    """Whether exactly three different members of a category are named, in at most MAX_WORDS words.

    A member counts as a whole word, in any letter case, in the singular or the plural. Other words are ignored: three
    members inside a sentence are right, and two members beside something else are wrong.
    """
    said = words(answer)
    # With spaces around it a word is found whole: "cat" is not in "cattle".
    text = " " + " ".join(said) + " "
    named = {
        member
        for member in members
        if any(f" {member.casefold()}{ending} " in text for ending in ("", "s", "es"))
        or (member.endswith("y") and f" {member.casefold()[:-1]}ies " in text)
        or (member.endswith("f") and f" {member.casefold()[:-1]}ves " in text)
    }
    return len(named) == 3 and len(said) <= MAX_WORDS


def one_sentence_with(answer: str, word: str) -> bool:
    """Whether the answer is one sentence of 4 to MAX_WORDS words that contains the word.

    One sentence: a single line that ends with ".", "!" or "?" (before a closing quotation mark, perhaps) and has none
    of these before a space. The word counts in any letter case, alone: "cats" is not "cat".
    """
    text = answer.strip().rstrip("\"'”’")
    said = words(text)
    ends = re.findall(r"[.!?]+(?=[\"'”’]?(?:\s|$))", text)
    single = len(ends) == 1 and text.endswith((".", "!", "?")) and "\n" not in text
    return single and 4 <= len(said) <= MAX_WORDS and word.casefold() in said


def one_word(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is one of the accepted words and nothing else.

    Letter case, punctuation and quotation marks around it do not matter; any second word makes it wrong.
    """
    return words(answer) in [words(one) for one in accepted]


def states(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is one sentence, or part of one, of at most 20 words with an accepted word among them.

    The word counts in any letter case, alone: "colder" is not "cold". A sentence ends at ".", "!" or "?" before a space
    or at the end of the answer; what the sentence says beside the word is not looked at.
    """
    text, said = answer.strip(), words(answer)
    ends_early = re.search(r"[.!?][\"'”’*)]*\s", text) or "\n" in text
    return not ends_early and len(said) <= 20 and any(one.casefold() in said for one in accepted)


def is_list(answer: str, items: Sequence[str]) -> bool:
    """Whether the answer is the list of these items in this order, each once.

    Items may be separated by commas, semicolons, "and", lines or arrows, be numbered or marked, and end with a full
    stop; letter case does not matter. Before them there may be words that end with a colon, and nothing after them.
    """
    lines = answer.strip().rpartition(":")[2].splitlines()
    listed = _BETWEEN.split("\n".join(_BULLET.sub("", line) for line in lines if line.strip()).strip())
    return [item.strip(" .\"'`*").casefold() for item in listed if item.strip(" .")] == [
        item.casefold() for item in items
    ]


def is_number(answer: str, number: int) -> bool:
    """Whether the number is the only one in an answer of at most MAX_WORDS words.

    Numbers count in digits, and in words from zero to twenty; "one" always counts, also as a pronoun.
    """
    said = words(answer)
    # isdecimal: "²" is a digit too, but no number that int reads
    numbers = [
        _NUMBERS.index(word) if word in _NUMBERS else word for word in said if word in _NUMBERS or word.isdecimal()
    ]
    return len(said) <= MAX_WORDS and [int(one) for one in numbers] == [number]


def is_copy(answer: str, text: str) -> bool:
    """Whether the answer is the text, letter by letter.

    White space around it, one pair of quotation marks around it and a full stop at the end do not matter; letter case
    and everything inside do.
    """

    def bare(text: str) -> str:
        text = text.strip()
        # The full stop may stand before or after the closing quotation mark.
        if text.endswith(('".', "'.", "”.", "’.")):
            text = text[:-1]
        if len(text) > 1 and (text[0], text[-1]) in {('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’")}:
            text = text[1:-1]
        return text.removesuffix(".")

    return bare(answer) == bare(text)


CHECKERS: dict[str, Callable[..., bool]] = {
    "name_three": names_three, "sentence": one_sentence_with, "one_word": one_word, "fact": states,
    "sort": is_list, "count": is_number, "copy": is_copy,
}  # fmt: skip


def check(kind: str, arguments: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right.

    Args:
        kind: of the instruction, a key of CHECKERS.
        arguments: of that checker.
        answer: text, without special tokens.
    """
    return CHECKERS[kind](answer, **arguments)
