"""Folders in the layout of Hugging Face: config.json, safetensors, tokenizer files.

Nothing here runs or unpickles what a checkpoint brings along: safetensors and JSON only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub import errors as hub_errors

from kd_jax.lm import model as model_lib
from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.weights import hf_config
from kd_jax.lm.weights.tokenizer import in_folder
from kd_jax.storage import files
from kd_jax.storage.errors import RunError

INDEX = "model.safetensors.index.json"
OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
# what a model on the hub is read from
PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")


class Stored(NamedTuple):
    """A checkpoint on disk whose weights are not read yet.

    Attributes:
        model: the model, with no params.
        shapes: the shape of each tensor there is, by the name it has in the file.
        name: (weight, layer) -> that name; weight is a key of the params tree, layer None outside of the layers.
        read: (weight, layer, index) -> that part of the weight; index is one slice with start and stop for each axis.
    """

    model: Model
    shapes: dict[str, tuple[int, ...]]
    name: Callable[[str, int | None], str]
    read: Callable[[str, int | None, tuple[slice, ...]], np.ndarray]


def pieces(architecture: Architecture) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """The weights one by one, as checkpoints keep them: (weight, layer or None, shape)."""
    tree = model_lib.abstract(architecture)
    outside = [(weight, None, leaf.shape) for weight, leaf in tree.items() if weight != "layers"]
    inside = [
        (weight, layer, leaf.shape[1:])
        for layer in range(architecture.num_hidden_layers)
        for weight, leaf in tree["layers"].items()
    ]
    return outside + inside


def tensor_name(weight: str, layer: int | None) -> str:
    """The name of a weight in such a checkpoint."""
    return OUTSIDE[weight] if layer is None else f"model.layers.{layer}.{LAYER[weight]}.weight"


def open_folder(folder: Path) -> Stored:
    """Opens a folder with config.json and safetensors, in one file or in shards with an index.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or describes something other
    than this Llama; both name the file, and the tensor or the key.
    """
    config = read_json(folder / "config.json")
    tensors = _tensor_files(folder)
    shapes = {name: _shape(folder, file, name) for name, file in tensors.items()}
    architecture = hf_config.architecture(config, folder / "config.json")

    def read(weight, layer, index):
        return tensors[tensor_name(weight, layer)].get_slice(tensor_name(weight, layer))[index]

    if OUTSIDE["head"] not in shapes and not architecture.tie_word_embeddings:
        raise ValueError(
            f"{folder}: tie_word_embeddings is {config.get('tie_word_embeddings', 'absent, which means false')}, "
            f"but there is no {OUTSIDE['head']}"
        )
    if {OUTSIDE["head"], OUTSIDE["embedding"]} <= set(shapes) and architecture.tie_word_embeddings:
        if not _is_tied(shapes, read):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {OUTSIDE['head']} differs from {OUTSIDE['embedding']}; "
                "set it to false to use both, or remove the head"
            )
        del shapes[OUTSIDE["head"]]
    tokenizer = in_folder(folder)
    ids = hf_config.special_ids(folder, config, architecture.vocab_size)
    return Stored(Model(architecture, {}, *ids, tokenizer), shapes, tensor_name, read)


def names(folder: Path) -> list[str]:
    """The files that `open_folder` reads, the tokenizer's left out. Raises FileNotFoundError where one is missing."""
    _, shards = _shards(folder)
    others = ("config.json", "generation_config.json", INDEX)
    return [name for name in others if (folder / name).exists()] + shards


def commit(repository: str, revision: str | None) -> str:
    """The commit on the Hugging Face hub that a revision stands for; offline, the one its cache has.

    Raises: RunError where it cannot be known.
    """
    # the hub's cache names the folder of a snapshot by its commit
    return snapshot(repository, revision, ("config.json",)).name


def snapshot(repository: str, revision: str | None, patterns: tuple[str, ...] = PATTERNS) -> Path:
    """The local copy of a model on the Hugging Face hub (its files of these patterns), fetched unless its cache has it.

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
        raise RunError(f"{what} is no folder here, and the Hugging Face hub does not give it: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return files.read_json(path, ValueError)


def _shards(folder: Path) -> tuple[dict[str, str], list[str]]:
    """(the shard of each tensor where there is an index, the shards, which are all there)."""
    where = read_json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).exists() else {}
    shards = sorted(set(where.values())) or ["model.safetensors"]
    if any(Path(shard).name != shard for shard in shards):
        raise ValueError(f"{folder / INDEX} names files that are not in its folder: {', '.join(shards)}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and not where:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {INDEX}. PyTorch .bin and .pt files are not read, "
            "since they are pickles: convert them with transformers' from_pretrained and save_pretrained"
        )
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]} is missing; {INDEX} names it")
    return where, shards


def _tensor_files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor; with an index, only the shards it names count."""
    where, shards = _shards(folder)
    tensors = {}
    for shard in shards:
        file = _open(folder / shard)
        names = set(file.keys())
        absent = sorted(name for name, place in where.items() if place == shard and name not in names)
        if absent:
            raise ValueError(f"{folder / shard} lacks {some(absent)}; {INDEX} says it is there")
        tensors |= {name: file for name in names if not where or where.get(name) == shard}
    # old exports carry this table, which follows from rope_theta
    return {name: file for name, file in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


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


def _is_tied(shapes: dict[str, tuple[int, ...]], read: Callable) -> bool:
    """Whether embedding and head are equal; 4096 rows at a time."""
    num_rows, width = shapes[OUTSIDE["embedding"]]
    starts = range(0, num_rows, 4096)
    blocks = ((slice(first, min(first + 4096, num_rows)), slice(0, width)) for first in starts)
    return shapes[OUTSIDE["head"]] == (num_rows, width) and all(
        np.array_equal(read("embedding", None, block), read("head", None, block)) for block in blocks
    )


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
