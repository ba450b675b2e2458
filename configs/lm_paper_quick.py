"""The paper's experiment for one GPU of 80 GB: each model one size smaller, a fiftieth of the sequences.

    python -m kd_jax.train --config configs/lm_paper_quick.py --workdir runs/paper_quick

It has been planned for about 1.5 hours there (--dry_run --device 1xH100), not run; the teacher fits with
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. Models are SmolLM2-360M -> 135M -> a student of a third of the teacher's weights,
as in the paper. There are 200 thousand sequences in place of 10 million, and 3 seeds; the other counts of sequences are
divided by 50, too, but are not below 2000. All else (lengths, batch, epochs, schedule) is as in lm_paper.py.
"""

from ml_collections import ConfigDict

from configs import lm_paper


def get_config() -> ConfigDict:
    config = lm_paper.get_config()
    config.p_star.update(source="HuggingFaceTB/SmolLM2-360M", architecture="smollm2-360m")
    config.num_train, config.num_validation = 200_000, 2000
    config.num_recall, config.num_samples = 2000, 2000
    config.seeds = 3
    config.teacher.preset = "smollm2-135m"
    config.student.update(preset="", layers=20, width=384, heads=6, kv_heads=2, mlp=1024)
    config.train.update(save_every=500)
    return config
