"""The Kullback-Leibler divergence from a target to the prediction, as PENCIL takes it (Yi & Wu, "Probabilistic End-to-end Noise
Correction for Learning with Noisy Labels", CVPR 2019)."""

from __future__ import annotations

from torch import Tensor

from losses.softmax import log_probabilities


def reverse_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(p || t) = sum_k p_k (log p_k - log t_k) per sample, p and t the softmax of logits and target logits [B, K]: [B].

    Both p carry gradient: d/dz_k = p_k (log p_k - log t_k - KL), so that the prediction seeks one mode of t.
    """
    log_p = log_probabilities(logits)
    return (log_p.exp() * (log_p - log_probabilities(target_logits))).sum(dim=1)
