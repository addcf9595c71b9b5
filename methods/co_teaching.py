"""Co-teaching: two networks, each trained on the samples that the other finds easy.

Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", NeurIPS 2018. Per batch each
network ranks the samples by cross-entropy and hands the share 1 - R with the smallest loss to its peer, which is updated on
those. R rises as in the paper, R(T) = forget_rate * min(1, T / T_k), with T the epoch counted from 1 and T_k the fraction
``ramp`` of the budget.

Differs from the paper: ``forget_rate`` is a hyperparameter that the search finds, the paper sets it to the true noise rate;
SGD with half a cosine, weight decay and augmentation (one view, seen by both networks) instead of Adam on plain images. The
paper scores both networks; here, as nothing is to be ensembled, the first one predicts alone.
Differs from the official code: its schedule rises to full over T_k - 1 epochs and its mean loss is divided by the number of
kept samples twice (harmless with Adam, not with SGD). At least one sample of a batch is kept.
State: two networks and two optimisers; nothing per sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, Learner, Method, Step, Task


@dataclass(frozen=True)
class CoTeachingConfig(GivenLabelsConfig):
    """The paper's ramp: 10 of 200 epochs; its forget_rate is the noise rate, up to 0.8. Selection starts in the first epoch,
    so the method begins at 0."""

    forget_rate: float = hyperparameter(
        0.2,
        "share of a batch that is left out once the ramp is over, ideally the noise rate",
        legal="[0, 1)",
        search=(0.0, 0.9),
    )
    ramp: float = hyperparameter(
        0.05,
        "fraction of the budget over which the share left out rises to forget_rate",
        legal="(0, 1]",
        search=(0.02, 0.2),
    )


class CoTeaching(Method[Batch]):
    """Two learners with their own initialisation, the same batches, and crossed selections."""

    Config = CoTeachingConfig
    config: CoTeachingConfig
    summary = "two networks, each picks the small-loss samples that the other trains on (Han et al. 2018)"

    def __init__(self, config: CoTeachingConfig, task: Task) -> None:
        super().__init__(config, task)
        self.first = Learner(task.make_net(), config)
        self.second = Learner(task.make_net(), config)

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        return data.shuffled(self.config.batch_size)

    def step(self, batch: Batch, clock: Clock) -> Step:
        images = self.task.view(self.config.augmentation)(batch.images)
        logits, second_logits = self.first(images), self.second(images)
        smoothing = self.config.label_smoothing
        first_losses = cross_entropy(logits, batch.labels, smoothing)
        second_losses = cross_entropy(second_logits, batch.labels, smoothing)
        candidates, num_kept = self.candidates(logits, second_logits, clock)
        first_loss = (small_losses(second_losses, num_kept, candidates) * first_losses).sum() / num_kept
        second_loss = (small_losses(first_losses, num_kept, candidates) * second_losses).sum() / num_kept
        rate = self.learning_rate(clock)
        self.first.update(first_loss, rate)
        self.second.update(second_loss, rate)
        loss = (first_loss.detach() + second_loss.detach()) / 2
        return Step(loss, batch.index, logits.detach().softmax(dim=1))

    def candidates(self, first: Tensor, second: Tensor, clock: Clock) -> tuple[Tensor | None, int | Tensor]:
        """Which samples may be trained on, bool [B] (None: all), and how many are, given the networks' logits [B, K]."""
        return None, self.num_kept(len(first), clock)

    def forgotten(self, clock: Clock) -> float:
        """The share R that is left out in this epoch."""
        return self.config.forget_rate * min(1.0, (clock.epoch + 1) / (self.config.ramp * clock.epochs))

    def num_kept(self, num_images: int, clock: Clock) -> int:
        """How many samples of a batch are trained on in this epoch: floor((1 - R) B), at least 1."""
        forgotten = self.forgotten(clock)
        return max(1, int(round((1 - forgotten) * num_images, 9)))

    def predict(self, images: Tensor) -> Tensor:
        """The first network's probabilities."""
        probabilities: Tensor = self.first(self.task.plain(images)).softmax(dim=1)
        return probabilities


def small_losses(losses: Tensor, num_kept: int | Tensor, candidates: Tensor | None = None) -> Tensor:
    """1 for the ``num_kept`` smallest of losses [B] among ``candidates``, bool [B], 0 for the others, [B].

    Of equal losses the earlier is kept. The candidates, all if None, must be at least ``num_kept``.
    """
    losses = losses.detach()
    ranked = losses if candidates is None else losses.masked_fill(~candidates, torch.inf)
    order = ranked.argsort(stable=True)
    kept = torch.arange(len(losses), device=losses.device) < num_kept
    return torch.zeros_like(losses).scatter(0, order, kept.to(losses))
