"""An online distillation update beside torch: the real SmolLM2-135M teaches a small student, forward KL at T = 1.

    python -m benchmarks.kd_step [ROWS LENGTH]

Both models run forward on the same random tokens, and the student learns the teacher's distribution at every position,
with AdamW and clipping: float32, 2 threads, a process for each side, after one update that compiles. torch runs the
models of transformers with three losses: the whole logits of both models, Liger's chunked loss (jsd with beta = 0, the
forward KL), and the same through torch.compile. kd_jax is compared with the quickest of the three. The losses of the
three updates are printed beside each other. Memory is the peak of the process above what it held with the weights
loaded.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.lm import SOURCE, memory, seconds

ROWS, LENGTH = 8, 512
STUDENT = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
           "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
REPEATS = 2


def tokens(rows: int, length: int):
    import numpy as np

    return np.random.RandomState(0).randint(0, 49152, (rows, length))


def ours(folder: str, rows: int, length: int) -> dict:
    import jax
    import numpy as np

    from kd_jax.lm import weights
    from kd_jax.lm.corpus import batches
    from kd_jax.lm.distill import loss as distill
    from kd_jax.lm.model import Compute
    from kd_jax.lm.training import optimizer as optim
    from kd_jax.lm.training import state as state_lib
    from kd_jax.lm.training import update as update_lib
    from kd_jax.runs import cache

    cache.enable_compilation_cache()
    teacher, student = weights.load(f"{folder}/teacher"), weights.load(f"{folder}/student")
    held = memory()
    schedule = optim.wsd(1e-3, 100, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    distillation = distill.Distillation(distill.DistillSpec(policy="online"), teacher)
    compute = Compute()
    loss, guide = distill.loss(distillation, student, compute, packed=False), distill.guide(distillation)
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), student.architecture, optimizer)
    state = state_lib.from_params(student.params, student.architecture, optimizer)
    layout = batches.Layout(rows, max_length=length)
    ids = list(tokens(rows, length).astype(np.int32))
    batch = state_lib.place(batches.arrange(ids, np.ones(rows, int), layout), None)

    def one():
        nonlocal state
        state, metrics = update(state, batch, guide)
        # Reading the loss waits for the update, as JAX returns before the work is done.
        losses.append(float(metrics.loss))

    losses = []
    first, took = seconds(one, REPEATS)
    jax.block_until_ready(state)
    return {"seconds": took, "first": first, "extra_mib": memory(peak=True) - held, "losses": losses}


def theirs(folder: str, rows: int, length: int, loss_of: Callable) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32) for name in ("teacher", "student")
    )
    teacher.eval()
    held = memory()
    # The settings of optim.adamw in `ours`, a constant rate included.
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    ids = torch.tensor(tokens(rows, length))

    def one():
        optimizer.zero_grad()
        with torch.no_grad():
            # The last position predicts a token that is not there: it has no loss on either side.
            theirs = teacher.model(ids).last_hidden_state[:, :-1]
        mine = student.model(ids).last_hidden_state[:, :-1]
        loss = loss_of(mine, student.lm_head.weight, theirs, teacher.lm_head.weight, ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    losses = []
    first, took = seconds(one, REPEATS)
    return {"seconds": took, "first": first, "extra_mib": memory(peak=True) - held, "losses": losses}


def _dense(mine, head, theirs, teacher_head, labels):
    import torch

    q = torch.log_softmax(mine @ head.T, -1)
    with torch.no_grad():
        p = torch.log_softmax(theirs @ teacher_head.T, -1)
    return torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")


def _liger(compiled: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def chunked(mine, head, theirs, teacher_head, labels):
        # Liger computes a gradient for every input that asks for one: the teacher's head must not.
        return loss(mine.flatten(0, 1), head, theirs.flatten(0, 1), teacher_head.detach(), labels.flatten())

    return chunked


SIDES = {
    "kd_jax": ours,
    "torch, dense": lambda *args: theirs(*args, _dense),
    "torch, Liger": lambda *args: theirs(*args, _liger(compiled=False)),
    "torch, Liger, compiled": lambda *args: theirs(*args, _liger(compiled=True)),
}


def _models(folder: str) -> None:
    """The teacher and a random student, where transformers reads them too."""
    import dataclasses

    import jax

    from kd_jax.lm import model as model_lib
    from kd_jax.lm import weights

    teacher = weights.load(SOURCE)
    weights.export(teacher, f"{folder}/teacher")
    architecture = dataclasses.replace(teacher.architecture, **STUDENT)
    params = model_lib.init(jax.random.key(0), architecture)
    weights.export(teacher._replace(architecture=architecture, params=params), f"{folder}/student")


def main(argv: list[str]) -> None:
    if len(argv) == 4:
        name, folder, *shape = argv
        print(json.dumps(SIDES[name](folder, *map(int, shape))))
        return
    rows, length = map(int, argv or (ROWS, LENGTH))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        _models(folder)
        for name in SIDES:
            command = [sys.executable, "-m", "benchmarks.kd_step", name, folder, str(rows), str(length)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = out = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"{name:22} {rows * length / out['seconds']:6.0f} tokens/s, extra memory {out['extra_mib']:5.0f} MiB, "
                f"first update {out['first']:.1f} s, losses " + ", ".join(f"{loss:.5f}" for loss in out["losses"]),
                flush=True,
            )
    # SIDES begins with kd_jax.
    ours, *others = found.values()
    best = min(others, key=lambda out: out["seconds"])
    apart = max(abs(a - b) / a for out in others for a, b in zip(ours["losses"], out["losses"], strict=True))
    print(
        f"kd_jax / the quickest of torch's: {best['seconds'] / ours['seconds']:.2f}x the speed, "
        f"{ours['extra_mib'] / best['extra_mib']:.2f} of its extra memory; losses differ by at most {apart:.1e}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
