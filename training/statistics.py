"""Label-refinement statistics: what a method believes about the labels, beside what it was given and, for reports, the truth.

Every metric is explained in ``docs/metrics.md``. The truth enters here and nowhere else in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Step

HARD = 0.95  # a target counts as hardened when its largest entry exceeds this


class RefinementStatistics:
    """Collects the predictions of one epoch and compares them, and the method's targets, with labels, truth and the past.

    ``labels`` [N] given; ``truth`` [N] or None: -1 where it is not known, K where a sample is of no class. What needs the truth
    is over the samples that have one. ``state_dict`` holds what the next epoch is compared with.
    """

    def __init__(self, labels: Tensor, truth: Tensor | None, num_classes: int) -> None:
        self.labels = labels
        self.truth = truth
        self.known = torch.ones_like(labels, dtype=torch.bool) if truth is None else truth >= 0
        self.num_classes = num_classes
        self.probabilities = torch.full((len(labels), num_classes), torch.nan, device=labels.device)
        self.last_predictions: Tensor | None = None
        self.last_targets: Tensor | None = None

    def start(self) -> None:
        """Forgets the predictions of the epoch before."""
        self.probabilities.fill_(torch.nan)

    def observe(self, step: Step) -> None:
        """Takes the probabilities of one update, where the method saw the unmixed batch."""
        if step.probabilities is not None:
            self.probabilities[step.index] = step.probabilities

    @property
    def observed(self) -> bool:
        """True where every sample of the epoch has been seen unmixed."""
        return not bool(self.probabilities[:, 0].isnan().any())

    def finish(self, targets: Tensor | None) -> dict[str, float]:
        """The metrics of an epoch that has ended, given the method's targets [N, K] (None: it keeps the given labels)."""
        metrics = self._of_predictions() if self.observed else {}
        metrics.update(self._of_targets(targets))
        if targets is not None:
            self.last_targets = targets.detach().clone()
        return {name: float(value) for name, value in metrics.items()}

    def _of_predictions(self) -> dict[str, Tensor]:
        p = self.probabilities
        predictions = p.argmax(dim=1)
        entropy = -torch.xlogy(p, p).sum(dim=1)
        tenths = torch.quantile(torch.exp(-entropy), torch.tensor([0.1, 0.5, 0.9], device=p.device))
        metrics = {f"refine/threshold_p{name}": value for name, value in zip((10, 50, 90), tenths, strict=True)}
        if self.last_predictions is not None:
            metrics["train/prediction_changes"] = (predictions != self.last_predictions).float().mean()
        self.last_predictions = predictions
        if self.truth is not None:
            wrong = self.known & (self.labels != self.truth)
            if wrong.any():
                metrics["train/memorised"] = (predictions == self.labels)[wrong].float().mean()
        return metrics

    def _of_targets(self, targets: Tensor | None) -> dict[str, Tensor]:
        rows = torch.arange(len(self.labels), device=self.labels.device)
        if targets is None:
            if self.truth is None or not self.observed:
                return {}
            score = -self.probabilities[rows, self.labels].log()
            return area_under_roc(score[self.known], (self.labels != self.truth)[self.known])
        refined, largest = targets.argmax(dim=1), targets.amax(dim=1)
        given_mass = targets[rows, self.labels]
        changed = refined != self.labels
        hardened = changed & (largest > HARD)
        metrics = {
            "refine/changed": changed.float().mean(),
            "refine/entropy": -torch.xlogy(targets, targets).sum(dim=1).mean(),
            "refine/given_mass": given_mass.mean(),
        }
        if self.last_targets is not None:
            metrics["refine/drift"] = 0.5 * (targets - self.last_targets).abs().sum(dim=1).mean()
        if changed.any():
            metrics["refine/hardened"] = hardened[changed].float().mean()
        if self.truth is not None:
            metrics.update(self._of_refined(refined, changed, hardened))
            metrics.update(area_under_roc(1 - given_mass[self.known], (self.labels != self.truth)[self.known]))
        return metrics

    def _of_refined(self, refined: Tensor, changed: Tensor, hardened: Tensor) -> dict[str, Tensor]:
        """How the refined classes, int64 [N], do against the truth, where it is known; the others are bool [N]."""
        assert self.truth is not None
        right = refined == self.truth
        kinds = {
            "refine/accuracy": (right, self.known),
            "refine/precision": (right, self.known & changed),
            "refine/recall": (right, self.known & (self.labels != self.truth)),
            "refine/hardened_wrong": (~right, self.known & hardened),
        }
        return {name: hit[rows].float().mean() for name, (hit, rows) in kinds.items() if rows.any()}

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"predictions": self.last_predictions, "targets": self.last_targets}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.last_predictions, self.last_targets = state["predictions"], state["targets"]


def area_under_roc(score: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """``refine/auroc``: the chance that a wrong label scores above a right one, ties counting half (Mann-Whitney).

    ``score`` [N] float, ``positive`` [N] bool; empty where one of the two kinds is absent or a score is not a number.
    """
    num_positive = positive.sum().double()  # products of counts exceed what float32 holds
    num_negative = len(positive) - num_positive
    if num_positive == 0 or num_negative == 0 or score.isnan().any():
        return {}
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    rank = size.cumsum(0) - (size - 1) / 2  # mean rank of a group of equal scores, counted from 1
    above = rank[group][positive].double().sum() - num_positive * (num_positive + 1) / 2
    return {"refine/auroc": above / (num_positive * num_negative)}
