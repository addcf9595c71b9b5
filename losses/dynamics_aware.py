"""Dynamics-aware loss (Li et al., "Dynamics-Aware Loss for Learning with Label Noise", arXiv 2303.11562, 2023)."""

from __future__ import annotations

import math

from torch import Tensor

from losses.cross_entropy import cross_entropy, entropy
from losses.generalized_cross_entropy import generalized_cross_entropy


def dynamics_aware_loss(logits: Tensor, labels: Tensor, q: float, bootstrap_weight: float, *, hard: bool = False) -> Tensor:
    """((1 - p_y^q) + bootstrap_weight H(p) / log K) / q per sample: logits [B, K], labels int64 [B], q > 0 -> [B].

    H is the entropy, both p with gradient (soft bootstrapping); ``hard`` puts -log max_k p_k in its place. Each is at most
    log K, so the loss lies in [0, (1 + bootstrap_weight) / q]. Gradient of the soft term in the logits:
    -bootstrap_weight p (log p + H) / (q log K).
    """
    given = generalized_cross_entropy(logits, labels, q)
    if not bootstrap_weight:
        return given
    own = cross_entropy(logits, logits.argmax(dim=1)) if hard else entropy(logits)
    return given + bootstrap_weight * own / (q * math.log(logits.shape[1]))
