"""Small Llama models with random weights, from a seed: the tests make the same ones again."""

import numpy as np

# Names are those of a config.json. Each kind of attention (a kv head for each query head, for several, one for all)
# comes with each rotary base, and tied and untied; head_dim is not hidden_size / heads everywhere.
_COLUMNS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
CONFIGS = {
    name: {**dict(zip(_COLUMNS, values, strict=True)), "max_position_embeddings": 256}
    for name, values in {
        "multi-head, tied": (96, 48, 80, 2, 4, 4, 12, 1e4, 1e-5, True),
        "multi-head, untied": (131, 40, 64, 3, 5, 5, 8, 1e5, 1e-6, False),
        "multi-head, wide heads, untied": (64, 32, 56, 2, 2, 2, 32, 1.3e5, 1e-5, False),
        "grouped, tied": (200, 48, 96, 3, 6, 3, 16, 1e5, 1e-5, True),
        "grouped, untied": (96, 64, 80, 2, 8, 2, 8, 1e4, 1e-5, False),
        "grouped, narrow heads, tied": (77, 54, 72, 4, 6, 2, 6, 1.3e5, 1e-2, True),
        "one kv head, tied": (112, 48, 64, 2, 3, 1, 16, 1.3e5, 1e-5, True),
        "one kv head, untied": (150, 36, 100, 3, 4, 1, 10, 1e5, 1e-5, False),
        "one kv head, wide heads, tied": (257, 24, 40, 2, 2, 1, 64, 1e4, 1e-3, True),
    }.items()
}
LENGTHS = (1, 2, 9, 40, 150)


def tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """float32 weights by their names in a checkpoint, drawn in the order they have here from RandomState(seed).

    Norm gains are uniform from 0.5 to 1.5; all else is normal with standard deviation 0.9 / sqrt(hidden_size). With 1.5
    in place of 0.9, two programs in float32 are more than 1e-5 apart, and each of them from float64.
    """
    random = np.random.RandomState(seed)
    return {
        name: (random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.standard_normal(shape) * scale).astype(
            np.float32
        )
        for scale in [0.9 * config["hidden_size"] ** -0.5]
        for name, shape in shapes(config).items()
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, by its name; linear weights are [out, in]."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
    }
    layers = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    vocab = (config["vocab_size"], width)
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": vocab}
    return {"model.embed_tokens.weight": vocab, **layers, "model.norm.weight": (width,), **head}


def sequences(config: dict, seed: int) -> list[np.ndarray]:
    """Uniformly random ids, one array for each of LENGTHS."""
    random = np.random.RandomState(1000 + seed)
    return [random.randint(0, config["vocab_size"], length) for length in LENGTHS]
