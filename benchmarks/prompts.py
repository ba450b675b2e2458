"""Answers to prompts that differ: tokens/s of kd_jax.lm.decode, and of transformers' generate beside it.

python -m benchmarks.prompts                       (SmolLM2-135M's shape; 256 prompts of 200 ids, 48 new ones each)
python -m benchmarks.prompts --peer                (transformers too)

EOS is off, so that every answer has all of its tokens. A first run, of the same size, warms up and is not counted. CPU
seconds are those of all cores: on a machine with other work they say more than the time that passed.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from kd_jax.lm import decode
from kd_jax.lm import model as model_lib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="smollm2-135m", help="shape of the model; weights are random (%(default)s)")
    add("--prompts", type=int, default=256, help="how many (%(default)s)")
    add("--length", type=int, default=200, help="ids of a prompt (%(default)s)")
    add("--new", type=int, default=48, help="new ids of an answer (%(default)s)")
    add("--batch_size", type=int, default=64, help="answers at a time (%(default)s)")
    add("--peer", action="store_true", help="measure transformers' generate too (needs torch)")
    args = parser.parse_args()
    shape = model_lib.PRESETS[args.preset]
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (args.prompts, args.length))
    report("kd_jax", ours(args, shape, ids), args)
    if args.peer:
        report("transformers", transformers(args, shape, ids), args)


def report(name: str, took: tuple[float, float], args: argparse.Namespace) -> None:
    seconds, cpu = took
    rate, answers = args.prompts * args.new / seconds, args.prompts / seconds
    print(f"{name}: {seconds:.1f} s, {rate:.0f} new tokens/s, {answers:.2f} answers/s; {cpu:.1f} CPU s", flush=True)


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds that pass and CPU seconds, of a second run."""
    run()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def ours(args: argparse.Namespace, shape: model_lib.Architecture, ids: np.ndarray) -> tuple[float, float]:
    model = model_lib.Model(shape, jax.jit(model_lib.init, static_argnums=1)(jax.random.key(0), shape))
    length = args.length + args.new

    def run() -> None:
        _, lengths, _ = decode.generate(
            model, ids.tolist(), args.prompts, max_length=length, batch_size=args.batch_size
        )
        assert (lengths == length).all()

    return timed(run)


def transformers(args: argparse.Namespace, shape: model_lib.Architecture, ids: np.ndarray) -> tuple[float, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, rope_theta=shape.rope_theta, tie_word_embeddings=True,
        max_position_embeddings=shape.max_position_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    def run() -> None:
        for first in range(0, args.prompts, args.batch_size):
            batch = torch.tensor(ids[first : first + args.batch_size])
            model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=args.new,
                min_new_tokens=args.new,
            )  # fmt: skip

    return timed(run)


if __name__ == "__main__":
    main()
