"""Cross-entropy on the given labels: the baseline that every other method must beat.

Differs from the paper: there is none; the schedule is this project's (SGD, half a cosine).
Differs from the official code: there is none.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from data.table import Batch
from losses import cross_entropy
from methods.base import Clock, SingleNet, Step


class CrossEntropy(SingleNet):
    """Trains on the given labels as they are."""

    summary = "cross-entropy on the given labels, the baseline"

    def step(self, batch: Batch, clock: Clock) -> Step:
        logits = self.learner(self.task.view(self.config.augmentation)(batch.images))
        loss = cross_entropy(logits, batch.labels).mean()
        self.learner.update(loss, clock)
        return Step(loss.detach(), batch.index, logits.detach().softmax(dim=1))
