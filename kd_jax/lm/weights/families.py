"""From a config.json to the settings of an architecture, and back: one table row per family of models.

Only keys that are known to change no number are passed over. Any other key that a family does not read is an error,
unless its value switches it off: a model must not load and then compute something else than its authors' code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kd_jax.lm.model import Architecture
from kd_jax.lm.model.rotary import Scaling


class Family(NamedTuple):
    """How a family's config.json is read and written.

    Attributes:
        causal_lm: the class of transformers that exports are read with.
        defaults: values of keys that a config.json may leave out, as transformers has them.
        always: settings that follow from the family alone.
        keys: config.json's key -> settings of the same value, beside those that all families share.
        other_keys: keys that code below reads, or that change nothing in this family.
    """

    causal_lm: str
    defaults: dict[str, Any] = {}
    always: dict[str, Any] = {}
    keys: dict[str, tuple[str, ...]] = {}
    other_keys: tuple[str, ...] = ()


_BIAS = {"attention_bias": ("query_key_value_bias", "output_bias")}
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
         "sliding_window": 4096, "max_window_layers": 28}  # fmt: skip
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
          "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
_GEMMA_ALWAYS = {"norm_order": "both", "unit_offset_gain": True}
_GEMMA_KEYS = {**_BIAS, "attn_logit_softcapping": ("attention_softcap",), "final_logit_softcapping": ("logit_softcap",)}
_GEMMA_OTHER = ("query_pre_attn_scalar", "hidden_activation", "hidden_act", "sliding_window_pattern", *_WINDOW)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048}, keys={**_BIAS, "mlp_bias": ("mlp_bias",)}),
    "mistral": Family(
        "MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        other_keys=("sliding_window",),
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, {"query_key_value_bias": True}, other_keys=_WINDOW),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, {"query_key_norm": "head"}, _BIAS, _WINDOW,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, _GEMMA_ALWAYS,
        _GEMMA_KEYS, _GEMMA_OTHER,
    ),
    # a multimodal checkpoint's config leaves out most sizes
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e6,
         "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        {**_GEMMA_ALWAYS, "query_key_norm": "head"}, _GEMMA_KEYS, (*_GEMMA_OTHER, "rope_local_base_freq"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6,
         "use_sliding_window": False, "no_rope_layer_interval": 4},
        keys={**_BIAS, "mlp_bias": ("mlp_bias",)}, other_keys=(*_WINDOW, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        {"norm_order": "after", "query_key_norm": "width"}, _BIAS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        # its published configs name code that transformers has had for long
        other_keys=("sliding_window", "original_max_position_embeddings", "auto_map"),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {"max_position_embeddings": 2048, "attention_multiplier": 1.0},
        keys={**_BIAS, "mlp_bias": ("mlp_bias",), "embedding_multiplier": ("embedding_multiplier",),
              "residual_multiplier": ("residual_multiplier",), "logits_scaling": ("logits_divisor",),
              "attention_multiplier": ("attention_scale",)},
    ),
}  # fmt: skip

# Keys with the name of their setting, and the type it has to have.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_SWITCHES = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    ),
}  # fmt: skip
# Keys that change no number that is computed here: training, generation, file formats, names.
_IGNORED = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version use_cache initializer_range attention_dropout
    resid_pdrop embd_pdrop hidden_dropout bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    id2label label2id tokenizer_class task_specific_params problem_type output_attentions output_hidden_states
    return_dict torchscript use_bfloat16 chunk_size_feed_forward pretraining_tp is_llama_config cache_implementation
    max_length min_length temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences do_sample
    repetition_penalty length_penalty no_repeat_ngram_size early_stopping name_or_path finetuning_task prefix
    eoi_token_index boi_token_index image_token_index mm_tokens_per_image vision_config unsloth_fixed
    unsloth_version vision_token_id image_token_id video_token_id
    """.split()
)


def read(config: dict[str, Any]) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        config: its content, as JSON gives it, of a text model of a known family.
    Raises: ValueError naming the key that is missing, of the wrong type or not understood.
    """
    name = config["model_type"]
    family = FAMILIES[name]
    _refuse_unknown(config, family)
    # null is the default, but for what null switches off
    stated = {key: value for key, value in config.items() if value is not None or key in _SWITCHES}
    config = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"} | family.defaults | stated
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if "head_dim" not in config:
        config["head_dim"] = _whole_heads(config)
    settings = {key: _typed(config, key, int) for key in _SIZES}
    settings |= {"rms_norm_eps": _typed(config, "rms_norm_eps", float), "family": name}
    settings |= {"tie_word_embeddings": _typed(config, "tie_word_embeddings", bool)}
    for key, names in family.keys.items():
        kind = bool if key.endswith("bias") else float
        value = None if config.get(key) is None else _typed(config, key, kind)
        settings |= {setting: value for setting in names if value is not None}
    settings |= family.always | _rope(config, settings["head_dim"]) | _layers(config, settings)
    # Gemma's configs may have both keys; transformers computes with hidden_activation.
    activation = config.get("hidden_activation", config["hidden_act"])
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    settings["activation"] = _ACTIVATIONS[activation]
    if name.startswith("gemma"):
        settings["attention_scale"] = _typed(config, "query_pre_attn_scalar", float) ** -0.5
        settings["embedding_multiplier"] = settings["hidden_size"] ** 0.5
    return Architecture(**settings)


def write(architecture: Architecture) -> dict[str, Any]:
    """The config.json of an architecture, without token ids and dtype.

    Raises: ValueError where the family's config.json cannot say all settings.
    """
    a = architecture
    family = FAMILIES[a.family]
    out = {"architectures": [family.causal_lm], "model_type": a.family}
    out |= {key: getattr(a, key) for key in (*_SIZES, "rms_norm_eps", "tie_word_embeddings")}
    out |= {key: getattr(a, names[0]) for key, names in family.keys.items()}
    activation = next(key for key, name in _ACTIVATIONS.items() if name == a.activation)
    out |= {"hidden_activation" if "hidden_activation" in family.other_keys else "hidden_act": activation}
    out |= _rope_config(a)
    if "sliding_window" in family.other_keys:
        out["sliding_window"] = a.sliding_window
    if "layer_types" in family.other_keys:
        kinds = ("full_attention", "sliding_attention")
        out["layer_types"] = [kinds[layer in a.sliding_layers] for layer in range(a.num_hidden_layers)]
    if "use_sliding_window" in family.defaults:
        out["use_sliding_window"] = a.sliding_window is not None
    if a.family == "smollm3":
        out["no_rope_layers"] = [int(layer not in a.unrotated_layers) for layer in range(a.num_hidden_layers)]
    if a.family.startswith("gemma"):
        # the inverse square root of a whole number
        out["query_pre_attn_scalar"] = round((a.attention_scale or a.head_dim**-0.5) ** -2)
    # Read back: a setting for which the family has no key would be lost without a word.
    again = read(out)
    if again != a:
        fields = (field.name for field in dataclasses.fields(a))
        different = [name for name in fields if getattr(again, name) != getattr(a, name)]
        raise ValueError(f"a {a.family} config.json cannot express this model's {', '.join(different)}")
    return out


def _refuse_unknown(config: dict[str, Any], family: Family) -> None:
    known = {*_SIZES, *_ROPE, "rms_norm_eps", "tie_word_embeddings", "hidden_act", *family.keys, *family.other_keys}
    for key, value in config.items():
        # switched off, whatever it is
        neutral = value is None or value is False or value in (0, 1, "", "none") and value is not True
        if not (key in known or key in _IGNORED or neutral or key.startswith("_") or "." in key):
            raise ValueError(
                f"{key}={value!r:.60} is not understood for model_type {config['model_type']!r}; "
                "remove it from config.json if it changes no number"
            )


def _typed(config: dict[str, Any], key: str, kind: type) -> Any:
    value = config.get(key)
    if value is None:
        raise ValueError(f"config.json lacks {key}")
    right = isinstance(value, bool) if kind is bool else isinstance(value, int | kind) and not isinstance(value, bool)
    # JSON's whole numbers have any size
    if not right or kind is not bool and not abs(value) < 1e300:
        words = {int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{key}={value!r:.40} has to be {words[kind]}")
    return kind(value)


def _whole_heads(config: dict[str, Any]) -> int:
    width, heads = (_typed(config, key, int) for key in ("hidden_size", "num_attention_heads"))
    if heads < 1 or width % heads:
        raise ValueError(f"config.json lacks head_dim, and hidden_size={width} is not a multiple of {heads} heads")
    return width // heads


def _rope(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Settings of the rotary embedding, from the keys that any version of transformers writes."""
    scaling, nested = (_object(config, key) for key in ("rope_scaling", "rope_parameters"))
    out: dict[str, Any] = {}
    # where both are given, rope_scaling counts, as in transformers
    if "full_attention" in nested:  # a rotary base for each kind of layer
        local, nested = _object(nested, "sliding_attention"), _object(nested, "full_attention") | scaling
        if not local:
            raise ValueError("rope_parameters lacks sliding_attention")
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters.sliding_attention={local} is not understood; only the default is")
        config = config | {"rope_local_base_freq": local.get("rope_theta", config.get("rope_local_base_freq"))}
    else:
        nested = scaling or nested
    if "rope_local_base_freq" in config:
        out["local_rope_theta"] = _typed(config, "rope_local_base_freq", float)
    flat = {"rope_theta": 10000.0} | config
    # in the object or beside it; where both are given that in the object counts, as in transformers
    flat |= {key: nested[key] for key in ("rope_theta", "partial_rotary_factor") if nested.get(key) is not None}
    factor = _typed({"partial_rotary_factor": 1.0} | flat, "partial_rotary_factor", float)
    if factor != 1:
        out["rotary_dim"] = int(head_dim * factor)
    return out | {"rope_theta": _typed(flat, "rope_theta", float), "rope_scaling": _scaling(config, nested)}


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}={value!r:.60} has to be an object")
    return value


def _scaling(config: dict[str, Any], nested: dict[str, Any]) -> Scaling | None:
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"rope_type={kind!r} is not one of {', '.join(_SCALINGS)}")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALINGS[kind])
    unknown = [key for key, value in nested.items() if key not in known and value is not None]
    if unknown:
        raise ValueError(f"{unknown[0]}={nested[unknown[0]]!r:.60} is not understood for rope_type {kind!r}")
    if kind == "default":
        return None
    values = {key: value for key, value in nested.items() if key in _SCALINGS[kind] and value is not None}
    if kind != "linear":
        # Phi-3 writes it beside the object, others may leave it out
        values.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        outer = config.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = outer or values["original_max_position_embeddings"]
    if kind == "yarn":
        values["attention_factor"] = _yarn_attention_factor(values)
        values = {key: value for key, value in values.items() if not key.startswith("mscale")}
    kinds = {"original_max_position_embeddings": int, "truncate": bool}
    return Scaling(
        rope_type=kind, **{key: _typed(values, key, kinds.get(key, float)) for key in values | {"factor": 0}}
    )


def _yarn_attention_factor(values: dict[str, Any]) -> float:
    """Equation 22 of YaRN (arXiv 2309.00071), or DeepSeek's ratio of two such where both scales are given."""
    if "attention_factor" in values:
        return values["attention_factor"]
    factor = _typed(values, "factor", float)

    def scale(times):
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(_typed(values, "mscale", float)) / scale(_typed(values, "mscale_all_dim", float))
    return scale(1)


def _rope_config(a: Architecture) -> dict[str, Any]:
    scaling: dict[str, Any] = {}
    if a.rope_scaling is not None:
        kept = (*_SCALINGS[a.rope_scaling.rope_type], "rope_type")
        scaling = {key: value for key, value in dataclasses.asdict(a.rope_scaling).items() if key in kept}
    flat = {"rope_theta": a.rope_theta}
    if a.rotary_dim is not None:
        flat["partial_rotary_factor"] = a.rotary_dim / a.head_dim
    rope = {"rope_type": "default"} | flat | scaling
    # transformers 5 reads rope_parameters, 4 the keys beside it
    out = {**flat, "rope_scaling": scaling or None, "rope_parameters": rope}
    if a.local_rope_theta is not None:
        local = {"rope_theta": a.local_rope_theta, "rope_type": "default"}
        out |= {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
        out |= {"rope_local_base_freq": a.local_rope_theta}
    if a.family == "phi3" and scaling:
        out["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
    return out


def _layers(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Which layers have a sliding window, and which have no rotary phases."""
    count, name = settings["num_hidden_layers"], config["model_type"]
    unrotated: tuple[int, ...] = ()
    if name == "smollm3":
        interval = _typed(config, "no_rope_layer_interval", int)
        rotated = config.get("no_rope_layers") or [(i + 1) % interval for i in range(count)]
        unrotated = tuple(i for i, flag in enumerate(rotated) if not flag)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is None:
        return {"unrotated_layers": unrotated}
    # what transformers does where a config has no layer_types
    patterns: dict[str, Callable[[int], bool]] = {
        "gemma2": lambda i: i % 2 == 0,
        "gemma3_text": lambda i: (i + 1) % config["sliding_window_pattern"] != 0,
        "smollm3": lambda i: i in unrotated,
    }
    types = config.get("layer_types")
    if types is not None:
        sliding = [kind == "sliding_attention" for kind in types]
        if len(types) != count or not set(types) <= {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types={types!r:.80} has to be sliding_attention or full_attention for each layer")
    else:
        first = config.get("max_window_layers", 0)
        sliding = [patterns.get(name, lambda i: i >= first)(i) for i in range(count)]
    layers = tuple(i for i, slides in enumerate(sliding) if slides)
    return {
        "sliding_window": _typed(config, "sliding_window", int) if layers else None,
        "sliding_layers": layers,
        "unrotated_layers": unrotated,
    }
