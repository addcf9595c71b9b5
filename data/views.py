"""Augmentation of whole batches of uint8 images, with random numbers per sample and no loop over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

View = Callable[[Tensor], Tensor]


def make_views(mean: Sequence[float], std: Sequence[float], image_size: int) -> tuple[View, View, View]:
    """The views (plain, weak, strong): uint8 [B, C, H, W] -> float32 [B, C, H, W], ``(images / 255 - mean) / std``.

    Weak: each sample shifted by -p..p pixels, uniformly and independently in both directions, with ``p = max(1, image_size //
    8)``; what moves in has pixel value 0 before normalisation. Strong: shifted by -2p..2p, then one square of side
    ``max(2, image_size // 4)``, anywhere within the image, set to the channel mean. ``mean`` and ``std`` are per channel, of
    images / 255. Random numbers come from torch's default generator of the images' device.
    """
    reach = max(1, image_size // 8)
    side = max(2, image_size // 4)
    constants: dict[torch.device, tuple[Tensor, Tensor]] = {}  # pixel mean and standard deviation [C, 1, 1] by device

    def plain(images: Tensor) -> Tensor:
        if images.device not in constants:
            scaled = 255 * torch.tensor([mean, std], dtype=torch.float64)
            centre, spread = scaled[:, :, None, None].to(images.device, torch.float32)
            constants[images.device] = (centre, spread)
        centre, spread = constants[images.device]
        return (images - centre).div_(spread)

    def weak(images: Tensor) -> Tensor:
        return plain(shift(images, reach))

    def strong(images: Tensor) -> Tensor:
        return erase(plain(shift(images, 2 * reach)), side)

    return plain, weak, strong


def shift(images: Tensor, reach: int) -> Tensor:
    """Moves each image of [B, C, H, W] by its own -reach..reach pixels in both directions; zeros move in."""
    num_images, channels, height, width = images.shape
    padded = functional.pad(images, (reach, reach, reach, reach)).flatten(2)
    corner = torch.randint(2 * reach + 1, (2, num_images, 1), device=images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    index = (rows[:, :, None] * (width + 2 * reach) + columns[:, None, :]).view(num_images, 1, height * width)
    return padded.gather(2, index.expand(-1, channels, -1)).view(images.shape)


def erase(images: Tensor, side: int) -> Tensor:
    """Sets one square per image of [B, C, H, W] to 0, in place; its place is uniform over those within the image."""
    num_images, _, height, width = images.shape
    top = torch.randint(height - side + 1, (num_images, 1), device=images.device)
    left = torch.randint(width - side + 1, (num_images, 1), device=images.device)
    row, column = torch.arange(height, device=images.device) - top, torch.arange(width, device=images.device) - left
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    return images.masked_fill_(inside[:, None], 0.0)
