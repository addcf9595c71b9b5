"""What a network is: features, then a head."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """float32 [B, C, H, W] -> logits [B, K]: ``features`` gives [B, F], dropout acts on them, ``head`` is linear."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.features = features
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits
