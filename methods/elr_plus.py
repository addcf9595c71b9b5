"""ELR+: early-learning regularisation with two networks, averages of their weights, and mixup.

Liu, Niles-Weed, Razavian & Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020. For each network: h <- beta h + (1 - beta) p, with p the prediction of the other network's average on the
unmixed images. With m ~ Beta(mixup, mixup), m <- max(m, 1 - m), images, labels y and rows h are mixed with those of a
random partner, x' = m x + (1 - m) x_partner, and loss = CE(y', p') + ramp * strength * log(1 - <h', p'>), p' the network's
prediction for x', clipped to [1e-4, 1 - 1e-4] in the second term. After each update the average moves,
average <- a average + (1 - a) network, with a = ramp * its momentum and ramp(f) = exp(-5 (1 - min(f / length, 1))^2) at the
fraction f of the budget, each with a length of its own. The two networks' mean logits predict.

Differs from the paper: p' is clipped, as in the code, so that the logarithm stays finite; beta and a follow from memories that
are fractions of the budget, and the ramps are constant within an epoch; the schedule is this project's (SGD, half a cosine).
Differs from the official code: both networks see the same split, labels and batches, each with its own view and mixup
(there each draws a split and noise of its own, which tells the pair more than one noisy label per sample); the averages
start as copies of their networks, not from an initialisation of their own (which the ramp replaces at once), and drop no
features. As there, the averages see batches in training mode: their own statistics of batch normalisation are recorded and
never used. ``weigh_labels`` is what the code does for exactly 100 classes; where every weight of a row is 0, which the code
divides by to nan, the labels are not weighed.
State: two networks, two optimisers, two averages; h, float32 [N, 2, K], zero at the start: 8 K bytes per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import early_learning_term, soft_cross_entropy
from methods.base import Clock, GivenLabelsConfig, Learner, Method, Step, Task, memory_momentum
from methods.parts.mixing import mix, mixing_weight
from methods.parts.moving_average import MovingAverage, averaging_momentum


@dataclass(frozen=True)
class ELRPlusConfig(GivenLabelsConfig):
    """The published defaults for CIFAR-10 with symmetric noise: 200 epochs of 352 batches. For CIFAR-100: beta 0.9 at 250
    epochs (memory 0.038), lambda 7, ramp 0.45, weigh_labels true."""

    memory: float = hyperparameter(
        0.014,
        "memory of the targets' running mean, as a fraction of the budget (0.7 per epoch at 200 epochs)",
        legal="(0, 1]",
        search=(0.01, 1.0),
        log=True,
    )
    strength: float = hyperparameter(
        3.0, "weight of the regulariser, lambda in the paper", legal="[0, inf)", search=(0.5, 10.0), log=True
    )
    ramp: float = hyperparameter(
        0.0, "fraction of the budget over which the regulariser's weight rises", legal="[0, 1]", search=(0.0, 0.5)
    )
    mixup: float = hyperparameter(
        1.0,
        "both parameters of the beta distribution of the mixing shares",
        legal="[0.01, inf)",
        search=(0.5, 5),
        log=True,
    )
    averaging: float = hyperparameter(
        0.00473,
        "memory of the running mean of the weights, as a fraction of the budget (0.997 per step at 70,000 steps)",
        legal="(0, 1]",
        search=(0.0015, 0.1),
        log=True,
    )
    averaging_ramp: float = hyperparameter(
        0.569, "fraction of the budget over which the averages slow down to that memory (40,000 steps)", legal="[0, 1]"
    )
    weigh_labels: bool = hyperparameter(False, "multiply mixed labels by mixed targets; published for CIFAR-100")


class ELRPlus(Method[Batch]):
    """Two learners; each is held to a running mean of what the other's average predicts."""

    Config = ELRPlusConfig
    config: ELRPlusConfig
    summary = "early-learning regularisation with two networks, averaged weights and mixup (Liu et al. 2020)"
    targets: Tensor

    def __init__(self, config: ELRPlusConfig, task: Task) -> None:
        super().__init__(config, task)
        self.first = Learner(task.make_net(), config)
        self.second = Learner(task.make_net(), config)
        self.first_average = MovingAverage(self.first.net)
        self.second_average = MovingAverage(self.second.net)
        self.register_buffer("targets", torch.zeros(task.num_samples, 2, task.num_classes, device=task.labels.device))

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        return data.shuffled(self.config.batch_size)

    def step(self, batch: Batch, clock: Clock) -> Step:
        first_loss, second_seen = self.loss(0, self.first, self.second_average, batch, clock)
        second_loss, first_seen = self.loss(1, self.second, self.first_average, batch, clock)
        rate, momentum = self.learning_rate(clock), self.averaging_momentum(clock)
        self.first.update(first_loss, rate)
        self.second.update(second_loss, rate)
        self.first_average.follow(self.first.net, momentum)
        self.second_average.follow(self.second.net, momentum)
        return Step((first_loss.detach() + second_loss.detach()) / 2, batch.index, (first_seen + second_seen) / 2)

    def loss(self, number: int, learner: Learner, peer: nn.Module, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor]:
        """The scalar loss of network ``number``, and what the peer's average predicts for the unmixed batch, [B, K]."""
        images = self.task.view(self.config.augmentation)(batch.images)
        probabilities = peer(images).softmax(dim=1)
        targets = self.remember(number, probabilities, batch.index, clock)
        smoothing = self.config.label_smoothing
        labels = (1 - smoothing) * one_hot(batch.labels, self.task.num_classes) + smoothing / self.task.num_classes
        share = mixing_weight(self.config.mixup)
        share = max(share, 1 - share)
        partner = torch.randperm(len(images), device=images.device)
        images, labels, targets = (mix(part, share, partner) for part in (images, labels, targets))
        if self.config.weigh_labels:
            labels = weighed(labels, targets)
        strength = self.config.strength * ramp_up(clock.fraction, self.config.ramp)
        logits = learner(images)
        return (soft_cross_entropy(logits, labels) + strength * early_learning_term(logits, targets)).mean(), probabilities

    def remember(self, number: int, probabilities: Tensor, index: Tensor, clock: Clock) -> Tensor:
        """Moves network ``number``'s rows ``index`` of the targets towards ``probabilities`` [B, K]; returns them, [B, K]."""
        beta = memory_momentum(self.config.memory, clock.epochs)
        self.targets[index, number] = beta * self.targets[index, number] + (1 - beta) * probabilities
        return self.targets[index, number]

    def averaging_momentum(self, clock: Clock) -> float:
        """The factor, per step, of the running mean of the weights: near 0 at the start, so that the networks copy in."""
        full = averaging_momentum(self.config.averaging, clock, self.task, self.config.batch_size)
        return ramp_up(clock.fraction, self.config.averaging_ramp) * full

    def predict(self, images: Tensor) -> Tensor:
        """The softmax of the two networks' mean logits; the averages only make targets."""
        plain = self.task.plain(images)
        logits: Tensor = (self.first(plain) + self.second(plain)) / 2
        return logits.softmax(dim=1)

    def refined_labels(self) -> Tensor:
        """The mean of both running means of predictions; the given label where a sample was never visited."""
        given = one_hot(self.task.labels, self.task.num_classes).to(self.targets)
        both = self.targets.sum(dim=1)
        mass = both.sum(dim=1, keepdim=True)
        return torch.where(mass > 0, both / mass, given)


def weighed(labels: Tensor, targets: Tensor) -> Tensor:
    """``labels`` times ``targets``, in rows that sum to 1 however small the products are: all [B, K], none negative.

    A row whose products are all 0 stays as it is: the targets rule out every class that is given, and say nothing of which
    of them is the better. The products are float64, in which those of two positive float32 are never 0.
    """
    weights = labels.double() * targets.double()
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total, labels).to(labels)


def ramp_up(fraction: float, length: float) -> float:
    """exp(-5 (1 - min(fraction / length, 1))^2): from 0.0067 at 0 to 1 at ``length`` and after; without a length always 1."""
    done = min(fraction / length, 1.0) if length else 1.0
    return math.exp(-5 * (1 - done) ** 2)
