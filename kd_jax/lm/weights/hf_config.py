"""What config.json and generation_config.json say of a model, as Hugging Face has them."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

from kd_jax.lm.model import Architecture, Model
from kd_jax.storage import files


def architecture(config: dict[str, Any], path: Path) -> Architecture:
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


def special_ids(
    folder: Path, config: dict[str, Any], vocab_size: int
) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id), from generation_config.json where it has them, else from config.json."""
    path = folder / "generation_config.json"
    generation = files.read_json(path, ValueError) if path.exists() else {}

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


def _number(config: dict[str, Any], key: str, path: Path) -> int | float:
    value = config.get(key)
    if value is None:
        raise ValueError(f"{path} lacks {key}")
    whole = key not in ("rope_theta", "rms_norm_eps")
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    # JSON's whole numbers have any size
    if not number or abs(value) > sys.float_info.max:
        raise ValueError(f"{path}: {key}={value!r:.40} has to be a {'whole ' if whole else ''}number")
    return value if whole else float(value)


def _refuse_other_models(config: dict[str, Any], path: Path) -> None:
    """A model that would load, and then compute something else."""
    if config.get("auto_map") is not None:
        raise ValueError(f"{path}: auto_map={config['auto_map']} names code that comes with the model; none is run")
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
    first, *others = found.values()
    if any(other != first for other in others):
        raise ValueError(f"{path} says two things: {', '.join(f'{key}={value}' for key, value in found.items())}")
    return first
