"""Every knob of selectivity on one frontier, for mixtures: which buys precision most cheaply in recall?

    python -m kd_jax.train --config configs/gmm_frontier.py --workdir runs/gmm_frontier
    python -m kd_jax.train --config configs/gmm_frontier.py:smoke --workdir runs/frontier_smoke    (seconds)

Cost: about 100 seconds of processor time, compiling included. Result, 64 seeds: every knob is dominated by sampling the
direct student at a lower temperature, as far as that goes (1.3 nats of precision). A random choice between two students
costs almost nothing up to a gain of 3 nats, where the cheapest knob, sharpening, costs 7 nats of recall per nat.
"""

from ml_collections import ConfigDict

from kd_jax.gmm.specs import GmmFrontierSpec
from kd_jax.runs.settings import defaults


def get_config(arg: str = "") -> ConfigDict:
    config = defaults(GmmFrontierSpec)
    if arg == "smoke":
        config.update(
            smoke=True, seeds=4, num_distill=200, num_precision=200, num_recall=200, num_draws=64, num_updates=100
        )
        config.knobs.update(beta=(1.0, 10.0, 100.0), jensen_shannon=(0.0, 0.5, 1.0), skew_forward_kl=(0.0, 0.5))
        config.knobs.skew_reverse_kl = (0.0, 0.5)
    elif arg:
        raise ValueError(f"configs/gmm_frontier.py:{arg} is not known; there is configs/gmm_frontier.py:smoke")
    return config
