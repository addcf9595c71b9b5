"""Sparse regularisation: cross-entropy on sharpened, normalised logits plus a norm that makes predictions sparse.

Zhou, Liu, Wang, Zhai, Jiang & Ji, "Learning with Noisy Labels via Sparse Regularization", ICCV 2021. With v = z / |z|_2 / tau
and p = softmax(v): loss = CE(y, p) + w sum_k p_k^r, r < 1. The norm is smallest for one-hot predictions, among which any
loss is robust to symmetric noise. Its weight grows, w = strength * growth^f at the fraction f of the budget.

Differs from the paper: the growth over the budget is a hyperparameter, rho^T there (w = lambda_0 rho^epoch), so that the
schedule stretches with the budget; the schedule of the learning rate is this project's (SGD, half a cosine).
Differs from the official code: w grows after each epoch, there for MNIST in steps of 5; no clip of p at 1e-7, no clipping of
gradients; cross-entropy only, not focal loss or generalised cross-entropy (with q near 0 there, cross-entropy in effect). Its
MNIST branch does not normalise (``normalized`` false). Predictions are the softmax of z itself: that of v never exceeds 0.48
with 10 classes at tau 0.5; the most probable class is the same.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy, sharpened_logits, sparse_norm
from methods.base import Clock, GivenLabelsConfig, SingleNet


@dataclass(frozen=True)
class SRConfig(GivenLabelsConfig):
    """The published defaults for CIFAR-10: tau 0.5, r 0.1, lambda_0 1.2, growing by 1.03 per epoch for 120 epochs.
    For MNIST the weight doubles every 5 of 50 epochs, a growth of 1024."""

    temperature: float = hyperparameter(
        0.5,
        "divides the logits, tau in the paper: small sharpens, and lets predictions grow sure",
        legal="(0, inf)",
        search=(0.05, 1.0),
        log=True,
    )
    exponent: float = hyperparameter(
        0.1,
        "of the probabilities in the norm, r (or p) in the paper: smaller is closer to counting them, 1 is no norm",
        legal="(0, 1]",
        search=(0.01, 0.5),
        log=True,
    )
    strength: float = hyperparameter(
        1.2, "weight of the norm at the start, lambda_0 in the paper", legal="[0, inf)", search=(0.3, 10.0), log=True
    )
    growth: float = hyperparameter(
        34.7,
        "factor by which the weight of the norm grows over the budget (1.03 per epoch at 120 epochs)",
        legal="[1, inf)",
        search=(1.0, 1024.0),
        log=True,
    )
    normalized: bool = hyperparameter(True, "whether logits are divided by their length")


class SparseRegularization(SingleNet):
    """Cross-entropy that is pushed, harder and harder, to commit itself to one class."""

    Config = SRConfig
    config: SRConfig
    summary = "cross-entropy plus a growing penalty on predictions that are not sparse (Zhou et al. 2021)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        sharpened = sharpened_logits(logits, self.config.temperature, normalized=self.config.normalized)
        given = cross_entropy(sharpened, batch.labels, self.config.label_smoothing)
        return given + self.norm_weight(clock) * sparse_norm(sharpened, self.config.exponent)

    def norm_weight(self, clock: Clock) -> float:
        """w in this epoch."""
        return self.config.strength * math.pow(self.config.growth, clock.fraction)
