"""Normalised cross-entropy (Ma et al., "Normalized Loss Functions for Deep Learning with Noisy Labels", ICML 2020)."""

from __future__ import annotations

from torch import Tensor

from losses.softmax import log_probabilities


def normalized_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y / sum_k log p_k per sample, in [0, 1]: logits [B, K], labels int64 [B] -> [B]. Its sum over the K labels is 1.

    With P = -log p_y and S = -sum_k log p_k, at least K log K, the gradient in the logits is
    (p - onehot(y)) / S - P (K p - 1) / S^2.
    """
    log_p = log_probabilities(logits)
    return log_p.gather(1, labels.unsqueeze(1)).squeeze(1) / log_p.sum(dim=1)
