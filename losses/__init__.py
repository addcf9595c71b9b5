"""Losses: pure functions of (logits, labels or targets) to one number per sample, from log-softmax in float32 at least."""

from losses.balance import balance_penalty
from losses.contrastive import clipped_directions, contrastive_losses, pair_weights
from losses.cross_entropy import cross_entropy, entropy, soft_cross_entropy
from losses.dynamics_aware import dynamics_aware_loss
from losses.early_learning import clipped_probabilities, early_learning_term
from losses.generalized_cross_entropy import generalized_cross_entropy, truncated_generalized_cross_entropy
from losses.normalized_cross_entropy import normalized_cross_entropy
from losses.overparameterization import corrected_probabilities, divergence_from, imbalance, unexplained
from losses.reverse_cross_entropy import absolute_error, reverse_cross_entropy
from losses.reverse_divergence import reverse_divergence
from losses.sparse import sharpened_logits, sparse_norm
from losses.squared_error import squared_error

__all__ = [
    "absolute_error",
    "balance_penalty",
    "clipped_directions",
    "clipped_probabilities",
    "contrastive_losses",
    "corrected_probabilities",
    "cross_entropy",
    "divergence_from",
    "dynamics_aware_loss",
    "early_learning_term",
    "entropy",
    "generalized_cross_entropy",
    "imbalance",
    "normalized_cross_entropy",
    "pair_weights",
    "reverse_cross_entropy",
    "reverse_divergence",
    "sharpened_logits",
    "soft_cross_entropy",
    "sparse_norm",
    "squared_error",
    "truncated_generalized_cross_entropy",
    "unexplained",
]
