"""An update of SmolLM2-135M beside transformers + torch: the same weights, loss and AdamW, float32, 2 threads each.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --lora                  adapters of rank 16 on all linear layers; beside PEFT
    python -m benchmarks.train_step --model gemma           Gemma 3 270M; --lora goes with it

8 x 512 random tokens, and 2 x 512 for Gemma, of which transformers keeps all logits. Each side runs in a process of its
own, and one update that compiles does not count. Memory is the peak of the whole process, and the part of that peak
above what it held with the weights loaded (moments of AdamW, gradients, activations).
"""

import argparse
import json
import subprocess
import sys
import tempfile

from benchmarks.lm import LENGTH, MODELS, memory, result, seconds, tokens

RANK, ALPHA = 16, 32


def ours(name: str, lora: bool, folder: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kd_jax.lm import weights
    from kd_jax.lm.corpus import batches
    from kd_jax.lm.distill.loss import cross_entropy
    from kd_jax.lm.model import Compute, flops
    from kd_jax.lm.model.frozen import ALL, Part
    from kd_jax.lm.model.lora import TARGETS, Lora
    from kd_jax.lm.training import optimizer as optim
    from kd_jax.lm.training import state as state_lib
    from kd_jax.lm.training import update as update_lib

    model = weights.load(folder)
    ceiling = flops.ceiling("float32")
    held = memory()
    schedule = optim.wsd(1e-5, 100, 0.0, 0.0)
    optimizer = optim.adamw(schedule)
    part = Part(lora=Lora(RANK, ALPHA, TARGETS)) if lora else ALL
    loss = update_lib.of_part(cross_entropy(model.architecture, Compute(), packed=False), model.architecture, part)
    update = update_lib.make(loss, optimizer, schedule)
    update = update_lib.compiled(update, model.architecture, optimizer, part=part)
    if lora:
        state = state_lib.init(jax.random.key(0), model.architecture, optimizer, part=part)
        guide = state_lib.place_frozen(model.params, model.architecture, None, part), None
    else:
        state, guide = state_lib.State(model.params, optimizer.init(model.params), jnp.int32(0)), None
    rows = MODELS[name].rows
    layout = batches.Layout(rows, max_length=LENGTH)
    ids = list(tokens(name, rows).astype(np.int32))
    batch = state_lib.place(batches.arrange(ids, np.ones(rows, int), layout), None)
    # The update donates the state's buffers: nothing else may keep the weights.
    del model

    def one():
        nonlocal state
        state, metrics = update(state, batch, guide)
        # Reading the loss waits for the update, as JAX returns before the work is done.
        losses.append(float(metrics.loss))

    losses = []
    first, took = seconds(one, 3)
    jax.block_until_ready(state)
    peak = memory(peak=True)
    flops_per_token = (4 if lora else 6) * MODELS[name].parameters  # adapters: no gradient of the weights
    out = result(rows * LENGTH, took, flops_per_token, ceiling, first, peak - held)
    return {**out, "peak": peak, "losses": losses}


def theirs(name: str, lora: bool, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    a = torch.ones((2048, 2048))
    ceiling = 2 * 2048**3 / seconds(lambda: torch.nn.functional.linear(a, a), 5)[1]
    if lora:
        import peft

        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    held = memory()
    # The settings of optim.adamw in `ours`, a constant rate included.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    rows = MODELS[name].rows
    ids = torch.tensor(tokens(name, rows))

    def one():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss))

    losses = []
    first, took = seconds(one, 3)
    peak = memory(peak=True)
    flops_per_token = (4 if lora else 6) * MODELS[name].parameters  # adapters: no gradient of the weights
    out = result(rows * LENGTH, took, flops_per_token, ceiling, first, peak - held)
    return {**out, "peak": peak, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=MODELS, help="%(default)s")
    parser.add_argument("--lora", action="store_true", help="train adapters")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: which side, and a folder
    args = parser.parse_args()
    if args.side:
        which, folder = args.side
        print(json.dumps({"kd_jax": ours, "transformers": theirs}[which](args.model, args.lora, folder)))
        return
    from kd_jax.lm import weights

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights.export(weights.load(MODELS[args.model].source), f"{folder}/model")
        for name in ("kd_jax", "transformers"):
            command = [sys.executable, "-m", "benchmarks.train_step", "--side", name, f"{folder}/model"]
            command += ["--model", args.model, *["--lora"] * args.lora]
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
    main()
