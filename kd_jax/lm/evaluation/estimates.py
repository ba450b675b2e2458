"""Averages with standard errors, lengths and variety of a set of sequences. Arrays in, numbers out.

`values` [N] are sums over the scored tokens of each sequence (nats), `tokens` [N] the numbers of these tokens. There
are two averages, and a name says which:

    per token (NAME)                    sum of all values / number of all tokens: long sequences weigh more
    per sequence (NAME_per_sequence)    mean of the values

Neither is the mean of the sequences' own means per token, and none is exponentiated.

Standard errors are over sequences. Sequences that answer the same prompts are alike: with `clusters`, the number of
each one's prompt [N], errors are over prompts.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.lm.corpus import Corpus, Rows
from kd_jax.metrics import Mean

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Bins of equal width over confidence from 0 to 1, as usual for this error.
CALIBRATION_BINS = 15


def clusters(rows: Rows) -> np.ndarray | None:
    """The number of each row's prompt, int [N]; None where all rows have one prompt, or each one of its own."""
    prompts = [tuple(ids[:length].tolist()) for ids, length in zip(rows.tokens, rows.prompt_length, strict=True)]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(number) in (1, len(prompts)):
        return None
    return np.array([number[prompt] for prompt in prompts])


def per_token(
    values: np.ndarray, tokens: np.ndarray, clusters: np.ndarray | None = None
) -> tuple[float, float]:  # fmt: skip
    """The ratio of sums, values [N] to tokens [N], and its standard error.

    The standard error is the delta method's: that of the mean of values - ratio * tokens, over the mean of tokens. It
    is NaN for fewer than two sequences (or clusters), or where a value is infinite, as is then the ratio.

    Args:
        values: [N], sums over each sequence's tokens.
        tokens: [N], how many those are.
        clusters: int [N], the number of each sequence's prompt; None where sequences are independent.
    """
    # float64: sums over a million tokens would lose digits in float32.
    values, tokens = np.asarray(values, np.float64), np.asarray(tokens, np.float64)
    total, count = tokens.sum(), len(values) if clusters is None else int(clusters.max(initial=-1)) + 1
    if not total:
        return float("nan"), float("nan")
    ratio = values.sum() / total
    if count < 2 or not np.isfinite(ratio):
        return float(ratio), float("nan")
    # A ratio of two random sums: long sequences have larger sums, and only what is not explained by length is noise.
    residuals = values - ratio * tokens
    if clusters is not None:
        residuals = np.bincount(clusters, residuals)
    return float(ratio), float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / total)


def per_sequence(values: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """The mean of values [N] and its standard error, which is NaN for fewer than two values or an infinite one."""
    if clusters is not None:
        return per_token(values, np.ones(len(values)), clusters)
    # the arrays of kd_jax.metrics are float32 unless told otherwise
    with jax.enable_x64(True):
        mean = Mean.of(jnp.asarray(values, jnp.float64))
        return float(mean.mean), float(mean.standard_error)


def both_averages(
    values: np.ndarray, tokens: np.ndarray, clusters: np.ndarray | None = None
) -> tuple[float, float, float, float]:
    """Per token and its standard error, per sequence and its standard error.

    Args:
        values, tokens, clusters: as of `per_token`.
    """
    return *per_token(values, tokens, clusters), *per_sequence(values, clusters)


def difference(one: tuple, other: tuple) -> tuple[float, float]:
    """The difference of two averages per token, and its standard error; each given as the arguments of `per_token`.

    The sequences are independent draws. Where both answer the same prompts, the error is too large rather than too
    small: what a prompt adds to both is not taken out.

    Args:
        one, other: values, tokens and clusters of a set of sequences, as of `per_token`.
    """
    (a, a_se), (b, b_se) = per_token(*one), per_token(*other)
    # independent draws: the variances add
    return a - b, float(np.hypot(a_se, b_se))


def share(where: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """The share of True and its standard error, binomial without clusters; NaN for fewer than two values."""
    if clusters is not None:
        return per_token(where, np.ones(len(where)), clusters)
    mean = float(np.mean(where))
    return mean, float(np.sqrt(mean * (1 - mean) / len(where))) if len(where) > 1 else float("nan")


def lengths(tokens: np.ndarray) -> tuple[float, float, dict[str, float]]:
    """Mean, standard deviation and quantiles of the lengths of sequences [N]."""
    sd = float(np.std(tokens, ddof=1)) if len(tokens) > 1 else float("nan")
    quantiles = {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(tokens, QUANTILES), strict=True)}
    return float(np.mean(tokens)), sd, quantiles


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): the bins' mean |hits - confidence|.

    Args:
        bins: [bin, 3]: tokens whose likeliest id has a probability in the bin, the sum of these probabilities
            (confidence), and at how many tokens that id was right.
    """
    tokens, confidence, right = np.asarray(bins, np.float64).T
    return float(np.abs(right - confidence).sum() / tokens.sum()) if tokens.sum() else float("nan")


def corpus_entropy(corpus: Corpus) -> tuple[float, float]:
    """Entropy per token of the distribution that samples were drawn from, in nats, and its standard error.

    Reads three narrow columns and no tokens.
    """
    columns = corpus.columns("length", "prompt_length", "sample_log_prob")
    # Minus a log-probability is an unbiased estimate of the entropy, and the samples have it already.
    return per_token(-columns["sample_log_prob"], columns["length"] - columns["prompt_length"])


def distinct(rows: Sequence[np.ndarray], n: int = 4) -> list[float]:
    """distinct-1 to distinct-n: different n-grams among all rows / n-grams.

    It falls with the number of rows: only sets of equal size can be compared (Li et al. 2016, arXiv 1510.03055). An
    n-gram lies within one row; NaN where no row has one.

    Args:
        rows: ids of each sequence, prompts left out.
        n: largest n-grams.
    """
    # Over all rows together: a mean over rows would not see that rows repeat each other.
    return [len(np.unique(codes)) / len(codes) if len(codes) else float("nan") for codes, _ in _ngrams(rows, n)]


def repetition(rows: Sequence[np.ndarray], n: int = 4) -> float:
    """Mean over rows of 1 - different n-grams / n-grams of the row (Welleck et al. 2020, arXiv 1908.04319, seq-rep-n).

    Rows shorter than n have none and are left out; NaN where all of them are.

    Args:
        rows: ids of each sequence, prompts left out.
        n: size of the n-grams.
    """
    *_, (codes, row) = _ngrams(rows, n)
    if not len(codes):
        return float("nan")
    # Row and n-gram in one number, so that one `unique` counts the different n-grams of all rows.
    different = np.unique(row * (codes.max() + 1) + codes) // (codes.max() + 1)
    counts, all_counts = (np.bincount(which, minlength=len(rows)) for which in (different, row))
    # A row without n-grams has no share, and 0 / 0 would be NaN.
    long_enough = all_counts > 0
    return float(np.mean(1 - counts[long_enough] / all_counts[long_enough]))


def _ngrams(rows: Sequence[np.ndarray], most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 .. most: a number for each n-gram, equal where they are, and the row it is in; int64 [n-grams]."""
    ids = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64)
    row = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    # Ids become small numbers first: they and the codes below multiply without overflow.
    ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    # An n-gram's number comes from that of its first n - 1 tokens and its last token.
    starts, codes, different = np.arange(len(ids)), ids, ids.max(initial=0) + 1
    for n in range(1, most + 1):
        if n > 1:
            # numbered anew for each n: the product of two numbers below the count of tokens fits int64
            longer = starts + n - 1 < len(ids)
            longer[longer] = row[starts[longer]] == row[starts[longer] + n - 1]
            starts, codes = starts[longer], codes[longer]
            codes = np.unique(codes * different + ids[starts + n - 1], return_inverse=True)[1].astype(np.int64)
        yield codes, row[starts]
