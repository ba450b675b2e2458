"""bfloat16 beside float32 on this machine: what SmolLM2-135M-Instruct gains in speed, and loses in its scores.

    python -m benchmarks.bfloat16

Scores 8 x 512 random ids, and draws 128 samples from "The" to 128 tokens, 64 at a time, in each dtype. Each set of
samples is then scored in both: the difference of scores on the same samples is what bfloat16 does to precision and
recall when it scores, and float32's score of both sets is what it does to precision when it draws.
"""

import time

import numpy as np

from benchmarks.lm import LENGTH, MODELS, ROWS, SOURCE, seconds, tokens


def main() -> None:
    import jax

    from kd_jax.lm import decode, score, weights
    from kd_jax.lm.model import Compute
    from kd_jax.runs import cache

    cache.enable_compilation_cache()
    print(f"{jax.devices()[0].device_kind}, {SOURCE}")
    models = {dtype: weights.load(SOURCE, dtype=dtype) for dtype in ("float32", "bfloat16")}
    prompt, drawn = MODELS["smollm2"].prompt, {}

    def scores(dtype, ids, lengths):
        return score.log_prob(models[dtype], ids, lengths, compute=Compute(dtype=dtype))[0]

    for dtype, model in models.items():

        def sample(count, seed, model=model, dtype=dtype):
            options = {"max_length": 128, "batch_size": 64, "compute": Compute(dtype=dtype)}
            return decode.generate(model, prompt, count, seed=seed, **options)

        _, took = seconds(lambda dtype=dtype: scores(dtype, tokens(), np.full(ROWS, LENGTH)), 2)
        sample(64, 1)  # compiles
        began = time.perf_counter()
        ids, lengths, _ = drawn[dtype] = sample(128, 0)
        made = int(lengths.sum()) - len(ids)
        rate = made / (time.perf_counter() - began)
        print(f"  {dtype:9} scores {ROWS * LENGTH / took:5.0f} and samples {rate:5.0f} tokens/s", flush=True)
    for dtype, (ids, lengths, _) in drawn.items():
        each = {by: scores(by, ids, lengths).sum(1) / (lengths - 1) for by in models}
        difference = each["bfloat16"] - each["float32"]
        scored = ", ".join(f"{show(value)} by {by}" for by, value in each.items())
        print(f"  samples of {dtype}, nats a token: {scored}")
        print(f"    bfloat16 - float32: {show(difference)}; of a sample at most {np.abs(difference).max():.4f}")


def show(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    main()
