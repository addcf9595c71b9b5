"""CDR: different update rules for critical and for other weights, so that fewer weights are left to memorise with.

Xia, Liu, Han, Gong, Wang, Ge & Chang, "Robust Early-Learning: Hindering the Memorization of Noisy Labels", ICLR 2021. With g
the gradient of the cross-entropy, all weights are ranked by |g w|; the share 1 - tau with the largest scores is critical in
this step. Critical weights: w <- w - rate ((1 - tau) g + lambda sign(w)). The others: w <- w - rate lambda sign(w).

Differs from the paper: ``noncritical``, tau, is a hyperparameter that the search finds, the paper sets it to the true noise
rate; ranked are the weights of linear and convolutional layers (tensors of two dimensions or more), in one ranking over all
layers, biases and batch normalisation keep their full gradient (as in the code); ``sparsity``, lambda, acts on every
parameter, its value in the paper is not known, and the L2 penalty that every method here has, ``weight_decay``, stands beside
it; the momentum is this project's, which keeps a weight moving for some steps after it was last critical; the schedule is this
project's (SGD, half a cosine); no early stopping, as a search stops trials itself.
Differs from the official code: it has L2 alone (here ``sparsity`` 0); it forwards each batch twice, so that batch normalisation
records it twice. A rising share of noncritical weights, which it computes and overwrites, is left out.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy
from methods.base import Clock, GivenLabelsConfig, SingleNet, Step


@dataclass(frozen=True)
class CDRConfig(GivenLabelsConfig):
    """The paper has no default for tau, which is the noise rate there; 0.2 is ours, as is the strength of the L1 penalty."""

    noncritical: float = hyperparameter(
        0.2,
        "share of the weights that a step does not train, tau, ideally the noise rate",
        legal="[0, 1)",
        search=(0.0, 0.9),
    )
    sparsity: float = hyperparameter(
        1e-5,
        "L1 penalty on every parameter, lambda: what makes weights that are not critical vanish",
        legal="[0, inf)",
        search=(1e-7, 1e-3),
        log=True,
    )


class CDR(SingleNet):
    """Cross-entropy whose gradient reaches the critical weights only; the others decay."""

    Config = CDRConfig
    config: CDRConfig
    summary = "only the weights that matter most for the loss learn, the others decay (Xia et al. 2021)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return cross_entropy(logits, batch.labels, self.config.label_smoothing)

    def step(self, batch: Batch, clock: Clock) -> Step:
        logits = self.learner(self.task.view(self.config.augmentation)(batch.images))
        loss = self.losses(logits, batch, clock).mean()
        trained = [parameter.detach() for parameter in self.learner.net.parameters() if parameter.requires_grad]
        gradients = critical_gradients(trained, self.learner.gradients(loss), self.config.noncritical)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                gradient.add_(parameter.sign(), alpha=self.config.sparsity)
        self.learner.descend(gradients, self.learning_rate(clock))
        return Step(loss.detach(), batch.index, logits.detach().softmax(dim=1))


def critical_gradients(parameters: list[Tensor], gradients: list[Tensor | None], noncritical: float) -> list[Tensor | None]:
    """What the parameters learn along: of all weights (two dimensions or more) the ``floor((1 - noncritical) m)`` with the
    largest |g w| keep (1 - noncritical) g, equal scores at the edge together; the others get 0. The rest is unchanged."""
    pairs = list(zip(parameters, gradients, strict=True))
    scores = [(w * g).abs().flatten() for w, g in pairs if g is not None and w.dim() >= 2]
    num_weights = sum(len(score) for score in scores)
    num_critical = int(round((1 - noncritical) * num_weights, 6))
    if num_critical:
        threshold = torch.cat(scores).kthvalue(num_weights - num_critical + 1).values
    else:
        threshold = torch.tensor(torch.inf)
    return [
        g if g is None or w.dim() < 2 else torch.where((w * g).abs() >= threshold, (1 - noncritical) * g, 0.0) for w, g in pairs
    ]
