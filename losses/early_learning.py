"""The early-learning regulariser (Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.softmax import log_probabilities

FLOOR = 1e-4  # the official code's; with K classes it holds up to K * FLOOR of the mass, too much from K = 1000 on


def clipped_probabilities(logits: Tensor) -> Tensor:
    """The softmax of logits [B, K], clipped to [1e-4, 1 - 1e-4]; no gradient flows where it was clipped."""
    return log_probabilities(logits).exp().clamp(FLOOR, 1 - FLOOR)


def early_learning_term(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 - <t, p>) per sample with p clipped, at most 0: logits [B, K], targets [B, K] in rows of sum <= 1 -> [B].

    Gradient in the logits where nothing is clipped: p_j (<t, p> - t_j) / (1 - <t, p>); it sums to 0 over the classes.
    """
    return torch.log1p(-(targets * clipped_probabilities(logits)).sum(dim=1))
