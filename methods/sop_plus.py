"""SOP+: SOP with a second, strong view that must agree, and balanced classes.

Liu, Zhu, Qu & You, "Robust Training under Label Noise by Over-parameterization", ICML 2022. Two views in one forward pass; with
p and q of SOP on the first, p' on the strong one, and m the batch's mean of q:
loss = mean(CE) + consistency * mean KL(p || p') + balance * (-mean_k log m_k), no gradient through the first p of KL.

Differs from the paper: as SOP does (``methods/sop.py``); u has no gradient from the balance of classes either. The rates are in
SOP's unit, 120 epochs in batches of 128: the published 10 and 10 of 300 epochs are 25 and 25.
Differs from the official code: as SOP does; the strong view is this project's, not a learnt policy of augmentation.
State: SOP's: 4 K + 4 bytes per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.table import Batch
from hparams import hyperparameter
from losses import divergence_from, imbalance
from methods.base import Clock, Step
from methods.sop import SOP, SOPConfig


@dataclass(frozen=True)
class SOPPlusConfig(SOPConfig):
    """The published defaults for CIFAR-10: 10 and 10 for 300 epochs, lambda_C 0.9, lambda_B 0.1."""

    given_rate: float = hyperparameter(
        25.0, "learning rate of u, how fast a given label is discounted", legal="[0, inf)", search=(0.01, 100.0), log=True
    )
    other_rate: float = hyperparameter(
        25.0, "learning rate of v, how fast another class takes its place", legal="[0, inf)", search=(0.1, 1000.0), log=True
    )
    consistency: float = hyperparameter(
        0.9, "weight of the divergence between the two views' predictions", legal="[0, inf)", search=(0.0, 1.0)
    )
    balance: float = hyperparameter(
        0.1, "weight of the imbalance of the classes in the mean prediction", legal="[0, inf)", search=(0.0, 0.5)
    )


class SOPPlus(SOP):
    """SOP whose batches are seen twice."""

    Config = SOPPlusConfig
    config: SOPPlusConfig
    summary = "SOP with a second view that must agree and balanced classes (Liu et al. 2022)"

    def step(self, batch: Batch, clock: Clock) -> Step:
        views = [self.task.view(self.config.augmentation)(batch.images), self.task.strong(batch.images)]
        logits, strong = self.learner(torch.cat(views)).chunk(2)
        losses, corrected = self.fit(logits, batch, clock)
        probabilities = logits.detach().softmax(dim=1)
        agreement = self.config.consistency * divergence_from(probabilities, strong)
        loss = (losses + agreement).mean() + self.config.balance * imbalance(corrected, self.config.floor)
        self.learner.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), batch.index, probabilities)
