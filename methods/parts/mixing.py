"""Mixing of a batch with itself (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def mixing_weight(alpha: float) -> float:
    """One draw from Beta(``alpha``, ``alpha``), in [0, 1], from torch's default generator: the weight of a whole batch."""
    return float(torch.distributions.Beta(alpha, alpha).sample())


def mix(rows: Tensor, weight: float, partners: Tensor) -> Tensor:
    """``weight`` * row i + (1 - ``weight``) * row ``partners[i]``: rows [B, ...], partners int64 [B] -> [B, ...].

    Cross-entropy is linear in its targets: that on mixed targets is the mixed sum of those on the single ones.
    """
    return weight * rows + (1 - weight) * rows[partners]
