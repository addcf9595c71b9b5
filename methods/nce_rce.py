"""Active-passive loss: normalised cross-entropy, which raises the given label, plus reverse, which lowers the others.

Ma, Huang, Wang, Romano, Erfani & Bailey, "Normalized Loss Functions for Deep Learning with Noisy Labels", ICML 2020. Loss:
alpha NCE + beta RCE, NCE = log p_y / sum_k log p_k, RCE = -A (1 - p_y) as in symmetric cross-entropy. Summed over the labels
each is a constant, so both are robust to symmetric noise; unlike the absolute error, the sum is not slow.

Differs from the paper: of its pairs only this one, which it reports as the best on CIFAR; A is ln 1e-4, as the official code's
clip at 1e-4 makes it (``log_zero``): the published alpha and beta belong to it; the schedule is this project's (SGD, half a
cosine).
Differs from the official code: no clamps (the normaliser is at least K log K), no clipping of gradients.
State: the network and its optimiser; nothing per sample.

Everything but the one term is the code of symmetric cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hparams import hyperparameter
from losses import normalized_cross_entropy
from methods.sce import SCEConfig, SymmetricCrossEntropy


@dataclass(frozen=True)
class NCERCEConfig(SCEConfig):
    """The published defaults for CIFAR-10 are alpha 1 and beta 1; for CIFAR-100 they are 10 and 0.1. MNIST: 1 and 10;
    WebVision: 50 and 0.1; Clothing1M: 10 and 1."""

    alpha: float = hyperparameter(
        1.0,
        "weight of the normalised cross-entropy; with many classes more",
        legal="[0, inf)",
        search=(0.1, 100.0),
        log=True,
        many_classes=10.0,
    )


class NormalizedAndReverseCrossEntropy(SymmetricCrossEntropy):
    """Two robust losses that make up for each other's slowness."""

    Config = NCERCEConfig
    config: NCERCEConfig
    summary = "normalised plus reverse cross-entropy, an active and a passive robust loss (Ma et al. 2020)"

    def active(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Normalised cross-entropy per sample: logits [B, K], labels int64 [B] -> [B]."""
        return normalized_cross_entropy(logits, labels)
