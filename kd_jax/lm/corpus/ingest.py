"""Data as the corpus of p*: documents of text or of ids, tokenised once into the format of kd_jax.lm.corpus."""

from __future__ import annotations

import collections
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kd_jax.lm import corpus, weights
from kd_jax.lm.corpus import conversations, documents, readers, shards
from kd_jax.lm.corpus.documents import Columns, Documents
from kd_jax.lm.corpus.manifest import DataSpec
from kd_jax.lm.corpus.store import Arrival, Corpus
from kd_jax.lm.weights.tokenizer import Tokenizer
from kd_jax.runs import progress
from kd_jax.runs.settings import freeze
from kd_jax.storage import files, lock

# Documents tokenised at a time, and the characters to an id of a row from which they are tokenised one by one.
_BATCH, _LONG = 256, 32


def from_dataset(
    source: str | os.PathLike, folder: str | os.PathLike, tokenizer_source: str | os.PathLike, *, max_length: int,
    split: str = "train", subset: str | None = None, text_column: str | None = None, ids_column: str | None = None,
    messages_column: str | None = None, prompt_column: str | None = None, response_column: str | None = None,
    num_samples: int | None = None, first: int = 0, eos: bool | int | Sequence[int] = True,
    prompt_ids: Sequence[int] = (), special_tokens: bool = False, whole_files: bool = False, shard_size: int = 1024,
    seed: int = 0, streaming: bool | None = None, command: str | None = None, needed: tuple[int, str] = (0, ""),
) -> Corpus:  # fmt: skip
    """Makes a corpus (kind "data") of documents, or continues one after its last whole shard; returns it finished.

    A document of text or ids ends with EOS (once) and is `finished`; where ids and EOS together are more than
    max_length, the first max_length ids remain, without EOS and not finished. Documents that are empty or blank are
    left out, and so are texts with a byte or character that the tokenizer has no token for, and conversations that
    nothing can be learnt from (kd_jax.lm.corpus.conversations); the manifest counts them under `skipped`.

    Which documents: those that can be used are put in an order that depends on `seed` alone (as they come, where they
    are streamed), and rows are the documents at the places first .. first + num_samples - 1. Ranges that do not
    overlap, of one source, split and seed, share no document: make train and validation so.

    Args:
        source: a file, a glob, a folder (documents.SOURCES), or a Hugging Face id of a data set, "org/name" or
            "org/name@revision".
        folder: of the corpus.
        tokenizer_source: anything kd_jax.lm.weights.tokenizer takes. Ids in the data are to be its ids.
        max_length: longest row, prompt and EOS included.
        split, subset: part of a data set that has such ("train" and its default one); files have none.
        text_column: column with the texts ("text").
        ids_column: column with lists of ids, instead.
        messages_column: column with conversations, lists of {"role", "content"} (or the same as JSON), instead.
        prompt_column, response_column: columns of a request and its answer, conversations of one turn, instead. After
            an `instruction` comes the column `input`, where there is one (Alpaca's form).
        num_samples: how many rows; all there are from `first` on by default, which a stream cannot tell.
        first: place of the first.
        eos: whether documents end with the tokenizer's EOS; an id where another one ends a document; or several ids: a
            document that ends with none of them gets the first. Without it no row is finished.
        prompt_ids: what each row is to begin with, such as BOS; rows that do already stay as they are. The prompt is
            not scored or trained on, nor is the first id of a row without one (prompt_length is at least 1).
        special_tokens: the text of a special token in a document, such as "<|endoftext|>", becomes its id; by default
            it is text like any other.
        whole_files: a .txt file is one document; by default each line is.
        shard_size: rows in a file.
        seed: of the order.
        streaming: reads a hub id's data as they come, without a copy on disk; by default where num_samples is given.
        command: what was typed, for the manifest; by default this process's.
        needed: how many documents there have to be in all, for corpora that are made later, and how this is reckoned,
            for the message. A stream is not counted.

    Returns: the corpus.
    Raises: ValueError for arguments that do not go together, columns that are not there (naming those that are), ids
        that are not the tokenizer's, and fewer documents than asked for; FileNotFoundError or RunError for a source
        that cannot be read or a folder that cannot take these rows.
    """
    source, tokenizer_source = files.absolute(source), files.absolute(tokenizer_source)
    on_hub = documents.is_hub_id(source)
    settings = {
        "source": source, "subset": subset, "split": split, "text_column": text_column, "ids_column": ids_column,
        "messages_column": messages_column, "prompt_column": prompt_column, "response_column": response_column,
        "streaming": on_hub and num_samples is not None if streaming is None else streaming, "first": first,
        "tokenizer_source": tokenizer_source, "prompt_ids": [int(i) for i in prompt_ids], "max_length": max_length,
        "special_tokens": special_tokens, "whole_files": whole_files, "shard_size": shard_size, "seed": seed,
    } | ({} if num_samples is None else {"num_samples": num_samples})  # fmt: skip
    columns = _columns(settings)
    _check(settings, on_hub)
    command = shlex.join(sys.argv) if command is None else command
    # Two processes in one folder would write the same shards.
    with lock.held(folder, command):
        # Settings are compared first: an error should come before the tokenizer is loaded and the data are read.
        corpus.find(folder, settings, kind="data")
        tokenizer = weights.tokenizer(tokenizer_source)
        settings |= _tokenizer_settings(tokenizer, settings, eos)
        identity = documents.identity(source)
        # The commit that was just looked up, so that a push meanwhile does not mix two versions.
        paths = documents.files(source, split=split, subset=subset, revision=identity if on_hub else None)
        readers.check_columns(source, paths, columns.names)
        if prompt_column and response_column != "input":
            columns = columns._replace(names=(*readers.request_columns(prompt_column), response_column))
        if settings["streaming"]:
            # A stream is never read as a whole: its fingerprint is the commit, and documents come in their own order.
            data, chosen = None, {"data_fingerprint": identity}
        else:
            data = documents.load(source, paths, columns, tokenizer, identity)
            places, skipped, chosen = _choose(data, settings, needed)
        target = corpus.create_or_resume(folder, settings | chosen, command=command, kind="data")
        if target.finished:
            return target
        if data is None:
            batches = _streamed(documents.stream(source, paths, columns), columns, tokenizer, target)
        else:
            batches = _taken(data, target, places, skipped)
        num_rows = target.manifest["settings"]["num_samples"]
        with progress.bar("rows", target.num_rows, num_rows, "row") as bar:
            return corpus.write_rows(
                target, _arrivals(batches, columns, tokenizer, target), lambda rows, _: bar.update(rows)
            )


def check_source(
    source: str | os.PathLike, *, split: str = "train", subset: str | None = None, text_column: str | None = None,
    ids_column: str | None = None, messages_column: str | None = None, prompt_column: str | None = None,
    response_column: str | None = None, whole_files: bool = False,
) -> None:  # fmt: skip
    """What `from_dataset` finds wrong with these arguments before it reads the data; errors are its own."""
    columns = _columns({
        "text_column": text_column, "ids_column": ids_column, "messages_column": messages_column,
        "prompt_column": prompt_column, "response_column": response_column, "whole_files": whole_files, "max_length": 0,
    })  # fmt: skip
    source = files.absolute(source)
    readers.check_columns(source, documents.files(source, split=split, subset=subset), columns.names)


def _columns(settings: dict[str, Any]) -> Columns:
    """What a document is made of; ValueError where several ways are given, or only a part of one."""
    pair = settings["prompt_column"], settings["response_column"]
    ways = {
        "text": [settings["text_column"]], "ids": [settings["ids_column"]], "messages": [settings["messages_column"]],
        "pair": pair,
    }  # fmt: skip
    # None of them given means the column "text".
    given = [kind for kind, names in ways.items() if any(name is not None for name in names)] or ["text"]
    if len(given) > 1 or (given == ["pair"] and None in pair):
        raise ValueError(
            "text_column, ids_column, messages_column, or prompt_column with response_column say what a document is; "
            f"give one of them (given: {', '.join(given)})"
        )
    names = tuple(name or "text" for name in ways[given[0]])
    kind = "messages" if given == ["pair"] else given[0]
    return Columns(kind, names, settings["whole_files"], settings["max_length"] if kind == "messages" else 0)


def _check(settings: dict[str, Any], on_hub: bool) -> None:
    freeze(DataSpec, settings, at="data")
    if settings["streaming"] and not (on_hub and "num_samples" in settings):
        raise ValueError("streaming=True is for data on the Hugging Face hub, and needs num_samples")
    if settings["max_length"] <= len(settings["prompt_ids"]):
        raise ValueError(f"max_length={settings['max_length']} counts the prompt; nothing would follow its ids")


def _tokenizer_settings(
    tokenizer: Tokenizer | None, settings: dict[str, Any], eos: bool | int | Sequence[int]
) -> dict[str, Any]:
    name = settings["tokenizer_source"]
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; name a source that has one as tokenizer_source")
    if isinstance(eos, bool):
        eos = [tokenizer.eos_id] if eos else []
    eos_ids = list(eos) if isinstance(eos, Sequence) else [eos]
    if None in eos_ids:
        raise ValueError(f"the tokenizer of {name} names no EOS; give its id, or eos=False for rows without")
    for i in [*settings["prompt_ids"], *eos_ids]:
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"prompt_ids and eos: {i} is not an id of {name} (0 to {tokenizer.vocab_size - 1})")
    return {"tokenizer_fingerprint": tokenizer.fingerprint, "eos_ids": eos_ids}


def _choose(
    data: Documents, settings: dict[str, Any], needed: tuple[int, str]
) -> tuple[np.ndarray, dict[str, int], dict[str, Any]]:  # fmt: skip
    """(where in the data the rows are, how many documents cannot be used, the settings known by now)."""
    usable, fingerprint, skipped = documents.survey(data)
    # raw bits, since NumPy may change what it makes of them from one version to the next
    order = np.argsort(np.random.Philox(settings["seed"]).random_raw(len(data)), kind="stable")
    # Places are ranks among the usable documents, so ranges that do not overlap share no document.
    ranked, first = order[usable[order]], settings["first"]
    num_samples = settings.get("num_samples", len(ranked) - first)
    if num_samples < 1 or max(first + num_samples, needed[0]) > len(ranked):
        raise ValueError(_too_few(data.source, len(ranked), skipped, settings, needed))
    places = ranked[first : first + num_samples]
    return places, skipped, {"data_fingerprint": fingerprint, "num_samples": len(places)}


def _too_few(
    source: str, usable: int, skipped: dict[str, int], settings: dict[str, Any], needed: tuple[int, str] = (0, "")
) -> str:  # fmt: skip
    asked = f"{settings['num_samples']} from place" if "num_samples" in settings else "those from place"
    asked = f"{asked} {settings['first']} on were asked for"
    if needed[0] > usable:
        asked = f"{needed[0]} are needed ({needed[1]})"
    more = f" (left out: {left_out(skipped)})" if skipped else ""
    return f"{source} has {usable} documents that can be used{more}; {asked}"


def left_out(skipped: dict[str, int] | None) -> str:
    """How many documents were left out, and why, in words; `skipped` is of a corpus's manifest."""
    return ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in (skipped or {}).items()) or "none"


def _taken(data: Documents, target: Corpus, places: np.ndarray, skipped: dict[str, int]) -> Iterator[tuple]:
    """Batches of the documents that the corpus lacks, each with how many were left out so far."""
    for start in range(target.num_rows, len(places), _BATCH):
        yield documents.take(data, places[start : start + _BATCH]), skipped


def _streamed(rows: Iterator[Any], columns: Columns, tokenizer: Tokenizer, target: Corpus) -> Iterator[tuple]:
    """As `_taken`, for a stream."""
    settings, skipped = target.manifest["settings"], collections.Counter()

    def usable() -> Iterator[Any]:
        for number, row in enumerate(rows):
            reason = documents.problem(columns, tokenizer, row, number)
            skipped.update([reason] if reason else [])
            if reason is None:
                yield row

    used = usable()
    # a stream has no random access: a resumed run reads the documents again that it has already
    passed = sum(1 for _ in itertools.islice(used, settings["first"] + target.num_rows))
    left = settings["num_samples"] - target.num_rows
    while left:
        batch = list(itertools.islice(used, min(left, _BATCH)))
        passed += len(batch)
        if not batch:
            raise ValueError(_too_few(settings["source"], passed, skipped, settings))
        left -= len(batch)
        yield batch, dict(skipped)


def _arrivals(batches: Iterator[tuple], columns: Columns, tokenizer: Tokenizer, target: Corpus) -> Iterator[Arrival]:
    settings, index = target.manifest["settings"], target.num_rows
    for batch, skipped in batches:
        if columns.kind == "messages":
            rows = [_conversation(index + i, text, tokenizer, settings) for i, text in enumerate(batch)]
        else:
            rows = [_row(index + i, ids, settings) for i, ids in enumerate(_ids(batch, columns, tokenizer, settings))]
        index += len(rows)
        yield Arrival(rows, sum(row["length"] - row["prompt_length"] for row in rows), about={"skipped": skipped})


def _ids(batch: list[Any], columns: Columns, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[list[int]]:
    if columns.kind == "ids":
        return [row.tolist() for row in batch]
    special, limit = settings.get("special_tokens", True), settings["max_length"] + 1
    if max(map(len, batch)) <= _LONG * limit:
        return tokenizer.encode_batch(batch, special=special)
    # of long documents no more is encoded than a row takes
    return [tokenizer.encode(text, special=special, limit=limit) for text in batch]


def _row(index: int, ids: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """A document as a row of kd_jax.lm.corpus.SCHEMA."""
    if not ids:
        raise ValueError(f"{settings['source']}: the tokenizer has no ids for the document of row {index}")
    prompt, eos_ids, max_length = settings["prompt_ids"], settings["eos_ids"], settings["max_length"]
    if ids[: len(prompt)] != prompt:
        ids = [*prompt, *ids]
    # a document that brings its own EOS does not get a second one
    if ids[-1] not in eos_ids:
        ids = [*ids, *eos_ids[:1]]
    # a cut document has no EOS: with one, a model would learn to stop at max_length
    cut = len(ids) > max_length
    tokens = np.array(ids[:max_length], np.int32)
    return {
        "index": index, "tokens": tokens, "length": len(tokens), "prompt_length": max(1, len(prompt)),
        "finished": bool(eos_ids) and not cut, "log_prob": None, "sample_log_prob": None,
    }  # fmt: skip


def _conversation(index: int, messages: str, tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    """A conversation as a row of kd_jax.lm.corpus.SCHEMA, with its loss mask."""
    ids, learnt = conversations.encode(json.loads(messages), tokenizer, settings["eos_ids"])
    max_length = settings["max_length"]
    tokens, mask = ids[:max_length], learnt[:max_length]
    return {
        # The prompt ends at the assistant's first id, which is the first True of the mask.
        "index": index, "tokens": tokens, "length": len(tokens), "prompt_length": max(1, int(mask.argmax())),
        "finished": bool(settings["eos_ids"]) and len(ids) <= max_length, "log_prob": None, "sample_log_prob": None,
        shards.LOSS_MASK: mask,
    }  # fmt: skip
