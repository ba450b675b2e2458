"""Data as the corpus of p*: documents of text or of ids, tokenised once into the format of kd_jax.lm.corpus."""

from __future__ import annotations

import collections
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kd_jax.lm import corpus, weights
from kd_jax.lm.corpus import documents
from kd_jax.lm.corpus.documents import Documents
from kd_jax.lm.corpus.store import Arrival, Corpus
from kd_jax.lm.weights.tokenizer import Tokenizer

# Documents tokenised at a time.
_BATCH = 256


def from_dataset(
    source: str | os.PathLike, folder: str | os.PathLike, tokenizer_source: str | os.PathLike, *, max_length: int,
    split: str = "train", subset: str | None = None, text_column: str | None = None, ids_column: str | None = None,
    num_samples: int | None = None, first: int = 0, eos: bool = True, prompt_ids: Sequence[int] = (),
    shard_size: int = 1024, seed: int = 0, streaming: bool | None = None, command: str | None = None,
) -> Corpus:  # fmt: skip
    """Makes a corpus (kind "data") of documents, or goes on with one after its last whole shard; returns it finished.

    A document is tokenised whole. With `eos` its ids end with the tokenizer's EOS (once), and it is `finished`; where
    ids and EOS together are more than max_length, the first max_length ids remain, without EOS and not finished.
    Documents that are empty or blank are left out, and so are texts with a byte that the tokenizer has no token for;
    the manifest counts both under `skipped`.

    Which documents: those that can be used are put in an order that depends on `seed` alone (as they come, where they
    are streamed), and rows are the documents at the places first .. first + num_samples - 1. Ranges that do not
    overlap, of one source, split and seed, share no document: make train and validation so.

    Args:
        source: a Parquet, JSON lines (.jsonl, .json, also .gz) or .txt file (a document a line), a glob, a folder, or a
            Hugging Face id of a data set, "org/name" or "org/name@revision".
        folder: of the corpus.
        tokenizer_source: anything kd_jax.lm.weights.tokenizer takes. Ids in the data are to be its ids.
        max_length: longest row, prompt and EOS included.
        split, subset: part of a data set that has such ("train" and its default one); files have none.
        text_column: column with the texts ("text").
        ids_column: column with lists of ids, instead.
        num_samples: how many rows; all there are from `first` on by default, which a stream cannot tell.
        first: place of the first.
        eos: whether documents end with EOS. Without it no row is finished.
        prompt_ids: what each row is to begin with, such as BOS; rows that do already stay as they are. The prompt is
            not scored or trained on, nor is the first id of a row without one (prompt_length is at least 1).
        shard_size: rows in a file.
        seed: of the order.
        streaming: reads a hub id's data as they come, without a copy on disk; by default where num_samples is given.
        command: what was typed, for the manifest; by default this process's.

    Raises ValueError for arguments that do not go together, columns that are not there (naming those that are), ids
    that are not the tokenizer's, and fewer documents than asked for; FileNotFoundError or RunError for a source that
    cannot be read or a folder that cannot take these rows.
    """
    source, tokenizer_source = _absolute(source), _absolute(tokenizer_source)
    on_hub = documents.is_hub_id(source)
    settings = {
        "source": source, "subset": subset, "split": split, "text_column": text_column, "ids_column": ids_column,
        "streaming": on_hub and num_samples is not None if streaming is None else streaming, "first": first,
        "tokenizer_source": tokenizer_source, "prompt_ids": [int(i) for i in prompt_ids], "max_length": max_length,
        "shard_size": shard_size, "seed": seed,
    } | ({} if num_samples is None else {"num_samples": num_samples})  # fmt: skip
    _check(settings, on_hub)
    corpus.check(folder, settings, kind="data")
    tokenizer = weights.tokenizer(tokenizer_source)
    settings |= _tokenizer_settings(tokenizer, settings, eos)
    revision = documents.commit(source) if on_hub and settings["streaming"] else None
    data = documents.load(source, split=split, subset=subset, streaming=settings["streaming"], revision=revision)
    of_text = ids_column is None
    found = documents.select(data, source, text_column if of_text else ids_column, of_text, tokenizer)
    places, more = (None, {"data_fingerprint": revision}) if settings["streaming"] else _choose(found, settings)
    skipped = more.pop("skipped", None)
    command = shlex.join(sys.argv) if command is None else command
    held = corpus.create_or_resume(folder, settings | more, command=command, kind="data")
    if held.finished:
        return held
    batches = _streamed(found, held) if places is None else _taken(found, held, places, skipped)
    rows = held.manifest["settings"]["num_samples"]
    # into a log file, a line's worth now and then
    often = 0.1 if sys.stderr.isatty() else 30
    with tqdm(total=rows, initial=held.num_rows, unit="row", mininterval=often, dynamic_ncols=True) as bar:
        return corpus.write_rows(held, _arrivals(found, held, batches), lambda made, _: bar.update(made))


def _absolute(source: str | os.PathLike) -> str:
    """A path, absolute, so that the corpus can be read from another folder; what is no path as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else str(source)


def _check(settings: dict[str, Any], on_hub: bool) -> None:
    if settings["text_column"] is not None and settings["ids_column"] is not None:
        raise ValueError("text_column and ids_column are two ways to say what a document is; give one of them")
    if settings["streaming"] and not on_hub:
        raise ValueError(f"streaming=True is for data on the Hugging Face hub, and {settings['source']} is here")
    if settings["streaming"] and "num_samples" not in settings:
        raise ValueError("num_samples is missing: how many documents a stream has is not known before it ends")
    least = {"num_samples": 1, "max_length": 1, "shard_size": 1, "first": 0, "seed": 0}
    for name, low in least.items():
        if name in settings and not (isinstance(settings[name], int) and settings[name] >= low):
            raise ValueError(f"{name}={settings[name]!r} must be an integer from {low}")
    room = settings["max_length"] - len(settings["prompt_ids"])
    if room < 1:
        raise ValueError(f"max_length={settings['max_length']} counts the prompt; nothing would follow its ids")


def _tokenizer_settings(tokenizer: Tokenizer | None, settings: dict[str, Any], eos: bool) -> dict[str, Any]:
    name = settings["tokenizer_source"]
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; name a source that has one as tokenizer_source")
    if eos and tokenizer.eos_id is None:
        raise ValueError(f"the tokenizer of {name} names no EOS; give eos=False for rows without")
    for i in settings["prompt_ids"]:
        if not 0 <= i < tokenizer.vocab_size:
            raise ValueError(f"prompt_ids: {i} is not an id of {name} (0 to {tokenizer.vocab_size - 1})")
    return {"tokenizer_fingerprint": tokenizer.fingerprint, "eos_ids": [tokenizer.eos_id] if eos else []}


def _choose(found: Documents, settings: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """(where in the data the rows are, what is known once it has been read)."""
    usable, fingerprint, skipped = documents.survey(found)
    # raw bits, since NumPy may change what it makes of them from one version to the next
    order = np.argsort(np.random.Philox(settings["seed"]).random_raw(len(found.data)), kind="stable")
    ranked = order[usable[order]]
    first, there = settings["first"], len(ranked)
    wanted = settings.get("num_samples", there - first)
    if wanted < 1 or first + wanted > there:
        raise ValueError(_too_few(found.source, there, skipped, settings))
    places = ranked[first : first + wanted]
    return places, {"data_fingerprint": fingerprint, "num_samples": len(places), "skipped": skipped}


def _too_few(source: str, there: int, skipped: dict[str, int], settings: dict[str, Any]) -> str:
    asked = f"{settings['num_samples']} from place" if "num_samples" in settings else "those from place"
    left_out = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in skipped.items())
    return (
        f"{source} has {there} documents that can be used{f' (left out: {left_out})' if left_out else ''}; "
        f"{asked} {settings['first']} on were asked for"
    )


def _taken(found: Documents, held: Corpus, places: np.ndarray, skipped: dict[str, int]) -> Iterator[tuple]:
    """Batches of the documents that the corpus lacks, each with what was left out so far."""
    for start in range(held.num_rows, len(places), _BATCH):
        yield documents.take(found, places[start : start + _BATCH]), skipped


def _streamed(found: Documents, held: Corpus) -> Iterator[tuple]:
    """`_taken`, of a stream."""
    settings, skipped = held.manifest["settings"], collections.Counter()
    rows = documents.stream(found, skipped)
    passed = sum(1 for _ in itertools.islice(rows, settings["first"] + held.num_rows))
    left = settings["num_samples"] - held.num_rows
    while left:
        batch = list(itertools.islice(rows, min(left, _BATCH)))
        passed += len(batch)
        if not batch:
            raise ValueError(_too_few(found.source, passed, skipped, settings))
        left -= len(batch)
        yield batch, dict(skipped)


def _arrivals(found: Documents, held: Corpus, batches: Iterator[tuple]) -> Iterator[Arrival]:
    index = held.num_rows
    for batch, skipped in batches:
        ids = found.tokenizer.encode_batch(batch) if found.of_text else [row.tolist() for row in batch]
        rows = []
        for of_document in ids:
            if not of_document:
                raise ValueError(f"{found.source}: the tokenizer has no ids for the document of row {index}")
            rows.append(_row(index, of_document, held.manifest["settings"]))
            index += 1
        tokens = sum(row["length"] - row["prompt_length"] for row in rows)
        yield Arrival(rows, tokens, about={"skipped": skipped})


def _row(index: int, ids: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """A document as a row of kd_jax.lm.corpus.SCHEMA."""
    prompt, eos, max_length = settings["prompt_ids"], settings["eos_ids"], settings["max_length"]
    if ids[: len(prompt)] != prompt:
        ids = [*prompt, *ids]
    if ids[-1:] != eos:
        ids = [*ids, *eos]
    cut = len(ids) > max_length
    tokens = np.array(ids[:max_length], np.int32)
    return {
        "index": index, "tokens": tokens, "length": len(tokens), "prompt_length": max(1, len(prompt)),
        "finished": bool(eos) and not cut, "log_prob": None, "sample_log_prob": None,
    }  # fmt: skip
