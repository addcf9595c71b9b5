"""DivideMix: two networks, each tells the other which labels to believe; the rest is learnt from as if it had none.

Li, Socher & Hoi, "DivideMix: Learning with Noisy Labels as Semi-supervised Learning", ICLR 2020. Warm-up: each network on the
given labels. Then at the start of an epoch each network's losses on all samples (evaluation mode, no augmentation, scaled to
[0, 1]) get a Gaussian mixture of two components; w is the posterior of the one with the smaller mean. A network is trained on
the *other's* division: X has w > threshold, U is the rest. Per step a batch of X and one of U, two views of each:

    guess:  t_u = sharpen(mean of p over both views and both networks)
    refine: t_x = sharpen(w onehot(y) + (1 - w) (mean of the network's own p over both views))
    mix:    all views and targets with a permutation of themselves, one m ~ Beta(alpha, alpha), m <- max(m, 1 - m)
    loss = CE on X + unlabelled_weight * ramp * mean (p - t)^2 on U + balance_weight * sum_k (1/K) log((1/K) / mean p_k)

with sharpen(t) = t^(1/T) / sum. The ramp rises from 0 to 1 after the warm-up, step by step. A step is one update of one
network: the first network's pass over its X, then the second's. The sum of both networks' logits predicts.

Differs from the paper: the squared error is a mean over classes, as in the code, to which every published weight belongs (the
paper's form is this one with the weight times K); warm-up and ramp are fractions of the budget; the schedule is this
project's (SGD, half a cosine). Weight, threshold and averaging are hyperparameters that the search finds; the paper sets
them by the noise rate.
Differs from the official code: warm-up batches are not twice as large; the two views of a batch are guessed for in one forward
pass (in training mode, as there); the mixture starts at the best two means instead of k-means from a random start. Where X
has fewer samples than a batch and than a tenth of the set, the tenth with the smallest losses takes its place; where U is
empty, X is learnt from alone. A balance of classes that underflow needs no clamp.
State: two networks and two optimisers; the last ``averaged`` scaled losses, float32 [N, 2, averaged], and the belief
w onehot(y) + (1 - w) p, mean over both networks, of the epoch's start, float32 [N, K]: 4 (K + 2 averaged) bytes per sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import balance_penalty, cross_entropy, entropy, soft_cross_entropy, squared_error
from methods.base import Clock, Config, Learner, Method, Step, Task, View, first_epoch
from methods.parts.mixing import mix, mixing_weight
from methods.parts.mixture import GaussianMixture, min_max
from methods.parts.training_pass import pass_over_training_set

VIEWS = 2  # of every image, M in the paper
FEWEST = 0.1  # share of the samples that is trained on as labelled where the mixture finds hardly any


@dataclass(frozen=True)
class DivideMixConfig(Config):
    """The published defaults. Warm-up is 10 (CIFAR-10) or 30 (CIFAR-100) of 300 epochs; it is an absolute need of five or more
    epochs of a large set, in which clean labels are learnt and noisy ones not yet, so the longer is the default and short
    budgets need more. ``batch_size`` is that of X."""

    warmup: float = hyperparameter(
        0.1,
        "fraction of the budget trained on the given labels before the first division",
        legal="[0, 1)",
        search=(0.01, 0.4),
        log=True,
    )
    threshold: float = hyperparameter(
        0.5, "probability of being clean above which a label is believed, tau", legal="[0, 1)", search=(0.3, 0.7)
    )
    unlabelled_weight: float = hyperparameter(
        25.0,
        "weight of the squared error on the unlabelled samples, lambda_u: small for little noise",
        legal="[0, inf)",
        search=(0.1, 150.0),
        log=True,
    )
    ramp: float = hyperparameter(
        0.0533,
        "fraction of the budget, after the warm-up, over which unlabelled_weight rises to full (16 of 300 epochs)",
        legal="(0, 1]",
        search=(0.02, 0.3),
        log=True,
    )
    temperature: float = hyperparameter(
        0.5, "T of the sharpening of targets: 1 leaves them, towards 0 they become hard", legal="(0, 1]", search=(0.3, 1.0)
    )
    mixing: float = hyperparameter(
        4.0,
        "alpha of the mixing weight's Beta(alpha, alpha): large mixes evenly, small hardly mixes",
        legal="[0.01, inf)",
        search=(0.5, 8.0),
        log=True,
    )
    balance_weight: float = hyperparameter(
        1.0, "weight of the penalty on classes that a batch's mean prediction leaves out", legal="[0, inf)", search=(0, 2)
    )
    averaged: int = hyperparameter(
        1,
        "epochs whose scaled losses are averaged for the division (5 steadies high noise)",
        legal="[1, 20]",
        search=(1, 5),
    )
    warmup_entropy: float = hyperparameter(
        0.0,
        "weight of the entropy that the warm-up rewards (1 for noise that depends on the class)",
        legal="[0, inf)",
        search=(0.0, 1.0),
    )

    def begins(self) -> float:
        """The end of the warm-up."""
        return self.warmup


@dataclass(frozen=True)
class Portion:
    """What one update of network ``number`` is made of. ``clean`` [B] are the probabilities w of the labelled rows, None in
    the warm-up; ``kept`` is the share of all samples that are labelled; ``ramp`` in [0, 1]."""

    number: int
    labelled: Batch
    clean: Tensor | None = None
    unlabelled: Batch | None = None
    ramp: float = 0.0
    kept: Tensor | None = None


class DivideMix(Method[Portion]):
    """Two networks that divide the samples for each other and learn from both parts."""

    Config = DivideMixConfig
    config: DivideMixConfig
    summary = "two networks divide the samples by a mixture of losses and learn semi-supervised (Li et al. 2020)"
    losses: Tensor
    belief: Tensor

    def __init__(self, config: DivideMixConfig, task: Task) -> None:
        super().__init__(config, task)
        self.first = Learner(task.make_net(), config)
        self.second = Learner(task.make_net(), config)
        self.view = task.view(config.augmentation)
        self.register_buffer("losses", torch.zeros(task.num_samples, 2, config.averaged, device=task.labels.device))
        self.register_buffer("belief", one_hot(task.labels, task.num_classes).float())

    @property
    def networks(self) -> tuple[Learner, Learner]:
        return self.first, self.second

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Portion]:
        if not clock.has_begun(self.config.begins()):
            for number in range(2):
                for batch in data.shuffled(self.config.batch_size):
                    yield Portion(number, batch)
            return
        clean, kept = self.divide(data, clock)
        kept = kept.cpu()
        for number in range(2):
            yield from self.portions(data, clock, number, clean[:, 1 - number], kept[:, 1 - number])

    def divide(self, data: TrainData, clock: Clock) -> tuple[Tensor, Tensor]:
        """Each network's probabilities that the labels are clean, [N, 2], and which ones it believes, bool [N, 2]."""
        epoch = clock.epoch - first_epoch(self.config.warmup, clock.epochs)
        num_averaged = min(self.config.averaged, epoch + 1)
        clean = torch.ones(len(data), 2, device=data.labels.device)
        kept = torch.ones_like(clean, dtype=torch.bool)
        for number, learner in enumerate(self.networks):
            index, logits = pass_over_training_set(learner, data, self.task.plain)
            labels = data.labels[index]
            self.losses[index, number, epoch % self.config.averaged] = min_max(cross_entropy(logits, labels)).float()
            losses = self.losses[index, number].sum(dim=1) / num_averaged
            own = GaussianMixture.fit(losses).posterior(losses).float()
            clean[index, number] = own
            kept[index, number] = believed(own, losses, self.config.threshold, self.config.batch_size)
            belief = 0.5 * refined(labels, own, logits.softmax(dim=1))
            self.belief[index] = self.belief[index] + belief if number else belief
        return clean, kept

    def portions(self, data: TrainData, clock: Clock, number: int, clean: Tensor, kept: Tensor) -> Iterator[Portion]:
        """A pass of network ``number`` over the rows that ``kept`` has, with as many batches of the others.

        ``clean`` [N] of the other network; ``kept`` bool [N], on the host, so that no batch waits for the device.
        """
        size, share = self.config.batch_size, kept.float().mean()
        others = cycled(data, size, ~kept)
        num_steps = int(kept.sum()) // size + 1
        for done, batch in enumerate(data.shuffled(size, kept)):
            ramp = self.ramp(clock, done / num_steps)
            yield Portion(number, batch, clean[batch.index], next(others, None), ramp, share)

    def ramp(self, clock: Clock, part: float) -> float:
        """The share of unlabelled_weight that acts once ``part`` of the epoch is done, in [0, 1]."""
        since = clock.epoch + part - first_epoch(self.config.warmup, clock.epochs)
        return min(1.0, max(0.0, since / (self.config.ramp * clock.epochs)))

    def step(self, batch: Portion, clock: Clock) -> Step:
        own, peer = self.networks[batch.number], self.networks[1 - batch.number]
        own.train()
        peer.eval()
        if batch.clean is None or batch.kept is None:
            return self.warm_up(own, batch.labelled, clock)
        images, targets, num_labelled = guessed(
            own, peer, self.view, batch.labelled, batch.clean, batch.unlabelled, self.config.temperature
        )
        weight = mixing_weight(self.config.mixing)
        weight = max(weight, 1 - weight)
        partners = torch.randperm(len(images), device=images.device)
        logits, targets = own(mix(images, weight, partners)), mix(targets, weight, partners)
        loss = soft_cross_entropy(logits[:num_labelled], targets[:num_labelled]).mean()
        loss = loss + self.config.balance_weight * balance_penalty(logits)
        index = batch.labelled.index
        if batch.unlabelled is not None:
            error = squared_error(logits[num_labelled:], targets[num_labelled:]).mean() / self.task.num_classes
            loss = loss + self.config.unlabelled_weight * batch.ramp * error
            index = torch.cat([index, batch.unlabelled.index])
        own.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), index, scalars={"select/kept": batch.kept})

    def warm_up(self, own: Learner, batch: Batch, clock: Clock) -> Step:
        """An update on the given labels."""
        logits = own(self.view(batch.images))
        losses = cross_entropy(logits, batch.labels) - self.config.warmup_entropy * entropy(logits)
        own.update(losses.mean(), self.learning_rate(clock))
        return Step(losses.detach().mean(), batch.index, logits.detach().softmax(dim=1))

    def predict(self, images: Tensor) -> Tensor:
        """The softmax of the sum of both networks' logits."""
        images = self.task.plain(images)
        probabilities: Tensor = (self.first(images) + self.second(images)).softmax(dim=1)
        return probabilities

    def refined_labels(self) -> Tensor:
        """The belief at the start of the last epoch, mean over both networks; the given label until the warm-up ends."""
        return self.belief.clone()


@torch.no_grad()
def guessed(
    own: Learner, peer: Learner, view: View, labelled: Batch, clean: Tensor, unlabelled: Batch | None, temperature: float
) -> tuple[Tensor, Tensor, int]:
    """All views of the labelled images, then of the unlabelled, their targets, and how many are of labelled ones."""
    views = [view(labelled.images) for _ in range(VIEWS)]
    targets = [sharpened(refined(labelled.labels, clean, mean_prediction([own], views)), temperature)] * VIEWS
    if unlabelled is not None:
        others = [view(unlabelled.images) for _ in range(VIEWS)]
        targets += [sharpened(mean_prediction([own, peer], others), temperature)] * VIEWS
        views += others
    return torch.cat(views), torch.cat(targets), VIEWS * len(clean)


def mean_prediction(learners: Sequence[Learner], views: Sequence[Tensor]) -> Tensor:
    """Mean of the probabilities of several ``views`` [B, C, H, W] of the same images, over views and learners, [B, K]."""
    images = torch.cat(list(views))
    return torch.stack([part for learner in learners for part in learner(images).softmax(dim=1).chunk(len(views))]).mean(dim=0)


def refined(labels: Tensor, clean: Tensor, probabilities: Tensor) -> Tensor:
    """w onehot(y) + (1 - w) p: labels int64 [B], clean [B] and probabilities [B, K] -> [B, K]."""
    clean = clean.unsqueeze(1)
    return clean * one_hot(labels, probabilities.shape[1]) + (1 - clean) * probabilities


def sharpened(targets: Tensor, temperature: float) -> Tensor:
    """t^(1/T) in rows of sum 1: [B, K] -> [B, K]. By logarithms, so that a small T does not underflow."""
    return (targets.log() / temperature).softmax(dim=1)


def believed(clean: Tensor, losses: Tensor, threshold: float, batch_size: int) -> Tensor:
    """Which labels to believe, bool [N]: clean [N] above ``threshold``. Where these are fewer than a batch and than a tenth of
    the samples, the tenth of the smallest ``losses`` [N] instead (more where equal losses are)."""
    kept = clean > threshold
    fewest = math.ceil(FEWEST * len(clean))
    if kept.sum() < min(batch_size, fewest):
        kept = losses <= losses.kthvalue(fewest).values
    return kept


def cycled(data: TrainData, batch_size: int, keep: Tensor) -> Iterator[Batch]:
    """Batches of the rows that ``keep`` [N] has, shuffled again whenever all were seen; none where it has none."""
    seen = True
    while seen:
        seen = False
        for batch in data.shuffled(batch_size, keep):
            seen = True
            yield batch
