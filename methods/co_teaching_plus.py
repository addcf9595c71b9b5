"""Co-teaching+: as Co-teaching, but after a warm-up only samples on which the two networks disagree are candidates.

Yu, Han, Yao, Niu, Tsang & Sugiyama, "How does Disagreement Help Generalization against Label Corruption?", ICML 2019. With
D = {i in the batch: argmax f(x_i) != argmax g(x_i)}, each network ranks D by cross-entropy and hands the floor((1 - R) |D|)
smallest to its peer, with R as in Co-teaching. Before that, for the fraction ``warmup`` of the budget, plain Co-teaching.

Differs from the paper: where nothing of D would be kept, floor((1 - R) |D|) = 0, the whole batch are candidates, which is plain
Co-teaching, so that networks that agree go on learning (the paper does not say; skipping the batch would stop them);
otherwise as in Co-teaching: ``forget_rate`` is found by the search, the recipe is SGD with half a cosine, and the first network
predicts alone.
Differs from the official code: the cross-entropy is of the logits, there of the softmax as if it were logits, which damps the
gradient; where nothing of D would be kept it takes all of D, and on an empty D makes a step or none, by a counter that
restarts each epoch. Its further differences are those of Co-teaching.
State: two networks and two optimisers; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hparams import hyperparameter
from methods.base import Clock
from methods.co_teaching import CoTeaching, CoTeachingConfig


@dataclass(frozen=True)
class CoTeachingPlusConfig(CoTeachingConfig):
    """Co-teaching's, and the published warm-up for CIFAR-10: 20 of 200 epochs (CIFAR-100: 5, MNIST: 0,
    Tiny-ImageNet: 100)."""

    warmup: float = hyperparameter(
        0.1,
        "fraction of the budget trained by plain Co-teaching before disagreement counts",
        legal="[0, 1)",
        search=(0.0, 0.5),
    )

    def begins(self) -> float:
        """The end of the warm-up."""
        return self.warmup


class CoTeachingPlus(CoTeaching):
    """Co-teaching on what the two networks see differently, which keeps them from becoming one."""

    Config = CoTeachingPlusConfig
    config: CoTeachingPlusConfig
    summary = "Co-teaching, but only on samples on which the two networks disagree (Yu et al. 2019)"

    def candidates(self, first: Tensor, second: Tensor, clock: Clock) -> tuple[Tensor | None, int | Tensor]:
        if not clock.has_begun(self.config.begins()):
            return super().candidates(first, second, clock)
        differ = self.disagreement(first, second)
        num_kept = torch.floor((1 - self.forgotten(clock)) * differ.sum().double() + 1e-9).long()  # stays on the device
        too_few = num_kept < 1
        return differ | too_few, torch.where(too_few, self.num_kept(len(first), clock), num_kept)

    def disagreement(self, first: Tensor, second: Tensor) -> Tensor:
        """Where the most probable classes of two networks' logits [B, K] differ: bool [B]."""
        return first.argmax(dim=1) != second.argmax(dim=1)
