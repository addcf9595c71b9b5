"""M-DYR-H: mixup, then labels that give way to hard predictions as far as a mixture fitted to the losses calls them noisy.

Arazo, Ortego, Albert, O'Connor & McGuinness, "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019. Warm-up:
mixup on the given labels, x' = m x + (1 - m) x_perm with one m ~ Beta(alpha, alpha) per batch, and likewise the targets. At
the end of each epoch a mixture of two beta distributions is fitted to the losses of all samples. In the next epoch, B the
posterior of the component of large losses at a sample's present loss and z = argmax p:

    t = (1 - B) onehot(y) + B onehot(z),   loss = CE(m t + (1 - m) t_perm, p') + rho * sum_k (1/K) log((1/K) / mean p'_k)

Losses are scaled so that their 5th and 95th percentiles are 0 and 1, and those outside are left out of the fit, which is ten
steps of expectation maximisation with weighted moments. As in the code a step has three forward passes: unmixed for z, mixed
for the gradient, unmixed in evaluation mode for the loss that B is read from; the sweep at the end of an epoch is in
evaluation mode, with the view that is trained on.

Differs from the paper: the end of the warm-up is a fraction of the budget (105 of 300 epochs; there five after the first drop
of the learning rate); the schedule is this project's (SGD, half a cosine); the posterior is read from a table of 100 bins, as
in the code, and does not fall again to the right of its largest entry.
Differs from the official code: the 5th percentile itself is scaled to 0, there it is first raised by 1e-5; B is not clipped to
[1e-4, 1 - 1e-4]; a bin stands for its middle; variances and parameters of
the mixture have floors; one clip of the scaled losses to [0.001, 0.999] instead of three; no sweeps that nothing reads.
State: t as of the last visit, float32 [N, K], one-hot at the start (nothing is learnt from it): 4 K bytes per sample; the
table and the two percentiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import balance_penalty, cross_entropy, soft_cross_entropy
from methods.base import Clock, Config, Learner, Method, Step, Task
from methods.parts.mixing import mix, mixing_weight
from methods.parts.mixture import BetaMixture
from methods.parts.training_pass import pass_over_training_set

BINS = 100
PERCENTILES = (0.05, 0.95)
EDGE = 1e-3  # scaled losses are clipped to [EDGE, 1 - EDGE]: beta densities can be 0 or infinite at the ends
SMALLEST_SPAN = 1e-6  # added to the distance of the percentiles, which can be 0


@dataclass(frozen=True)
class MDYRHConfig(Config):
    """The published defaults for CIFAR: 105 of 300 epochs of mixup, then bootstrapping, alpha 32, rho 1."""

    warmup: float = hyperparameter(
        0.35,
        "fraction of the budget trained with mixup on the given labels before they give way",
        legal="[0, 1)",
        search=(0.1, 0.5),
    )
    mixing: float = hyperparameter(
        32.0,
        "alpha of the mixing weight's Beta(alpha, alpha): large mixes evenly, small hardly mixes",
        legal="[0.01, inf)",
        search=(0.3, 32.0),
        log=True,
    )
    balance_weight: float = hyperparameter(
        1.0, "weight of the penalty on classes that a batch's mean prediction leaves out, rho", legal="[0, inf)", search=(0, 2)
    )

    def begins(self) -> float:
        """The end of the warm-up."""
        return self.warmup


class MDYRH(Method[Batch]):
    """Mixup first, then mixup on labels that are part given, part predicted."""

    Config = MDYRHConfig
    config: MDYRHConfig
    summary = "mixup; labels yield to predictions as far as a beta mixture of the losses says (Arazo et al. 2019)"
    targets: Tensor
    posteriors: Tensor
    percentiles: Tensor

    def __init__(self, config: MDYRHConfig, task: Task) -> None:
        super().__init__(config, task)
        self.learner = Learner(task.make_net(), config)
        self.view = task.view(config.augmentation)
        self.register_buffer("targets", one_hot(task.labels, task.num_classes).float())
        self.register_buffer("posteriors", torch.zeros(BINS, device=task.labels.device))
        self.register_buffer("percentiles", torch.tensor([0.0, 1.0], device=task.labels.device))

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        yield from data.shuffled(self.config.batch_size)
        coming = Clock(clock.epoch + 1, clock.epochs)
        if coming.epoch < coming.epochs and coming.has_begun(self.config.begins()):
            index, logits = pass_over_training_set(self.learner, data, self.view)
            self.fit(cross_entropy(logits, data.labels[index]))

    def fit(self, losses: Tensor) -> None:
        """Fits the mixture to the losses [N] of all samples: moves the table and the percentiles."""
        levels = torch.tensor(PERCENTILES, dtype=torch.float64, device=losses.device)
        losses = losses.double()
        low, high = losses.quantile(levels)
        self.percentiles.copy_(torch.stack([low, high]))
        self.posteriors.copy_(BetaMixture.fit(self.scaled(losses[(losses >= low) & (losses <= high)])).table(BINS))

    def scaled(self, losses: Tensor) -> Tensor:
        """Losses [B] so that the percentiles become 0 and 1, clipped to lie inside."""
        low, high = self.percentiles.unbind()
        return ((losses - low) / (high - low + SMALLEST_SPAN)).clamp(EDGE, 1 - EDGE)

    def noisy(self, losses: Tensor) -> Tensor:
        """B: the probability that samples of these losses [B] belong to the component of large ones, [B]; 0 before a fit."""
        return self.posteriors[(BINS * self.scaled(losses)).long().clamp(0, BINS - 1)]

    def step(self, batch: Batch, clock: Clock) -> Step:
        images = self.view(batch.images)
        weight = mixing_weight(self.config.mixing)
        partners = torch.randperm(len(images), device=images.device)
        targets = one_hot(batch.labels, self.task.num_classes).float()
        if not clock.has_begun(self.config.begins()):
            logits = self.learner(mix(images, weight, partners))
            loss = soft_cross_entropy(logits, mix(targets, weight, partners)).mean()
            self.learner.update(loss, self.learning_rate(clock))
            return Step(loss.detach(), batch.index)
        with torch.no_grad():
            probabilities = self.learner(images).softmax(dim=1)
        logits = self.learner(mix(images, weight, partners))
        noisy = self.noisy(self.present_losses(images, batch.labels)).unsqueeze(1)
        targets = (1 - noisy) * targets + noisy * one_hot(probabilities.argmax(dim=1), self.task.num_classes)
        self.targets[batch.index] = targets
        loss = soft_cross_entropy(logits, mix(targets, weight, partners)).mean()
        loss = loss + self.config.balance_weight * balance_penalty(logits)
        self.learner.update(loss, self.learning_rate(clock))
        return Step(loss.detach(), batch.index, probabilities)

    @torch.no_grad()
    def present_losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy [B] of float images in evaluation mode, which the mixture was fitted in."""
        self.learner.eval()
        losses = cross_entropy(self.learner(images), labels)
        self.learner.train()
        return losses

    def predict(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.learner(self.task.plain(images)).softmax(dim=1)
        return probabilities

    def refined_labels(self) -> Tensor:
        """What was trained on at the last visit, before mixing; the given label until the warm-up ends."""
        return self.targets.clone()
