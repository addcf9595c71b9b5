"""Dynamics-aware loss: fits like cross-entropy first, turns robust as training goes on, and bootstraps at the end.

Li et al., "Dynamics-Aware Loss for Learning with Label Noise", arXiv 2303.11562, 2023. At the fraction f of the budget
q = q_start + (q_end - q_start) f; loss = ((1 - p_y^q) + w H(p) / log K) / q. The weight w is 0 until q = 1 and then rises
linearly, w = (q - 1) / (q_end - 1): from q = 1 on, easy samples pull more than hard ones, and the network's own belief more
and more. q stays below q_end, which would be reached at f = 1.

Differs from the paper: w is 0 where q_end is not above both 1 and q_start (there is no ramp then, and the paper's expression
divides by 0 or less); the schedule is this project's (SGD, half a cosine).
Differs from the official code: no clip of p_y at 1e-6, no 1e-6 within the logarithm. The code first had a hard bootstrap,
-log max_k p_k in place of H(p); which of the two the published numbers used is not known (``bootstrap``).
State: the network and its optimiser; nothing per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.table import Batch
from hparams import hyperparameter
from losses import dynamics_aware_loss
from methods.base import Clock, Config, SingleNet


@dataclass(frozen=True)
class DALConfig(Config):
    """The published defaults for CIFAR: q from 0.6 to 1.5."""

    q_start: float = hyperparameter(
        0.6, "exponent at the start: towards 0 cross-entropy, which fits fast", legal="(0, inf)", search=(0.1, 0.9)
    )
    q_end: float = hyperparameter(
        1.5,
        "exponent at the end: above 1 easy samples pull more than hard ones",
        legal="(0, inf)",
        search=(1.05, 2.0),
    )
    bootstrap: str = hyperparameter(
        "soft",
        "what the prediction is held to: its own probabilities, or its most probable class",
        choices=("soft", "hard"),
    )


class DynamicsAwareLoss(SingleNet):
    """Generalised cross-entropy with a rising exponent, and the entropy of the prediction."""

    Config = DALConfig
    config: DALConfig
    summary = "generalised cross-entropy that turns robust as training goes on, then bootstraps (Li et al. 2023)"

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        q, weight = self.exponent(clock), self.bootstrap_weight(clock)
        return dynamics_aware_loss(logits, batch.labels, q, weight, hard=self.config.bootstrap == "hard")

    def exponent(self, clock: Clock) -> float:
        """q in this epoch."""
        return self.config.q_start + (self.config.q_end - self.config.q_start) * clock.fraction

    def bootstrap_weight(self, clock: Clock) -> float:
        """w in this epoch, in [0, 1): the time since q = 1 as a share of the time from there to the end."""
        if self.config.q_end <= max(1.0, self.config.q_start):
            return 0.0
        return max(0.0, (self.exponent(clock) - 1) / (self.config.q_end - 1))
