"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable

from models.mlp import mlp
from models.network import Network
from models.small_cnn import small_cnn

__all__ = ["MODELS", "Network", "make_model"]

MODELS: dict[str, Callable[[int, int, int, float], Network]] = {"mlp": mlp, "small-cnn": small_cnn}


def make_model(name: str, *, in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """A new network for float images [B, in_channels, image_size, image_size]. ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    return MODELS[name](in_channels, image_size, num_classes, dropout)
