"""The views of a batch: what a network sees of uint8 images, plainly and after random changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data import augment
from errors import UserError

View = Callable[[Tensor], Tensor]


def make_views(
    mean: Sequence[float], std: Sequence[float], image_size: int, kind: str = "shift", input_size: int = 0
) -> tuple[View, View, View]:
    """The views (plain, weak, strong): uint8 [B, C, S, S] -> float32 [B, C, T, T], ``(images / 255 - mean) / std``.

    S is ``image_size``, at least 4; T is ``input_size``, or S where that is 0. ``kind`` is one of ``VIEWS``, which say what is
    done before. ``mean`` and ``std`` are per channel, of images / 255. Random numbers come from torch's default generators and
    are drawn per sample. ValueError for a kind that is not known, and for an ``input_size`` that it cannot make.
    """
    if kind not in VIEWS:
        raise UserError(f"unknown views {kind!r}; known are {', '.join(VIEWS)}")
    constants: dict[torch.device, tuple[Tensor, Tensor]] = {}  # pixel mean and standard deviation [C, 1, 1] by device

    def normalise(images: Tensor) -> Tensor:
        if images.device not in constants:
            divisors = [one or 1.0 for one in std]  # a channel that never changes becomes 0
            scaled = 255 * torch.tensor([mean, divisors], dtype=torch.float64)
            centre, spread = scaled[:, :, None, None].to(images.device, torch.float32, non_blocking=True)
            constants[images.device] = (centre, spread)
        centre, spread = constants[images.device]
        return (images - centre).div_(spread)

    return VIEWS[kind](normalise, image_size, input_size or image_size)


def _shift(normalise: View, image_size: int, input_size: int) -> tuple[View, View, View]:
    """For small images whose left is not their right, digits for one. Everything is in proportion to the image's size.

    Weak: shifted by -p..p pixels in both directions, with ``p = max(1, image_size // 8)``; what moves in has pixel value 0
    before normalisation. Strong: shifted by -2p..2p, then one square of side ``max(2, image_size // 4)``, anywhere within the
    image, set to the channel mean.
    """
    _keeps_size("shift", image_size, input_size)
    reach, side = max(1, image_size // 8), max(2, image_size // 4)

    def weak(images: Tensor) -> Tensor:
        return normalise(augment.shift(images, reach))

    def strong(images: Tensor) -> Tensor:
        return augment.erase(normalise(augment.shift(images, 2 * reach)), side)

    return normalise, weak, strong


def _flip_crop(normalise: View, image_size: int, input_size: int) -> tuple[View, View, View]:
    """CIFAR's. Weak: shifted by -p..p (4 at 32 pixels), as above, and flipped left to right or not.

    Strong: weak, then RandAugment (2 operations, magnitude 10 of 0..30), then a square of half the image's side set to the
    channel mean. It lies within the image, as torchvision's RandomErasing has it; Cutout (DeVries and Taylor 2017) lets it
    hang over the border.
    """
    _keeps_size("flip-crop", image_size, input_size)
    reach, side = max(1, image_size // 8), image_size // 2

    def moved(images: Tensor) -> Tensor:
        return augment.flip(augment.shift(images, reach))

    def weak(images: Tensor) -> Tensor:
        return normalise(moved(images))

    def strong(images: Tensor) -> Tensor:
        return augment.erase(normalise(augment.rand_augment(moved(images))), side)

    return normalise, weak, strong


def _imagenet(normalise: View, image_size: int, input_size: int) -> tuple[View, View, View]:
    """For photographs that are stored larger than the network's input, and whose left may be their right.

    Plain: the middle. Weak: any part of that size, flipped or not. Strong: a part of 0.2 to 1 of the area and width 3/4 to 4/3
    of height, resized, flipped or not; with probability 0.8 brightness, contrast and saturation times 0.6..1.4 and hue turned
    by up to a tenth; grey with probability 0.2.
    """
    return _photographs(normalise, image_size, input_size, augment.flip)


def _photographs(normalise: View, image_size: int, input_size: int, mirrored: View) -> tuple[View, View, View]:
    if input_size > image_size:
        raise UserError(
            f"views crop and imagenet cut {input_size} pixels from images of {image_size}; at most {image_size} are there"
        )

    def plain(images: Tensor) -> Tensor:
        return normalise(augment.centre_crop(images, input_size))

    def weak(images: Tensor) -> Tensor:
        return normalise(mirrored(augment.crop(images, input_size, input_size)))

    def strong(images: Tensor) -> Tensor:
        parts = mirrored(augment.resized_crop(images, input_size, scale=(0.2, 1.0)))
        return normalise(augment.grey(augment.colour_jitter(parts, (0.4, 0.4, 0.4, 0.1), probability=0.8), probability=0.2))

    return plain, weak, strong


def _keeps_size(kind: str, image_size: int, input_size: int) -> None:
    if input_size != image_size:
        raise UserError(f"views {kind!r} keep the size of images, {image_size}; input_size is {input_size}")


def _crop(normalise: View, image_size: int, input_size: int) -> tuple[View, View, View]:
    """As ``imagenet``, but no image is seen in a mirror, as arrows, signs and writing must not be."""
    return _photographs(normalise, image_size, input_size, lambda images: images)


VIEWS: dict[str, Callable[[View, int, int], tuple[View, View, View]]] = {
    "shift": _shift,
    "flip-crop": _flip_crop,
    "crop": _crop,
    "imagenet": _imagenet,
}
