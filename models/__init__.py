"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from models.cnn import cnn8, cnn9
from models.imagenet import inception_resnet_v2, resnet50_imagenet, resnet50_pretrained, vgg19_bn
from models.mlp import mlp
from models.network import Network
from models.preact_resnet import preact_resnet, wide_resnet
from models.resnet import basic, bottleneck, resnet
from models.small_cnn import small_cnn

__all__ = ["MODELS", "Model", "Network", "make_model"]


class Model(NamedTuple):
    """``build`` takes (in_channels, image_size, num_classes, dropout); ``min_size`` is in pixels a side."""

    build: Callable[[int, int, int, float], Network]
    min_size: int = 1


MODELS: dict[str, Model] = {
    "mlp": Model(mlp),
    "small-cnn": Model(small_cnn, 4),
    "cnn8": Model(cnn8, 8),
    "cnn9": Model(cnn9, 28),
    "resnet18": Model(partial(resnet, basic, (64, 128, 256, 512), (2, 2, 2, 2))),
    "resnet34": Model(partial(resnet, basic, (64, 128, 256, 512), (3, 4, 6, 3))),
    "resnet50": Model(partial(resnet, bottleneck, (256, 512, 1024, 2048), (3, 4, 6, 3))),
    "preact-resnet18": Model(partial(preact_resnet, (2, 2, 2, 2))),
    "preact-resnet34": Model(partial(preact_resnet, (3, 4, 6, 3))),
    "wrn-28-10": Model(partial(wide_resnet, 28, 10)),
    "vgg19-bn": Model(vgg19_bn, 32),
    "resnet50-imagenet": Model(resnet50_imagenet),
    "resnet50-imagenet:pretrained": Model(resnet50_pretrained),
    "inception-resnet-v2": Model(inception_resnet_v2, 75),
}


def make_model(name: str, *, in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """A new network for float images [B, in_channels, image_size, image_size].

    ValueError for an unknown name, for images too small for the network, and where pretrained weights cannot be had.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    model = MODELS[name]
    if image_size < model.min_size:
        raise ValueError(f"{name} needs images of at least {model.min_size} pixels a side, not {image_size}")
    return model.build(in_channels, image_size, num_classes, dropout)
