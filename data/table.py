"""A training set is a table of tensors, and a batch is a gather."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a training set: images uint8 [B, C, H, W], given labels int64 [B], their index in the set int64 [B]."""

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class TrainData:
    """What a method is given: images uint8 [N, C, H, W] and given labels int64 [N]. Never the truth."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> Batch:
        """The rows ``index``, int64 [B]."""
        return Batch(self.images[index], self.labels[index], index)

    def shuffled(self, batch_size: int, keep: Tensor | None = None) -> Iterator[Batch]:
        """Every row once, or every row that ``keep``, bool [N], has, in an order drawn from torch's default generator.

        A last batch of one row joins the batch before it: batch normalisation cannot train on one image.
        """
        order = torch.randperm(len(self)).to(self.labels.device)
        if keep is not None:
            order = order[keep[order]]
        parts = [part for part in order.split(batch_size) if len(part)]  # type: ignore[no-untyped-call]
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        for index in parts:
            yield self.gather(index)


@dataclass(frozen=True)
class Labelled:
    """A held-out set: images uint8 [N, C, H, W] and the labels to score against, int64 [N]."""

    images: Tensor
    labels: Tensor
