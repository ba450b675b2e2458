"""Conversations as token ids, with a mask of the tokens that the assistant says.

The tokenizer's chat template renders a conversation twice, as transformers does: as it is, and with a mark in place of
each turn of the assistant. The marks tell where the turns are in the text; nothing is searched for in the ids. Where a
token would lie across the border of a prompt and a reply, the two are encoded apart and their ids concatenated, so that
"Call foo(" and ")" stay four ids. What a template puts before a reply, such as <think></think>, is not learnt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_jax.lm.weights.tokenizer import Tokenizer

# Raised when `encode` makes other rows of the same conversations: finished stages are then not reused.
VERSION = 2


class Conversation(NamedTuple):
    """A conversation in ids.

    Attributes:
        ids: int32 [n].
        learnt: bool [n]; whether an id is the assistant's: its words and what ends its turn.
    """

    ids: np.ndarray
    learnt: np.ndarray


def encode(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, eos_ids: Sequence[int] | None = None
) -> Conversation:
    """Encodes a conversation; what comes after the assistant's last turn is left out.

    A conversation ends with the first EOS after the last turn. Where the template closes a turn with none, such as
    <|im_end|> for a model whose EOS is <|endoftext|>, EOS is put there: a model would not learn to stop.

    Args:
        messages: each with "role" and "content". Without a chat template, one turn of a user and one of the assistant:
            their texts.
        tokenizer: with the chat template.
        eos_ids: the ids that end a sequence, or none; the first one is put where none is. By default the tokenizer's.

    Returns: the conversation.
    Raises: ValueError for messages without a turn of the assistant, with calls of tools, or that the template refuses.
    """
    for i, message in enumerate(messages):
        # The call comes after the text that is learnt: a model would learn to end its turn without it.
        if message.get("tool_calls"):
            raise ValueError(f"messages[{i}].tool_calls: calls of tools cannot be learnt")
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant" and message.get("content")]
    if not turns or not all(isinstance(message.get("content", ""), str) for message in messages):
        raise ValueError("the assistant has no turn, or some content is not text")
    if eos_ids is None:
        eos_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces = _pieces(messages, turns, tokenizer, eos_ids) if tokenizer.chat_template else list(_plain(messages, turns))
    ids, learnt = _encode(pieces, tokenizer)
    if eos_ids and ids[-1] not in eos_ids:
        ids, learnt = [*ids, eos_ids[0]], [*learnt, True]
    return Conversation(np.array(ids, np.int32), np.array(learnt, bool))


def _encode(pieces: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of the pieces' text, encoded as a whole as transformers does, unless a token would lie across a border."""
    ids, spans = tokenizer.encode_with_spans("".join(text for text, _ in pieces))
    borders = np.cumsum([len(text) for text, _ in pieces])
    # A token belongs to the piece it starts in. If it ends in another one, it lies across a border.
    first = np.searchsorted(borders, [start for start, _ in spans], side="right")
    last = np.searchsorted(borders, [max(start, end - 1) for start, end in spans], side="right")
    if (first == last).all():
        return ids, [pieces[i][1] for i in first]
    # Encoded apart, as a sampler sees it: the prompt's ids are fixed before the reply begins.
    parts = [(tokenizer.encode(text), of_assistant) for text, of_assistant in pieces]
    return sum((part for part, _ in parts), []), sum(([of] * len(part) for part, of in parts), [])


def _plain(messages: Sequence[dict[str, Any]], turns: list[int]) -> Iterator[tuple[str, bool]]:
    if turns != [1] or len(messages) != 2:
        raise ValueError("the tokenizer has no chat template; without one, a conversation is a prompt and a response")
    return ((message["content"], i == 1) for i, message in enumerate(messages))


def _pieces(
    messages: Sequence[dict[str, Any]], turns: list[int], tokenizer: Tokenizer, eos_ids: Sequence[int]
) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces: (text, whether the assistant says it)."""
    marks = {turn: f"<<reply {turn}>>" for turn in turns}
    marked = [{**message, "content": marks.get(i, message["content"])} for i, message in enumerate(messages)]
    prompts, rest = [], tokenizer.render(marked[: turns[-1] + 1])
    for mark in marks.values():
        prompt, _, rest = rest.partition(mark)
        prompts.append(prompt)
    end = _end(rest, tokenizer, eos_ids)
    rendered = tokenizer.render(messages[: turns[-1] + 1])
    for clean in (str, str.strip):  # some templates strip the text
        said = [clean(messages[turn]["content"]) for turn in turns]
        if rendered == "".join(itertools.chain(*zip(prompts, said, strict=True), [rest])):
            break
    else:
        raise ValueError("the chat template changes the assistant's text, or puts something else around it")
    # The last turn may be closed by more than the others, such as <|end|> and EOS.
    ends = [end if prompt.startswith(end) else _shared(end, prompt, tokenizer) for prompt in prompts[1:]] + [end]
    starts = ["", *ends[:-1]]
    pieces = []
    for prompt, start, text, finish in zip(prompts, starts, said, ends, strict=True):
        # Tokenizers join a space with the word after it, so the space before a reply is part of the reply.
        words = prompt.removeprefix(start).rstrip(" ")
        pieces += [(words, False), (prompt.removeprefix(start)[len(words) :] + text + finish, True)]
    return pieces


def _end(rest: str, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> str:
    """What of the text after a reply ends its turn: all up to the first EOS, or all but a line feed."""
    ids, spans = tokenizer.encode_with_spans(rest)
    first = next((stop for i, (_, stop) in zip(ids, spans, strict=True) if i in eos_ids), None)
    # a line feed after the end belongs to the next prompt
    return rest[:first] if first else rest.rstrip() or rest


def _shared(end: str, prompt: str, tokenizer: Tokenizer) -> str:
    """The whole tokens that the end of the last turn and the prompt after another turn begin with alike."""
    (ids, spans), (others, _) = (tokenizer.encode_with_spans(text) for text in (end, prompt))
    shared = 0
    for i, other, (start, stop) in zip(ids, others, spans, strict=False):
        if i != other:
            break
        # a line feed after the end belongs to the next prompt, unless it is part of a token, as in Phi-3
        shared = stop if end[start:stop].strip() else shared
    return end[:shared]
