"""The device's numbers beside those of a CPU: scores, greedy tokens and losses, before any time is measured.

The reference is made by a process of its own that sees the CPU alone, so that it runs the CPU's forms of the programs.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm import decode, score, weights
from kd_jax.lm import model as model_lib
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill import loss as distill
from kd_jax.lm.model import PRESETS, Compute, Model
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.lm.training.recipe import TrainSpec

ROWS, LENGTH, PROMPT, NEW = 8, 64, 4, 24
# Largest differences from the CPU. bfloat16 keeps 8 bits of each activation; a wrong mask or kernel is off by nats.
LIMITS = {
    "float32": {"scores": 1e-3, "greedy": 1e-3, "losses": 1e-3},
    "bfloat16": {"scores": 0.5, "greedy": 0.5, "losses": 0.05},
}


class Values(NamedTuple):
    """What is compared; nats.

    Attributes:
        scores: log-probability of each token of random texts.
        greedy: int ids, a prompt and the likeliest token after each [row, position].
        losses: of the first updates on text, then of the first ones from a teacher.
    """

    scores: np.ndarray
    greedy: np.ndarray
    losses: np.ndarray


def model_of(path: str | None, tiny: bool) -> Model:
    """The model in float32: that of a file, or random weights of a small shape with SmolLM2's width."""
    if path is not None:
        return weights.load(path)
    shape = PRESETS["tiny"] if tiny else dataclasses.replace(PRESETS["smollm2-135m"], num_hidden_layers=6)
    params = model_lib.init(jax.random.key(0), shape)
    # larger logits than at the start of a training, so that the next token is not a matter of chance
    return Model(shape, {**params, "norm": 3 * params["norm"]})


def values(model: Model, dtype: str) -> Values:
    """The three on the device that JAX uses."""
    model, compute = model._replace(eos_ids=()), Compute(dtype=dtype)
    tokens = _tokens(model)
    scores = score.log_prob(model, tokens, np.full(ROWS, LENGTH), compute=compute)[0]
    prompts = tokens[:, :PROMPT].tolist()
    greedy = decode.generate(model, prompts, ROWS, max_length=PROMPT + NEW, top_k=1, batch_size=ROWS, compute=compute)
    return Values(scores, greedy[0], np.concatenate([_losses(model, policy, compute) for policy in (None, "online")]))


def _tokens(model: Model) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.num_tokens, (ROWS, LENGTH)).astype(np.int32)


def _losses(model: Model, policy: str | None, compute: Compute) -> list[float]:
    """The losses of two updates: on text, or from a teacher of the same shape that is a little different."""
    shape, spec = model.architecture, TrainSpec(learning_rate=1e-4, warmup=0.0)
    optimizer, schedule = spec.optimizer(100), spec.schedule(100)
    loss, guide = distill.cross_entropy(shape, compute, num_tokens=model.num_tokens, packed=False), None
    if policy is not None:
        teacher = model._replace(params=jax.tree.map(lambda leaf: 1.1 * leaf, model.params))
        distillation = distill.Distillation(distill.DistillSpec(policy=policy), teacher, compute)
        loss, guide = distill.loss(distillation, model, compute, packed=False), distill.guide(distillation)
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), shape, optimizer)
    state = state_lib.from_params(model.params, shape, optimizer)
    batch = batches.arrange(list(_tokens(model)), np.ones(ROWS, int), batches.Layout(ROWS, LENGTH))
    losses = []
    for _ in range(2):
        state, metrics = update(state, state_lib.place(batch, None), guide)
        losses.append(float(metrics.loss))
    return losses


def reference(path: str | None, tiny: bool, folder: Path) -> None:
    """On the CPU: its own values, and by how much each of the device's greedy tokens is less likely than the best."""
    model = model_of(path, tiny)
    own = values(model, "float32")
    arrays = own._asdict()
    for dtype in LIMITS:
        greedy = np.load(folder / f"{dtype}.npy")
        (log_probs, best), _ = score.per_token(model, greedy, np.full(ROWS, PROMPT + NEW), _beside_best)
        arrays[dtype] = (best - log_probs)[:, PROMPT - 1 :]
    np.savez(folder / "reference.npz", **arrays)


def _beside_best(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0], log_probs.max(axis=-1)


def differences(device: Values, cpu: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """The largest difference of each of the three, in nats.

    Args:
        device: its values in this dtype.
        cpu: the arrays of `reference`.
    """
    return {
        "scores": float(np.abs(device.scores - cpu["scores"]).max()),
        "greedy": float(np.max(cpu[dtype])),
        "losses": float(np.abs(device.losses - cpu["losses"]).max()),
    }


def check(device: dict[str, Values], cpu: dict[str, np.ndarray]) -> list[dict]:
    """A row for each dtype and value. Raises SystemExit, naming it, where one is not what the CPU gives."""
    rows = []
    for dtype, one in device.items():
        for name, difference in differences(one, cpu, dtype).items():
            limit = LIMITS[dtype][name]
            # written so that NaN fails
            if not difference <= limit:
                raise SystemExit(
                    f"parity: {name} in {dtype} are up to {difference:.2g} nats from the CPU's (at most {limit} is "
                    "right): this device computes something else, so no time was measured"
                )
            rows.append({"case": f"{name}, {dtype}", "value": difference, "unit": "nats", "limit": limit})
    return rows


def measure(path: str | None, tiny: bool) -> list[dict]:
    """Rows of `check` for the device that JAX uses."""
    model = model_of(path, tiny)
    device = {dtype: values(model, dtype) for dtype in LIMITS}
    with tempfile.TemporaryDirectory() as folder:
        for dtype, one in device.items():
            np.save(Path(folder) / f"{dtype}.npy", one.greedy)
        command = [sys.executable, "-m", "benchmarks.accelerator", "--reference", folder]
        command += [*(["--tiny"] if tiny else []), *(["--weights", path] if path else [])]
        subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        with np.load(Path(folder) / "reference.npz") as arrays:
            return check(device, dict(arrays))
