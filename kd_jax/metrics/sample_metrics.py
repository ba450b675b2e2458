"""The metrics of samples, a row each, and their bias at the sample size. To add one, write its row here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.metrics import diversity, mauve, neighbours
from kd_jax.metrics.mean import Mean


# Frozen: what the properties cache must stay true of the arrays.
@dataclasses.dataclass(frozen=True)
class Samples:
    """What metrics are computed from. Metrics of one family share their work through the cached properties.

    Attributes:
        fake: [M, D], embeddings of a model's samples.
        real: [N, D], embeddings of data; None for metrics of the samples alone.
        prompts: int [G], which prompt each of the grouped samples continues, from 0; None without prompts.
        grouped: [G, D], samples with several of each prompt; `fake` by default.
        k: which neighbour a ball reaches to.
        num_buckets, seed: of MAUVE.
    """

    fake: np.ndarray
    real: np.ndarray | None = None
    prompts: np.ndarray | None = None
    grouped: np.ndarray | None = None
    k: int = 5
    num_buckets: int | None = None
    seed: int = 0

    @property
    def of_prompts(self) -> np.ndarray:
        """The samples that `prompts` is of."""
        return self.fake if self.grouped is None else self.grouped

    @functools.cached_property
    def neighbours(self) -> neighbours.Neighbours:
        """Precision, recall, density and coverage."""
        return neighbours.knn_precision_recall(self.real, self.fake, self.k)

    @functools.cached_property
    def clipped(self) -> neighbours.ClippedNeighbours:
        """Clipped density and coverage."""
        return neighbours.clipped_density_coverage(self.real, self.fake, self.k)


class SampleMetric(NamedTuple):
    """A metric of samples.

    Attributes:
        name: of its column.
        summary: what it is, in a few words.
        needs: the fields of `Samples` that it takes and that may be None.
        unit: of its values.
        larger: what a larger value means.
        function: Samples -> number.
        ideal: the value that says that samples and data have one distribution; None if none does.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    unit: str
    larger: str
    function: Callable[[Samples], float]
    ideal: float | None = None


_ROWS = (
    SampleMetric(
        # By nearest neighbours: both sets may have any size.
        "knn_precision", "share of samples near data (Kynkäänniemi et al. 2019)", ("real",), "share",
        "more samples look like data", lambda samples: samples.neighbours.precision, 1.0,
    ),
    SampleMetric(
        "knn_recall", "share of data near samples (Kynkäänniemi et al. 2019)", ("real",), "share",
        "more of the data is reached", lambda samples: samples.neighbours.recall, 1.0,
    ),
    SampleMetric(
        "knn_density", "real balls around a sample, divided by k (Naeem et al. 2020)", ("real",), "ratio",
        "samples lie where data are denser", lambda samples: samples.neighbours.density, 1.0,
    ),
    SampleMetric(
        "knn_coverage", "share of real balls with a sample in them (Naeem et al. 2020)", ("real",), "share",
        "more of the data is reached", lambda samples: samples.neighbours.coverage, 1.0,
    ),
    SampleMetric(
        "clipped_density", "equivalent share of samples as good as data (Salvy et al. 2025)", ("real",), "share",
        "more samples look like data", lambda samples: samples.clipped.density, 1.0,
    ),
    SampleMetric(
        "clipped_coverage", "equivalent share of samples that cover the data (Salvy et al. 2025)", ("real",), "share",
        "more of the data is reached", lambda samples: samples.clipped.coverage, 1.0,
    ),
    SampleMetric(
        # By histograms: only for as many samples as data.
        "mauve", "area under the divergence frontier of histograms (Pillutla et al. 2021)", ("real",), "share",
        "samples and data are closer",
        lambda samples: mauve.compare(
            samples.real, {"fake": samples.fake}, num_buckets=samples.num_buckets, seed=samples.seed
        )["fake"].score,
        1.0,
    ),
    SampleMetric(
        # Of the samples alone. Without an ideal: data can be more or less varied.
        "vendi_score", "effective number of different samples (Friedman & Dieng 2023)", (), "samples",
        "samples differ more from each other", lambda samples: diversity.vendi_score(samples.fake),
    ),
    SampleMetric(
        "prompt_diversity", "mean cosine distance between samples of one prompt (Kirk et al. 2024)", ("prompts",),
        "cosine distance", "samples of one prompt differ more",
        lambda samples: float(diversity.prompt_diversity(samples.of_prompts, samples.prompts).mean),
    ),
)  # fmt: skip

SAMPLE_METRICS: dict[str, SampleMetric] = {row.name: row for row in _ROWS}


def compute(samples: Samples) -> dict[str, float]:
    """The value of every metric whose needs are met, by name; the others are absent.

    Raises: ValueError for shapes that do not go together, k or fewer points, or, since MAUVE scores of different sizes
        cannot be compared, unequally many real and fake points.
    """
    return {name: row.function(samples) for name, row in SAMPLE_METRICS.items() if _met(row, samples)}


class Bias(NamedTuple):
    """A metric of a model against itself.

    Attributes:
        size: number of points on each side.
        value: the metric, a Mean over random splits. The splits share points, so its error is only a rough one.
        bias: the value less the metric's ideal.
    """

    size: int
    value: Mean
    bias: float


def self_bias(samples: Samples, *, size: int | None = None, num_splits: int = 4) -> dict[str, Bias]:
    """What the metrics that have an ideal give for two disjoint random parts of one set, `samples.real`.

    Both parts have the same distribution, so what a metric is away from its ideal is the bias of a finite sample. It
    shrinks with the size: to judge a comparison of n with n points, give 2n and let `size` be n.

    Args:
        samples: its `real` is split; `k`, `num_buckets` and `seed` are used, `fake` is not.
        size: points of each part; half of them by default.
    """
    points = np.asarray(samples.real)
    size = len(points) // 2 if size is None else size
    # A permutation for each split, by (seed, split): more splits leave the first ones as they are.
    orders = (np.random.default_rng((samples.seed, split)).permutation(len(points)) for split in range(num_splits))
    # Made once, so that all metrics of a part share what it caches.
    parts = [
        dataclasses.replace(samples, real=points[order[:size]], fake=points[order[size : 2 * size]], prompts=None)
        for order in orders
    ]
    result = {}
    for name, row in SAMPLE_METRICS.items():
        if row.ideal is not None:
            value = Mean.of(jnp.array([row.function(part) for part in parts]))
            result[name] = Bias(size, value, float(value.mean) - row.ideal)
    return result


def _met(row: SampleMetric, samples: Samples) -> bool:
    return all(getattr(samples, need) is not None for need in row.needs)
