"""Random logits, labels and targets in float64, on which losses are compared with their closed forms."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], labels [B] and targets [B, K] whose rows sum to 1, in float64."""
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_images, num_classes = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    logits = draw(st.floats(0.1, spread)) * torch.randn(num_images, num_classes, generator=stream, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_images,), generator=stream)
    targets = torch.rand(num_images, num_classes, generator=stream, dtype=torch.float64)
    return logits, labels, targets / targets.sum(dim=1, keepdim=True)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return functional.one_hot(labels, logits.shape[1]).to(logits)


def gradient(losses: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), logits)[0]
