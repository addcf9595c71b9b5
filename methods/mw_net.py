"""Meta-Weight-Net: a small network weighs each sample by its loss, and learns to from samples with clean labels.

Shu, Xie, Yi, Zhao, Zhou, Xu & Meng, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", NeurIPS 2019.
With L_i(w) the cross-entropy of sample i, v_i = V(L_i; Theta) in (0, 1) its weight, L_i without gradient there, and alpha the
learning rate, per batch of n: w^(Theta) = w - alpha / n sum_i v_i grad L_i(w), one virtual step of plain SGD; Theta descends
the mean cross-entropy of w^ on a batch of clean samples, by Adam; w descends 1/n sum_i v_i L_i(w) with the new Theta. Since v
depends on Theta alone, the gradient is -alpha / n sum_i s_i dv_i/dTheta with s_i = <grad L_i(w), grad Meta(w^)>: a clean
gradient that agrees with the sample's raises the weights of losses like this one.

Differs from the paper: the batch of clean samples is drawn anew for every step, as large as a batch or all there are (paper:
shuffled passes over 1,000 images); SGD with half a cosine, which alpha follows.
Differs from the official code: the losses of the last step are those of the first, same weights, same dropout (there a second
forward pass); no copy of the network is made. As in its later script weights are not normalised and V is trained by Adam;
``normalise`` divides by their sum, as its earlier one does. Clean samples have to be trusted: its loss on them is not robust.
State: two networks and their optimisers; nothing per sample.

The gradient in Theta is exact: torch goes back through the virtual step to the weights, whose gradient there is the form above.
Of the ways to s without that, finite differences are at the mercy of rounding (bfloat16, TF32 convolutions), and forward mode
brings seconds of imports to every worker; both would have to replay dropout. Virtual and clean pass work on copies of the
buffers: batch normalisation's running statistics come from the training batches alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, Learner, Method, Step, Task


@dataclass(frozen=True)
class MWNetConfig(GivenLabelsConfig):
    """The published defaults, for about 60,000 steps. A trial of few steps needs a higher ``weight_lr``, but from about 0.05 on
    all weights can shrink to 0 at once, and nothing is learnt any more."""

    hidden: int = hyperparameter(100, "hidden units of the network that weighs", legal="[1, inf)")
    weight_lr: float = hyperparameter(
        1e-3, "learning rate of the network that weighs (Adam)", legal="[0, inf)", search=(1e-4, 0.03), log=True
    )
    weight_net_decay: float = hyperparameter(1e-4, "L2 penalty, coupled, on the network that weighs", legal="[0, inf)")
    normalise: bool = hyperparameter(False, "divide a batch's weights by their sum instead of by its size")


@dataclass(frozen=True)
class Pair:
    """What one step learns from: ``given`` of the training set, ``trusted`` with clean labels."""

    given: Batch
    trusted: Batch


class WeightNet(nn.Module):
    """One hidden layer from a loss to a weight in (0, 1), and Adam, whose state is in buffers."""

    def __init__(self, config: MWNetConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Sequential(nn.Linear(1, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1), nn.Sigmoid())
        for number, parameter in enumerate(self.net.parameters()):
            self.register_buffer(f"mean_{number}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"square_{number}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"steps_{number}", torch.zeros(()))

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.net(losses.unsqueeze(1)).squeeze(1)
        return weights

    def update(self, loss: Tensor) -> None:
        """One step of Adam on the scalar ``loss``."""
        parameters: list[Tensor] = list(self.net.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        numbers = range(len(parameters))
        with torch.no_grad():
            adam(
                parameters,
                list(gradients),
                [self.get_buffer(f"mean_{number}") for number in numbers],
                [self.get_buffer(f"square_{number}") for number in numbers],
                [],
                [self.get_buffer(f"steps_{number}") for number in numbers],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self.config.weight_lr,
                weight_decay=self.config.weight_net_decay,
                eps=1e-8,
                maximize=False,
            )


class MetaWeightNet(Method[Pair]):
    """A learner, and a network that says how much each of its losses counts."""

    Config = MWNetConfig
    config: MWNetConfig
    summary = "a small network, taught by clean samples, weighs each sample by its loss (Shu et al. 2019)"
    needs_trusted = True
    second_order = True

    def __init__(self, config: MWNetConfig, task: Task) -> None:
        super().__init__(config, task)
        self.learner = Learner(task.make_net(), config)
        self.weight_net = WeightNet(config)

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Pair]:
        trusted = self.task.trusted
        assert trusted is not None, "a search without trusted samples leaves this method out"
        for batch in data.shuffled(self.config.batch_size):
            chosen = torch.randperm(len(trusted))[: self.config.batch_size]
            yield Pair(batch, trusted.gather(chosen))

    def step(self, batch: Pair, clock: Clock) -> Step:
        view = self.task.view(self.config.augmentation)
        given, rate = batch.given, self.learning_rate(clock)
        logits = self.learner(view(given.images))
        losses = cross_entropy(logits, given.labels, self.config.label_smoothing)
        self.weight_net.update(self.clean_loss(losses, view(batch.trusted.images), batch.trusted.labels, rate))
        weights = self.weights(losses).detach()
        loss = (weights * losses).sum()
        self.learner.update(loss, rate)
        scalars = {"weight/mean": self.weight_net(losses.detach()).mean().detach()}
        return Step(loss.detach(), given.index, logits.detach().softmax(dim=1), scalars)

    def weights(self, losses: Tensor) -> Tensor:
        """What each of the losses [B] is multiplied with in their sum: [B], with gradient in the weighing network alone."""
        weights: Tensor = self.weight_net(losses.detach())
        if not self.config.normalise:
            return weights / len(weights)
        total = weights.sum()
        return weights / (total + (total == 0))

    def clean_loss(self, losses: Tensor, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Mean cross-entropy on clean samples after a virtual step along the weighted ``losses`` [B] of the learner.

        Its gradient in the weighing network goes through that step; the learner, its buffers included, stays as it is.
        """
        named = {name: parameter for name, parameter in self.learner.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad((self.weights(losses) * losses).sum(), list(named.values()), create_graph=True)
        state = {f"net.{name}": buffer.clone() for name, buffer in self.learner.net.named_buffers()}
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            state[name] = parameter.detach() - rate * gradient
        return cross_entropy(functional_call(self.learner, state, (images,)), labels).mean()

    def predict(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.learner(self.task.plain(images)).softmax(dim=1)
        return probabilities
