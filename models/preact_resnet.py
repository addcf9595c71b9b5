"""Residual networks with the activation before the convolution, for small images; any size will do.

He, Zhang, Ren & Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, and Zagoruyko & Komodakis, "Wide Residual
Networks", BMVC 2016. Both begin with one 3 x 3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.convolution import convolution, he_normal, stages
from models.network import Network


class PreActBlock(nn.Module):
    """x + residual(activate(x)): [B, num_in, H, W] -> [B, num_out, H / stride, W / stride], rounded up.

    Where shapes change, a 1 x 1 convolution of the activated input takes the place of x.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and num_in == num_out
        self.projection = None if same else convolution(num_in, num_out, 1, stride)
        self.activate = nn.Sequential(nn.BatchNorm2d(num_in), nn.ReLU())
        self.residual = nn.Sequential(
            convolution(num_in, num_out, stride=stride), nn.BatchNorm2d(num_out), nn.ReLU(), convolution(num_out, num_out)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        activated = self.activate(inputs)
        shortcut = inputs if self.projection is None else self.projection(activated)
        outputs: Tensor = shortcut + self.residual(activated)
        return outputs


def preact_resnet(depths: Sequence[int], in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """Stages of 64, 128, 256 and 512 channels with ``depths`` blocks, the mean over all pixels; 512 features.

    Differs from the paper: no batch normalisation and ReLU after the last block, so that features can be negative, as in the
    networks that mixup and papers on noisy labels train. (DivideMix's has one more batch normalisation and ReLU, on its stem.)
    """
    features = nn.Sequential(
        convolution(in_channels, 64),
        stages(PreActBlock, 64, (64, 128, 256, 512), depths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    he_normal(features)
    return Network(features, 512, num_classes, dropout)


def wide_resnet(depth: int, widening: int, in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """WRN-``depth``-``widening``: stages of 16, 32 and 64 channels times ``widening``, the mean over all pixels.

    ``depth`` is 6 n + 4 for n blocks a stage. The only dropout is before the head; the paper's, inside blocks, is left out.
    """
    widths = [width * widening for width in (16, 32, 64)]
    features = nn.Sequential(
        convolution(in_channels, 16),
        stages(PreActBlock, 16, widths, 3 * [(depth - 4) // 6]),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    he_normal(features)
    return Network(features, widths[-1], num_classes, dropout)


preact_resnet18 = partial(preact_resnet, (2, 2, 2, 2))
preact_resnet34 = partial(preact_resnet, (3, 4, 6, 3))
wrn_28_10 = partial(wide_resnet, 28, 10)
