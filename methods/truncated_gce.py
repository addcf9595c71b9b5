"""Truncated generalised cross-entropy: samples whose given label the network disbelieves are pruned, now and then anew.

Zhang & Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018. With
L_q(p) = (1 - p^q) / q: loss = L_q(p_y) for the samples that are kept, the constant L_q(threshold) for those that are pruned.
All are kept at first; from ``warmup`` on, every ``interval``, a pass over the training set keeps those with p_y > threshold.

Differs from the paper: the pruning pass uses the network as it is at the start of an epoch, not the checkpoint that was best
on noisy validation data, which a method never sees; warm-up and interval are fractions of the budget; the schedule is this
project's (SGD, half a cosine).
Differs from the official code: none was published. The common re-implementation picks the checkpoint by test accuracy and
prunes on augmented images one epoch earlier; here the pass sees plain images in evaluation mode. Its loss lacks the
constant of the pruned samples and lies lower by L_q(threshold); the gradient is the same.
State: p_y of the last pass, float32 [N], 1 at the start: 4 bytes per sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import truncated_generalized_cross_entropy
from losses.softmax import label_log_probability
from methods.base import Clock, Step, Task
from methods.gce import GCEConfig, GeneralizedCrossEntropy
from methods.parts.training_pass import pass_over_training_set


@dataclass(frozen=True)
class TruncatedGCEConfig(GCEConfig):
    """The published defaults are q = 0.7 and k = 0.5; pruning from epoch 40 of 120 on, every 10 epochs, is for CIFAR-10."""

    threshold: float = hyperparameter(
        0.5,
        "probability of the given label up to which a sample is pruned, k in the paper",
        legal="[0, 1)",
        search=(0.1, 0.6),
    )
    warmup: float = hyperparameter(
        0.333,
        "fraction of the budget before the first pruning",
        legal="[0, 1)",
        search=(0.2, 0.6),
    )
    interval: float = hyperparameter(
        0.083, "fraction of the budget from one pruning to the next", legal="(0, 1]", search=(0.03, 0.2), log=True
    )

    def begins(self) -> float:
        """The first pruning."""
        return self.warmup


class TruncatedGeneralizedCrossEntropy(GeneralizedCrossEntropy):
    """Generalised cross-entropy on the samples that the network believed when it last looked."""

    Config = TruncatedGCEConfig
    config: TruncatedGCEConfig
    summary = "generalised cross-entropy that prunes the samples it disbelieves (Zhang & Sabuncu 2018)"
    given_probability: Tensor

    def __init__(self, config: TruncatedGCEConfig, task: Task) -> None:
        super().__init__(config, task)
        self.register_buffer("given_probability", torch.ones(task.num_samples, device=task.labels.device))

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        if self.prunes(clock):
            self.look(data)
        yield from super().batches(data, clock)

    def prunes(self, clock: Clock) -> bool:
        """True for the first epoch on whose start ``warmup + j interval`` of the budget is done, for j = 0, 1, 2, ..."""
        return self.num_intervals(clock.epoch, clock.epochs) > self.num_intervals(clock.epoch - 1, clock.epochs)

    def num_intervals(self, epoch: int, epochs: int) -> int:
        """Whole intervals since the warm-up; -1 in the warm-up."""
        return max(-1, math.floor(round((epoch / epochs - self.config.warmup) / self.config.interval, 9)))

    def look(self, data: TrainData) -> None:
        """Notes the probability of each given label, in evaluation mode."""
        index, logits = pass_over_training_set(self.learner, data, self.task.plain)
        self.given_probability[index] = label_log_probability(logits, data.labels[index]).exp()

    def kept(self, index: Tensor) -> Tensor:
        """Which of the rows ``index`` are trained on, bool [B]."""
        return self.given_probability[index] > self.config.threshold

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        kept = self.kept(batch.index)
        return truncated_generalized_cross_entropy(logits, batch.labels, self.config.q, self.config.threshold, kept)

    def step(self, batch: Batch, clock: Clock) -> Step:
        kept = self.kept(batch.index).float().mean()
        return dataclasses.replace(super().step(batch, clock), scalars={"select/kept": kept})
