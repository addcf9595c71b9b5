"""What a network is: features, then a head."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn


class Trunk(nn.Sequential):
    """float32 [B, C, H, W] -> features, float32 [B, F], computed in the precision that suits the device, channels last."""

    precision = torch.float32

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        low = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision) if low else nullcontext():
            features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return features.float() if low else features


class Network(nn.Module):
    """float32 [B, C, H, W] -> logits float32 [B, K]: ``features`` gives [B, F], dropout acts on them, ``head`` is linear."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.features = Trunk(features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(images)))
        return logits

    def tuned(self, device: str, precision: str = "auto", compiled: bool = False) -> Network:
        """Moves it to ``device`` and makes it as fast as that device can, in place.

        Precision auto: bfloat16 autocast on a GPU that computes in it (older ones only imitate it, slowly); else float32, on a
        CPU so that results are the same on every machine. Images and filters are stored channels last everywhere: tensor cores
        want it, and a CPU pools and normalises several times as fast. ``compiled``: by torch.compile, in place; the next one of
        the same shape in a process finds what was compiled.
        """
        on_gpu = torch.device(device).type == "cuda"
        fast = precision == "auto" and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        low = fast or precision == "bfloat16"
        self.features.precision = torch.bfloat16 if low else torch.float32
        self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            self.features.compile()
        return self
