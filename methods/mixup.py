"""mixup: trains on convex combinations of pairs of images, with the losses of both labels.

Zhang, Cisse, Dauphin & Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018. Per batch one m ~ Beta(alpha, alpha)
and one permutation pi: x = m x_i + (1 - m) x_pi(i), loss = m CE(y_i, p) + (1 - m) CE(y_pi(i), p), which is cross-entropy with
the labels mixed in the same way.

Differs from the paper: the schedule is this project's (SGD, half a cosine).
Differs from the official code: nothing else.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from data.table import Batch
from hparams import hyperparameter
from methods.base import Clock, GivenLabelsConfig, Step
from methods.ce import CrossEntropy
from methods.parts.mixing import mix, mixing_weight


@dataclass(frozen=True)
class MixupConfig(GivenLabelsConfig):
    """The published default for CIFAR-10 is 1; with noisy labels the paper's best are 8 and 32."""

    alpha: float = hyperparameter(
        1.0,
        "of Beta(alpha, alpha), from which a batch's share is drawn: near 0 hardly mixed, large half and half",
        legal="[0.01, inf)",
        search=(0.1, 32.0),
        log=True,
    )


class Mixup(CrossEntropy):
    """Cross-entropy between what is mixed."""

    Config = MixupConfig
    config: MixupConfig
    summary = "trains on mixtures of two images and of their losses (Zhang et al. 2018)"

    def step(self, batch: Batch, clock: Clock) -> Step:
        images = self.task.view(self.config.augmentation)(batch.images)
        share = self.share()
        order = torch.randperm(len(images), device=images.device)
        logits = self.learner(mix(images, share, order))
        first = self.losses(logits, batch, clock)
        second = self.losses(logits, dataclasses.replace(batch, labels=batch.labels[order]), clock)
        loss = (share * first + (1 - share) * second).mean()
        self.learner.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), batch.index)

    def share(self) -> float:
        """m, the share of an image in its mixture, for one batch. Far below 0.01 torch's draws underflow, to 1/2."""
        return mixing_weight(self.config.alpha)
