"""The manifest of a corpus: what its rows are a function of, and which of them are on disk."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

import kd_jax
from kd_jax.storage import untrusted
from kd_jax.storage.errors import RunError, again
from kd_jax.storage.files import read_json

FORMAT = 1
# What samples are a function of, and how they lie in files; a corpus goes on only where all of these are equal.
SETTINGS = (
    "source", "model_fingerprint", "tokenizer_fingerprint", "dtype", "prompt", "prompt_ids", "eos_ids",
    "sample_temperature", "top_k", "top_p", "seed", "max_length", "num_samples", "shard_size",
)  # fmt: skip
# The same of rows made from data (kd_jax.lm.corpus.ingest).
DATA_SETTINGS = (
    "source", "subset", "split", "streaming", "text_column", "ids_column", "data_fingerprint", "first",
    "tokenizer_source", "tokenizer_fingerprint", "prompt_ids", "eos_ids", "seed", "max_length", "num_samples",
    "shard_size",
)  # fmt: skip
KINDS = {"samples": SETTINGS, "data": DATA_SETTINGS}
# Where a teacher was recorded, what its columns are a function of (kd_jax.lm.distill.recorded_top_k.settings); settings
# of a sampler that older corpora do not have, where absent stands for None (off).
OPTIONAL = ("teacher", "min_p")
_SHARD = {"file": str, "first": int, "rows": int, "tokens": int, "finished": int, "bytes": int, "sha256": str}


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, None where there is none; RunError for one that is damaged or of something else."""
    path = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a corpus is a folder")
    try:
        manifest = read_json(path, hint=again(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if manifest.get("kind") not in KINDS:
        raise RunError(f"{path} is not the manifest of a corpus; choose another folder")
    if manifest.get("format") != FORMAT:
        raise RunError(f"{path} is of format {manifest.get('format')}; this version reads format {FORMAT}")
    try:
        _check(folder, manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {type(error).__name__}: {error}{again(folder)}") from error
    return manifest


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    settings = manifest["settings"]
    check_settings(settings, manifest["kind"])
    first = 0
    for shard in manifest["shards"]:
        untrusted.inside(folder, shard["file"])
        wrong = [key for key, kind in _SHARD.items() if type(shard[key]) is not kind]
        if wrong:
            raise ValueError(f"shard {shard['file']!r} has {wrong[0]}={shard[wrong[0]]!r:.40}")
        due = first, min(settings["shard_size"], settings["num_samples"] - first)
        if (shard["first"], shard["rows"]) != due:
            raise ValueError(f"shard {shard['file']!r} is not the {due[1]} rows from row {first} on")
        first += shard["rows"]
    status = "finished" if first == settings["num_samples"] else "running"
    if (manifest["counts"], manifest["status"]) != (_counts(manifest["shards"]), status):
        raise ValueError("its counts or status are not those of its shards")


def check_settings(settings: dict[str, Any], kind: str) -> None:
    """Raises ValueError unless each setting of the kind is there, and no other, and the sizes are sizes."""
    wrong = sorted(set(KINDS[kind]) ^ (set(settings) - set(OPTIONAL)))
    if wrong:
        raise ValueError(f"settings of {kind} are to be exactly {', '.join(KINDS[kind])}; not so: {', '.join(wrong)}")
    for key in ("num_samples", "shard_size", "max_length"):
        if type(settings[key]) is not int or settings[key] < 1:
            raise ValueError(f"{key}={settings[key]!r} must be an integer from 1")
    # the lists in a shard have 32-bit offsets
    if settings["shard_size"] * settings["max_length"] >= 2**31:
        raise ValueError(f"shard_size={settings['shard_size']} times max_length must stay below 2**31; make it smaller")


def compare(folder: Path, manifest: dict[str, Any], new: dict[str, Any], kind: str) -> None:
    """RunError names the settings that are not those of the corpus in the folder; only num_samples may be, and grow."""
    if manifest["kind"] != kind:
        raise RunError(f"{folder} holds a corpus of {manifest['kind']}, not of {kind}; choose another folder")
    old = manifest["settings"]
    names = [key for key in new if key != "num_samples" and new[key] != old.get(key)]
    changes = [f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new[key])}" for key in names]
    if changes:
        raise RunError(f"{folder} holds a corpus with other settings ({'; '.join(changes)}); choose another folder")
    if new.get("num_samples", old["num_samples"]) < old["num_samples"]:
        raise RunError(
            f"{folder} is a corpus of {old['num_samples']} samples and cannot shrink "
            f"(num_samples: {old['num_samples']} -> {new['num_samples']}); choose another folder"
        )


def new(settings: dict[str, Any], command: str, kind: str) -> dict[str, Any]:
    """The manifest of a corpus with no row yet."""
    manifest = {"format": FORMAT, "kind": kind, "status": "running", "started": _now(), **_origin(command)}
    return with_shards(manifest | {"settings": settings, "speed": speed({}, 0.0, 0, 1.0)}, [])


def _origin(command: str) -> dict[str, Any]:
    """What made these rows, beside the settings."""
    devices = jax.devices()
    modules = {"jax": jax, "numpy": np, "pyarrow": pa, "kd_jax": kd_jax}
    return {
        "command": command,
        "versions": {"python": platform.python_version(), **{name: m.__version__ for name, m in modules.items()}},
        "device": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
    }


def restart(manifest: dict[str, Any], settings: dict[str, Any], command: str) -> dict[str, Any]:
    """The manifest to go on from: of the shards, those that are whole for the number of samples wanted now."""
    size, total = settings["shard_size"], settings["num_samples"]
    shards = [shard for shard in manifest["shards"] if shard["rows"] == min(size, total - shard["first"])]
    resumed = [*manifest.get("resumed", []), {"when": _now(), **_origin(command)}]
    return with_shards(manifest | {"settings": settings, "resumed": resumed}, shards)


def with_shards(manifest: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest with these shards, which make it finished or not."""
    counts = _counts(shards)
    done = counts["rows"] == manifest["settings"]["num_samples"]
    status = {"status": "finished" if done else "running", "finished": _now() if done else None}
    return manifest | status | {"counts": counts, "shards": shards}


def _counts(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards) for key in ("rows", "tokens", "finished")}


def speed(before: dict[str, Any], seconds: float, tokens: int, utilisation: float) -> dict[str, Any]:
    """Totals over all runs that went into a corpus; `tokens` are those generated, or taken from data, kept or not."""
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
    """The settings as they come back from the manifest, so that the two compare equal; floats come back exactly."""
    return json.loads(json.dumps(settings, allow_nan=False))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
