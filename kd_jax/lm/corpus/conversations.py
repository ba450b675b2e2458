"""Conversations as token ids, with a mask of the tokens that the assistant says.

The tokenizer's chat template renders a conversation twice, as transformers does: as it is, and with a mark after each
reply of the assistant. The marks tell where the replies end in the text; nothing is searched for in the ids. Where a
token would lie across the border of a prompt and a reply, the two are encoded apart and their ids concatenated, so that
"Call foo(" and ")" stay four ids. What a template puts before a reply, such as <think></think>, is not learnt; thoughts
that are part of a reply are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_jax.lm.weights.tokenizer import Tokenizer

# Raised when `encode` makes other rows of the same conversations: finished stages are then not reused.
VERSION = 3
# After each reply, to find its end. A text that has it is taken for one that the template changes.
_MARK = "<<end of reply>>"


class Unusable(ValueError):
    """A conversation that nothing can be learnt from. Such rows are left out of a corpus, and counted.

    Attributes:
        reason: why, as it is counted.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


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
    Raises: Unusable where the assistant says nothing, where a content is null, or where the template does not render
        what the assistant says as it is, as one that leaves out the thoughts of earlier turns; ValueError for messages
        without a role or a turn of the assistant, with calls of tools, or that the template refuses.
    """
    for i, message in enumerate(messages):
        # The call comes after the text that is learnt: a model would learn to end its turn without it.
        if message.get("tool_calls"):
            raise ValueError(f"messages[{i}].tool_calls: calls of tools cannot be learnt")
        if not isinstance(message.get("role"), str):
            keys = ", ".join(message) or "none"
            raise ValueError(f"messages[{i}] has no role; a message has the keys role and content, and this one {keys}")
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise ValueError(f"messages[{i}].content of role {message['role']!r} is not text, but {kind}")
    contents = [message.get("content", "") for message in messages]
    roles = [message["role"] for message in messages]
    replies = [i for i, role in enumerate(roles) if role == "assistant"]
    if not replies:
        raise ValueError(f"the assistant has no turn; the roles are {', '.join(dict.fromkeys(roles)) or 'none'}")
    if None in contents or not any(contents[i].strip() for i in replies):
        raise Unusable("empty", "the assistant says nothing, or a message has null in place of a text")
    turns = [i for i in replies if contents[i].strip()]
    if eos_ids is None:
        eos_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces = _pieces(messages, turns, tokenizer, eos_ids) if tokenizer.chat_template else list(_plain(messages, turns))
    ids, learnt = _encode(pieces, tokenizer)
    if not tokenizer.chat_template and tokenizer.adds_bos:  # a template puts BOS in front itself
        begun = tokenizer.with_bos(ids)
        ids, learnt = begun, [False] * (len(begun) - len(ids)) + learnt
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
    messages = messages[: turns[-1] + 1]
    rendered = tokenizer.render(messages)
    for clean in (str, str.strip):  # some templates strip the text
        said = {turn: clean(messages[turn]["content"]) for turn in turns}
        # After the text and not in its place: a template may look into it, for </think>.
        marked = [{**turn, "content": said[i] + _MARK} if i in said else turn for i, turn in enumerate(messages)]
        *parts, rest = tokenizer.render(marked).split(_MARK)
        as_it_is = len(parts) == len(said) and all(map(str.endswith, parts, said.values()))
        if as_it_is and "".join([*parts, rest]) == rendered:
            break
    else:
        raise Unusable("changed_by_the_chat_template", "the chat template changes the assistant's text")
    prompts = list(map(str.removesuffix, parts, said.values()))
    end = _end(rest, tokenizer, eos_ids)
    # The last turn may be closed by more than the others, such as <|end|> and EOS.
    ends = [end if prompt.startswith(end) else _shared(end, prompt, tokenizer) for prompt in prompts[1:]] + [end]
    starts = ["", *ends[:-1]]
    pieces = []
    for prompt, start, text, finish in zip(prompts, starts, said.values(), ends, strict=True):
        # Tokenizers join a space with the word after it, so the space before a reply is part of the reply.
        words = prompt.removeprefix(start).rstrip(" ")
        pieces += [(words, False), (prompt.removeprefix(start)[len(words) :] + text + finish, True)]
    return pieces


def _end(rest: str, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> str:
    """The part of the text after a reply that ends its turn: up to the first EOS, or all but a line feed."""
    ids, spans = tokenizer.encode_with_spans(rest)
    first = next((stop for i, (_, stop) in zip(ids, spans, strict=True) if i in eos_ids), None)
    # a line feed after the end belongs to the next prompt
    return rest[:first] if first else rest.rstrip() or rest


def _shared(end: str, prompt: str, tokenizer: Tokenizer) -> str:
    """The beginning, in whole tokens, that the end of the last turn shares with the prompt after another turn."""
    (ids, spans), (others, _) = (tokenizer.encode_with_spans(text) for text in (end, prompt))
    shared = 0
    for i, other, (start, stop) in zip(ids, others, spans, strict=False):
        if i != other:
            break
        # a line feed after the end belongs to the next prompt, unless it is part of a token, as in Phi-3
        shared = stop if end[start:stop].strip() else shared
    return end[:shared]
