"""The mixture experiment along every axis: student and teacher components, data size, dimension, mode separation.

    python -m kd_jax.train --config configs/gmm_wide.py --workdir runs/gmm_wide

Each axis is varied alone about the setting of configs/gmm.py; each setting is a full sweep over beta and seeds.

Cost: 11 settings, 12672 students, 90 s on two cores. Result: the trade-off needs a student poorer than its teacher.
With 4 student components, as many as the teacher has, precision no longer moves with beta (-0.03 +- 0.05 nats per
decade).
"""

from ml_collections import ConfigDict

from configs import gmm


def get_config(arg: str = "") -> ConfigDict:
    config = gmm.get_config(arg)
    config.vary.student_components = (1, 2, 4)
    config.vary.teacher_components = (2, 4, 8)
    config.vary.num_data = (30, 100, 1000)
    config.vary.dim = (2, 8, 32)
    config.vary.separation = (0.5, 1.0, 2.0)
    return config
