"""Distillation on logits beside torch, Liger and TRL: forward KL, value and gradients, from hidden states and heads.

    python -m benchmarks.kd_loss                     2048 tokens, float32: time and memory
    python -m benchmarks.kd_loss --curve             512 to 16384 tokens; --save FILE keeps the numbers,
                                                     --sides NAME,... measures some of them
    python -m benchmarks.kd_loss --figure FILE       the figure of kept numbers, docs/kd_loss.png
    python -m benchmarks.kd_loss --bf16              errors against float64 of inputs in bfloat16

Width 576, vocabulary 49152; gradients with respect to the student's hidden states and head; 2 threads; each side runs
in a process of its own. "torch" and "jax" compute the logits of all tokens: torch in the inputs' dtype, as TRL's GKD
loss does ("torch float32" converts them to float32 first, and so does jax). "liger" is LigerFusedLinearJSDLoss with
beta = 0 and its defaults (compiled, chunks of 1024), "liger eager" the same without torch.compile; "trl" is the chunked
loss of its DistillationTrainer.

The time is the least of three runs (of one beyond 2048 tokens). One run comes before, is shown as the first, and does
not count, as it compiles. Extra memory is the peak of the process after that first run, above what it held with the
inputs loaded. The share is the time that the four matrix products would take, at the rate of a product of 2048 x 576
and 576 x 8192 measured in the same process, divided by the time. A size that is not expected to fit into memory, going
by the size before it, is left out.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.lm import memory, seconds

WIDTH, VOCAB = 576, 49152
SIDES = ("torch", "liger", "liger eager", "trl", "jax", "kd_jax")
CURVE = (512, 1024, 2048, 4096, 8192, 16384)
ERRORS = ("torch", "torch float32", "liger eager", "trl", "jax", "kd_jax")


def inputs(tokens: int, close: float = 1.0):
    """Hidden states and head of student and teacher, float32; logits have a deviation of 3, differences 3 * close."""
    import numpy as np

    random = np.random.default_rng(0)
    hidden, head, other, other_head = (
        random.standard_normal((rows, WIDTH), np.float32) for rows in (tokens, VOCAB, tokens, VOCAB)
    )
    # Hidden states and head each bring half of the difference's variance: 2 * share**2 = close**2. Weights of 1 -
    # share**2 and share**2 leave the scale of the teacher's logits that of the student's.
    share = close / 2**0.5
    other = (1 - share**2) ** 0.5 * hidden + share * other
    other_head = (1 - share**2) ** 0.5 * head + share * other_head
    scale = 3 / WIDTH**0.5
    return hidden, scale * head, other, scale * other_head


# --- the sides: a function of the arrays that returns value and gradients ---------------------------------------------


def torch_side(name: str):
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(2)

    def dense(hidden, head, teacher_hidden, teacher_head):
        logits, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
        if name == "torch float32":
            logits, teacher = logits.float(), teacher.float()
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher, -1)
        # "batchmean" divides by the tokens; "mean" would divide by the vocabulary as well.
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    if name.startswith("liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=name == "liger"
        )  # fmt: skip

        def loss(hidden, head, teacher_hidden, teacher_head):
            return module(hidden, head, teacher_hidden, teacher_head, torch.zeros(len(hidden), dtype=torch.long))

    elif name == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def loss(hidden, head, teacher_hidden, teacher_head):
            mask = torch.ones(1, len(hidden), dtype=torch.long)
            return _chunked_divergence_loss(hidden[None], teacher_hidden[None], head, teacher_head, mask, 0.0)[0]

    else:
        loss = dense

    def run(hidden, head, teacher_hidden, teacher_head):
        # torch would add the new gradients to those of the run before.
        hidden.grad = head.grad = None
        with torch.enable_grad():
            value = loss(hidden, head, teacher_hidden, teacher_head)
            value.backward()
        return value.detach(), hidden.grad, head.grad

    def put(arrays, dtype):
        placed = [torch.from_numpy(array).to(getattr(torch, dtype)) for array in arrays]
        return [placed[0].requires_grad_(), placed[1].requires_grad_(), *placed[2:]]

    def product(rows, columns):
        a, b = torch.ones((rows, WIDTH)), torch.ones((columns, WIDTH))
        return lambda: a @ b.T

    return put, run, product, lambda array: array.double().numpy()


def jax_side(name: str):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kd_jax import fused

    def dense(hidden, head, teacher_hidden, teacher_head):
        log_q, log_p = (
            jax.nn.log_softmax((h @ w.T).astype(jnp.float32))
            for h, w in ((hidden, head), (teacher_hidden, teacher_head))
        )
        return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()

    def ours(hidden, head, teacher_hidden, teacher_head):
        return fused.linear_distillation(
            student_hidden=hidden,
            student_head=head,
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            labels=None,
            mask=jnp.ones(len(hidden), bool),
        )[0].mean

    step = jax.jit(jax.value_and_grad({"jax": dense, "kd_jax": ours}[name], (0, 1)))

    def run(*arrays):
        # JAX returns before the work is done: waiting is part of the time.
        value, gradients = jax.block_until_ready(step(*arrays))
        return value, *gradients

    def put(arrays, dtype):
        return [jnp.asarray(array, dtype) for array in arrays]

    def product(rows, columns):
        a, b = jnp.ones((rows, WIDTH)), jnp.ones((columns, WIDTH))
        multiply = jax.jit(lambda a, b: fused.dot(a, b, (1, 1)))
        return lambda: multiply(a, b).block_until_ready()

    return put, run, product, lambda array: np.asarray(array, np.float64)


def side(name: str):
    return jax_side(name) if name in ("jax", "kd_jax") else torch_side(name)


# --- time and memory --------------------------------------------------------------------------------------------------


def measure(name: str, tokens: int) -> dict:
    put, run, product, _ = side(name)
    # Each side is held to the rate that its own library reaches, measured before the inputs take memory.
    ceiling = 2 * 2048 * WIDTH * 8192 / seconds(product(2048, 8192), 10)[1]
    arrays = put(inputs(tokens), "float32")
    values = []

    def once():
        values.append(float(run(*arrays)[0]))

    def timed():
        began = time.perf_counter()
        once()
        return time.perf_counter() - began

    held = memory()
    first = timed()
    memory()  # the peak starts anew
    took = min(timed() for _ in range(3 if tokens <= 2048 else 1))
    share = 4 * 2 * tokens * WIDTH * VOCAB / ceiling / took
    return {
        "side": name, "tokens": tokens, "seconds": took, "first": first, "extra_mib": memory(peak=True) - held,
        "value": values[-1], "share": share, "ceiling": ceiling,
    }  # fmt: skip


def call(*arguments) -> dict:
    command = [sys.executable, "-m", "benchmarks.kd_loss", "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def free_mib() -> float:
    status = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s*(\d+) kB", status)[1]) / 1024


def curve(names, sizes) -> list[dict]:
    found = []
    for name in names:
        before = None
        for tokens in sizes:
            # Memory grows at most in proportion to the tokens, so the size before tells whether this one fits.
            if before and before["extra_mib"] * tokens / before["tokens"] > 0.9 * free_mib():
                print(f"  {name:12} {tokens:6} tokens: left out, for want of memory", flush=True)
                break
            before = call("time", name, tokens)
            found.append(before)
            print(
                f"  {name:12} {tokens:6} tokens: {before['seconds']:6.2f} s ({before['share']:.0%} of "
                f"{before['ceiling'] / 1e9:.0f} GFLOP/s), extra memory {before['extra_mib']:6.0f} MiB, "
                f"first run {before['first']:.1f} s, value {before['value']:.6f}",
                flush=True,
            )
    return found


def growth(found: list[dict]) -> float:
    """MiB a token, by least squares over the sizes."""
    import numpy as np

    return float(np.polyfit([one["tokens"] for one in found], [one["extra_mib"] for one in found], 1)[0])


def summary(found: list[dict]) -> None:
    by_side = {name: [one for one in found if one["side"] == name] for name in SIDES}
    mine = {one["tokens"]: one for one in by_side["kd_jax"]}
    for name, others in by_side.items():
        if len(others) > 1:
            print(f"  {name:12} {growth(others):.4f} MiB of extra memory a token")
        for one in others:
            if name != "kd_jax" and one["tokens"] in mine:
                ours = mine[one["tokens"]]
                print(
                    f"  kd_jax / {name}, {one['tokens']} tokens: {one['seconds'] / ours['seconds']:.2f}x the speed, "
                    f"{ours['extra_mib'] / one['extra_mib']:.2f} of the extra memory"
                )


def figure(found: list[dict], path: Path) -> None:
    from kd_jax.reporting import figures

    # Okabe and Ito's colours, and a marker each: told apart without colour too
    looks = {
        "torch": ("#e69f00", "s", "torch, all logits"), "liger": ("#009e73", "^", "Liger, chunks"),
        "liger eager": ("#56b4e9", "v", "Liger, not compiled"), "trl": ("#cc79a7", "P", "TRL, chunks"),
        "jax": ("#d55e00", "D", "JAX, all logits"), "kd_jax": ("#0072b2", "o", "kd_jax, chunks"),
    }  # fmt: skip
    canvas = figures.canvas(9, 3.8)
    time_axes, memory_axes = canvas.subplots(1, 2)
    for name, (colour, marker, label) in looks.items():
        some = [one for one in found if one["side"] == name]
        if some:
            tokens = [one["tokens"] for one in some]
            style = {"color": colour, "marker": marker, "label": label, "linewidth": 2.4 if name == "kd_jax" else 1.4}
            time_axes.plot(tokens, [1e3 * one["seconds"] / one["tokens"] for one in some], **style)
            memory_axes.plot(tokens, [one["extra_mib"] for one in some], **style)
    time_axes.set(ylabel="time per token (ms)", ylim=(0, None))
    memory_axes.set_yscale("log", base=2)
    held = [256 * 2**i for i in range(7)]
    memory_axes.set(ylabel="extra memory (MiB)", yticks=held, yticklabels=held, ylim=(held[0], held[5]))
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", xticks=CURVE, xticklabels=CURVE)
        figures.tidy(axes)
    time_axes.legend(frameon=False)
    canvas.savefig(path, dpi=150)
    print(f"wrote {path}")


# --- errors of bfloat16 -----------------------------------------------------------------------------------------------


def error(name: str, close: float) -> dict:
    import numpy as np

    tokens = 128
    put, run, _, wide = side(name)
    arrays = put(inputs(tokens, close), "bfloat16")
    # The reference starts from the inputs already rounded to bfloat16: only errors of the computation count.
    hidden, head, teacher_hidden, teacher_head = (
        wide(array.detach() if hasattr(array, "detach") else array) for array in arrays
    )

    def log_softmax(logits):
        logits = logits - logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    log_q, log_p = log_softmax(hidden @ head.T), log_softmax(teacher_hidden @ teacher_head.T)
    p = np.exp(log_p)
    value = (p * (log_p - log_q)).sum(axis=-1).mean()
    # The gradient of the mean forward KL with respect to the student's logits.
    by_logits = (np.exp(log_q) - p) / tokens
    wanted = by_logits @ head, by_logits.T @ hidden
    got, *gradients = run(*arrays)
    errors = [
        np.linalg.norm(wide(found) - reference) / np.linalg.norm(reference)
        for found, reference in zip(gradients, wanted, strict=True)
    ]
    return {
        "side": name,
        "value": value,
        "of value": abs(float(got) / value - 1),
        "hidden": errors[0],
        "head": errors[1],
    }


def errors(names) -> None:
    for close in (1.0, 0.03):
        for name in names:
            one = call("error", name, close)
            print(
                f"  KL {one['value']:.5f}  {name:14} relative errors: value {one['of value']:.1e}, "
                f"gradient in hidden states {one['hidden']:.1e}, in head {one['head']:.1e}",
                flush=True,
            )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--sides")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # of a side's own process
    flags = parser.parse_args(argv)
    if flags.one:
        what, name, size = flags.one
        print(json.dumps(measure(name, int(size)) if what == "time" else error(name, float(size))))
        return
    if flags.figure:
        found = [json.loads(line) for line in flags.figure.read_text().splitlines()]
        summary(found)
        figure(found, Path("docs/kd_loss.png"))
        return
    names = flags.sides.split(",") if flags.sides else ERRORS if flags.bf16 else SIDES
    if flags.bf16:
        errors(names)
        return
    found = curve(names, CURVE if flags.curve else (2048,))
    summary(found)
    if flags.save:
        with flags.save.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in found)


if __name__ == "__main__":
    main(sys.argv[1:])
