"""SOP: sparse over-parameterisation. Each label's noise is modelled by parameters of its own, which only wrong labels need.

Liu, Zhu, Qu & You, "Robust Training under Label Noise by Over-parameterization", ICML 2022. Per sample a number u and a row v,
both from N(0, 1e-8^2). With e(y) the given label, U = u^2 e(y), V = v^2 (1 - e(y)):
q = max(p + U - V, eps) in rows of sum 1, again at least eps; CE = -log q_y; MSE = |e(argmax p) + U - V - e(y)|^2.
The network learns from CE, u from CE and v from MSE, by plain gradient descent on the rows that a batch has. They grow
geometrically with the visits, u where p_y is small and v where argmax p is not y: clean labels are fitted before they stir.

Differs from the paper: the rates of u and v are stated for 120 epochs in batches of 128. A visit moves a row by rate / 128
(whatever the batch size) * 120 / epochs, so that a shorter trial grows them as far. Where that is 1/2 or more for v, as at the
published 100 in 120 epochs or at 25 in 46, a v that has reached 1 jumps between 1 and -1 and its class stays noise, also when
the network is back at y. The schedule of the network is this project's (SGD, half a cosine).
Differs from the official code: as in the paper u has no gradient from MSE; ``given_learns_from`` both is the code's form, on
which the published rates for asymmetric noise depend. u and v are held within [-1, 1], as in the paper (there their squares are
clipped), and are part of the checkpoint (there they are lost on resume). MSE, which does not train the network, is not part of
the loss that is reported.
State: u, float32 [N], and v, float32 [N, K]: 4 K + 4 bytes per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch
from hparams import hyperparameter
from losses import corrected_probabilities, unexplained
from methods.base import Clock, Config, SingleNet, Task

REFERENCE_EPOCHS = 120
REFERENCE_BATCH = 128


@dataclass(frozen=True)
class SOPConfig(Config):
    """The published defaults for CIFAR-10 with symmetric noise: 10 and 10 for 120 epochs in batches of 128 (with asymmetric
    noise 10 and 100; CIFAR-100: 1 and 10, with asymmetric noise 1 and 100, or 0.1 and 100 with the code's form)."""

    given_rate: float = hyperparameter(
        10.0, "learning rate of u, how fast a given label is discounted", legal="[0, inf)", search=(0.01, 100.0), log=True
    )
    other_rate: float = hyperparameter(
        10.0, "learning rate of v, how fast another class takes its place", legal="[0, inf)", search=(0.1, 1000.0), log=True
    )
    given_learns_from: str = hyperparameter(
        "cross-entropy",
        "what u learns from: the cross-entropy (paper), or the squared error as well (both, code)",
        choices=("cross-entropy", "both"),
    )
    initial: float = hyperparameter(1e-8, "standard deviation of u and v at the start", legal="(0, 0.1]")
    floor: float = hyperparameter(1e-4, "smallest corrected probability, eps", legal="(0, 0.1]")


class SOP(SingleNet):
    """Cross-entropy on the given labels between them and the prediction plus modelled noise."""

    Config = SOPConfig
    config: SOPConfig
    summary = "sparse over-parameterisation, each label's noise has parameters of its own (Liu et al. 2022)"
    given: Tensor  # u
    others: Tensor  # v

    def __init__(self, config: SOPConfig, task: Task) -> None:
        super().__init__(config, task)
        device = task.labels.device
        self.register_buffer("given", (config.initial * torch.randn(task.num_samples)).to(device))
        self.register_buffer("others", (config.initial * torch.randn(task.num_samples, task.num_classes)).to(device))

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return self.fit(logits, batch, clock)[0]

    def fit(self, logits: Tensor, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor]:
        """CE per sample [B] and the corrected predictions q [B, K] of logits [B, K]; then moves u and v of the batch."""
        given = self.given[batch.index].requires_grad_()
        others = self.others[batch.index].requires_grad_()
        added, removed = modelled_noise(given, others, batch.labels)
        corrected = corrected_probabilities(logits, added, removed.detach(), self.config.floor)
        losses = -corrected.gather(1, batch.labels.unsqueeze(1)).squeeze(1).log()
        explained = added if self.config.given_learns_from == "both" else added.detach()
        left = unexplained(logits, batch.labels, explained, removed)
        pulls = torch.autograd.grad((losses + left).sum(), (given, others), retain_graph=True)
        per_visit = REFERENCE_EPOCHS / clock.epochs / REFERENCE_BATCH
        self.given[batch.index] = (given - self.config.given_rate * per_visit * pulls[0]).detach().clamp(-1, 1)
        self.others[batch.index] = (others - self.config.other_rate * per_visit * pulls[1]).detach().clamp(-1, 1)
        return losses, corrected

    def refined_labels(self) -> Tensor:
        """The given labels without the modelled noise: (1 - U) on the given class, V on the others, and what U takes away and V
        does not place yet evenly over the others; in rows of sum 1."""
        added, removed = modelled_noise(self.given, self.others, self.task.labels)
        given = one_hot(self.task.labels, self.task.num_classes)
        missing = (added.sum(dim=1, keepdim=True) - removed.sum(dim=1, keepdim=True)).clamp_min(0)
        believed = given - added + removed + (1 - given) * missing / (self.task.num_classes - 1)
        return believed / believed.sum(dim=1, keepdim=True)


def modelled_noise(given: Tensor, others: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """U = u^2 e(y) and V = v^2 (1 - e(y)), both [B, K]: u [B], v [B, K], labels int64 [B]."""
    onehot = one_hot(labels, others.shape[1])
    return given.square().unsqueeze(1) * onehot, others.square() * (1 - onehot)
