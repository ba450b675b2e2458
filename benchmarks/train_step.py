"""An update of SmolLM2-135M beside transformers + torch: the same weights, loss and AdamW, float32, 2 threads each.

    python -m benchmarks.train_step

8 x 512 random tokens; each side runs in a process of its own, and one update that compiles does not count. Memory is
the peak of the whole process, and the part of that peak above what it held with the weights loaded (moments of AdamW,
gradients, activations).
"""

import json
import subprocess
import sys
import tempfile

from benchmarks.lm import LENGTH, ROWS, SOURCE, memory, result, seconds, tokens


def ours(folder: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kd_jax.lm import weights
    from kd_jax.lm.corpus import batches
    from kd_jax.lm.distill.loss import cross_entropy
    from kd_jax.lm.model import Compute, flops
    from kd_jax.lm.training import optimizer as optim
    from kd_jax.lm.training import state as state_lib
    from kd_jax.lm.training import update as update_lib

    model = weights.load(folder)
    ceiling = flops.ceiling("float32")
    held = memory()
    schedule = optim.wsd(1e-5, 100, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    loss = cross_entropy(model.architecture, Compute())
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), model.architecture, optimizer)
    state = state_lib.State(model.params, optimizer.init(model.params), jnp.int32(0))
    layout = batches.Layout(ROWS, max_length=LENGTH)
    batch = state_lib.place(batches.arrange(list(tokens().astype(np.int32)), np.ones(ROWS, int), layout), None)
    # The update donates the state's buffers: nothing else may keep the weights.
    del model

    def one():
        nonlocal state
        state, metrics = update(state, batch)
        # Reading the loss waits for the update, as JAX returns before the work is done.
        losses.append(float(metrics.loss))

    losses = []
    first, took = seconds(one, 3)
    jax.block_until_ready(state)
    peak = memory(peak=True)
    return {**result(ROWS * LENGTH, took, 6, ceiling, first, peak - held), "peak": peak, "losses": losses}


def theirs(folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    a = torch.ones((2048, 2048))
    ceiling = 2 * 2048**3 / seconds(lambda: torch.nn.functional.linear(a, a), 5)[1]
    held = memory()
    # The settings of optim.adamw in `ours`, a constant rate included.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    ids = torch.tensor(tokens())

    def one():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))

    losses = []
    first, took = seconds(one, 3)
    peak = memory(peak=True)
    return {**result(ROWS * LENGTH, took, 6, ceiling, first, peak - held), "peak": peak, "losses": losses}


def main(argv: list[str]) -> None:
    if argv:
        print(json.dumps({"kd_jax": ours, "transformers": theirs}[argv[0]](argv[1])))
        return
    from kd_jax.lm import weights

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights.export(weights.load(SOURCE), f"{folder}/model")
        for name in ("kd_jax", "transformers"):
            command = [sys.executable, "-m", "benchmarks.train_step", name, f"{folder}/model"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = out = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"{name:13} {out['tokens_per_s']:6.0f} tokens/s, {out['share']:.0%} of "
                f"{out['ceiling'] / 1e9:.0f} GFLOP/s, peak {out['peak']:.0f} MiB, of that extra "
                f"{out['extra_mib']:.0f} MiB, first update {out['first']:.1f} s, losses "
                + ", ".join(f"{loss:.4f}" for loss in out["losses"]),
                flush=True,
            )
    mine, peer = found["kd_jax"], found["transformers"]
    print(
        f"kd_jax / transformers: {mine['tokens_per_s'] / peer['tokens_per_s']:.2f}x the speed, "
        f"{mine['peak'] / peer['peak']:.2f} of the peak memory, "
        f"{mine['extra_mib'] / peer['extra_mib']:.2f} of the extra"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
