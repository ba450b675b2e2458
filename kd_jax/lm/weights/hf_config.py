"""config.json and generation_config.json of a Hugging Face folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from kd_jax.lm.model import Architecture, Model
from kd_jax.lm.weights import families
from kd_jax.storage import files


def architecture(config: dict[str, Any], path: Path) -> Architecture:
    """The architecture in a config.json; a key that is absent has transformers' default for its family.

    Args:
        config: the file's content.
        path: of the file, for messages.
    Raises: ValueError naming the file, and the key that is missing, wrong or not understood.
    """
    # Phi 3's published configs name code that transformers has had for long; it is known here
    if config.get("auto_map") is not None and config.get("model_type") != "phi3":
        raise ValueError(
            f"{path}: auto_map={config['auto_map']} names code that comes with the model, which is never run"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path} has a quantization_config, and quantised safetensors are not read: dequantise and save again "
            "(with transformers, `model.dequantize().save_pretrained(FOLDER)`), or take the original or a GGUF file"
        )
    rotary = [config.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling")]
    if not any(rotary):
        warnings.warn(f"{path} has neither rope_theta nor rope_parameters; its family's default is taken", stacklevel=2)
    try:
        return families.read(_text_config(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model alone, where it is a multimodal Gemma 3. ValueError for an unknown model."""
    name, known = config.get("model_type"), families.FAMILIES
    if name == "gemma3" and isinstance(config.get("text_config"), dict):
        outer = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
        return {**outer, **config["text_config"], "model_type": "gemma3_text"}
    if name not in known:
        raise ValueError(f"model_type is {name!r}; known are {', '.join(known)} (and gemma3 with its text_config)")
    if config.get("architectures") not in (None, [known[name].causal_lm]):
        raise ValueError(f"architectures is {config['architectures']}; only {known[name].causal_lm} is known")
    return config


def special_ids(
    folder: Path, config: dict[str, Any], vocab_size: int
) -> tuple[tuple[int, ...], int | None, int | None]:
    """(eos_ids, bos_id, pad_id), from generation_config.json where it has them, else from config.json.

    Args:
        folder: of the model.
        config: the content of config.json.
        vocab_size: ids of the model.
    Raises: ValueError for an id beyond the vocabulary.
    """
    path = folder / "generation_config.json"
    generation = files.read_json(path, ValueError) if path.exists() else {}

    def ids(key):
        # The generation config first: it may end chat turns with ids that config.json does not have.
        value = config.get(key) if generation.get(key) is None else generation[key]
        value = [] if value is None else value if isinstance(value, list) else [value]
        # -1 is how the first Llama checkpoints say that there is none
        if value == [-1] and key != "eos_token_id":
            return ()
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < vocab_size:
                raise ValueError(f"{folder}: {key}={value} is not among the ids 0 to {vocab_size - 1}")
        return tuple(value)

    eos, bos, pad = (ids(key) for key in ("eos_token_id", "bos_token_id", "pad_token_id"))
    return eos, next(iter(bos), None), next(iter(pad), None)


def configs(model: Model, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and generation_config.json for a model whose weights have this dtype.

    Args:
        model: its weights are not used.
        dtype: of the exported weights.
    Raises: ValueError where the model's family has no config.json for its settings.
    """
    ids = {"bos_token_id": model.bos_id, "eos_token_id": list(model.eos_ids) or None, "pad_token_id": model.pad_id}
    # A single id is written as a number, as transformers writes it.
    if len(model.eos_ids) == 1:
        ids["eos_token_id"] = model.eos_ids[0]
    # null where there is none: an id that is left out would become transformers' default
    config = {**families.write(model.architecture), **ids, "dtype": dtype, "torch_dtype": dtype}
    return config, {key: value for key, value in ids.items() if value is not None}
