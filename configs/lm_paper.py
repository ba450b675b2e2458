"""The paper's language-model experiment at its own size: SmolLM2-1.7B -> 360M -> 135M, 10 million sequences.

    python -m kd_jax.train --config configs/lm_paper.py --workdir runs/paper --dry_run
    python -m kd_jax.train --config configs/lm_paper.py --workdir runs/paper
    python -m kd_jax.train --config configs/lm_paper.py:scripts --workdir runs/paper    (as its scripts train)

The teacher is trained for 5 epochs and students for 1, as summaries of the paper say; its published scripts train both
for 5, and so does lm_paper.py:scripts. The direct students and those of tau = 1 are also sampled at lower temperatures.
The comparison named before the run: students of text at tau = 0.8 against direct ones cooled to equal precision.

For many accelerators: --dry_run says what each stage costs. Unlike in the published code, token ids are never decoded
and encoded again, EOS is trained and scored, validation does not count padding, and seed 0 is seeded like any other.
"""

from ml_collections import ConfigDict

from configs import lm


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "scripts"):
        raise ValueError(f"configs/lm_paper.py:{arg} is not known; there is configs/lm_paper.py:scripts")
    config = lm.get_config()
    config.p_star.update(source="HuggingFaceTB/SmolLM2-1.7B", architecture="smollm2-1.7b")
    config.num_train, config.num_validation = 10_000_000, 10_000
    config.num_recall, config.num_samples = 100_000, 100_000
    config.seeds = 5
    config.sampling.update(max_length=512, batch_size=512, shard_size=16384, dtype="bfloat16")
    config.teacher.preset, config.student.preset = "smollm2-360m", "smollm2-135m"
    # the paper's batch of 256 sequences; packed into rows of 2048, which changes no loss
    config.train.update(row_length=2048, validations=20, save_every=1000, log_every=50)
    config.student.train.epochs = 5 if arg else 1
    config.evaluation.sample_temperatures, config.cooled_arms = (1.0, 0.9, 0.8, 0.7), ("direct", "tau-1")
    config.contrast.arm = "tau-0.8"
    config.compute.dtype = "bfloat16"
    return config
