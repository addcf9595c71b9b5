"""Symmetric cross-entropy: cross-entropy plus its reverse, in which prediction and label change places.

Wang, Ma, Chen, Luo, Yi & Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019. Loss:
alpha CE + beta RCE, RCE = -sum_k p_k log onehot(y)_k with log 0 := A < 0, that is -A (1 - p_y): cross-entropy learns, the
reverse, an absolute error, is robust. Gradient: (alpha - beta A p_y) (p - onehot(y)).

Differs from the paper: nothing is clipped; the schedule is this project's (SGD, half a cosine). For SGD only alpha / beta and
the learning rate matter (beside weight_decay), so a search leaves beta and A alone.
Differs from the official code: its clip at 1e-4 makes A -9.21, the paper says -4 (``log_zero``); published numbers, those of
later papers too, are the code's. The labels are not smoothed: the reverse of a smoothed label is another function.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy, reverse_cross_entropy
from methods.base import Clock, Config, SingleNet


@dataclass(frozen=True)
class SCEConfig(Config):
    """The published defaults for CIFAR-10 are alpha 0.1 and beta 1; for CIFAR-100 they are 6 and 0.1."""

    alpha: float = hyperparameter(
        0.1,
        "weight of the cross-entropy; with many classes or little noise more",
        legal="[0, inf)",
        search=(0.01, 10.0),
        log=True,
    )
    beta: float = hyperparameter(1.0, "weight of the reverse cross-entropy", legal="[0, inf)")
    log_zero: float = hyperparameter(
        -4.0, "what log 0 is taken for, A in the paper; the official code's is -9.21", legal="(-inf, 0)"
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
