"""Every knob of selectivity on one frontier, for mixtures: which buys precision most cheaply in recall?

    python -m kd_jax.train --config configs/gmm_frontier.py --workdir runs/gmm_frontier
    python -m kd_jax.train --config configs/gmm_frontier.py:smoke --workdir runs/frontier_smoke    (seconds)

Cost: 36 seconds on two cores. Result: sharpening the teacher costs the least recall up to 3 nats
of precision; at 4 the divergences that lean to reverse KL cost as little.
"""

from ml_collections import ConfigDict

from configs import gmm


def get_config(arg: str = "") -> ConfigDict:
    config = gmm.get_config()  # the mixture experiment's own setting, but for its sweep of beta
    for name in ("beta_min", "beta_max", "num_betas", "vary"):
        del config[name]
    config.experiment = "gmm_frontier"
    # Values of each knob, in order. An empty one is left out.
    config.knobs = ConfigDict(
        {
            # of the teacher, whose student is fitted by EM
            "beta": (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0),
            "top_k": (4, 3, 2, 1),
            "top_p": (1.0, 0.8, 0.6, 0.4, 0.2),
            # of the student's loss, whose teacher stays as it is; 0 to 1 is forward to reverse KL
            "jensen_shannon": (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            "skew_forward_kl": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
            "skew_reverse_kl": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
        }
    )
    config.gains = (0.5, 1.0, 2.0, 3.0, 4.0)  # nats of precision above the plain student, at which knobs are compared
    # Fits by gradient; their starts are EM's student and each of the teacher's components.
    config.num_draws = 512  # of each student component, for terms that are means over the student
    config.num_updates = 200
    config.learning_rate = 0.1
    if arg == "smoke":
        config.update(seeds=4, num_distill=200, num_precision=200, num_recall=200, num_draws=64, num_updates=100)
        config.knobs.update(beta=(1.0, 10.0, 100.0), jensen_shannon=(0.0, 0.5, 1.0), skew_forward_kl=(0.0, 0.5))
        config.knobs.skew_reverse_kl = (0.0, 0.5)
    elif arg:
        raise ValueError(f"configs/gmm_frontier.py:{arg} is not known; there is configs/gmm_frontier.py:smoke")
    return config
