"""The penalty on a batch whose mean prediction leaves classes out (Tanaka et al., "Joint Optimization Framework for Learning
with Noisy Labels", CVPR 2018), as M-DYR-H and DivideMix use it."""

from __future__ import annotations

import math

from torch import Tensor

from losses.softmax import log_probabilities


def balance_penalty(logits: Tensor) -> Tensor:
    """KL(uniform || mean of p) = sum_k (1/K) log((1/K) / mean_i p_ik): logits [B, K] -> one number, of the whole batch.

    At least 0, and 0 only where the mean prediction is uniform. The mean is taken of log-probabilities by log-sum-exp, so
    that a class which underflows in every row still has a finite penalty and a gradient, without a clamp.
    """
    num_rows, num_classes = logits.shape
    log_mean = log_probabilities(logits).logsumexp(dim=0) - math.log(num_rows)
    return -log_mean.mean() - math.log(num_classes)
