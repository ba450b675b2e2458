"""Folders in the layout of Hugging Face: config.json, safetensors, tokenizer files.

Nothing here runs or unpickles what a checkpoint brings along: safetensors and JSON only.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub import errors as hub_errors

from kd_jax.lm import model as model_lib
from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.tokenizer import Tokenizer
from kd_jax.run import RunError

INDEX = "model.safetensors.index.json"
OUTSIDE = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER = {
    "attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


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
    files = _files(folder)
    shapes = {name: _shape(file, name) for name, file in files.items()}
    architecture = _architecture(config, folder / "config.json")

    def read(weight, layer, index):
        return files[tensor_name(weight, layer)].get_slice(tensor_name(weight, layer))[index]

    if OUTSIDE["head"] not in shapes and not architecture.tie_word_embeddings:
        raise ValueError(
            f"{folder}: tie_word_embeddings is {config.get('tie_word_embeddings', 'absent, which means false')}, "
            f"but there is no {OUTSIDE['head']}"
        )
    if {OUTSIDE["head"], OUTSIDE["embedding"]} <= set(shapes) and architecture.tie_word_embeddings:
        _check_tied(folder, shapes, read)
        del shapes[OUTSIDE["head"]]
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    ids = _special_ids(folder, config, architecture.vocab_size)
    return Stored(Model(architecture, {}, *ids, tokenizer), shapes, tensor_name, read)


def configs(model: Model, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and generation_config.json say of a model."""
    a = model.architecture
    ids = {"bos_token_id": model.bos_id, "eos_token_id": list(model.eos_ids) or None, "pad_token_id": model.pad_id}
    if len(model.eos_ids) == 1:
        ids["eos_token_id"] = model.eos_ids[0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(a),
        # transformers 5 reads the nested one, earlier ones the other
        "rope_parameters": {"rope_theta": a.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # null where there is none: an id that is left out would become transformers' default
        **ids,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return config, {key: value for key, value in ids.items() if value is not None}


def snapshot(repository: str, revision: str | None) -> Path:
    """The local copy of a model on the Hugging Face hub, fetched unless its cache has it; RunError says why not."""
    what = repository + (f"@{revision}" if revision else "")
    try:
        # only files in the top folder: others are the same weights in other forms
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "model*.safetensors", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except hub_errors.GatedRepoError as error:
        raise RunError(f"{what} is gated: accept its terms on its page, then log in (hf auth login)") from error
    except hub_errors.RevisionNotFoundError as error:
        raise RunError(f"{repository} is on the Hugging Face hub, but has no revision {revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise RunError(
            f"{what} is neither a folder here nor a model on the Hugging Face hub; for a private one, log in "
            "(hf auth login)"
        ) from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise RunError(
            f"{what} is not a folder here; as a Hugging Face id, it is not in the hub's cache "
            f"({huggingface_hub.constants.HF_HUB_CACHE}), and the hub is out of reach (is there a network? "
            f"HF_HUB_OFFLINE is {'on' if huggingface_hub.constants.HF_HUB_OFFLINE else 'off'})"
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise RunError(f"cannot fetch {what} from the Hugging Face hub: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor; with an index, only the shards it names count."""
    if (folder / INDEX).exists():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{folder / INDEX} lacks weight_map, from tensors to files")
        shards = sorted(set(where.values()))
    else:
        where, shards = {}, ["model.safetensors"]
    files = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{folder / INDEX} names {shard!r}, which is not a file of this folder")
        if not (folder / shard).is_file():
            if not where:
                raise FileNotFoundError(
                    f"{folder} has neither model.safetensors nor {INDEX}. PyTorch .bin and .pt files are not read, "
                    "since they are pickles: convert them with transformers' from_pretrained and save_pretrained"
                )
            raise FileNotFoundError(f"{folder / shard} is missing; {INDEX} names it")
        file = _open(folder / shard)
        there = set(file.keys())
        absent = sorted(name for name, place in where.items() if place == shard and name not in there)
        if absent:
            raise ValueError(f"{folder / shard} lacks {some(absent)}; {INDEX} says it is there")
        files |= {name: file for name in there if not where or where.get(name) == shard}
    # old exports carry this table, which follows from rope_theta
    return {name: file for name, file in files.items() if not name.endswith("rotary_emb.inv_freq")}


def _open(path: Path) -> Any:
    try:
        # pread: mapped pages of the file would count as memory of the process
        return safetensors.safe_open(path, framework="numpy", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut short or damaged, fetch it again: {error}"
        ) from error


def _shape(file: Any, name: str) -> tuple[int, ...]:
    part = file.get_slice(name)
    if part.get_dtype() not in FLOATS:
        raise ValueError(f"{name} is stored as {part.get_dtype()}; weights have to be one of {', '.join(FLOATS)}")
    return tuple(part.get_shape())


def _check_tied(folder: Path, shapes: dict[str, tuple[int, ...]], read: Callable) -> None:
    embedding, head = (shapes[OUTSIDE[weight]] for weight in ("embedding", "head"))
    equal = embedding == head
    for first in range(0, embedding[0] if equal else 0, 4096):
        rows = (slice(first, min(first + 4096, embedding[0])), slice(0, embedding[1]))
        equal = equal and np.array_equal(read("embedding", None, rows), read("head", None, rows))
    if not equal:
        raise ValueError(
            f"{folder}: tie_word_embeddings is true, but {OUTSIDE['head']} differs from {OUTSIDE['embedding']}; "
            "set it to false to use both, or remove the head"
        )


def _architecture(config: dict[str, Any], path: Path) -> Architecture:
    """The architecture in a config.json; a key that is absent has transformers' default for Llama, with a warning."""
    _refuse_other_models(config, path)
    for key, value in {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}.items():
        if config.get(key) is None:
            warnings.warn(f"{path} lacks {key}; {value} is taken, as transformers does", stacklevel=2)
            config = {**config, key: value}
    theta = _rope_theta(config, path)
    config = {**config, "rope_theta": theta}
    # newer configs say these, older ones leave them to follow from the others
    width, heads = _number(config, "hidden_size", path), _number(config, "num_attention_heads", path)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None:
        if heads < 1 or width % heads:
            raise ValueError(f"{path} lacks head_dim, and hidden_size={width} is not a multiple of {heads} heads")
        config["head_dim"] = width // heads
    tied = config["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings={tied!r} has to be true or false")
    names = [field.name for field in dataclasses.fields(Architecture) if field.name != "tie_word_embeddings"]
    values = {name: _number(config, name, path) for name in names}
    try:
        return Architecture(**values, tie_word_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _number(config: dict[str, Any], key: str, path: Path) -> int | float:
    value = config.get(key)
    if value is None:
        raise ValueError(f"{path} lacks {key}")
    whole = key not in ("rope_theta", "rms_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{path}: {key}={value!r} has to be a {'whole ' if whole else ''}number")
    return value if whole else float(value)


def _refuse_other_models(config: dict[str, Any], path: Path) -> None:
    """A model that would load, and then compute something else."""
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; only 'llama' is known")
    if config.get("architectures") not in (None, ["LlamaForCausalLM"]):
        raise ValueError(f"{path}: architectures is {config['architectures']}; only LlamaForCausalLM is known")
    known = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False,
        "quantization_config": None, "partial_rotary_factor": 1,
    }  # fmt: skip
    for key, value in known.items():
        if config.get(key) is not None and config[key] != value:
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; it has to be {value!r} or absent")


def _rope_theta(config: dict[str, Any], path: Path) -> Any:
    found = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        nested = config.get(key)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            raise ValueError(f"{path}: {key}={nested!r} has to be an object")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default" or nested.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"{path}: {key}={nested} is not supported; only the default rotary embedding is")
        found[f"{key}.rope_theta"] = nested.get("rope_theta")
    found = {key: value for key, value in found.items() if value is not None}
    if not found:
        warnings.warn(f"{path} has no rope_theta, nor rope_parameters.rope_theta; 10000 is taken", stacklevel=2)
        return 10000.0
    if len(set(found.values())) > 1:
        raise ValueError(f"{path} says two things: {', '.join(f'{key}={value}' for key, value in found.items())}")
    return next(iter(found.values()))


def _special_ids(
    folder: Path, config: dict[str, Any], vocab_size: int
) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id), from generation_config.json where it has them, else from config.json."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}

    def ids(key):
        value = config.get(key) if generation.get(key) is None else generation[key]
        value = [] if value is None else value if isinstance(value, list) else [value]
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < vocab_size:
                raise ValueError(f"{folder}: {key}={value} is not among the ids 0 to {vocab_size - 1}")
        return tuple(value)

    eos = ids("eos_token_id")
    # -1 is how the first Llama checkpoints say that there is none
    bos, pad = (() if config.get(key) == -1 else ids(key) for key in ("bos_token_id", "pad_token_id"))
    return eos, next(iter(bos), None), next(iter(pad), None)


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
