"""Networks for large images, from torchvision and timm, with their initialisation.

Both libraries take seconds to import, so that each is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from errors import UserError
from models.convolution import he_normal
from models.network import Network


def vgg19_bn(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """torchvision's VGG-19 with batch normalisation (Simonyan & Zisserman, ICLR 2015), as papers train it on ANIMAL-10N.

    The convolutions' output is averaged to, or repeated over, 7 x 7; two linear layers of 4096 follow, so that most of the
    140 million parameters are there at any image size. ``dropout`` acts on both layers of 4096, where torchvision's is 0.5.
    """
    from torchvision.models import vgg19_bn

    trunk = vgg19_bn(dropout=dropout)
    trunk.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    he_normal(trunk.features[0])
    nn.init.zeros_(trunk.features[0].bias)
    to_hidden = trunk.classifier[:5]  # less the second dropout and the classes, which Network has
    network = Network(nn.Sequential(trunk.features, trunk.avgpool, nn.Flatten(), *to_hidden), 4096, num_classes, dropout)
    nn.init.normal_(network.head.weight, 0, 0.01)
    nn.init.zeros_(network.head.bias)
    return network


def resnet50_trunk(in_channels: int) -> nn.Module:
    """torchvision's ResNet-50, with the layers and names that its weights have, less the last layer."""
    from torchvision.models import resnet50

    trunk: nn.Module = resnet50()
    trunk.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    he_normal(trunk.conv1)
    trunk.fc = nn.Identity()
    return trunk


def resnet50_imagenet(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """torchvision's ResNet-50 (He et al., CVPR 2016): its stem alone shrinks images to a quarter; 2048 features."""
    return Network(resnet50_trunk(in_channels), 2048, num_classes, dropout)


def resnet50_pretrained(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """The same with torchvision's weights IMAGENET1K_V1 and a new head, as papers train it on Clothing1M.

    The weights are read from torch.hub's folder, and downloaded into it first where it lacks them. UserError where they can be
    neither read nor downloaded, or for images that are not of three channels.
    """
    from torchvision.models import ResNet50_Weights

    if in_channels != 3:
        raise UserError(f"resnet50-imagenet:pretrained needs images of 3 channels, not {in_channels}")
    weights = ResNet50_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a damaged file, or one that differs from its hash
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"resnet50-imagenet:pretrained: weights can be neither read from {path} nor fetched from {weights.url}: {reason}"
        ) from error
    trunk = resnet50_trunk(in_channels)
    trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return Network(trunk, 2048, num_classes, dropout)


def inception_resnet_v2(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """timm's Inception-ResNet-v2 (Szegedy et al., AAAI 2017), from scratch, as papers train it on WebVision; 1536 features."""
    import timm

    trunk = timm.create_model("inception_resnet_v2", in_chans=in_channels, num_classes=0)
    return Network(trunk, 1536, num_classes, dropout)
