"""PENCIL: label distributions that are learnt along with the network, and then trained on.

Yi & Wu, "Probabilistic End-to-end Noise Correction for Learning with Noisy Labels", CVPR 2019. Each sample has label logits l,
10 onehot(y) at the start, and t = softmax(l). Stage 1: cross-entropy on the given labels at a constant, high learning rate.
Stage 2, at the same: with p the prediction, L = (KL(p || t) + 10 alpha L_o + beta H(p)) / K, where L_o = -log t_y holds the
labels and has no gradient in the network. The network descends the mean of L, and the label logits of the batch step by lambda
along theirs, l <- l - lambda / (B K) [(t - p) + 10 alpha (t - onehot(y))], with the same p. Stage 3: labels are frozen, the
loss is KL(p || t) / K, the learning rate ``final_lr``, a tenth and a hundredth of it for a third of the stage each.

Differs from the paper: lambda is declared as ``label_steps``, the sum of lambda / (B K) over stage 2, so that labels move as
far at other batch sizes, numbers of classes and budgets. A visit's lambda / (B K) is at most 2 / (1 + 10 alpha), half of where
the descent stops going down: in a short stage 2 labels would jump from one class to another and back. L_o is weighted by
10 alpha / K, which with ten classes is the paper's alpha; at its alpha K = 1 t stays half onehot(y), and with a hundred classes
or more no label could change. alpha and beta are those that another group found to work with L_o as the paper writes it (the
published 0.1 to 0.4 hold the labels fast).
Differs from the official code: with ``compatibility`` paper (the default) L_o is -log t_y; with official it is, as there, a
cross-entropy that takes t for logits, whose gradient is far weaker: J (softmax(t) - onehot(y)) with J = diag(t) - t t^T, for
which alpha was published. It is curved less, so there a visit's lambda / (B K) is at most 4 / (1 + 4.41 alpha), the whole of
where the descent stops going down; no published rate is above that. The last learning rates are not rounded down to 0, K is
not always 10, and rows are updated in place.
State: l, float32 [N, K]: 4 K bytes per sample.

Where the losses of stages 2 and 3 carry 1 / K, cross-entropy does not: gradients shrink at the switch, and with them what a
learning rate does beside the same weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy, entropy, reverse_divergence
from methods.base import Clock, Config, SingleNet, Task, first_epoch

CONFIDENCE = 10.0  # label logit of the given class at the start
DROP = 10.0  # the final learning rate is divided by it after each third of the last stage
THIRDS = 3
CLASSES = 10  # for which alpha is stated
STEADY = 2.0  # over 1 + 10 alpha: half of 2 / curvature, up to which a descent along the label logits goes down
STEADY_OFFICIAL = 4.0  # over 1 + 10 alpha CURVATURE: the whole of it for the official form
CURVATURE = 0.441  # largest second derivative of the official L_o (two classes, t_y = 0.68), as a share of KL's largest, 1/2


@dataclass(frozen=True)
class PENCILConfig(Config):
    """The published stages: 70, 130 and 120 of 320 epochs. lambda 600 at batch 128 with 10 classes is 61 in 130 epochs."""

    warmup: float = hyperparameter(
        0.21875,
        "fraction of the budget trained on the given labels (stage 1)",
        legal="[0, 1)",
        search=(0.1, 0.35),
    )
    refinement: float = hyperparameter(
        0.40625,
        "fraction of the budget, after the first stage, in which labels are learnt (stage 2); the rest is stage 3",
        legal="[0, 1]",
        search=(0.2, 0.5),
    )
    label_steps: float = hyperparameter(
        61.0,
        "how far label logits can move in stage 2: the sum of lambda / (B K) over its epochs, where these are enough",
        legal="[0, inf)",
        search=(5.0, 500.0),
        log=True,
    )
    alpha: float = hyperparameter(
        0.01,
        "weight of what holds the labels to the given ones, for ten classes",
        legal="[0, inf)",
        search=(0.001, 0.5),
        log=True,
    )
    beta: float = hyperparameter(
        0.1, "weight of the entropy of the prediction in stage 2", legal="[0, inf)", search=(0.05, 0.8), log=True
    )
    final_lr: float = hyperparameter(
        0.2, "learning rate at the start of stage 3", legal="(0, inf)", search=(0.02, 0.5), log=True
    )
    compatibility: str = hyperparameter(
        "paper", "what holds the labels: -log t_y, or the official code's weaker form of it", choices=("paper", "official")
    )

    def begins(self) -> float:
        """The end of the first stage."""
        return self.warmup


class PENCIL(SingleNet):
    """Given labels, then labels and network together, then the labels that were found."""

    Config = PENCILConfig
    config: PENCILConfig
    summary = "label distributions, learnt by gradient along with the network, replace the labels (Yi & Wu 2019)"
    label_logits: Tensor

    def __init__(self, config: PENCILConfig, task: Task) -> None:
        super().__init__(config, task)
        self.register_buffer("label_logits", CONFIDENCE * one_hot(task.labels, task.num_classes).float())

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        if not clock.has_begun(self.config.begins()):
            return cross_entropy(logits, batch.labels)
        K = self.task.num_classes
        rows = self.label_logits[batch.index]
        losses = reverse_divergence(logits, rows) / K
        if clock.has_begun(self.labels_final()):
            return losses
        gradient = label_gradient(rows, logits.detach(), batch.labels, self.config.alpha, self.config.compatibility)
        self.label_logits[batch.index] = rows - self.label_rate(clock) * gradient
        return losses + self.config.beta * entropy(logits) / K

    def labels_final(self) -> float:
        """The fraction of the budget at which labels are frozen and stage 3 starts."""
        return self.config.warmup + self.config.refinement

    def label_rate(self, clock: Clock) -> float:
        """lambda / (B K): ``label_steps`` over the number of epochs of stage 2, each of which visits a sample once."""
        last = min(first_epoch(self.labels_final(), clock.epochs), clock.epochs)
        even = self.config.label_steps / (last - first_epoch(self.config.begins(), clock.epochs))
        return min(even, steadiest_rate(self.config.alpha, self.config.compatibility))

    def learning_rate(self, clock: Clock) -> float:
        """Constant until the labels are final, then a tenth of what it was after each third."""
        if not clock.has_begun(self.labels_final()):
            return self.config.lr
        return self.config.final_lr / DROP ** int(round(THIRDS * clock.since(self.labels_final()), 9))

    def refined_labels(self) -> Tensor:
        return self.label_logits.softmax(dim=1)


def steadiest_rate(alpha: float, compatibility: str) -> float:
    """The largest lambda / (B K) of a visit, with L_o weighted by ``alpha``."""
    if compatibility == "paper":
        return STEADY / (1 + CLASSES * alpha)
    return STEADY_OFFICIAL / (1 + CURVATURE * CLASSES * alpha)


def label_gradient(label_logits: Tensor, logits: Tensor, labels: Tensor, alpha: float, compatibility: str) -> Tensor:
    """The gradient of KL(p || t) + 10 alpha L_o per sample in its label logits: all [B, K], labels int64 [B].

    L_o is -log t_y (``paper``), or the cross-entropy of t taken for logits (``official``). Rows sum to 0.
    """
    K = label_logits.shape[1]
    t, given = label_logits.softmax(dim=1), one_hot(labels, K)
    if compatibility == "paper":
        hold = t - given
    else:
        twice = t.softmax(dim=1) - given
        hold = t * (twice - (t * twice).sum(dim=1, keepdim=True))
    return (t - logits.softmax(dim=1)) + CLASSES * alpha * hold
