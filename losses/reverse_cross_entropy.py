"""Absolute error (Ghosh, Kumar & Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017) and
reverse cross-entropy (Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019)."""

from __future__ import annotations

from torch import Tensor

from losses.generalized_cross_entropy import generalized_cross_entropy


def absolute_error(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - p_y per sample, in [0, 1]: logits [B, K], labels int64 [B] -> [B].

    Half of the L1 distance between p and onehot(y), and generalised cross-entropy at q = 1. Gradient in the logits:
    p_y (p - onehot(y)). Summed over the K labels it is K - 1 for every p: it is symmetric.
    """
    return generalized_cross_entropy(logits, labels, 1.0)


def reverse_cross_entropy(logits: Tensor, labels: Tensor, log_zero: float) -> Tensor:
    """-sum_k p_k log onehot(y)_k per sample with log 0 := ``log_zero`` < 0: logits [B, K], labels int64 [B] -> [B].

    That is -log_zero (1 - p_y), in [0, -log_zero]; gradient in the logits: -log_zero p_y (p - onehot(y)).
    """
    return -log_zero * absolute_error(logits, labels)
