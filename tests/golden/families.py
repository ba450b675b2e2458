"""Tiny models of every family, several settings each: what they are, and random weights from a seed."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent

_SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
# name -> (model_type, what differs from the family's defaults). Windows are shorter than the texts, and the texts
# longer than the original contexts.
CONFIGS = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": _LLAMA3, "head_dim": 16}),
    "llama 3.2": ("llama", {"rope_parameters": {**_LLAMA3, "factor": 2.0}, "tie_word_embeddings": True}),
    "llama, biases, linear": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral, no window": ("mistral", {"sliding_window": None, "rope_parameters": _YARN}),
    "qwen 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen 2.5, window, yarn": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "rope_parameters": _YARN},
    ),
    "qwen 3": ("qwen3", {"head_dim": 16}),
    "qwen 3, biases, tied": ("qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma 2": ("gemma2", {
        "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }),
    "gemma 2, uncapped": ("gemma2", {
        "head_dim": 12, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    }),
    "gemma 3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 8}),
    "gemma 3, linear": ("gemma3_text", {
        "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {**_LINEAR, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    "smollm 3": ("smollm3", {}),
    "smollm 3, window": ("smollm3", {
        "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": False,
    }),
    "olmo 2": ("olmo2", {}),
    "olmo 2, grouped, biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "phi 3": ("phi3", {"sliding_window": 9}),
    "phi 3, partial rotary": ("phi3", {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    "granite 3": ("granite", {
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.15, "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    }),
    "granite 3, biases": ("granite", {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 3.0,
        "attention_bias": True, "mlp_bias": True,
    }),
}  # fmt: skip
LENGTHS = (60, 13)


def fields(name: str) -> tuple[str, dict]:
    """(model_type, the fields of its configuration)."""
    model_type, changes = CONFIGS[name]
    return model_type, {**_SIZES, **changes}


def sequences(name: str) -> list[np.ndarray]:
    """Random ids, one array for each of LENGTHS."""
    random = np.random.RandomState(1000 + list(CONFIGS).index(name))
    return [random.randint(0, _SIZES["vocab_size"], length) for length in LENGTHS]


def tensors(name: str, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """float32 weights by their names in a checkpoint: gains near 1, biases near 0, all else normal."""
    random = np.random.RandomState(list(CONFIGS).index(name))
    offset = 1 if CONFIGS[name][0].startswith("gemma") else 0

    def draw(key, shape):
        if key.endswith("norm.weight"):
            return random.uniform(0.5, 1.5, shape) - offset
        return random.standard_normal(shape) * (0.3 if key.endswith("bias") else 0.9 * _SIZES["hidden_size"] ** -0.5)

    return {key: draw(key, shape).astype(np.float32) for key, shape in sorted(shapes.items())}


@functools.cache
def described() -> dict[str, dict]:
    """Of each model: "config", as transformers writes it to config.json, and "shapes" of its tensors, {layer} for 0."""
    return json.loads((FOLDER / "families.json").read_text())


def shapes_of(name: str) -> dict[str, list[int]]:
    """The shapes of all tensors of a model."""
    about = described()[name]
    layers = range(about["config"]["num_hidden_layers"])
    return {key.format(layer=i): shape for key, shape in about["shapes"].items() for i in layers}


def write_folder(name: str, folder: Path) -> Path:
    """The model as transformers would save it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described()[name]["config"]))
    save_file(tensors(name, shapes_of(name)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
