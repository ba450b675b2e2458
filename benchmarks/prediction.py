"""What `--dry_run --device 1xCPU` predicts of a training, beside that training: memory of an update, and time.

    python -m benchmarks.prediction [CASE ...]

Each case has three processes: the prediction; an update, whose memory (weights and moments included, the compiler's
not) is the growth of the peak of its process; and the training itself on rows of random ids, twice, as the first run
compiles. Time is that of the whole training, checkpoints included. In the second process freed memory goes back to the
system at once (MALLOC_MMAP_THRESHOLD_): otherwise the C library keeps some tens of MiB of it, more or less by chance.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lm import memory
from configs import lm
from kd_jax.lm import corpus, training
from kd_jax.lm.corpus import batches
from kd_jax.lm.distill.loss import cross_entropy
from kd_jax.lm.experiment import cost, footprint, planning
from kd_jax.lm.experiment.specs import LmSpec, planned_shape
from kd_jax.lm.model import Compute, Model
from kd_jax.lm.training import state as state_lib
from kd_jax.lm.training import update as update_lib
from kd_jax.parallel import devices
from kd_jax.runs import cache
from kd_jax.runs.settings import freeze

# Student, rows of an update, length, updates. The vocabulary is SmolLM2's, 49152.
CASES = {
    "smollm2-135m": ({"preset": "smollm2-135m"}, 8, 64, 15),
    "2 layers x 128": ({"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp": 384}, 24, 48, 30),
}


def config_of(name: str):
    student, rows, length, updates = CASES[name]
    config = lm.get_config()
    config.p_star.architecture = "smollm2-135m"
    config.student.update(student)
    config.num_train, config.num_validation, config.sampling.max_length = rows * updates, 2 * rows, length
    config.train.update(epochs=1, batch_size=rows, validations=1, log_every=1)
    return freeze(LmSpec, config)


def predicted(name: str) -> dict:
    config = config_of(name)
    target = devices.target("1xCPU", 0.4, None)
    about = cost.training(config, planned_shape(config, "student"))
    program = footprint.programs(config, {name: about}, target)[name]
    by_share = planning.seconds(config, about, target)
    return {
        "memory": program.memory.total,
        "seconds": planning.seconds(config, about, target, program),
        "writing": about.written / cost.writing_rate(),
        "by_share": by_share,
    }


def update(name: str) -> dict:
    """Growth of the peak by a state and two updates."""
    config = config_of(name)
    shape, spec = planned_shape(config, "student"), config.train
    optimizer, schedule = spec.optimizer(100), spec.schedule(100)
    layout = footprint.layout(config, config.train, None)
    tokens = list(_tokens(layout.sequences, layout.max_length))
    batch = batches.arrange(tokens, np.ones(len(tokens), int), layout)
    loss = cross_entropy(shape, Compute(**vars(config.compute)))
    update = update_lib.compiled(update_lib.make(loss, optimizer, schedule), shape, optimizer)
    compiled = update.lower(state_lib.abstract(shape, optimizer), jax.tree.map(jnp.asarray, batch)).compile()
    state_lib.init(jax.random.key(0), shape, optimizer)  # compiled, too, and freed again
    held = memory()
    state = state_lib.init(jax.random.key(0), shape, optimizer)
    for _ in range(2):
        state, _ = jax.block_until_ready(compiled(state, state_lib.place(batch, None)))
    return {"memory": (memory(peak=True) - held) * 2**20}


def trained(name: str) -> dict:
    """Where the time of the training goes, by training.json."""
    cache.enable_compilation_cache()
    config = config_of(name)
    shape, spec = planned_shape(config, "student"), config.train
    with tempfile.TemporaryDirectory() as folder:
        held = _corpus(Path(folder) / "corpus", config)
        for run in ("first", "second"):
            members = [training.Member(held, config.num_validation, 0, Path(folder) / run)]
            found = training.train(spec, Model(shape, {}), members, compute=Compute(**vars(config.compute)))[0]
    return found["seconds"]


def _tokens(rows: int, length: int) -> np.ndarray:
    """Ids without an EOS (0), after a prompt (1)."""
    tokens = np.random.default_rng(0).integers(2, 49152, (rows, length)).astype(np.int32)
    tokens[:, 0] = 1
    return tokens


def _corpus(folder: Path, config) -> corpus.Corpus:
    rows, length = config.num_train + config.num_validation, config.sampling.max_length
    about = {
        "source": "random", "model_fingerprint": "0", "tokenizer_fingerprint": None, "dtype": "float32", "prompt": None,
        "prompt_ids": [1], "eos_ids": [0], "sample_temperature": 1.0, "top_k": None, "top_p": None, "seed": 0,
        "max_length": length, "num_samples": rows, "shard_size": 4096,
    }  # fmt: skip
    zeros = np.zeros((rows, length), np.float32)
    samples = SimpleNamespace(
        index=np.arange(rows), tokens=_tokens(rows, length), lengths=np.full(rows, length, np.int32),
        prompt_lengths=np.ones(rows, np.int32), finished=np.zeros(rows, bool), log_probs=zeros,
        sample_log_probs=zeros, utilisation=1.0, steps=1,
    )  # fmt: skip
    return corpus.write(corpus.create_or_resume(folder, about, command="benchmarks.prediction"), [samples])


PARTS = {"predicted": predicted, "update": update, "trained": trained}


def main(argv: list[str]) -> None:
    if len(argv) == 2 and argv[0] in PARTS:
        print(json.dumps(PARTS[argv[0]](argv[1])))
        return
    for name in argv or CASES:
        found = {}
        for part in PARTS:
            command = [sys.executable, "-m", "benchmarks.prediction", part, name]
            environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if part == "update" else {})
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found[part] = json.loads(done.stdout.strip().splitlines()[-1])
        said, need, took = found["predicted"], found["update"]["memory"], found["trained"]
        print(
            f"{name}: memory {said['memory'] / 2**20:.0f} MiB predicted, {need / 2**20:.0f} measured "
            f"({said['memory'] / need - 1:+.0%}); time {said['seconds']:.1f} s predicted (checkpoints "
            f"{said['writing']:.1f}), {took['total']:.1f} measured ({took['checkpoints']:.1f}; "
            f"{said['seconds'] / took['total'] - 1:+.0%}); by the share of cost.SHARES it would be "
            f"{said['by_share']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
