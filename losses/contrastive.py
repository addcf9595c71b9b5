"""The contrastive regulariser of CTRR (Yi, Liu, She, McLeod & Wang, "On Learning Contrastive Representations for Learning
with Noisy Labels", CVPR 2022), in the form of its released code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

EDGE = 1e-4  # the released code's: coordinates of unit vectors are clipped to [EDGE, 1 - EDGE], so negative ones count nothing
SMALLEST = 1e-6  # of 1 - similarity: clipped coordinates are not renormalised, and the product can exceed 1 by a rounding


def contrastive_losses(queries: Tensor, keys: Tensor, probabilities: Tensor, threshold: float) -> Tensor:
    """sum_j W_ij (2 + c_ij) per sample: queries and keys [B, D] of any length, probabilities [B, K] -> [B].

    With G_ij the product of the clipped unit vectors of query i and key j: c_ii = -G_ii, c_ij = log(1 - G_ij). The gradient of
    -c_ij in an unclipped query u of unit vector n is (v - <n, v> n) / (|u| (1 - G_ij)), v the key. No gradient in
    ``probabilities``; for W see :func:`pair_weights`.
    """
    similarity = clipped_directions(queries) @ clipped_directions(keys).T
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    between = (1 - similarity).clamp_min(SMALLEST).log()  # finite on the diagonal, too: it is not used there
    pairs = torch.where(own, -similarity, between)
    return (pair_weights(probabilities.detach(), threshold) * (2 + pairs)).sum(dim=1)


def clipped_directions(vectors: Tensor) -> Tensor:
    """The unit vectors of [B, D] in float32 at least, each coordinate clipped; no gradient flows where it was."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return normalize(vectors, dim=1).clamp(EDGE, 1 - EDGE)


def pair_weights(probabilities: Tensor, threshold: float) -> Tensor:
    """W [B, B] in rows of sum 1: 1 for a sample and itself, the product <p_i, p_j> of the predictions [B, K] for two samples
    where it reaches ``threshold``, else 0; then divided by the row's sum."""
    agreement = probabilities @ probabilities.T
    weights = torch.where(agreement >= threshold, agreement, 0.0).fill_diagonal_(1.0)
    return weights / weights.sum(dim=1, keepdim=True)
