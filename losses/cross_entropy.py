"""Cross-entropy with given and with soft labels, and the entropy of a prediction, in nats."""

from __future__ import annotations

from torch import Tensor

from losses.softmax import label_log_probability, log_probabilities


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """-sum_k t_k log p_k per sample, t = (1 - smoothing) onehot(y) + smoothing / K: logits [B, K], labels int64 [B] -> [B].

    Gradient in the logits: p - t. Without smoothing this is -log p_y, bit for bit.
    """
    given = -label_log_probability(logits, labels)
    if not smoothing:
        return given
    return (1 - smoothing) * given - smoothing * log_probabilities(logits).mean(dim=1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_k t_k log p_k per sample: logits and targets [B, K] -> [B]. Gradient in the logits, for rows of sum 1: p - t."""
    return -(targets * log_probabilities(logits)).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """H(p) = -sum_k p_k log p_k of the softmax, per sample, in [0, log K]: logits [B, K] -> [B].

    Both p carry gradient: -dH/dz_k = p_k (log p_k + H), so descent raises the logits of the classes above exp(-H).
    """
    log_p = log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(dim=1)
