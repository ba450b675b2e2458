"""Every knob of selectivity on one frontier, for mixtures: which buys precision most cheaply in recall?

    python -m kd_jax.train --config configs/gmm_frontier.py --workdir runs/gmm_frontier
    python -m kd_jax.train --config configs/gmm_frontier.py:smoke --workdir runs/frontier_smoke    (seconds)

Cost: 40 seconds on two cores, 15 of them compiling. Result: sharpening the teacher costs the least recall up to 3 nats
of precision; at 4 the divergences that lean to reverse KL cost as little.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    config = ConfigDict()
    config.experiment = "gmm_frontier"
    config.seed = 0  # of the first run; the others count up from it
    config.seeds = 64
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
    # The mixture experiment's own setting: see configs/gmm.py.
    config.dim = 2
    config.separation = 1.0
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
    # Fits by gradient; their starts are EM's student and each of the teacher's components.
    config.num_draws = 512  # of each student component, for terms that are means over the student
    config.num_updates = 200
    config.learning_rate = 0.1
    config.memory_gib = 1.0  # a sweep that needs more is cut into chunks of seeds
    if arg == "smoke":
        config.update(seeds=4, num_distill=200, num_precision=200, num_recall=200, num_draws=64, num_updates=100)
        config.knobs.update(beta=(1.0, 10.0, 100.0), jensen_shannon=(0.0, 0.5, 1.0), skew_forward_kl=(0.0, 0.5))
        config.knobs.skew_reverse_kl = (0.0, 0.5)
    elif arg:
        raise ValueError(f"configs/gmm_frontier.py:{arg} is not known; there is configs/gmm_frontier.py:smoke")
    return config
