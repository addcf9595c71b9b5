"""The squared distance of a prediction to soft labels (Brier's score), bounded where cross-entropy is not."""

from __future__ import annotations

from torch import Tensor

from losses.softmax import log_probabilities


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """sum_k (p_k - t_k)^2 per sample, in [0, 2]: logits and targets [B, K] -> [B]."""
    return (log_probabilities(logits).exp() - targets).square().sum(dim=1)
