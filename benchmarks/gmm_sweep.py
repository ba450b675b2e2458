"""The default sweep beside the published notebook's way: scikit-learn, one fit at a time.

    python -m benchmarks.gmm_sweep                  time, and agreement of the means over all seeds
    python -m benchmarks.gmm_sweep --students 100000   peak memory of a large sweep, in chunks

For each beta both sides fit a student to as many points and score it on as many draws. kd_jax does more: it also fits
the controls and scores every student at lower sampling temperatures. It also draws fewer random numbers, as the betas
of a seed share them; the peer draws anew for each beta.
"""

import argparse
import resource
import time

import numpy as np

from benchmarks import notebook_chain
from configs.gmm import get_config
from kd_jax.gmm import experiment
from kd_jax.gmm.specs import GmmSpec
from kd_jax.gmm.students import CONTROLS
from kd_jax.runs.settings import freeze

COLUMNS = ("precision", "recall", "precision_notebook", "recall_notebook")


def compare(seeds: int) -> None:
    spec = freeze(GmmSpec, get_config())
    setting, betas = experiment.base_of(spec), np.geomspace(1, 100, 16)
    numbers = experiment.numbers_of(spec)._replace(betas=betas)
    began = time.perf_counter()
    experiment.sweep(setting, np.arange(seeds), numbers)
    first = time.perf_counter() - began
    times = []
    # The least of five: other work on the machine only ever adds time.
    for _ in range(5):
        began = time.perf_counter()
        scores = experiment.sweep(setting, np.arange(seeds), numbers).scores
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    peer = [notebook_chain.run_seed(seed, betas) for seed in range(seeds)]
    peer_time = time.perf_counter() - began
    distilled = np.stack([p[1] for p in peer])
    print(f"{'column':20} {'beta':>6} {'kd_jax':>18} {'scikit-learn':>18}  difference / joint standard error")
    worst = 0.0
    for c, column in enumerate(COLUMNS):
        for b in (0, 8, 15):
            mine, theirs = getattr(scores, column)[:, 2 + b], distilled[:, b, c]
            # The two sides draw different random numbers, so their seeds are not pairs: the errors add in quadrature.
            errors = [v.std(ddof=1) / np.sqrt(seeds) for v in (mine, theirs)]
            z = (mine.mean() - theirs.mean()) / np.hypot(*errors)
            worst = max(worst, abs(z))
            pairs = [f"{v.mean():8.3f} +- {e:6.3f}" for v, e in zip((mine, theirs), errors, strict=True)]
            print(f"{column:20} {betas[b]:6.1f} {pairs[0]:>18} {pairs[1]:>18}  {z:+.2f}")
    # Twelve comparisons: if the means are equal, one of them is 4 errors away in about one run of a thousand.
    assert worst < 4, "the two sides do not compute the same thing"
    mine = f"kd_jax {min(times):.3f} s after a first call of {first:.2f} s (compile included)"
    print(f"{seeds} seeds x {len(betas)} betas: scikit-learn {peer_time:.2f} s, {mine}: ", end="")
    print(f"{peer_time / min(times):.0f}x; with the compile {peer_time / first:.1f}x")


def large(students: int) -> None:
    spec = freeze(GmmSpec, get_config())
    setting, numbers = experiment.base_of(spec), experiment.numbers_of(spec)
    count = len(numbers.betas) + 2 + len(CONTROLS)  # students of a seed
    seeds = -(-students // count)
    size = experiment.chunk_size(setting, count, spec.memory_gib)
    began = time.perf_counter()
    for first in range(0, seeds, size):
        experiment.sweep(setting, np.arange(first, first + size), numbers)
    # Linux gives ru_maxrss in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seeds * count} students, {size} seeds a chunk: {time.perf_counter() - began:.1f} s, peak {peak:.2f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--students", type=int, default=0)
    args = parser.parse_args()
    large(args.students) if args.students else compare(args.seeds)
