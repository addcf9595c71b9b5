"""Losses: pure functions of (logits, labels or targets) to one number per sample, from log-softmax in float32 at least."""

from losses.cross_entropy import cross_entropy, entropy, soft_cross_entropy
from losses.early_learning import clipped_probabilities, early_learning_term
from losses.generalized_cross_entropy import generalized_cross_entropy
from losses.reverse_divergence import reverse_divergence

__all__ = [
    "clipped_probabilities",
    "cross_entropy",
    "early_learning_term",
    "entropy",
    "generalized_cross_entropy",
    "reverse_divergence",
    "soft_cross_entropy",
]
