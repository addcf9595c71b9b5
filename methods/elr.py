"""Early-learning regularisation: cross-entropy plus a term that holds predictions to a running mean of earlier ones.

Liu, Niles-Weed, Razavian & Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020. Per batch: t <- beta t + (1 - beta) p, then loss = CE(y, p) + strength * log(1 - <t, p>), with the updated t.

Differs from the paper: as its code does, p is clipped to [1e-4, 1 - 1e-4] and renormalised before it enters t; beta follows
from ``memory``, a fraction of the budget, so that a short trial forgets in step; the schedule is this project's (SGD, half
a cosine); ELR+ (two networks, mixup, weight averaging) is a method of its own.
Differs from the official code: t is part of the checkpoint (there it is lost on resume).
State: t, float32 [N, K], zero at the start: 4 K bytes per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch
from hparams import hyperparameter
from losses import clipped_probabilities, cross_entropy, early_learning_term
from methods.base import Clock, GivenLabelsConfig, SingleNet, Task, memory_momentum


@dataclass(frozen=True)
class ELRConfig(GivenLabelsConfig):
    """The published defaults for CIFAR-10 with symmetric noise: beta 0.7 over 120 epochs, lambda 3. For Clothing1M beta is 0.7
    over 10 epochs, a memory of 0.28."""

    memory: float = hyperparameter(
        0.0234,
        "memory of the targets' running mean, as a fraction of the budget (0.7 per epoch at 120 epochs)",
        legal="(0, 1]",
        search=(0.01, 1.0),
        log=True,
    )
    strength: float = hyperparameter(
        3.0, "weight of the regulariser, lambda in the paper", legal="[0, inf)", search=(0.5, 10.0), log=True
    )


class EarlyLearningRegularization(SingleNet):
    """The given label is never replaced; its pull is cancelled where the network's own past disagrees."""

    Config = ELRConfig
    config: ELRConfig
    summary = "early-learning regularisation, holds predictions to a running mean of earlier ones (Liu et al. 2020)"
    targets: Tensor

    def __init__(self, config: ELRConfig, task: Task) -> None:
        super().__init__(config, task)
        self.register_buffer("targets", torch.zeros(task.num_samples, task.num_classes, device=task.labels.device))

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        targets = self.remember(logits.detach(), batch.index, clock)
        given = cross_entropy(logits, batch.labels, self.config.label_smoothing)
        return given + self.config.strength * early_learning_term(logits, targets)

    def remember(self, logits: Tensor, index: Tensor, clock: Clock) -> Tensor:
        """Moves the rows ``index`` of the targets towards the prediction; returns them, [B, K]. No gradient."""
        beta = memory_momentum(self.config.memory, clock.epochs)
        probabilities = clipped_probabilities(logits)
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        self.targets[index] = beta * self.targets[index] + (1 - beta) * probabilities
        return self.targets[index]

    def refined_labels(self) -> Tensor:
        """The running mean of the predictions; the given label where a sample was never visited."""
        given = one_hot(self.task.labels, self.task.num_classes).to(self.targets)
        mass = self.targets.sum(dim=1, keepdim=True)
        return torch.where(mass > 0, self.targets / mass, given)
