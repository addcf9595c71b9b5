"""Residual networks for small images: He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

The ImageNet networks of the paper with a stem for 32 x 32 pixels, as papers on noisy labels train them on CIFAR: one 3 x 3
convolution of 64 channels, no max-pooling. Projection shortcuts where shapes change; a bottleneck halves the image in its
3 x 3 convolution, as torchvision's does. Any image size will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

from models.convolution import convolution, he_normal, stages
from models.network import Network


class ResidualBlock(nn.Module):
    """relu(residual(x) + shortcut(x)): [B, num_in, H, W] -> [B, num_out, H / stride, W / stride], rounded up."""

    def __init__(self, residual: nn.Module, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(convolution(num_in, num_out, 1, stride), nn.BatchNorm2d(num_out))

    def forward(self, inputs: Tensor) -> Tensor:
        return relu(self.residual(inputs) + self.shortcut(inputs))


def basic(num_in: int, num_out: int, stride: int) -> ResidualBlock:
    """Two 3 x 3 convolutions: the block of ResNet-18 and 34."""
    residual = nn.Sequential(
        convolution(num_in, num_out, stride=stride),
        nn.BatchNorm2d(num_out),
        nn.ReLU(),
        convolution(num_out, num_out),
        nn.BatchNorm2d(num_out),
    )
    return ResidualBlock(residual, num_in, num_out, stride)


def bottleneck(num_in: int, num_out: int, stride: int) -> ResidualBlock:
    """A 3 x 3 convolution on a quarter of the channels, between two of 1 x 1: the block of ResNet-50."""
    width = num_out // 4
    residual = nn.Sequential(
        convolution(num_in, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        convolution(width, width, stride=stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        convolution(width, num_out, 1),
        nn.BatchNorm2d(num_out),
    )
    return ResidualBlock(residual, num_in, num_out, stride)


def resnet(
    block: Callable[[int, int, int], ResidualBlock],
    widths: Sequence[int],
    depths: Sequence[int],
    in_channels: int,
    image_size: int,
    num_classes: int,
    dropout: float,
) -> Network:
    """The stem, ``depths[i]`` blocks of ``widths[i]`` channels for each i, the mean over pixels; ``widths[-1]`` features."""
    features = nn.Sequential(
        convolution(in_channels, 64),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        stages(block, 64, widths, depths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    he_normal(features)
    return Network(features, widths[-1], num_classes, dropout)


resnet18 = partial(resnet, basic, (64, 128, 256, 512), (2, 2, 2, 2))
resnet34 = partial(resnet, basic, (64, 128, 256, 512), (3, 4, 6, 3))
resnet50 = partial(resnet, bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3))
