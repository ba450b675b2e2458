"""The mixture experiment in plain NumPy and scikit-learn, one fit at a time: the peer of kd_jax.gmm.experiment.

Written from the steps of the paper and of the published notebook, with both pairs of score columns; it shares no code
with kd_jax.
"""

import itertools

import numpy as np
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture

MODES = np.array([m for m in itertools.product((-1, 0, 1), repeat=2) if m != (0, 0)], float)
VARIANCE = 0.025


def sample_p_star(rng, n):
    return MODES[rng.integers(0, 8, n)] + np.sqrt(VARIANCE) * rng.normal(size=(n, 2))


def log_p_star(x):
    squared = ((x[:, None] - MODES) ** 2).sum(-1)
    return logsumexp(-0.5 * squared / VARIANCE, axis=1) - np.log(8 * 2 * np.pi * VARIANCE)


def fit(rng, x, components):
    model = GaussianMixture(components, covariance_type="diag", random_state=int(rng.integers(2**31)))
    return model.fit(x)


def sharpen(teacher, beta):
    # Normalised in log-space: a weight to the power of beta can underflow.
    powered = beta * np.log(teacher.weights_)
    sharp = GaussianMixture(teacher.n_components, covariance_type="diag")
    sharp.weights_ = np.exp(powered - logsumexp(powered))
    sharp.means_, sharp.covariances_ = teacher.means_, teacher.covariances_
    # sample() reads the covariances and score() this factor: a mixture that was never fitted needs both.
    sharp.precisions_cholesky_ = teacher.precisions_cholesky_
    return sharp


def draw(rng, model, n):
    model.random_state = int(rng.integers(2**31))
    return model.sample(n)[0]


def scores(rng, student, teacher, data, num_precision, num_recall):
    """precision, recall, precision_notebook, recall_notebook."""
    draws = draw(rng, student, num_precision)
    fresh = sample_p_star(rng, num_recall)
    return log_p_star(draws).mean(), student.score(fresh), teacher.score(draws), student.score(data)


def run_seed(seed, betas, *, num_data=100, teacher_components=4, num_distill=1000, num_precision=2000, num_recall=2000):
    """Scores of the direct student [4] and of the distilled ones [B, 4]."""
    rng = np.random.default_rng(seed)
    data = sample_p_star(rng, num_data)
    direct, teacher = fit(rng, data, 1), fit(rng, data, teacher_components)
    distilled = []
    for beta in betas:
        sharp = sharpen(teacher, beta)
        student = fit(rng, draw(rng, sharp, num_distill), 1)
        distilled.append(scores(rng, student, sharp, data, num_precision, num_recall))
    return scores(rng, direct, sharp, data, num_precision, num_recall), np.array(distilled)
