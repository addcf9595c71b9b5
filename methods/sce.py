"""Symmetric cross-entropy: cross-entropy plus its reverse, in which prediction and label change places.

Wang, Ma, Chen, Luo, Yi & Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019. Loss:
alpha CE + beta RCE, RCE = -sum_k p_k log onehot(y)_k with log 0 := A < 0, that is -A (1 - p_y): cross-entropy learns, the
reverse, an absolute error, is robust. Gradient: (alpha - beta A p_y) (p - onehot(y)).

Differs from the paper: A is ln 1e-4, as the official code's clip at 1e-4 makes it, where the text says -4 (``log_zero``): the
published alpha and beta, those of later papers too, belong to the code's. Nothing is clipped; the schedule is this project's
(SGD, half a cosine). beta and A are one factor, so a search leaves A alone.
Differs from the official code: the labels are not smoothed: the reverse of a smoothed label is another function.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy, reverse_cross_entropy
from methods.base import Clock, Config, SingleNet


@dataclass(frozen=True)
class SCEConfig(Config):
    """The published defaults for CIFAR-10 are alpha 0.1 and beta 1; for CIFAR-100 they are 6 and 0.1. Both belong to the
    official code's A. MNIST: 0.01 and 1; WebVision and Clothing1M: 10 and 1."""

    alpha: float = hyperparameter(
        0.1,
        "weight of the cross-entropy; with many classes or little noise more",
        legal="[0, inf)",
        search=(0.01, 10.0),
        log=True,
        many_classes=6.0,
    )
    beta: float = hyperparameter(
        1.0,
        "weight of the reverse cross-entropy; with many classes less",
        legal="[0, inf)",
        search=(0.05, 10.0),
        log=True,
        many_classes=0.1,
    )
    log_zero: float = hyperparameter(
        math.log(1e-4), "what log 0 is taken for, A: ln 1e-4 in the official code; the paper says -4", legal="(-inf, 0)"
    )


class SymmetricCrossEntropy(SingleNet):
    """A loss that learns and a loss that is robust, added."""

    Config = SCEConfig
    config: SCEConfig
    summary = "cross-entropy plus reverse cross-entropy (Wang et al. 2019)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        reverse = reverse_cross_entropy(logits, batch.labels, self.config.log_zero)
        return self.config.alpha * self.active(logits, batch.labels) + self.config.beta * reverse

    def active(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that learns, per sample: logits [B, K], labels int64 [B] -> [B]."""
        return cross_entropy(logits, labels)
