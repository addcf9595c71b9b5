"""Generalised cross-entropy (Zhang & Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
Labels", NeurIPS 2018), plain and truncated."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.softmax import label_log_probability


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float) -> Tensor:
    """(1 - p_y^q) / q per sample, in [0, 1/q]: logits [B, K], labels int64 [B], q > 0 -> [B].

    Written as -expm1(q log p_y) / q: it stays exact as q goes to 0 (cross-entropy) and its gradient p_y^q (p - onehot(y))
    stays finite where p_y underflows, without a clamp. q = 1 is 1 - p_y.
    """
    return -torch.expm1(q * label_log_probability(logits, labels)) / q


def truncated_generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float, threshold: float, kept: Tensor) -> Tensor:
    """Generalised cross-entropy where ``kept``, bool [B], and its value at p_y = ``threshold`` elsewhere, without gradient.

    Logits [B, K], labels int64 [B], q > 0, ``threshold`` in [0, 1) -> [B]. With kept = (p_y > threshold) it is continuous.
    """
    losses = generalized_cross_entropy(logits, labels, q)
    return torch.where(kept, losses, (1 - threshold**q) / q)
