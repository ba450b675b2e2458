"""The paper's mixture experiment: the precision-recall frontier of distillation.

    python -m kd_jax.train --config configs/gmm.py --workdir runs/gmm
    python -m kd_jax.train --config configs/gmm.py:smoke --workdir runs/gmm_smoke    (seconds)

Cost: well under a minute on two cores. Result: precision rises and recall falls with beta; see the README's table.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "gmm"
    config.seed = 0  # of the first run; the others count up from it
    config.seeds = 64
    config.beta_min, config.beta_max = 1.0, 100.0
    config.num_betas = 17  # log-spaced; an odd number has 10 in the middle
    config.dim = 2
    config.separation = 1.0  # of the modes of p*, in units of the paper's ring
    config.num_data = 100
    config.teacher_components = 4
    config.student_components = 1
    config.num_distill = 1000
    config.num_precision = 2000
    config.num_recall = 2000
    config.covariance_type = "diag"
    config.max_iter = 100
    config.num_starts = 1
    config.tol = 1e-3
    config.memory_gib = 1.0  # a sweep that needs more is cut into chunks of seeds
    # Values put into the settings above one axis at a time, each a sweep of its own.
    config.vary = ConfigDict(
        {"dim": (), "num_data": (), "teacher_components": (), "student_components": (), "separation": ()}
    )
    if arg == "smoke":
        config.update(seeds=4, num_betas=3, num_distill=200, num_precision=200, num_recall=200)
    elif arg:
        raise ValueError(f"configs/gmm.py:{arg} is not known; there is configs/gmm.py:smoke")
    return config
