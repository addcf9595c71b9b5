"""A pass over the whole training set that changes nothing: what a network says of every sample."""

from __future__ import annotations

import torch
from torch import Tensor

from data.table import TrainData
from methods.base import Learner, View

PASS_BATCH = 1024


def pass_over_training_set(learner: Learner, data: TrainData, view: View) -> tuple[Tensor, Tensor]:
    """Logits [N, K] of the ``view`` of every sample, in evaluation mode and without gradient, and their index, int64 [N].

    In the order of ``data.shuffled``: whoever uses them must not depend on the order.
    """
    training = learner.training
    learner.eval()
    with torch.no_grad():
        outputs = [(batch.index, learner(view(batch.images))) for batch in data.shuffled(data.fitting(PASS_BATCH))]
    learner.train(training)
    indices, logits = zip(*outputs, strict=True)
    return torch.cat(indices), torch.cat(logits)
