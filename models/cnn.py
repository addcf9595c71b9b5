"""The plain convolutional networks of early papers on noisy labels, for CIFAR."""

from __future__ import annotations

from torch import nn

from models.network import Network


def cnn8(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """Six convolutions and two linear layers: the CIFAR-10 network of symmetric cross-entropy and active-passive losses.

    Wang et al., ICCV 2019, and Ma et al., ICML 2020: 3 x 3 convolutions of 64, 64, 128, 128, 196 and 196 channels, 2 x 2
    max-pooling after every second, a linear layer of 256, each with batch normalisation and ReLU. Widths and initialisation
    (He's uniform for convolutions, Glorot's uniform for linear layers) are those of the released code.
    """
    layers: list[nn.Module] = []
    num_in = in_channels
    for width in (64, 128, 196):
        for num_channels in (num_in, width):
            layers += [nn.Conv2d(num_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        num_in = width
    num_pixels = (image_size // 8) ** 2
    layers += [nn.Flatten(), nn.Linear(num_in * num_pixels, 256), nn.BatchNorm1d(256), nn.ReLU()]
    network = Network(nn.Sequential(*layers), 256, num_classes, dropout)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return network


def cnn9(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """Nine convolutions: the CIFAR network of Co-teaching (Han et al., NeurIPS 2018); 128 features.

    3 x 3 convolutions of 128, 128, 128 | 256, 256, 256 | 512, 256, 128 channels, each with batch normalisation and leaky ReLU
    of slope 0.01; 2 x 2 max-pooling and dropout of 0.25 at the bars, and the mean over all pixels at the end. As in the
    released code dropout takes whole channels, weights start as torch draws them, and the last three convolutions are not
    padded, so that images need 28 pixels a side. ``dropout`` comes on top of the dropout inside.
    """
    layers: list[nn.Module] = []
    num_in = in_channels
    for widths, padding in (((128, 128, 128), 1), ((256, 256, 256), 1), ((512, 256, 128), 0)):
        if layers:
            layers += [nn.MaxPool2d(2), nn.Dropout2d(0.25)]
        for width in widths:
            layers += [nn.Conv2d(num_in, width, 3, padding=padding), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
            num_in = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Network(nn.Sequential(*layers), num_in, num_classes, dropout)
