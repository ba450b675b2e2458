"""Text to token ids and back: the tokenizer of a Hugging Face folder, or the one inside a GGUF file."""

from __future__ import annotations

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

from kd_jax.lm.weights import gguf_tokenizer
from kd_jax.lm.weights.gguf_reader import Reader
from kd_jax.storage import files

# What a folder's tokenizer is read from.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_SPECIAL = ("bos", "eos", "eot", "pad")
# transformers lets these override what tokenizer.json and tokenizer_config.json say.
_OVERRIDES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and the ids with a meaning; an id that is not known is None, and 0 is an id like any other.

    Nothing is added to a text unless asked for: a post-processor in tokenizer.json that puts in BOS or EOS is not run.

    Attributes:
        backend: the tokenizers.Tokenizer that does the work.
        bos_id: starts a sequence.
        eos_id: ends a sequence.
        eot_id: ends a turn of a chat, where a GGUF file names one.
        pad_id: fills up a row.
        chat_template: the chat template as it was found, or None.
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
        """Reads tokenizer.json and, where they are there, tokenizer_config.json and special_tokens_map.json.

        Raises FileNotFoundError where there is no tokenizer.json; ValueError for a file that cannot be read, or a
        special token that tokenizer.json does not have.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no tokenizer.json in {folder}; save the tokenizer there with transformers "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder)), which converts older formats"
            )
        backend = _backend(path)
        # both are settings of whoever saved the file, and would cut or fill up ids unasked
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        # where both files name a token, tokenizer_config.json is the newer format; its null means none
        names = {**_read_json(folder / "special_tokens_map.json"), **config}
        limit = config.get("model_max_length")
        return cls(
            backend,
            **{f"{name}_id": _named_id(backend, names, f"{name}_token", folder) for name in _SPECIAL},
            chat_template=_chat_template(folder, config),
            # transformers writes 1e30 for "no limit known"
            model_max_length=limit if type(limit) is int and 0 < limit < 10**20 else None,
        )

    @classmethod
    def from_gguf(cls, source: str | os.PathLike | Reader) -> Tokenizer:
        """Builds the tokenizer from a GGUF file (its path, or a reader of it); only byte-level BPE is supported.

        Ids that the file marks unused fill up the model's vocabulary and are no tokens. Raises FileNotFoundError, or
        ValueError that names the metadata key which is missing, wrong or not supported.
        """
        return cls(**gguf_tokenizer.read(source if isinstance(source, Reader) else Reader(source)))

    @functools.cached_property
    def vocab_size(self) -> int:
        """How many ids there are: the highest plus 1, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what makes two tokenizers the same: (token, id) table, merges, pre-tokenizer, normalizer."""
        return hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        description = json.loads(self.backend.to_str())
        return {
            "tokens": sorted(self.backend.get_vocab(with_added_tokens=True).items()),
            "merges": description["model"].get("merges", []),
            "pre_tokenizer": description["pre_tokenizer"],
            "normalizer": description["normalizer"],
        }

    @functools.cached_property
    def _lost_bytes(self) -> re.Pattern[bytes]:
        """Finds bytes that a byte-level vocabulary has no token for; BPE leaves them out without a word."""
        model = self.backend.model
        byte_level = isinstance(self.backend.decoder, decoders.ByteLevel) and isinstance(model, models.BPE)
        if not byte_level or model.unk_token is not None:
            return re.compile(b"(?!)")
        lost = bytes(b for b, char in enumerate(_byte_characters()) if self.backend.token_to_id(char) is None)
        return re.compile(b"[" + re.escape(lost) + b"]" if lost else b"(?!)")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of a text; special tokens written in it become their ids.

        `bos` puts BOS in front, unless the text starts with it already. Raises ValueError where the text has a byte
        that no token stands for, or where BOS is wanted and there is none.
        """
        self._check_bytes(text)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return self.with_bos(ids) if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """`encode` of each text."""
        for text in texts:
            self._check_bytes(text)
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

    def round_trips(self, ids: Iterable[int]) -> bool:
        """Whether the text of these ids encodes to them again; sampled ids need not."""
        ids = [int(i) for i in ids]
        # not `encode`: a lone byte decodes to U+FFFD, which the vocabulary may lack, and then the answer is just no
        return self.backend.encode(self.decode(ids), add_special_tokens=False).ids == ids

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
            **{key: None if i is None else self.backend.id_to_token(i) for key, i in tokens.items()},
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        files.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", config)
        for name in _OVERRIDES:
            (folder / name).unlink(missing_ok=True)

    def lost_byte(self, text: str) -> int | None:
        """The first byte of a text that no token stands for, so that `encode` refuses it; None where there is none."""
        found = self._lost_bytes.search(text.encode())
        return None if found is None else found[0][0]

    def _check_bytes(self, text: str) -> None:
        lost = self.lost_byte(text)
        if lost is not None:
            raise ValueError(
                f"the vocabulary has no token for byte 0x{lost:02x}, which is in the text {text[:40]!r}; "
                "it would be left out of the ids: remove it from the text"
            )


def check_same(a: Tokenizer, b: Tokenizer, names: tuple[str, str] = ("teacher", "student")) -> None:
    """Raises ValueError, saying what differs first, unless an id means the same in both and text is cut the same."""
    if a.fingerprint == b.fingerprint:
        return
    of_a, of_b = names
    must = "; both must have the same tokenizer"
    if a.vocab_size != b.vocab_size:
        raise ValueError(f"{of_a} has {a.vocab_size} token ids, {of_b} has {b.vocab_size}{must}")
    for i in range(a.vocab_size):
        left, right = a.backend.id_to_token(i), b.backend.id_to_token(i)
        if left != right:
            raise ValueError(f"id {i} is {left!r} for {of_a} and {right!r} for {of_b}{must}")
    merges_a, merges_b = a._parts["merges"], b._parts["merges"]
    if merges_a != merges_b:
        at = next((i for i, pair in enumerate(zip(merges_a, merges_b, strict=False)) if pair[0] != pair[1]), None)
        where = f"counts {len(merges_a)} and {len(merges_b)}" if at is None else f"{merges_a[at]} and {merges_b[at]}"
        raise ValueError(f"the merges of {of_a} and {of_b} differ: {where}{must}")
    for part in ("pre_tokenizer", "normalizer"):
        left, right = a._parts[part], b._parts[part]
        if left != right:
            raise ValueError(f"the {part} of {of_a} is {json.dumps(left)}, that of {of_b} {json.dumps(right)}{must}")


def _backend(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        if not backend.get_vocab_size():
            raise ValueError("it has no tokens")
        unknown = getattr(backend.model, "unk_token", None)
        if unknown is not None and backend.model.token_to_id(unknown) is None:
            raise ValueError(f"its unk_token {unknown!r:.40} is not in its vocabulary")
        return backend
    except BaseException as error:  # the library raises no narrower class, and a panic of it is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} is not a tokenizer ({error})") from error


def _chat_template(folder: Path, config: dict[str, Any]) -> Any:
    """The chat template as it is found; it is never rendered here."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def _named_id(backend: tokenizers.Tokenizer, names: dict[str, Any], key: str, folder: Path) -> int | None:
    token = names.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    i = backend.token_to_id(token) if isinstance(token, str) else None
    if i is None:
        raise ValueError(
            f"{folder}: {key} is {token!r:.80}, which tokenizer.json does not have; add it there or drop it"
        )
    return i


def _read_json(path: Path) -> dict[str, Any]:
    return files.read_json(path, ValueError) if path.is_file() else {}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it shows in Latin-1."""
    others = iter(range(256, 512))
    return [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else chr(next(others)) for b in range(256)]
