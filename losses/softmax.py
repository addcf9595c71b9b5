"""Log-probabilities: what every loss here starts from."""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Log of the softmax of logits [B, K], in float32 at least, whatever precision the network ran in; float64 stays."""
    return torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def label_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y for logits [B, K] and labels int64 [B]: [B]."""
    return log_probabilities(logits).gather(1, labels.unsqueeze(1)).squeeze(1)
