"""How much of each of two samples goes into their mixture."""

from __future__ import annotations

import torch


def mixing_weight(alpha: float) -> float:
    """One draw from Beta(``alpha``, ``alpha``), in [0, 1], from torch's default generator: the weight of a whole batch."""
    return float(torch.distributions.Beta(alpha, alpha).sample())
