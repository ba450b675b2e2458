"""What a set of samples says of a model: averages with their standard errors, lengths, variety. Arrays in, numbers out.

Of N sequences, `values` are sums over each one's scored tokens (nats) and `tokens` how many those are. There are two
averages, and a name says which:

    per token (NAME)                    sum of all values / number of all tokens: long sequences count for more
    per sequence (NAME_per_sequence)    mean of the values

Neither is the mean of the sequences' own means per token, nor is any of them exponentiated.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm.corpus import Rows
from kd_jax.metrics import Mean

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def per_token(values: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """The ratio of sums, values [N] to tokens [N], and its standard error over sequences.

    The standard error is the delta method's: that of the mean of values - ratio * tokens, over the mean of tokens. It
    is NaN for fewer than two sequences, or where a value is infinite, as is then the ratio.
    """
    values, tokens = np.asarray(values, np.float64), np.asarray(tokens, np.float64)
    total, count = tokens.sum(), len(values)
    if not total:
        return float("nan"), float("nan")
    ratio = values.sum() / total
    if count < 2 or not np.isfinite(ratio):
        return float(ratio), float("nan")
    residuals = values - ratio * tokens
    return float(ratio), float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / total)


def per_sequence(values: np.ndarray) -> tuple[float, float]:
    """The mean of values [N] and its standard error; NaN where there are too few, or infinite ones for the error."""
    # the arrays of kd_jax.metrics are float32 unless told otherwise
    with jax.enable_x64(True):
        mean = Mean.of(jnp.asarray(values, jnp.float64))
        return float(mean.mean), float(mean.standard_error)


def numbers(
    rows: Rows, under_p_star: np.ndarray, recall_tokens: np.ndarray, recall: np.ndarray | None,
    data_log_prob: np.ndarray, from_p_star: bool,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of a model.

    Args:
        rows: its samples.
        under_p_star: log p* of each, float64 [n].
        recall_tokens: how many tokens of each validation row are scored, int [m].
        recall: log model of each validation row, float64 [m]; None where the model is not scored.
        data_log_prob: log p* of each validation row, float64 [m].
        from_p_star: whether those rows were drawn from p*; of other data, KL(p* || model) is not known.
    """
    tokens, own = rows.length - rows.prompt_length, rows.sample_log_prob
    finished, finished_se = share(rows.finished)
    gap = data_log_prob - recall if from_p_star and recall is not None else None
    generated = [ids[start:] for ids, start in zip(rows.tokens, rows.prompt_length, strict=True)]
    variety = {f"distinct_{n}": value for n, value in enumerate(distinct(generated), start=1)}
    return {
        "num_samples": len(tokens), "num_tokens": int(tokens.sum()), "num_recall": len(recall_tokens),
        "num_recall_tokens": int(recall_tokens.sum()),
        **averages("precision", under_p_star, tokens), "precision_num_infinite": int(np.isinf(under_p_star).sum()),
        **(absent("recall") if recall is None else averages("recall", recall, recall_tokens)),
        "recall_num_infinite": None if recall is None else int(np.isinf(recall).sum()),
        **averages("entropy", -own, tokens),
        # one mean of differences, not a difference of means: both are of the same draws, and much of their noise is
        **averages("kl_model_data", own - under_p_star, tokens),
        **(absent("kl_data_model") if gap is None else averages("kl_data_model", gap, recall_tokens)),
        **averages("data_log_prob", data_log_prob, recall_tokens),
        "finished": finished, "finished_se": finished_se, **lengths(tokens), **variety,
        "repetition_4": repetition(generated),
    }  # fmt: skip


def averages(name: str, values: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Both averages and their standard errors, as NAME, NAME_se, NAME_per_sequence and NAME_per_sequence_se.

    Raises ValueError for a NaN among the values, which no average of log-probabilities can have.
    """
    if np.isnan(values).any():
        raise ValueError(f"{name}: sequence {int(np.isnan(values).argmax())} has NaN for its log-probability")
    numbers = (*per_token(values, tokens), *per_sequence(values))
    return dict(zip(absent(name), numbers, strict=True))


def absent(name: str) -> dict[str, None]:
    """The names of `averages`, where there is nothing to average."""
    return dict.fromkeys((name, f"{name}_se", f"{name}_per_sequence", f"{name}_per_sequence_se"))


def share(where: np.ndarray) -> tuple[float, float]:
    """The share of True and its (binomial) standard error."""
    mean = float(np.mean(where))
    return mean, float(np.sqrt(mean * (1 - mean) / len(where)))


def lengths(tokens: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of how long sequences are."""
    sd = float(np.std(tokens, ddof=1)) if len(tokens) > 1 else float("nan")
    quantiles = {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(tokens, QUANTILES), strict=True)}
    return {"length_mean": float(np.mean(tokens)), "length_sd": sd, "length_quantiles": quantiles}


def distinct(rows: Sequence[np.ndarray], n: int = 4) -> list[float]:
    """distinct-1 to distinct-n: how many different n-grams there are among all rows, over how many n-grams.

    It falls with the number of rows: only sets of equal size can be compared (Li et al. 2016, arXiv 1510.03055). An
    n-gram lies within one row; NaN where no row has one.
    """
    return [len(np.unique(codes)) / len(codes) if len(codes) else float("nan") for codes, _ in _ngrams(rows, n)]


def repetition(rows: Sequence[np.ndarray], n: int = 4) -> float:
    """Mean over rows of 1 - different n-grams / n-grams of the row (Welleck et al. 2020, arXiv 1908.04319, seq-rep-n).

    Rows shorter than n have none and are left out; NaN where all of them are.
    """
    *_, (codes, row) = _ngrams(rows, n)
    if not len(codes):
        return float("nan")
    different = np.unique(row * (codes.max() + 1) + codes) // (codes.max() + 1)
    counts, all_counts = (np.bincount(which, minlength=len(rows)) for which in (different, row))
    there = all_counts > 0
    return float(np.mean(1 - counts[there] / all_counts[there]))


def _ngrams(rows: Sequence[np.ndarray], most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 .. most: a number for each n-gram, equal where they are, and the row it is in; int64 [n-grams]."""
    ids = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
    row = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    starts, codes, different = np.arange(len(ids)), ids, ids.max(initial=0) + 1
    for n in range(1, most + 1):
        if n > 1:
            # numbered anew each time: the product of two numbers below the count of tokens fits int64
            longer = starts + n - 1 < len(ids)
            longer[longer] = row[starts[longer]] == row[starts[longer] + n - 1]
            starts, codes = starts[longer], codes[longer]
            codes = np.unique(codes * different + ids[starts + n - 1], return_inverse=True)[1].astype(np.int64)
        yield codes, row[starts]
