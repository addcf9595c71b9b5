"""Cross-entropy on the given labels: the baseline that every other method must beat.

Differs from the paper: there is none; the schedule is this project's (SGD, half a cosine).
Differs from the official code: there is none.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from torch import Tensor

from data.table import Batch
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, SingleNet


class CrossEntropy(SingleNet):
    """Trains on the given labels as they are."""

    Config = GivenLabelsConfig
    config: GivenLabelsConfig
    summary = "cross-entropy on the given labels, the baseline"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return cross_entropy(logits, batch.labels, self.config.label_smoothing)
