"""Every divergence and its gradient from the definition, in NumPy and float64."""

import numpy as np

# with the parameters that tests go through; ends and what is near them included
PARAMETERS = {
    "forward_kl": [None], "reverse_kl": [None], "jensen_shannon": [0.5, 0.0, 1.0, 0.1, 0.9, 1e-3],
    "skew_forward_kl": [0.1, 0.0, 0.9], "skew_reverse_kl": [0.1, 0.0, 0.9], "total_variation": [None],
    "alpha_divergence": [0.5, 0.0, 1.0, 0.3, 0.99, 1e-2, 2.0],
}  # fmt: skip


def softmax(logits, temperature=1.0):
    logits = np.asarray(logits, np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_ratio(a, b):
    """log(a / b), 0 where a is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, np.log(a) - np.log(b), 0.0)


def kl(a, b):
    with np.errstate(invalid="ignore"):
        return np.where(a > 0, a * log_ratio(a, b), 0.0).sum(axis=-1)


def _divergence(name, p, q, x):
    """The value, and q times its derivative with respect to q."""
    if name == "forward_kl" or (name, x) in (("jensen_shannon", 0.0), ("alpha_divergence", 1.0)):
        return kl(p, q), -p
    if name == "reverse_kl" or (name, x) in (("jensen_shannon", 1.0), ("alpha_divergence", 0.0)):
        return kl(q, p), q * (log_ratio(q, p) + 1)
    if name == "jensen_shannon":
        m = x * p + (1 - x) * q
        return x * kl(p, m) + (1 - x) * kl(q, m), (1 - x) * q * log_ratio(q, m)
    if name == "skew_forward_kl":
        m = x * p + (1 - x) * q
        return kl(p, m), -(1 - x) * p * q / np.where(m > 0, m, 1)
    if name == "skew_reverse_kl":
        m = x * q + (1 - x) * p
        return kl(q, m), q * (log_ratio(q, m) + 1 - x * q / np.where(m > 0, m, 1))
    if name == "total_variation":
        return abs(p - q).sum(axis=-1) / 2, q * np.sign(q - p) / 2
    mixed = np.where((p > 0) & (q > 0), np.exp(x * log_ratio(p, q)) * q, 0.0)
    return (mixed.sum(axis=-1) - 1) / (x * (x - 1)), -mixed / x


def value(name, teacher, student, parameter=None, temperature=1.0, teacher_temperature=None):
    p, q = softmax(teacher, teacher_temperature or temperature), softmax(student, temperature)
    return _divergence(name, p, q, parameter)[0]


def gradient(name, teacher, student, parameter=None, temperature=1.0, teacher_temperature=None):
    """With respect to the student's logits."""
    p, q = softmax(teacher, teacher_temperature or temperature), softmax(student, temperature)
    slope = _divergence(name, p, q, parameter)[1]
    with np.errstate(invalid="ignore"):  # where the divergence is infinite it is NaN
        return (slope - q * slope.sum(axis=-1, keepdims=True)) / temperature


def entropy(logits, temperature=1.0):
    p = softmax(logits, temperature)
    return -kl(p, np.ones_like(p))


def cross_entropy(logits, labels):
    """The value and its gradient with respect to the logits."""
    q = softmax(logits)
    one_hot = np.eye(q.shape[-1])[labels]
    return -np.log((one_hot * q).sum(axis=-1)), q - one_hot
