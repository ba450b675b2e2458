"""The tokenizer inside a GGUF file, built anew from its metadata: byte-level BPE."""

from __future__ import annotations

from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from kd_jax.lm.weights.gguf_reader import Reader

_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}

# The pattern that Llama 3 was published with.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How text is cut before BPE, by the name that tokenizer.ggml.pre gives it; each is what the model's tokenizer.json has.
_PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def read(reader: Reader) -> dict[str, Any]:
    """The fields of a Tokenizer; ValueError names a key that is missing, wrong or not supported."""
    backend = _byte_level_bpe(reader)
    architecture = _metadata(reader, "general.architecture", str, required=False)
    return {
        "backend": backend,
        **{f"{name}_id": _id(reader, key, backend) for name, key in _IDS.items()},
        "chat_template": _metadata(reader, "tokenizer.chat_template", str, required=False),
        "model_max_length": _metadata(reader, f"{architecture}.context_length", int, required=False),
    }


def _byte_level_bpe(reader: Reader) -> tokenizers.Tokenizer:
    model = _metadata(reader, "tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {model!r}; only 'gpt2' is read, so use a folder with tokenizer.json")
    pre = _metadata(reader, "tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; only {known} are read, so use a folder with tokenizer.json")
    tokens = _metadata(reader, "tokenizer.ggml.tokens", list, of=str)
    types = _metadata(reader, "tokenizer.ggml.token_type", list, of=int)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    vocab = _vocabulary(tokens, types)
    merges = _merges(_metadata(reader, "tokenizer.ggml.merges", list, of=str), vocab)
    # Llama 3 takes a word that is a token as it stands, without merging it up
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    # one call each: the library gives every token of a call the same flag
    for kind, add in (
        (gguf.TokenType.CONTROL, backend.add_special_tokens),
        (gguf.TokenType.USER_DEFINED, backend.add_tokens),
    ):
        add([AddedToken(token, normalized=False) for token, of in zip(tokens, types, strict=True) if of == kind])
    return backend


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == gguf.TokenType.UNUSED:
            continue
        if token in vocab:
            raise ValueError(f"tokenizer.ggml.tokens has {token!r} twice, as {vocab[token]} and {i}")
        vocab[token] = i
    if not vocab:
        raise ValueError("tokenizer.ggml.tokens is empty")
    return vocab


def _merges(lines: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Splits "a b" lines. The byte-level alphabet has no space, so the one in a line separates."""
    merges = []
    for number, line in enumerate(lines):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"tokenizer.ggml.merges[{number}] is {line!r}, which is not two tokens and one space")
        left, right = parts
        for token in (left, right, left + right):
            # the library does not report this, it panics
            if token not in vocab:
                raise ValueError(f"tokenizer.ggml.merges[{number}] is {line!r}, but there is no token {token!r}")
        merges.append((left, right))
    return merges


def _metadata(reader: Reader, key: str, kind: type, *, of: type = object, required: bool = True) -> Any:
    """A value of a type; in a list, all members are `of` a type."""
    value = reader.get(key)
    if value is None:
        if required:
            raise ValueError(f"the GGUF file has no {key}; use a folder with tokenizer.json")
        return None
    # all members of a list have one type
    if type(value) is not kind or (kind is list and value and not isinstance(value[0], of)):
        raise ValueError(f"{key} in the GGUF file is not a {kind.__name__} but {str(value)[:40]}")
    return value


def _id(reader: Reader, key: str, backend: tokenizers.Tokenizer) -> int | None:
    i = _metadata(reader, key, int, required=False)
    if i is not None and (i < 0 or backend.id_to_token(i) is None):
        raise ValueError(f"{key} is {i}, which is not the id of a token")
    return i
