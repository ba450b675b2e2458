"""The mixture experiment along more axes: dimension and separation of the modes too, with more seeds for each setting.

    python -m kd_jax.train --config configs/gmm_wide.py --workdir runs/gmm_wide

Each axis is varied alone about the setting of configs/gmm.py. Result: the trade needs a student poorer than its
teacher.
"""

from ml_collections import ConfigDict

from configs import gmm


def get_config(arg: str = "") -> ConfigDict:
    config = gmm.get_config(arg)
    config.vary.update(num_data=(30, 300, 1000), dim=(8, 32), separation=(0.5, 2.0), seeds=400)
    return config
