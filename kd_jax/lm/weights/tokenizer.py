"""Text to token ids and back: the tokenizer of a Hugging Face folder, or the one inside a GGUF file."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from kd_jax.lm.weights import gguf_reader, gguf_tokenizer
from kd_jax.storage import files

# What a folder's tokenizer is read from, and what else where there is no tokenizer.json.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OLDER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")

_SPECIAL = ("bos", "eos", "eot", "pad")
# Characters of text to a token, as a first guess; text is seldom longer.
_CHARACTERS = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens of single bytes
# A space between two letters: no tokenizer joins what is on either side of it.
_BORDER = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids with a meaning; an id that is not known is None, and 0 is an id like any other.

    Nothing is added to a text unless asked for: a post-processor in tokenizer.json that puts in BOS or EOS is not run.
    It only says, by `adds_bos`, what a text that a model continues begins with (`encode_prompt`).

    Attributes:
        backend: the tokenizers.Tokenizer that does the work.
        bos_id: starts a sequence.
        eos_id: ends a sequence.
        eot_id: ends a turn of a chat, where a GGUF file names one.
        pad_id: fills up a row.
        chat_template: the chat template (Jinja), or None.
        model_max_length: tokens the model was trained for, or None.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    pad_id: int | None = None
    chat_template: Any = dataclasses.field(default=None, repr=False)
    model_max_length: int | None = None

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer:
        """Reads a folder's tokenizer with transformers.

        tokenizer.json is taken as it is. AutoTokenizer would choose a class by config.json and tokenizer_config.json;
        for SmolLM2 that is GPT-2's, which does not split digits as the model was trained to. Folders without
        tokenizer.json (tokenizer.model, vocab.json) go through AutoTokenizer, which converts them.

        Raises: ValueError, naming the folder, where transformers cannot read it.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes most of a second

        folder = Path(folder)
        kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
        try:
            loaded = kind.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the libraries raise no narrower class
            raise ValueError(f"{folder}: transformers cannot read the tokenizer: {error}") from error
        backend = loaded.backend_tokenizer
        # both are settings of whoever saved the file, and would cut or fill up ids unasked
        backend.no_truncation()
        backend.no_padding()
        eot = loaded.special_tokens_map.get("eot_token")
        limit = loaded.model_max_length
        return cls(
            backend, loaded.bos_token_id, loaded.eos_token_id, None if eot is None else backend.token_to_id(eot),
            loaded.pad_token_id, loaded.chat_template,
            # transformers has 1e30 for "no limit known"
            int(limit) if limit < 10**20 else None,
        )  # fmt: skip

    @classmethod
    def from_gguf(cls, source: str | os.PathLike | gguf_reader.GGUF) -> Tokenizer:
        """Builds the tokenizer inside a GGUF file (its path, or the file as read).

        Ids that the file marks unused fill up the model's vocabulary and are no tokens.

        Raises: ValueError, naming the metadata key, where it is missing or not supported.
        """
        file = source if isinstance(source, gguf_reader.GGUF) else gguf_reader.read(source)
        try:
            return cls(**gguf_tokenizer.read(file.metadata))
        except KeyError as error:
            raise ValueError(f"the GGUF file has no {error.args[0]}; use a folder with tokenizer.json") from error

    @functools.cached_property
    def vocab_size(self) -> int:
        """How many ids there are: the highest plus 1, added tokens included."""
        # Not the number of tokens: ids may have gaps, and a model has a logit for each.
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the model's texts begin with BOS, as its tokenizer's post-processor says."""
        return self.bos_id is not None and self.backend.encode("").ids[:1] == [self.bos_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what makes two tokenizers the same: (token, id) table, merges, pre-tokenizer, normalizer."""
        description = json.loads(self.backend.to_str())
        # What decides the ids of a text. Padding, truncation and post-processors are in the file too, but are never
        # run.
        parts = {
            "tokens": sorted(self.backend.get_vocab(with_added_tokens=True).items()),
            "merges": description["model"].get("merges", []),
            "pre_tokenizer": description["pre_tokenizer"],
            "normalizer": description["normalizer"],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _lost_bytes(self) -> re.Pattern[bytes]:
        """Finds bytes that a byte-level vocabulary has no token for; BPE drops them without a warning."""
        model = self.backend.model
        byte_level = isinstance(self.backend.decoder, decoders.ByteLevel) and isinstance(model, models.BPE)
        if not byte_level or model.unk_token is not None:
            return re.compile(b"(?!)")
        lost = bytes(b for b, char in enumerate(_byte_characters()) if self.backend.token_to_id(char) is None)
        return re.compile(b"[" + re.escape(lost) + b"]" if lost else b"(?!)")

    def encode(self, text: str, *, bos: bool = False, special: bool = True, limit: int | None = None) -> list[int]:
        """The ids of a text.

        Args:
            text: any text.
            bos: put BOS in front, unless the ids start with it already.
            special: special tokens written in the text, such as "<|endoftext|>", become their ids; otherwise they are
                text like any other.
            limit: as many ids are enough. Of a long text only the beginning is encoded, up to a space between two
                letters; there may be more ids, and they are the first ones of the whole text's.

        Returns: the ids.
        Raises: ValueError where no token stands for a byte of the text, or BOS is wanted and there is none.
        """
        self._check_bytes(text)
        # a switch of the backend, so it is set for each call
        self.backend.encode_special_tokens = not special
        # 20 MB take seconds; a short row needs no more than the first page of them
        end = len(text) if limit is None else _CHARACTERS * limit
        while True:
            border = _BORDER.search(text, end)
            part = text if border is None else text[: border.start()]
            ids = self.backend.encode(part, add_special_tokens=False).ids
            if border is None or len(ids) >= limit:
                return self.with_bos(ids) if bos else ids
            # The first guess was too short. Four times as much each time: the total stays within twice the last try.
            end *= 4

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that a model continues: BOS is in front where the model was trained so (`adds_bos`)."""
        return self.encode(text, bos=self.adds_bos)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters [start, end) that each stands for."""
        self._check_bytes(text)
        self.backend.encode_special_tokens = False
        encoded = self.backend.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, special: bool = True) -> list[list[int]]:
        """`encode` of each text.

        Args:
            texts: any number.
            bos, special: as of `encode`.
        """
        for text in texts:
            self._check_bytes(text)
        self.backend.encode_special_tokens = not special
        rows = [row.ids for row in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self.with_bos(row) for row in rows] if bos else rows

    def with_bos(self, ids: Iterable[int]) -> list[int]:
        """The ids with BOS in front; those that start with it stay as they are. ValueError where there is no BOS."""
        if self.bos_id is None:
            raise ValueError("BOS is wanted, but this tokenizer has no BOS token; leave it off")
        ids = [int(i) for i in ids]
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD. ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is not one of this tokenizer's (0 to {self.vocab_size - 1})")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for in a text; none for special tokens, and for ids without a token."""
        description = json.loads(self.backend.to_str())
        byte_level = "ByteLevel" in json.dumps([description["decoder"], description["pre_tokenizer"]])
        of_character = {character: b for b, character in enumerate(_byte_characters())}
        added = self.backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in added:
                table[i] = b"" if added[i].special else added[i].content.encode()
            elif byte_level:
                table[i] = bytes(of_character[character] for character in token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                table[i] = bytes([int(match[1], 16)])
            else:
                table[i] = token.replace("▁", " ").encode()
        return table

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether a text gets a space in front before it is cut into tokens, as Llama 2's does."""
        decoder = json.dumps(json.loads(self.backend.to_str())["decoder"])
        return '"Strip"' in decoder or '"prepend_scheme": "always"' in decoder or '"prepend_scheme": "first"' in decoder

    def round_trips(self, ids: Iterable[int]) -> bool:
        """Whether the text of these ids encodes to them again; sampled ids need not."""
        ids = [int(i) for i in ids]
        self.backend.encode_special_tokens = False
        # not `encode`: a lone byte decodes to U+FFFD, which the vocabulary may lack, and then the answer is just no
        return self.backend.encode(self.decode(ids), add_special_tokens=False).ids == ids

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """A conversation as text by the chat template, as transformers renders it.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with what comes before the assistant's next turn.

        Returns: the text, whose special tokens `encode` makes ids again.
        Raises: ValueError where there is no template, or it refuses the messages.
        """
        try:
            return self._transformers.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    @functools.cached_property
    def _transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        # transformers wants tokens where we have ids.
        special = {f"{name}_token": getattr(self, f"{name}_id") for name in ("bos", "eos", "pad")}
        names = {key: self.backend.id_to_token(i) for key, i in special.items() if i is not None}
        return PreTrainedTokenizerFast(tokenizer_object=self.backend, chat_template=self.chat_template, **names)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, each whole or not at all; replaces a tokenizer there.

        transformers.AutoTokenizer gives the same ids from them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {f"{name}_token": getattr(self, f"{name}_id") for name in _SPECIAL}
        config = {
            # the generic class takes tokenizer.json as it is; model classes (GPT-2's, Llama's) put in their own
            # pre-tokenizer, and the digits would no longer be split
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # by default transformers 4 has token_type_ids too, which its `generate` does not take
            "model_input_names": ["input_ids", "attention_mask"],
            **{key: None if i is None else self.backend.id_to_token(i) for key, i in tokens.items()},
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        files.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", config)
        # transformers lets these override what the two say
        for name in {*FILES, *OLDER_FILES} - {"tokenizer.json", "tokenizer_config.json"}:
            (folder / name).unlink(missing_ok=True)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each id; a character of several ids stands at the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ids = [int(i) for i in ids]
        # special tokens have no bytes
        return [self.backend.id_to_token(i) if self.is_special(i) else decoder.decode(self.token_bytes[i]) for i in ids]

    def is_special(self, i: int) -> bool:
        """Whether an id is a special token: BOS, EOS, the end of a turn, and the like."""
        token = self.backend.get_added_tokens_decoder().get(i)
        return i == self.eos_id or (token is not None and token.special)

    def lost_byte(self, text: str) -> int | None:
        """The first byte of a text that no token stands for, so that `encode` refuses it; None where there is none."""
        match = self._lost_bytes.search(text.encode())
        return None if match is None else match[0][0]

    def _check_bytes(self, text: str) -> None:
        lost = self.lost_byte(text)
        if lost is not None:
            raise ValueError(
                f"the vocabulary has no token for byte 0x{lost:02x}, which is in the text {text[:40]!r}; "
                "it would be left out of the ids: remove it from the text"
            )


def in_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, None where there is none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return Tokenizer.from_folder(folder) if any((folder / name).exists() for name in names) else None


def difference(a: Tokenizer, b: Tokenizer, a_name: str, b_name: str) -> str | None:
    """How the ids of two tokenizers differ: how many, and the first few with their tokens; None where they do not.

    Only what an id stands for counts. How text is cut into tokens may differ: token ids are the data.

    Args:
        a, b: the two.
        a_name, b_name: what the text calls them.
    """
    if a.vocab_size != b.vocab_size:
        return f"{a_name} has {a.vocab_size} ids and {b_name} {b.vocab_size}"
    ids = [i for i in range(a.vocab_size) if a.backend.id_to_token(i) != b.backend.id_to_token(i)]
    if not ids:
        return None
    first = [f"{i} is {a.backend.id_to_token(i)!r} and {b.backend.id_to_token(i)!r}" for i in ids[:4]]
    more = ", ..." if len(ids) > len(first) else ""
    return f"{len(ids)} of {a.vocab_size} ids are other tokens in {a_name} and {b_name}: {', '.join(first)}{more}"


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it shows in Latin-1."""
    others = iter(range(256, 512))
    return [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else chr(next(others)) for b in range(256)]
