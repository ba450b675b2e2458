"""The mixture experiment along more axes: also dimension and separation of the modes, with more seeds per setting.

    python -m kd_jax.train --config configs/gmm_wide.py --workdir runs/gmm_wide

Each axis is varied alone, from the setting of configs/gmm.py. Result: there is a trade only where the student has fewer
components than the teacher.
"""

from ml_collections import ConfigDict

from configs import gmm


def get_config(arg: str = "") -> ConfigDict:
    config = gmm.get_config(arg)
    config.vary.update(num_data=(30, 300, 1000), dim=(8, 32), separation=(0.5, 2.0), seeds=400)
    return config
