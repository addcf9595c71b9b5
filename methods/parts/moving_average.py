"""A network whose weights are a running mean of another's: a slower, steadier copy that makes targets."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from methods.base import Clock, Task


class MovingAverage(nn.Module):
    """Starts as a copy of ``net`` and follows it when told to. No gradient reaches it, and nothing is dropped in it.

    Parameters are averaged. Buffers are not: those of batch normalisation come from this network's own passes in training
    mode, where the statistics of the batch are used and the buffers only recorded.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        for module in self.net.modules():
            if isinstance(module, (nn.Dropout, nn.Dropout2d)):
                module.p = 0.0

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = self.net(images).float()
        return outputs

    def follow(self, net: nn.Module, momentum: float) -> None:
        """average <- momentum * average + (1 - momentum) * net, for every parameter."""
        with torch.no_grad():
            for mine, theirs in zip(self.net.parameters(), net.parameters(), strict=True):
                mine.lerp_(theirs, 1 - momentum)


def averaging_momentum(memory: float, clock: Clock, task: Task, batch_size: int) -> float:
    """The factor, per step, of a running mean of weights whose memory is a fraction of the budget."""
    steps = clock.epochs * task.num_samples / batch_size
    return math.exp(-1 / (memory * steps))
