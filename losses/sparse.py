"""Sparse regularisation (Zhou et al., "Learning with Noisy Labels via Sparse Regularization", ICCV 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses.softmax import log_probabilities


def sharpened_logits(logits: Tensor, temperature: float, *, normalized: bool) -> Tensor:
    """logits [B, K] / temperature, each row first divided by its L2 norm where ``normalized``: [B, K], float32 at least.

    Normalised, no probability exceeds 1 / (1 + (K - 1) exp(-sqrt(K / (K - 1)) / temperature)), and the gradient of any loss
    of the result is orthogonal to the logits. A row of zeros stays zero.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (normalize(logits, dim=1) if normalized else logits) / temperature


def sparse_norm(logits: Tensor, exponent: float) -> Tensor:
    """S = sum_k p_k^r, r the ``exponent`` in (0, 1], per sample, in [1, K^(1 - r)]: logits [B, K] -> [B].

    1 for a one-hot p only (for r < 1), K^(1 - r) for the uniform one. Written as sum_k exp(r log p_k): the gradient in the
    logits, r (p^r - p S), stays finite where a p_k underflows, without a clamp.
    """
    return torch.exp(exponent * log_probabilities(logits)).sum(dim=1)
