"""A network whose weights are a running mean of another's: a slower, steadier copy that makes targets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


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
