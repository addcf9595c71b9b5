"""What residual networks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def convolution(num_in: int, num_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """``size`` x ``size``, odd, for batch norm: [B, num_in, H, W] -> [B, num_out, H / stride, W / stride], rounded up."""
    return nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)


def stages(
    block: Callable[[int, int, int], nn.Module], num_in: int, widths: Sequence[int], depths: Sequence[int]
) -> nn.Sequential:
    """``depths[i]`` blocks that give ``widths[i]`` channels, for each i; every stage but the first begins by halving the image.

    ``block`` makes one from (channels in, channels out, stride).
    """
    blocks = []
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for position in range(depth):
            blocks.append(block(num_in, width, 2 if number > 0 and position == 0 else 1))
            num_in = width
    return nn.Sequential(*blocks)


def he_normal(trunk: nn.Module) -> None:
    """Draws every convolution anew from N(0, 2 / (size^2 channels out)), He et al., ICCV 2015, in the form for gradients.

    So do the released networks of the ResNet and wide ResNet papers.
    """
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
