"""Two hidden layers: the fastest network there is, for tests."""

from __future__ import annotations

from torch import nn

from models.network import Network


def mlp(in_channels: int, image_size: int, num_classes: int, dropout: float) -> Network:
    """Two hidden layers of 128 with ReLU, on the pixels."""
    features = nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    )
    return Network(features, 128, num_classes, dropout)
