"""The metrics of an evaluation, a row each: what it is computed of, how it is reduced, its unit and what it means.

To add a metric, add a row to METRICS (and to the documentation). Runs that were evaluated before get it from what they
have kept: results name their metrics with their versions, so an old number is not taken for one of a new definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax import metrics
from kd_jax.lm.corpus import Rows
from kd_jax.lm.evaluation import estimates

# What metrics are computed of; n samples of the model and m validation rows, sums over a row's generated tokens.
MEASURED = {
    "samples": "the model's samples (kd_jax.lm.corpus.Rows)",
    "p_star_of_samples": "log p* of each sample, nats, float64 [n]",
    "data": "the validation rows (kd_jax.lm.corpus.Rows)",
    "model_of_data": "log model of each validation row at the samples' temperature and truncation, nats, float64 [m]",
    "p_star_of_data": "log p* of each validation row, nats, float64 [m]",
    "own_data": "p_star_of_data where the validation rows were drawn from p*",
    "calibration": "confidence and hits of the model on the validation rows, see estimates.calibration_error",
    "agreement": "validation tokens of each row at which the model's likeliest id is p*'s, float64 [m]",
    "points": "embeddings of samples and validation rows, equally many (Points)",
}


class Reduction(NamedTuple):
    """How values become columns.

    Attributes:
        columns: of a metric, NAME and these endings.
        compute: takes what Metric.values returns, gives a value for each column.
    """

    columns: tuple[str, ...]
    compute: Callable[..., Iterable[Any]]


class Points:
    """Texts as points, for the metrics of kd_jax.metrics.SAMPLE_METRICS.

    Args:
        samples: the points; `real` are validation rows, as many as `fake`.
        bias: what the metrics give for two halves of the validation rows, by name; it is asked for at most once.
    """

    def __init__(self, samples: metrics.Samples, bias: Callable[[], Mapping[str, metrics.Bias]]):
        self.samples, self._bias = samples, bias

    def value_and_bias(self, name: str) -> tuple[float, float | None]:
        """A metric, and how far it is off for equal distributions at this size; None for one without an ideal."""
        # Asked for late: without a metric of points, no bias is computed.
        bias = self._bias().get(name)
        return float(metrics.SAMPLE_METRICS[name].function(self.samples)), None if bias is None else bias.bias


PER_TOKEN = Reduction(("", "_se", "_per_sequence", "_per_sequence_se"), estimates.both_averages)
SHARE = Reduction(("", "_se"), estimates.share)
NUMBER = Reduction(("",), lambda value: (value,))


class Metric(NamedTuple):
    """A metric of a model.

    Attributes:
        name: its columns begin with it.
        needs: names of MEASURED; where one is not there, the metric's columns are None.
        reduction: see Reduction.
        unit: of its first column.
        larger: what a larger value means.
        formula: x ~ model are samples, x ~ data validation rows.
        values: takes what it needs, returns the arguments of the reduction.
        version: raised when the formula changes: kept results of another one are computed again.
    """

    name: str
    needs: tuple[str, ...]
    reduction: Reduction
    unit: str
    larger: str
    formula: str
    values: Callable[..., tuple]
    version: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns in a row of metrics.jsonl."""
        return tuple(self.name + ending for ending in self.reduction.columns)


def _counts(rows: Rows) -> np.ndarray:
    return rows.num_learnt


def _weights(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens of each row, and the number of its prompt: answers to one prompt are alike, so errors are by prompt."""
    return rows.num_learnt, estimates.clusters(rows)


def _generated(rows: Rows) -> list[np.ndarray]:
    return [ids[start:] for ids, start in zip(rows.tokens, rows.prompt_length, strict=True)]


def _infinite(values: np.ndarray) -> tuple[int]:
    return (int(np.isinf(values).sum()),)


_ROWS = (
    Metric("num_samples", ("samples",), NUMBER, "sequences", "smaller errors", "n", lambda s: (len(s.length),)),
    Metric("num_tokens", ("samples",), NUMBER, "tokens", "smaller errors", "sum of lengths of the samples",
           lambda s: (int(_counts(s).sum()),)),
    Metric("num_recall", ("data",), NUMBER, "sequences", "smaller errors", "m", lambda d: (len(d.length),)),
    Metric("num_recall_tokens", ("data",), NUMBER, "tokens", "smaller errors", "sum of lengths of the validation rows",
           lambda d: (int(_counts(d).sum()),)),
    Metric("precision", ("p_star_of_samples", "samples"), PER_TOKEN, "nats per token", "samples are likelier under p*",
           "E_{x ~ model} log p*(x)", lambda v, s: (v, *_weights(s))),
    Metric("precision_num_infinite", ("p_star_of_samples",), NUMBER, "sequences", "samples that p* never gives",
           "how many samples have log p*(x) = -inf", _infinite),
    Metric("recall", ("model_of_data", "data"), PER_TOKEN, "nats per token", "the data are likelier under the model",
           "E_{x ~ data} log model(x)", lambda v, d: (v, *_weights(d))),
    Metric("recall_num_infinite", ("model_of_data",), NUMBER, "sequences", "data that the model never gives",
           "how many validation rows have log model(x) = -inf", _infinite),
    # The log-probabilities of the draws themselves: no second pass, and it holds at any temperature and truncation.
    Metric("entropy", ("samples",), PER_TOKEN, "nats per token", "more varied samples",
           "-E_{x ~ model} log model(x), both as sampled", lambda s: (-s.sample_log_prob, *_weights(s))),
    # One mean of differences, not a difference of means: both logarithms are of the same draws and share their noise.
    Metric("kl_model_data", ("p_star_of_samples", "samples"), PER_TOKEN, "nats per token", "samples unlike p*'s",
           "KL(model || p*) = E_{x ~ model} [log model(x) - log p*(x)]",
           lambda v, s: (s.sample_log_prob - v, *_weights(s))),
    Metric("kl_data_model", ("own_data", "model_of_data", "data"), PER_TOKEN, "nats per token", "data not covered",
           "KL(p* || model) = E_{x ~ p*} [log p*(x) - log model(x)]", lambda p, q, d: (p - q, *_weights(d))),
    Metric("data_log_prob", ("p_star_of_data", "data"), PER_TOKEN, "nats per token", "data likelier under p*",
           "E_{x ~ data} log p*(x)", lambda v, d: (v, *_weights(d))),
    # The text that p* finds likeliest is dull and repetitive: a precision above p*'s own is not a sign of quality.
    Metric("precision_excess", ("p_star_of_samples", "samples", "own_data", "data"),
           Reduction(("", "_se"), estimates.difference), "nats per token",
           "samples likelier under p* than its own: look at entropy, distinct and repetition",
           "precision - E_{x ~ p*} log p*(x)", lambda v, s, p, d: ((v, *_weights(s)), (p, *_weights(d)))),
    Metric("finished", ("samples",), SHARE, "share", "more samples end with an EOS", "share of samples that end",
           lambda s: (s.finished, estimates.clusters(s))),
    Metric("length", ("samples",), Reduction(("_mean", "_sd", "_quantiles"), estimates.lengths), "tokens",
           "longer samples", "tokens after the prompt, the EOS included", lambda s: (_counts(s),)),
    Metric("distinct", ("samples",), Reduction(("_1", "_2", "_3", "_4"), estimates.distinct), "share",
           "more varied samples", "different n-grams / n-grams, over all samples", lambda s: (_generated(s),)),
    Metric("repetition_4", ("samples",), NUMBER, "share", "more repetition inside a sample",
           "mean over samples of 1 - different 4-grams / 4-grams", lambda s: (estimates.repetition(_generated(s)),)),
    Metric("calibration_error", ("calibration",), NUMBER, "share", "confidence further from the share of hits",
           "sum over 15 bins of confidence: share of tokens * |hits - confidence|",
           lambda c: (estimates.calibration_error(c),)),
    Metric("agreement", ("agreement", "data"), PER_TOKEN, "share", "the likeliest id is more often p*'s",
           "E_{x ~ data} [argmax model = argmax p*]", lambda a, d: (a, *_weights(d))),
)  # fmt: skip
# Metrics of samples are rows of their own table: one that is added there is a column here.
_OF_POINTS = (
    Metric(
        name, ("points",), Reduction(("", "_bias"), lambda value, bias: (value, bias)), row.unit, row.larger,
        row.summary, functools.partial(Points.value_and_bias, name=name), 2,
    )
    for name, row in metrics.SAMPLE_METRICS.items()
)  # fmt: skip
METRICS = {metric.name: metric for metric in (*_ROWS, *_OF_POINTS)}


def computable(measured: Iterable[str]) -> dict[str, int]:
    """Name and version of each metric that can be computed of these names of MEASURED."""
    return {name: metric.version for name, metric in METRICS.items() if set(metric.needs) <= set(measured)}


def compute(names: Iterable[str], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of some metrics.

    Args:
        names: of METRICS.
        measured: a value for each name of MEASURED that they need.
    """
    columns = {}
    for metric in (METRICS[name] for name in names):
        values = metric.values(*(measured[name] for name in metric.needs))
        columns |= dict(zip(metric.columns, metric.reduction.compute(*values), strict=True))
    return columns


def row(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of all metrics in the order of the table, None for those that are not there."""
    return {name: columns.get(name) for metric in METRICS.values() for name in metric.columns}
