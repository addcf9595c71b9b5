"""A training set is rows of a table of tensors, and a batch is a gather."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a set: images uint8 [B, C, H, W], their labels int64 [B], their index in the set int64 [B]."""

    images: Tensor
    labels: Tensor
    index: Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. On its way there the host does not wait for what the device has still to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # the driver copies from pageable memory when it likes, and may wait
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass(frozen=True)
class Labelled:
    """N rows of a table with a label each; ``rows`` None: the whole table, in order.

    The table may be the whole data set's, mapped, of which nothing is copied but batches; these go where the labels are.
    """

    images: Tensor  # uint8 [M, C, H, W]
    labels: Tensor  # int64 [N]
    rows: Tensor | None = None  # int64 [N], rows of ``images``, on the same device

    def __len__(self) -> int:
        return len(self.labels)

    def fitting(self, most: int) -> int:
        """Images per batch where none is learnt from: at most ``most``, and as many as 128 images of 256 x 256 have pixels.

        On a CPU as 64 of 32 x 32: it takes twice as long per image where activations do not fit its caches.
        """
        pixels = 64 * 32**2 if self.labels.device.type == "cpu" else 128 * 256**2
        return max(1, min(most, pixels // (self.images.shape[2] * self.images.shape[3])))

    def gather(self, index: Tensor) -> Batch:
        """The samples ``index``, int64 [B] on any device, on the labels' device."""
        place, index = moved(index, self.images.device), moved(index, self.labels.device)
        if self.rows is not None:
            place = self.rows[place]
        return Batch(moved(self.images[place], self.labels.device), self.labels[index], index)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once."""
        for index in torch.arange(len(self), device=self.images.device).split(batch_size):  # type: ignore[no-untyped-call]
            yield self.gather(index)


@dataclass(frozen=True)
class TrainData(Labelled):
    """What a method is given: images and given labels. Never the truth."""

    def shuffled(self, batch_size: int, keep: Tensor | None = None) -> Iterator[Batch]:
        """Every sample once, or every one that ``keep``, bool [N], has, in an order drawn from torch's default generator.

        A last batch of one row joins the batch before it: batch normalisation cannot train on one image.
        """
        order = torch.randperm(len(self))
        if keep is not None:
            order = order[keep.to(order.device)[order]]
        order = moved(order, self.images.device)
        parts = [part for part in order.split(batch_size) if len(part)]  # type: ignore[no-untyped-call]
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        for index in parts:
            yield self.gather(index)
