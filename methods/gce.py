"""Generalised cross-entropy: (1 - p_y^q) / q, between cross-entropy (q -> 0) and mean absolute error (q = 1).

Zhang & Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018.

Differs from the paper: the plain loss only (the truncated one is a method of its own); the schedule is this project's (SGD,
half a cosine).
Differs from the official code: none was published. Unlike the common re-implementations the power is taken of log p_y, so
nothing is clamped and the gradient stays finite where p_y underflows.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import generalized_cross_entropy
from methods.base import Clock, Config, SingleNet


@dataclass(frozen=True)
class GCEConfig(Config):
    """The published default is q = 0.7 for every kind of noise."""

    q: float = hyperparameter(
        0.7,
        "exponent: towards 0 cross-entropy (learns fast), 1 mean absolute error (most robust)",
        legal="(0, 1]",
        search=(0.05, 1.0),
    )


class GeneralizedCrossEntropy(SingleNet):
    """Cross-entropy whose gradient is weighted by p_y^q: what the network disbelieves pulls less."""

    Config = GCEConfig
    config: GCEConfig
    summary = "generalised cross-entropy, samples that the network disbelieves weigh less (Zhang & Sabuncu 2018)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return generalized_cross_entropy(logits, batch.labels, self.config.q)
