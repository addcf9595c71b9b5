"""What SOP fits given labels with: predictions plus modelled noise (Liu, Zhu, Qu & You, "Robust Training under Label Noise by
Over-parameterization", ICML 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from losses.softmax import log_probabilities


def corrected_probabilities(logits: Tensor, added: Tensor, removed: Tensor, floor: float) -> Tensor:
    """max(p + added - removed, floor), divided by its sum, and again at least ``floor``: all [B, K].

    No gradient flows where an entry was below the floor, except through the sum.
    """
    raised = (log_probabilities(logits).exp() + added - removed).clamp_min(floor)
    return (raised / raised.sum(dim=1, keepdim=True)).clamp(floor, 1.0)


def unexplained(logits: Tensor, labels: Tensor, added: Tensor, removed: Tensor) -> Tensor:
    """|onehot(argmax p) + added - removed - onehot(y)|^2 per sample, without gradient in the logits: logits, added and removed
    [B, K], labels int64 [B] -> [B]."""
    num_classes = logits.shape[1]
    hard = one_hot(logits.argmax(dim=1), num_classes) - one_hot(labels, num_classes)
    return (hard + added - removed).square().sum(dim=1)


def divergence_from(targets: Tensor, logits: Tensor) -> Tensor:
    """KL(t || p) = sum_k t_k log(t_k / p_k) per sample, at least 0: targets and logits [B, K] -> [B]. Gradient: p - t."""
    return (torch.xlogy(targets, targets) - targets * log_probabilities(logits)).sum(dim=1)


def imbalance(probabilities: Tensor, floor: float) -> Tensor:
    """-mean_k log m_k of the batch's mean prediction m, each at least ``floor``: [B, K] -> scalar, log K where all are 1 / K.

    Of the whole batch, as classes are balanced over samples, not within one.
    """
    return -probabilities.mean(dim=0).clamp_min(floor).log().mean()
