"""The paper's experiment for one GPU of 80 GB: each model one size smaller, a fiftieth of the sequences.

    python -m kd_jax.train --config configs/lm_paper_quick.py --workdir runs/paper_quick

About 1.5 hours there, which is reckoned (--dry_run --device 1xH100) and has not been run; the teacher fits with
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. The rule: SmolLM2-360M -> 135M ->
a student of a third of the teacher's weights, as in the paper; 200 thousand sequences in place of 10 million, each
corpus, validation and sample count divided by 50 (but not below 2000), 3 seeds. All else (lengths, batch, epochs,
schedule) is as in lm_paper.py.
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
