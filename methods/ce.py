"""Cross-entropy on the given labels: the baseline that every other method must beat; and the same on smoothed labels.

Szegedy, Vanhoucke, Ioffe, Shlens & Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016; with noisy
labels: Lukasik, Bhojanapalli, Menon & Kumar, "Does Label Smoothing Mitigate Label Noise?", ICML 2020. Both methods minimise
-sum_k t_k log p_k with t = (1 - label_smoothing) onehot(y) + label_smoothing / K; they differ in its default and range.

Differs from the paper: the mass is spread over all K classes as there, not over the K - 1 others; the schedule is this
project's (SGD, half a cosine).
Differs from the official code: there is none.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, SingleNet


class CrossEntropy(SingleNet):
    """Trains on the given labels as they are."""

    Config = GivenLabelsConfig
    config: GivenLabelsConfig
    summary = "cross-entropy on the given labels, the baseline"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return cross_entropy(logits, batch.labels, self.config.label_smoothing)


@dataclass(frozen=True)
class LabelSmoothingConfig(GivenLabelsConfig):
    """The published default is 0.1; with noisy labels more than the noise rate can help."""

    label_smoothing: float = hyperparameter(
        0.1, "mass of a given label that is spread over all classes", legal="[0, 1]", search=(0.0, 0.6)
    )


class LabelSmoothing(CrossEntropy):
    """Cross-entropy that never asks for certainty."""

    Config = LabelSmoothingConfig
    config: LabelSmoothingConfig
    summary = "cross-entropy on labels that leave some mass to every class (Szegedy et al. 2016)"
