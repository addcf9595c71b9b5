"""SELC: self-ensemble label correction. After a warm-up each label becomes a running mean of the network's predictions.

Lu & He, "SELC: Self-Ensemble Label Correction Improves Learning with Noisy Labels", IJCAI 2022. Warm-up: cross-entropy on
the given labels. Then per batch: t <- a t + (1 - a) p, with t the given label at the start, and loss = CE(t, p) with the
updated t; p is the prediction of the training step itself, without gradient.

Differs from the paper: the end of the warm-up is a hyperparameter (``warmup``, a fraction of the budget), and estimated from
a mixture fitted to the losses only with ``turning_point``; then one run does both, so that labels are corrected as soon as
the turning point is recognised, and at ``warmup`` at the latest, where the paper looks at a finished run and starts ten
epochs before it. a follows from ``memory``, likewise a fraction; the schedule is this project's (SGD, half a cosine, no step
at the end of the warm-up); SELC+ (retraining with mixup on the corrected labels) is left out.
Differs from the official code: log-softmax instead of the logarithm of a softmax, which can be infinite. The code has no
estimator, but a table of warm-ups.
State: t, float32 [N, K], one-hot at the start: 4 K bytes per sample; with ``turning_point`` six numbers more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import one_hot

from data.table import Batch, TrainData
from hparams import hyperparameter
from losses import cross_entropy, soft_cross_entropy
from methods.base import Clock, Config, SingleNet, Task, memory_momentum
from methods.parts.training_pass import pass_over_training_set
from methods.parts.turning_point import TurningPoint


@dataclass(frozen=True)
class SELCConfig(Config):
    """The published defaults for CIFAR-10: 30 of 200 epochs of warm-up, momentum 0.9."""

    warmup: float = hyperparameter(
        0.15,
        "fraction of the budget trained on the given labels before they are corrected",
        legal="[0, 1)",
        search=(0.025, 0.4),
    )
    memory: float = hyperparameter(
        0.047,
        "memory of the labels' running mean, as a fraction of the budget (0.9 per epoch at 200 epochs)",
        legal="(0, 1]",
        search=(0.012, 0.2),
        log=True,
    )
    turning_point: bool = hyperparameter(
        False, "end the warm-up where a mixture of the losses says so; ``warmup`` is then the latest end"
    )
    patience: float = hyperparameter(
        0.05,
        "with turning_point: fraction of the budget for which the separation must stay below its largest value",
        legal="[0, 1)",
    )

    def begins(self) -> float:
        """The end of the warm-up, the latest one where it is estimated."""
        return self.warmup


class SELC(SingleNet):
    """Hard labels first, then an ensemble over time of the network's own predictions."""

    Config = SELCConfig
    config: SELCConfig
    summary = "after a warm-up, labels become a running mean of the predictions (Lu & He 2022)"
    targets: Tensor

    def __init__(self, config: SELCConfig, task: Task) -> None:
        super().__init__(config, task)
        self.register_buffer("targets", one_hot(task.labels, task.num_classes).float())
        self.turning_point = TurningPoint(config.patience, task.labels.device) if config.turning_point else None

    def batches(self, data: TrainData, clock: Clock) -> Iterable[Batch]:
        yield from super().batches(data, clock)
        if self.turning_point is not None and not self.corrects(clock):
            index, logits = pass_over_training_set(self.learner, data, self.task.plain)
            self.turning_point.observe(cross_entropy(logits, data.labels[index]), clock)

    def corrects(self, clock: Clock) -> bool:
        """True where the warm-up is over."""
        latest = clock.has_begun(self.config.begins())
        return latest or (self.turning_point is not None and self.turning_point.passed(clock))

    def losses(self, logits: Tensor, batch: Batch, clock: Clock) -> Tensor:
        if not self.corrects(clock):
            return cross_entropy(logits, batch.labels)
        targets = self.refine(logits.detach().softmax(dim=1), batch.index, clock)
        return self.refinement_loss(logits, targets)

    def refine(self, probabilities: Tensor, index: Tensor, clock: Clock) -> Tensor:
        """Moves the rows ``index`` of the targets towards ``probabilities`` [B, K]; returns them, [B, K]. No gradient."""
        momentum = memory_momentum(self.config.memory, clock.epochs)
        self.targets[index] = momentum * self.targets[index] + (1 - momentum) * probabilities
        return self.targets[index]

    def refinement_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What is minimised after the warm-up, per sample: logits and targets [B, K] -> [B]."""
        return soft_cross_entropy(logits, targets)

    def refined_labels(self) -> Tensor:
        """The targets: one-hot where a sample was not visited since the warm-up."""
        return self.targets.clone()
