"""LoRA adapters in a folder that the `peft` library reads; a merged model goes through `weights.export`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kd_jax.lm.model import Architecture
from kd_jax.lm.model.lora import Lora
from kd_jax.lm.weights import tensors
from kd_jax.storage import files, folders

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def export(
    adapters: dict[str, Any], lora: Lora, architecture: Architecture, folder: str | os.PathLike, *, base: str,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes adapters for `peft.PeftModel.from_pretrained(model, folder)`, whole or not at all.

    Args:
        adapters, lora: see kd_jax.lm.model.lora.
        architecture: of the base model.
        base: id or folder of the base model, for the adapter's own record.
    Raises: FileExistsError for a folder that is not empty, unless `overwrite` and it holds adapters; ValueError for a
        target that is part of a fused projection in the family's own layout.
    """
    names = tensors.hugging_face(architecture)
    if fused := in_fused(architecture, lora):
        raise ValueError(f"{architecture.family} fuses {', '.join(fused)}: export the merged model instead")
    arrays = {}
    for weight, adapter in adapters.items():
        # PEFT has a pair of matrices for each layer; ours are stacked.
        for layer in range(architecture.num_hidden_layers):
            name = f"base_model.model.{names.prefix.format(layer=layer)}{names.layer[weight]}"
            # safetensors writes the memory as it lies: a slice that is not contiguous would come out scrambled.
            arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(adapter["a"][layer])
            arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(adapter["b"][layer])
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        # PEFT finds a layer by the last part of its name.
        "target_modules": sorted(names.layer[weight].rpartition(".")[2] for weight in adapters),
    }  # fmt: skip
    with folders.replacing(folder, overwrite, _FILES) as partial:
        save_file(arrays, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        files.write_json(partial / "adapter_config.json", config)


def in_fused(architecture: Architecture, lora: Lora) -> list[str]:
    """The targets that are part of a fused projection in the family's own layout, where they cannot be exported."""
    fused = tensors.hugging_face(architecture).fused.values()
    return sorted({weight for weights in fused for weight in weights} & set(lora.targets))
