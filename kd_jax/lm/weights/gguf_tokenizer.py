"""The tokenizer inside a GGUF file, built from its metadata: byte-level BPE, SentencePiece BPE, SentencePiece unigram.

transformers builds one too, but by the file's `tokenizer.ggml.pre` it does not know SmolLM's way to split digits, and
it reads Gemma 3's metadata in minutes.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

_IDS = {
    "bos_id": "tokenizer.ggml.bos_token_id",
    "eos_id": "tokenizer.ggml.eos_token_id",
    "eot_id": "tokenizer.ggml.eot_token_id",
    "pad_id": "tokenizer.ggml.padding_token_id",
}

# The patterns that Llama 3, Qwen 2, Mistral's Tekken and GPT-4o were published with.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED % ("", "", r"\p{N}")
_GPT4O = _CASED % (*["(?i:'s|'t|'re|'ve|'m|'ll|'d)?"] * 2, r"\p{N}{1,3}")
_PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
# GPT-2's own pattern is the default of ByteLevel; these split off each digit before.
_GPT2_LIKE = {"gpt-2": False, "olmo": False, "smollm": True, "refact": True, "starcoder": True}
# Byte-level ones whose texts begin with BOS where the file does not say it, as Llama 3's files seldom do (llama.cpp).
_BOS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "tekken")


def read(metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of a kd_jax.lm.weights.tokenizer.Tokenizer.

    Args:
        metadata: of a GGUF file.

    Raises: ValueError, naming the key, for a tokenizer that is not known; KeyError for a key that is missing.
    """
    kind = metadata["tokenizer.ggml.model"]
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}, and only {known} are read; use a folder with tokenizer.json"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    backend = _BUILDERS[kind](metadata, tokens, types)
    # one call each: the library gives every token of a call the same flag
    for type_, add in (
        (TokenType.CONTROL, backend.add_special_tokens),
        (TokenType.USER_DEFINED, backend.add_tokens),
    ):
        added = [token for token, of in zip(tokens, types, strict=True) if of == type_ and token.strip(" ")]
        add([AddedToken(token, normalized=False) for token in added])
    bos_id = metadata.get(_IDS["bos_id"])
    bos = None if bos_id is None else backend.id_to_token(bos_id)
    if bos is not None and _adds_bos(metadata):
        backend.post_processor = processors.TemplateProcessing([bos, "$A"], special_tokens=[(bos, bos_id)])
    architecture = metadata.get("general.architecture")
    return {
        "backend": backend,
        **{name: metadata.get(key) for name, key in _IDS.items()},
        "chat_template": metadata.get("tokenizer.chat_template"),
        "model_max_length": metadata.get(f"{architecture}.context_length"),
    }


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether the model's texts begin with BOS. Llama 2's like, and some others, have it where the key is missing."""
    default = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _BOS_FIRST
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """Byte-level BPE with the merges of the file, as GPT-2, Llama 3, Qwen and SmolLM have it."""
    pre = metadata["tokenizer.ggml.pre"]
    if pre not in _PATTERNS and pre not in _GPT2_LIKE:
        known = ", ".join([*_GPT2_LIKE, *_PATTERNS])
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}, and only {known} are read; use a folder with tokenizer.json")
    # unused ids fill the embedding up to a round size; as tokens they would be found in texts that spell them
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is a token as it stands, without merging it up
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_PATTERNS.get(pre) == _LLAMA3))
    if pre in _GPT2_LIKE:
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, cut]) if _GPT2_LIKE[pre] else cut
    else:
        cut = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    # Qwen's tokenizer.json composes characters first; GGUF has no key for it
    if _PATTERNS.get(pre) == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with bytes for unknown characters, as Llama 2, Mistral and Gemma have it.

    The file has a score for each piece and no merges. SentencePiece joins the two neighbours whose piece has the
    highest score: each way to cut a piece in two is a merge, in the order of the scores.
    """
    # a GGUF file spells the runs of spaces that a user has defined with real spaces
    pieces = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=_merges(pieces, vocab, types, metadata["tokenizer.ggml.scores"]),
            unk_token=None if unknown is None else pieces[unknown], fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    # files from before this key are of Llama 2 and its like, which put a space before a text
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        # as Gemma's tokenizer.json has it
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges(pieces: list[str], vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    # control tokens are no pieces: text that spells one must not be merged into it
    ranked, score = [], float("inf")
    for i, of in enumerate(types):
        # pieces that the user has defined have no score of their own: they rank by their place in the file
        score = scores[i] if of == TokenType.NORMAL else score
        if of in (TokenType.NORMAL, TokenType.USER_DEFINED):
            ranked.append((-score, i, pieces[i]))
    cuts = ((piece[:at], piece[at:]) for _, _, piece in sorted(ranked) for at in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in vocab and right in vocab]


def _unigram(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model, as T5 has it: the most likely cut of the text by the scores."""
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    byte_fallback = TokenType.BYTE in types
    scored = list(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback))
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap:
        # The bytes may be stored as signed numbers.
        backend.normalizer = normalizers.Precompiled(bytes(value & 255 for value in charsmap))
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    return backend


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece_bpe, "t5": _unigram}
