"""Mean absolute error between the prediction and the given label: robust to symmetric noise, and slow to learn.

Ghosh, Kumar & Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017. Loss:
sum_k |p_k - onehot(y)_k| = 2 (1 - p_y). Its gradient 2 p_y (p - onehot(y)) starts near 2/K of that of cross-entropy, so with
many classes it hardly trains at all; that is the method's own limit.

Differs from the paper: the loss is ``scale`` (1 - p_y); the paper's is ``scale`` 2, the common re-implementations' is 1. For
SGD a scale multiplies the learning rate (and divides weight_decay): too small and nothing is learnt in time, too large and
whole classes are given up for good; the schedule is this project's (SGD, half a cosine).
Differs from the official code: none was published.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import absolute_error
from methods.base import Clock, Config, SingleNet


@dataclass(frozen=True)
class MAEConfig(Config):
    """The published loss has no hyperparameter; its scale takes the learning rate to where this loss needs it."""

    scale: float = hyperparameter(
        2.0, "factor of 1 - p_y, 2 in the paper: multiplies the learning rate", legal="(0, inf)", search=(0.5, 10.0), log=True
    )


class MeanAbsoluteError(SingleNet):
    """What the network disbelieves weighs p_y."""

    Config = MAEConfig
    config: MAEConfig
    summary = "mean absolute error, robust to symmetric noise but slow to learn (Ghosh et al. 2017)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        return self.config.scale * absolute_error(logits, batch.labels)
