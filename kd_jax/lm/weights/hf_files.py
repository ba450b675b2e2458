"""Folders in the layout of Hugging Face: config.json, safetensors, tokenizer files.

Nothing here runs or unpickles what a checkpoint brings along: safetensors and JSON only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub import errors as hub_errors

from kd_jax.lm.model import Model
from kd_jax.lm.weights import hf_config
from kd_jax.lm.weights import tensors as tensors_lib
from kd_jax.lm.weights.tokenizer import in_folder
from kd_jax.storage import files
from kd_jax.storage.errors import RunError

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Prefixes in a multimodal checkpoint: of its text model, in one of two orders, and of parts that no text goes through.
_TEXT_MODEL = r"^(language_model\.(?=lm_head)|(language_model\.model|model\.language_model)\.(?=.))"
_NO_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
FLOATS = ("F64", "F32", "F16", "BF16")
# what a model on the hub is read from
PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")


class Stored(NamedTuple):
    """A checkpoint on disk whose weights are not read yet.

    Attributes:
        model: the model, with no params.
        shapes: the shape of each tensor there is, by the name it has in the file.
        tensors: what the architecture needs; see kd_jax.lm.weights.tensors.
        read: (weight, layer, index) -> that part of the weight; weight is a key of the params tree, layer is None
            outside of the layers, index is one slice with start and stop for each axis.
    """

    model: Model
    shapes: dict[str, tuple[int, ...]]
    tensors: list[tensors_lib.Tensor]
    read: Callable[[str, int | None, tuple[slice, ...]], np.ndarray]


def open_folder(folder: Path) -> Stored:
    """Opens a folder with config.json and safetensors, in one file or in shards with an index.

    Args:
        folder: with the files.

    Returns: the model without weights, and how to read them.
    Raises: FileNotFoundError where a file is missing, ValueError where one is damaged or describes a model that is not
        known; both name the file, and the tensor or the key.
    """
    config = read_json(folder / "config.json")
    stored_names, open_files = _tensor_files(folder)
    shapes = {name: _shape(folder, open_files[name], stored) for name, stored in stored_names.items()}
    # Everything is checked from headers, before a weight is read.
    architecture = hf_config.architecture(config, folder / "config.json")
    tensors = tensors_lib.listed(architecture, tensors_lib.hugging_face(architecture))
    places = tensors_lib.places(tensors, architecture)

    def read(weight, layer, index):
        name, row = places[weight, layer]
        index = (slice(index[0].start + row, index[0].stop + row), *index[1:])
        # Only this slice is read from disk: each device reads its own part of a weight.
        return open_files[name].get_slice(stored_names[name])[index]

    if HEAD not in shapes and not architecture.tie_word_embeddings:
        raise ValueError(
            f"{folder}: tie_word_embeddings is {config.get('tie_word_embeddings', 'absent, which means false')}, "
            f"but there is no {HEAD}"
        )
    # Some exports store a tied head a second time. A head that differs was trained, and dropping it would be wrong.
    if {HEAD, EMBEDDING} <= set(shapes) and architecture.tie_word_embeddings:
        head, embedding = (open_files[name].get_slice(stored_names[name]) for name in (HEAD, EMBEDDING))
        if not _are_equal(head, embedding):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
                "set it to false to use both, or remove the head"
            )
        del shapes[HEAD]
    tokenizer = in_folder(folder)
    ids = hf_config.special_ids(folder, config, architecture.vocab_size)
    model = Model(architecture, {}, *ids, tokenizer)
    # The vocabulary may be padded; ids of the padding are never drawn, so no sample would end with one.
    if undrawn := [i for i in model.eos_ids if i >= model.num_tokens]:
        raise ValueError(
            f"{folder}: eos_token_id has {undrawn[0]}, but the tokenizer's ids end at {model.num_tokens - 1}; "
            "correct it in config.json or generation_config.json"
        )
    return Stored(model, shapes, tensors, read)


def check_tensors(stored: Stored, path: Path) -> None:
    """Raises ValueError unless there are the tensors that the architecture needs, in their shapes, and no others."""
    wanted = {tensor.name: tensor.shape for tensor in stored.tensors}
    missing = [name for name in wanted if name not in stored.shapes]
    if missing:
        raise ValueError(f"{path} lacks {some(missing)}")
    for name, shape in wanted.items():
        if stored.shapes[name] != shape:
            raise ValueError(f"{path}: {name} has shape {stored.shapes[name]}; the architecture says {shape}")
    extra = sorted(set(stored.shapes) - set(wanted))
    if extra:
        raise ValueError(f"{path} has weights that this architecture has no place for: {some(extra)}")


def check_tokenizer(model: Model, path: Path) -> None:
    """Raises ValueError where a tokenizer has more ids than its model."""
    tokenizer, count = model.tokenizer, model.architecture.vocab_size
    if tokenizer is None or tokenizer.vocab_size <= count:
        return
    # Tokens are added without weights for them: Gemma 3's text models know their id of images by name alone.
    added = tokenizer.backend.get_added_tokens_decoder()
    if any(i >= count and i not in added for i in tokenizer.backend.get_vocab(with_added_tokens=True).values()):
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, but the model only {count}")


def names(folder: Path) -> list[str]:
    """The files that `open_folder` reads, without the tokenizer's. Raises FileNotFoundError where one is missing."""
    where, shards = _shards(folder)
    others = ("config.json", "generation_config.json", *([INDEX] if where else []))
    return [name for name in others if (folder / name).exists()] + shards


def commit(repository: str, revision: str | None) -> str:
    """The commit on the Hugging Face hub that a revision stands for; offline, the one its cache has.

    Args:
        repository: "org/name".
        revision: a branch, tag or commit; None for the default.
    Raises: RunError where it cannot be known.
    """
    # the hub's cache names the folder of a snapshot by its commit
    return snapshot(repository, revision, ("config.json",)).name


def snapshot(repository: str, revision: str | None, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The local copy of a model on the Hugging Face hub (its files of these patterns), fetched unless its cache has it.

    Args:
        repository, revision: as of `commit`.
        patterns: of file names.
    Raises: RunError, with the hub's reason, where there is none.
    """
    what = repository + (f"@{revision}" if revision else "")
    try:
        # only files in the top folder: others are the same weights in other forms
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise RunError(f"{what} is not a folder here, and the Hugging Face hub does not provide it: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises: FileNotFoundError where it is missing, ValueError where it holds something else; both name it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return files.read_json(path, ValueError)


def _shards(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(the shard of each tensor where there is an index, the shards, which are all there)."""
    where = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else {}
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise ValueError(f"{folder / INDEX}: weight_map={where!r:.60} has to give the file of each tensor")
    shards = sorted(set(where.values())) or ["model.safetensors"]
    # The index comes from outside: a name with a path in it could point to any file.
    if any(Path(shard).name != shard for shard in shards):
        raise ValueError(f"{folder / INDEX} names files that are not in its folder: {', '.join(shards)}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    whole = (folder / "model.safetensors").is_file()
    # transformers leaves the old index where it saves a model again, in one file
    if whole and len(missing) == len(shards):
        return {}, ["model.safetensors"]
    if missing and not where:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {INDEX}. PyTorch .bin and .pt files are not read, "
            "since they are pickles: convert them with transformers' from_pretrained and save_pretrained"
        )
    if missing:
        other = "; remove the index if model.safetensors is the model" if whole else ""
        raise FileNotFoundError(f"{folder / missing[0]} is missing; {INDEX} names it{other}")
    return where, shards


def _tensor_files(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """(name in the file, the open safetensors file), each by the name of the tensor in a text model.

    With an index, only the shards it names count.
    """
    where, shards = _shards(folder)
    tensors = {}
    for shard in shards:
        file = _open(folder / shard)
        names = set(file.keys())
        absent = sorted(name for name, place in where.items() if place == shard and name not in names)
        if absent:
            raise ValueError(f"{folder / shard} lacks {some(absent)}; {INDEX} says it is there")
        tensors |= {name: file for name in names if not where or where.get(name) == shard}
    # Names of a multimodal checkpoint become those of its text model.
    stored = {
        re.sub(_TEXT_MODEL, lambda match: "" if match[2] is None else "model.", name): name
        for name in tensors
        # old exports carry inv_freq, a table that follows from rope_theta
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(_NO_TEXT)
    }
    return stored, {name: tensors[stored_name] for name, stored_name in stored.items()}


def _open(path: Path) -> Any:
    try:
        # pread: mapped pages of the file would count as memory of the process
        return safetensors.safe_open(path, framework="numpy", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut short or damaged, fetch it again: {error}"
        ) from error


def _shape(folder: Path, file: Any, name: str) -> tuple[int, ...]:
    part = file.get_slice(name)
    if part.get_dtype() not in FLOATS:
        raise ValueError(
            f"{folder}: {name} is stored as {part.get_dtype()}; weights have to be one of {', '.join(FLOATS)}"
        )
    return tuple(part.get_shape())


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two stored tensors are equal; 4096 rows at a time."""
    # In blocks: two whole embeddings in memory would be the peak of loading a small model.
    count = one.get_shape()[0]
    blocks = (slice(first, min(first + 4096, count)) for first in range(0, count, 4096))
    return one.get_shape() == other.get_shape() and all(np.array_equal(one[block], other[block]) for block in blocks)


def some(names: list[str]) -> str:
    """The first few of many names, for messages."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
