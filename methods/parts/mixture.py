"""Mixtures of two components in one dimension, for losses: one component of small losses, one of large.

Everything is float64. Equal values are one value with a count and the values are sorted, so the order in which they come
changes no bit of a fit or of a posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GAUSSIAN_ITERATIONS = 10
GAUSSIAN_TOLERANCE = 1e-2  # of the mean log-likelihood: it stops after two or three iterations, near the two means
VARIANCE_FLOOR = 5e-4  # added to every variance
BETA_ITERATIONS = 10
BETA_VARIANCE_FLOOR = 1e-6
BETA_PARAMETER_FLOOR = 1e-3
JOINT_FLOOR = 1e-12  # of a beta component's density times its weight: none can die


def min_max(values: Tensor) -> Tensor:
    """``values`` [N] moved and scaled to [0, 1], float64; all 0 where they are equal."""
    values = values.double()
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high > low, high - low, 1.0)


@dataclass(frozen=True)
class GaussianMixture:
    """Two normal distributions; each field is float64 [2], and the first component has the smaller mean."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> GaussianMixture:
        """To ``values`` [N], N >= 1, by expectation maximisation from the best two means. Equal values: equal components.

        Stops, as scikit-learn does, once the mean log-likelihood changes by less than ``GAUSSIAN_TOLERANCE``.
        """
        values, counts = torch.unique(values.double(), return_counts=True)
        mixture = cls.of_shares(values, counts.unsqueeze(1) * two_means(values, counts))
        before = -math.inf
        for _ in range(GAUSSIAN_ITERATIONS):
            log_joint = mixture.log_joint(values)
            log_evidence = log_joint.logsumexp(dim=1, keepdim=True)
            mixture = cls.of_shares(values, counts.unsqueeze(1) * (log_joint - log_evidence).exp())
            now = float((counts * log_evidence.squeeze(1)).sum() / counts.sum())
            if abs(now - before) < GAUSSIAN_TOLERANCE:
                break
            before = now
        order = mixture.means.argsort(stable=True)
        return cls(mixture.weights[order], mixture.means[order], mixture.variances[order])

    @classmethod
    def of_shares(cls, values: Tensor, shares: Tensor) -> GaussianMixture:
        """The maximum of the likelihood given how much of each value [U] belongs to each component, [U, 2]."""
        totals = shares.sum(dim=0) + 10 * torch.finfo(torch.float64).eps  # a component may be empty
        means = (shares * values.unsqueeze(1)).sum(dim=0) / totals
        variances = (shares * (values.unsqueeze(1) - means).square()).sum(dim=0) / totals + VARIANCE_FLOOR
        return cls(totals / totals.sum(), means, variances)

    def log_joint(self, values: Tensor) -> Tensor:
        """log(weight * density) of values [U] in each component, up to a constant, [U, 2]."""
        squares = (values.unsqueeze(1) - self.means).square() / self.variances
        return self.weights.log() - 0.5 * (squares + self.variances.log())

    def posterior(self, values: Tensor) -> Tensor:
        """The probability that each of ``values`` [N] belongs to the component with the smaller mean, float64 [N]."""
        values, places = torch.unique(values.double(), return_inverse=True)
        return self.log_joint(values).softmax(dim=1)[:, 0][places]

    @property
    def separation(self) -> Tensor:
        """The distance of the two means."""
        return self.means[1] - self.means[0]


def two_means(values: Tensor, counts: Tensor) -> Tensor:
    """The best clustering of sorted distinct values [U] with counts [U] in two: one-hot rows [U, 2]. In one dimension it is
    a cut, so all cuts are compared: the largest variance between the clusters is wanted. One value: equal shares."""
    if len(values) == 1:
        return torch.ones(1, 2, dtype=values.dtype, device=values.device)
    below, total = counts.cumsum(0)[:-1], counts.sum()
    sum_below, sum_total = (counts * values).cumsum(0)[:-1], (counts * values).sum()
    gap = (sum_total - sum_below) / (total - below) - sum_below / below
    cut = (below * (total - below) * gap.square()).argmax()
    first = torch.arange(len(values), device=values.device) <= cut
    return torch.stack([first, ~first], dim=1).to(values.dtype)


@dataclass(frozen=True)
class BetaMixture:
    """Two beta distributions on (0, 1); each field is float64 [2], and the second component has the larger mean."""

    weights: Tensor
    alphas: Tensor
    betas: Tensor

    @classmethod
    def fit(cls, values: Tensor) -> BetaMixture:
        """To ``values`` [N] inside (0, 1), N >= 1: ten steps of expectation and matching of weighted moments."""
        values, counts = torch.unique(values.double(), return_counts=True)

        def pair(first: float, second: float) -> Tensor:
            return torch.tensor([first, second], dtype=values.dtype, device=values.device)

        mixture = cls(pair(0.5, 0.5), pair(1, 2), pair(2, 1))
        values = values.unsqueeze(1)
        for _ in range(BETA_ITERATIONS):
            joint = mixture.joint(values.squeeze(1)).clamp(min=JOINT_FLOOR)
            shares = counts.unsqueeze(1) * joint / joint.sum(dim=1, keepdim=True)
            totals = shares.sum(dim=0)
            means = (shares * values).sum(dim=0) / totals
            variances = ((shares * (values - means).square()).sum(dim=0) / totals).clamp(min=BETA_VARIANCE_FLOOR)
            alphas = (means * (means * (1 - means) / variances - 1)).clamp(min=BETA_PARAMETER_FLOOR)
            betas = (alphas * (1 - means) / means).clamp(min=BETA_PARAMETER_FLOOR)
            mixture = cls(totals / totals.sum(), alphas, betas)
        order = mixture.means.argsort(stable=True)
        return cls(mixture.weights[order], mixture.alphas[order], mixture.betas[order])

    @property
    def means(self) -> Tensor:
        return self.alphas / (self.alphas + self.betas)

    def joint(self, values: Tensor) -> Tensor:
        """Weight * density of values [U] inside (0, 1) in each component, [U, 2]."""
        values = values.unsqueeze(1)
        constants = torch.lgamma(self.alphas + self.betas) - torch.lgamma(self.alphas) - torch.lgamma(self.betas)
        log_density = (self.alphas - 1) * values.log() + (self.betas - 1) * torch.log1p(-values) + constants
        return self.weights * log_density.exp()

    def table(self, num_bins: int) -> Tensor:
        """The probability of the component with the larger mean in the middle of each of ``num_bins`` equal parts of (0, 1),
        float64 [num_bins]. To the right of its largest entry it does not fall again: no large loss is called clean."""
        joint = self.joint((torch.arange(num_bins, dtype=torch.float64, device=self.alphas.device) + 0.5) / num_bins)
        posterior = joint[:, 1] / (joint.sum(dim=1) + JOINT_FLOOR)
        posterior[posterior.argmax() :] = posterior.max()
        return posterior
