"""The manifest of a corpus: what its rows are a function of, and which of them are on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_jax.lm.sampler_spec import WHOLE, SamplerSpec
from kd_jax.runs.run import origin, timestamp
from kd_jax.runs.settings import changes, freeze, setting, spec
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import read_json

FORMAT = 1


# How the model was sampled are the settings of SamplerSpec; none is off.
@spec
class SampleSpec(changes(SamplerSpec)):
    """What sampled rows are a function of, and how they lie in files: a corpus is continued only where all is equal."""

    source: str = setting("", "where the model is from; a name, its content is the fingerprint")
    model_fingerprint: str | None = setting(None, "of the weights")
    tokenizer_fingerprint: str | None = setting(None, "of the tokenizer, none where the model has none")
    dtype: str | None = setting(None, "of the forward pass")
    prompt: str | None = setting(None, "the text of the prompt, where it was one")
    prompt_ids: tuple[int, ...] = setting((), "ids that each row begins with; none: rows have their own", at_least=0)
    prompts_fingerprint: str | None = setting(None, "of the prompts, where rows have their own")
    samples_per_prompt: int | None = setting(None, "rows of each prompt, one after another", at_least=1)
    eos_ids: tuple[int, ...] = setting((), "ids that end a row", at_least=0)
    sample_temperature: float = setting(1.0, "tau", at_least=0)
    seed: int = setting(0, "of the samples", at_least=0)
    max_length: int = setting(1, "ids of the longest row, prompt included", at_least=1)
    max_new_tokens: int | None = setting(None, "of each row, where prompts have several lengths", at_least=1)
    num_samples: int = setting(1, "rows; the only setting that may grow", at_least=1)
    shard_size: int = setting(1024, "rows of a file", at_least=1)
    teacher: dict[str, Any] | None = setting(None, "of recorded top-k columns (kd_jax.lm.distill.recorded_top_k)")
    selection: str | None = setting(None, "which of more samples were chosen (kd_jax.lm.decode.chosen_text)")


@spec
class DataSpec:
    """The same of rows made from data (kd_jax.lm.corpus.ingest)."""

    source: str = setting("", "where the data are from; a name, their content is the fingerprint")
    subset: str | None = setting(None, "of a data set that has such")
    split: str = setting("train", "of a data set that has such")
    streaming: bool = setting(False, "read as they come, in that order")
    text_column: str | None = setting(None, "column of texts")
    ids_column: str | None = setting(None, "column of lists of ids")
    messages_column: str | None = setting(None, "column of conversations")
    prompt_column: str | None = setting(None, "column of requests")
    response_column: str | None = setting(None, "column of answers")
    data_fingerprint: str | None = setting(None, "of the documents, or the commit of a stream")
    first: int = setting(0, "place of the first row in the order of documents", at_least=0)
    tokenizer_source: str = setting("", "where the tokenizer is from")
    tokenizer_fingerprint: str | None = setting(None, "of the tokenizer")
    special_tokens: bool = setting(True, "text of special tokens becomes their ids")
    whole_files: bool = setting(False, "a .txt file is one document")
    prompt_ids: tuple[int, ...] = setting((), "ids that each row begins with", at_least=0)
    eos_ids: tuple[int, ...] = setting((), "ids that end a document; the first is put where none is", at_least=0)
    seed: int = setting(0, "of the order of documents", at_least=0)
    max_length: int = setting(1, "ids of the longest row, prompt and EOS included", at_least=1)
    num_samples: int = setting(1, "rows; the only setting that may grow", at_least=1)
    shard_size: int = setting(1024, "rows of a file", at_least=1)
    teacher: dict[str, Any] | None = setting(None, "of recorded top-k columns (kd_jax.lm.distill.recorded_top_k)")


_NAMES = ("source", "prompt", "tokenizer_source")
KINDS = {"samples": SampleSpec, "data": DataSpec}
# Settings that came later, with what corpora without them have. They are written only where they differ, so that the
# fingerprint of a corpus does not change with a new setting. Of the sampler's knobs, these three are the oldest.
LATER = {
    **dict.fromkeys(WHOLE.knobs().keys() - {"sample_temperature", "top_k", "top_p"}),
    "special_tokens": True, "whole_files": False, "messages_column": None, "prompt_column": None,
    "response_column": None, "prompts_fingerprint": None, "samples_per_prompt": None, "selection": None,
    "max_new_tokens": None,
}  # fmt: skip
SETTINGS, DATA_SETTINGS = (
    tuple(field.name for field in dataclasses.fields(kind) if field.name not in (*LATER, "teacher"))
    for kind in (SampleSpec, DataSpec)
)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None if there is none.

    Raises: RunError where it is damaged, or is not the manifest of a corpus.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path, hint=again(folder))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if manifest.get("kind") not in KINDS or manifest.get("format") != FORMAT:
        raise RunError(f"{path} is not the manifest of a corpus of format {FORMAT}; choose another folder")
    try:
        check_settings(manifest["settings"], manifest["kind"])
        # The counts are written beside the list of shards: a file that was edited or cut shows as a difference.
        rows = sum(shard["rows"] for shard in manifest["shards"])
        counted = manifest["counts"]["rows"]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}{again(folder)}") from error
    if counted != rows:
        raise RunError(f"{path} is damaged: its counts differ from those of its shards{again(folder)}")
    return manifest


def check_settings(settings: dict[str, Any], kind: str) -> None:
    """Raises ValueError, naming the setting, for one that is unknown, of another type or out of its range.

    Args:
        settings: of the corpus.
        kind: "samples" or "data".
    """
    corpus = freeze(KINDS[kind], settings, at=f"settings of {kind}")
    # the lists in a shard have 32-bit offsets
    if corpus.shard_size * corpus.max_length >= 2**31:
        raise ValueError(f"shard_size={corpus.shard_size} times max_length must stay below 2**31; make it smaller")


def compare(folder: Path, manifest: dict[str, Any], new: dict[str, Any], kind: str) -> None:
    """Raises RunError, naming the settings that differ from those of the corpus in the folder; num_samples may grow.

    Args:
        folder: for the message.
        manifest: of the corpus there.
        new: settings that are asked for, perhaps in part.
        kind: "samples" or "data".
    """
    if manifest["kind"] != kind:
        raise RunError(f"{folder} holds a corpus of {manifest['kind']}, not of {kind}; choose another folder")
    # A corpus from before a setting was made as by its default.
    old = LATER | manifest["settings"]
    changes = [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(value)}"
        for key, value in new.items()
        if (value < old[key] if key == "num_samples" else value != old.get(key))
    ]
    if changes:
        raise RunError(f"{folder} holds a corpus with other settings ({'; '.join(changes)}); choose another folder")


def new(settings: dict[str, Any], command: str, kind: str) -> dict[str, Any]:
    """The manifest of a corpus with no row yet.

    Args:
        settings: of the corpus.
        command: what was typed.
        kind: "samples" or "data".
    """
    # "running" until all rows are there: a killed corpus shows as unfinished.
    manifest = {"format": FORMAT, "kind": kind, "status": "running", "started": timestamp(), **origin(command, pa)}
    return with_shards(manifest | {"settings": settings, "speed": speed({}, 0.0, 0, 1.0)}, [])


def restart(manifest: dict[str, Any], settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The manifest to go on from: of the shards, those that are whole for the number of samples wanted now.

    Args:
        manifest: of the corpus so far.
        settings: that are wanted now; only num_samples may differ.
        command: what was typed.
    """
    size, total = settings["shard_size"], settings["num_samples"]
    # A short last shard is written again: with more samples wanted, its file has more rows.
    shards = [shard for shard in manifest["shards"] if shard["rows"] == min(size, total - shard["first"])]
    # Each start's machine stays on record: other devices round differently.
    resumed = [*manifest.get("resumed", []), {"when": timestamp(), **origin(command, pa)}]
    return with_shards(manifest | {"settings": settings, "resumed": resumed}, shards)


def with_shards(manifest: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest with these shards, which make it finished or not."""
    counts = _counts(shards)
    done = counts["rows"] == manifest["settings"]["num_samples"]
    status = {"status": "finished" if done else "running", "finished": timestamp() if done else None}
    return manifest | status | {"counts": counts, "shards": shards}


def _counts(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "finished")}


def speed(before: dict[str, Any], seconds: float, tokens: int, utilisation: float) -> dict[str, Any]:
    """Totals over all runs that went into a corpus; `tokens` are those generated, or taken from data, kept or not.

    Args:
        before: totals of earlier runs.
        seconds, tokens: of this run.
        utilisation: share of the sampler's slot steps that ran a sample.
    """
    # Slot steps are summed, not utilisations: the mean over several runs is weighted by their work.
    seconds, slot_steps = seconds + before.get("seconds", 0), tokens / utilisation + before.get("slot_steps", 0)
    tokens += before.get("generated_tokens", 0)
    return {
        "seconds": round(seconds, 3),
        "generated_tokens": tokens,
        "slot_steps": round(slot_steps),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else None,
        "utilisation": round(tokens / slot_steps, 4) if tokens else None,
    }


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the manifest gives them back (tuples as lists), so that the two compare equal."""
    return json.loads(json.dumps(settings, allow_nan=False))


def without_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of LATER that have the value of older corpora."""
    return {key: value for key, value in settings.items() if key not in LATER or value != LATER[key]}


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the rows. Names are left out: fingerprints stand for their content."""
    content = {key: value for key, value in without_defaults(settings).items() if key not in _NAMES}
    # A recorded teacher counts by its content, too.
    return content | ({"teacher": identity(content["teacher"])} if content.get("teacher") else {})
