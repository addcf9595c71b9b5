"""Networks by name. A network's module is imported when one is made: the names are known without torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from errors import UserError

if TYPE_CHECKING:
    from models.network import Network

__all__ = ["MODELS", "Model", "make_model"]


class Model(NamedTuple):
    """The module in this package and the function in it; ``min_size`` is in pixels a side."""

    module: str
    function: str
    min_size: int = 1

    @property
    def build(self) -> Callable[[int, int, int, float], Network]:
        """Makes the network from in_channels, image_size, num_classes and dropout."""
        function: Callable[[int, int, int, float], Network] = getattr(import_module(f"models.{self.module}"), self.function)
        return function


MODELS: dict[str, Model] = {
    "mlp": Model("mlp", "mlp"),
    "small-cnn": Model("small_cnn", "small_cnn", 4),
    "cnn8": Model("cnn", "cnn8", 8),
    "cnn9": Model("cnn", "cnn9", 28),
    "resnet18": Model("resnet", "resnet18"),
    "resnet34": Model("resnet", "resnet34"),
    "resnet50": Model("resnet", "resnet50"),
    "preact-resnet18": Model("preact_resnet", "preact_resnet18"),
    "preact-resnet34": Model("preact_resnet", "preact_resnet34"),
    "wrn-28-10": Model("preact_resnet", "wrn_28_10"),
    "vgg19-bn": Model("imagenet", "vgg19_bn", 32),
    "resnet50-imagenet": Model("imagenet", "resnet50_imagenet"),
    "resnet50-imagenet:pretrained": Model("imagenet", "resnet50_pretrained"),
    "inception-resnet-v2": Model("imagenet", "inception_resnet_v2", 75),
}


def make_model(name: str, *, in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """A new network for float images [B, in_channels, image_size, image_size].

    UserError for an unknown name, for images too small for the network, and where pretrained weights cannot be had.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    model = MODELS[name]
    if image_size < model.min_size:
        raise UserError(f"{name} needs images of at least {model.min_size} pixels a side, not {image_size}")
    return model.build(in_channels, image_size, num_classes, dropout)
