"""Bootstrapping: cross-entropy against the given label mixed with the network's own prediction, in every step.

Reed, Lee, Anguelov, Szegedy, Erhan & Rabinovich, "Training Deep Neural Networks on Noisy Labels with Bootstrapping", ICLR 2015
workshop (arXiv 1412.6596). Loss, soft: -sum_k (beta onehot(y)_k + (1 - beta) p_k) log p_k, both p with gradient, that is
beta CE + (1 - beta) H(p); hard: the network's own class in place of p, that is beta CE - (1 - beta) log max_k p_k. ALR's
entropy term at weight w, over targets that never move, is the soft form with beta = 1 / (1 + w), the loss scaled by 1 + w.

Differs from the paper: no pretraining; the schedule is this project's (SGD, half a cosine).
Differs from the official code: there is none.
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import cross_entropy, entropy
from methods.base import Clock, GivenLabelsConfig, SingleNet


@dataclass(frozen=True)
class BootstrappingConfig(GivenLabelsConfig):
    """The published default of the soft form; for the hard form it is 0.8."""

    given_share: float = hyperparameter(
        0.95, "share of the given label, beta in the paper; the rest is the prediction's", legal="[0, 1]", search=(0.3, 1.0)
    )
    target: str = hyperparameter(
        "soft", "what of the prediction is a label: its probabilities (soft) or its class (hard)", choices=("soft", "hard")
    )


class Bootstrapping(SingleNet):
    """Cross-entropy that lets the network insist."""

    Config = BootstrappingConfig
    config: BootstrappingConfig
    summary = "cross-entropy against given labels mixed with the network's own predictions (Reed et al. 2015)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        own = entropy(logits) if self.config.target == "soft" else cross_entropy(logits, logits.argmax(dim=1))
        given = cross_entropy(logits, batch.labels, self.config.label_smoothing)
        return self.config.given_share * given + (1 - self.config.given_share) * own
