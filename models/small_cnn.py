"""Two convolutions, for images of 8 x 8 up to about 32 x 32."""

from __future__ import annotations

from torch import nn

from models.network import Network


def small_cnn(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """3 x 3 convolutions of 32 and 64 channels, each with batch normalisation, ReLU and 2 x 2 max-pooling; 256 features.

    The pooling at the end makes it independent of the image size, which must be at least 4.
    """
    features = nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    return Network(features, 64 * 2 * 2, num_classes, dropout)
