"""Random changes of whole batches of uint8 images [B, C, H, W], drawn per sample, with no loop over samples.

Random numbers come from torch's default generators: of the images' device, and of the CPU where the host must know what was
drawn (which operation a sample gets). Nothing waits for a device: no element is read, no shape depends on one, and what the
host drew is copied without blocking. No function changes its input, except :func:`erase`.

What a change is follows torchvision 0.28 (``transforms.v2`` on tensors), which draws one change per call: the operations are
its own on uint8, rounding included. Images with a number of channels other than 3 have no colour: :func:`saturation`,
:func:`hue` and :func:`grey` leave them as they are, as torchvision does for one channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from data.table import moved

# --- where pixels come from -------------------------------------------------------------------------------------------------


def _pick(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, C, h, w]: pixels at ``rows`` and ``columns``, int64 of shapes that broadcast to [B, h, w]."""
    index = rows * images.shape[3] + columns
    found = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return found.view(*images.shape[:2], *index.shape[1:])


def window(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """The part [B, C, height, width] of each image whose first row and column are ``top`` and ``left``, int64 [B]."""
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    return _pick(images, rows[:, :, None], columns[:, None, :])


def crop(images: Tensor, height: int, width: int) -> Tensor:
    """A part [B, C, height, width] of each image, uniformly among those that lie within it."""
    num_images, _, full_height, full_width = images.shape
    top = torch.randint(full_height - height + 1, (num_images,), device=images.device)
    left = torch.randint(full_width - width + 1, (num_images,), device=images.device)
    return window(images, top, left, height, width)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The middle [B, C, size, size]; half a pixel is rounded to even."""
    top, left = (round((full - size) / 2) for full in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def shift(images: Tensor, reach: int) -> Tensor:
    """Moves each image by its own -reach..reach pixels in both directions; zeros move in."""
    return crop(functional.pad(images, (reach, reach, reach, reach)), *images.shape[2:])


def flip(images: Tensor) -> Tensor:
    """Every other image, at random, seen in a mirror."""
    return sometimes(images, images.flip(3), 0.5)


def sometimes(images: Tensor, changed: Tensor, probability: float) -> Tensor:
    """``changed`` for samples drawn with that probability, ``images`` for the others."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < probability, changed, images)


def erase(images: Tensor, side: int) -> Tensor:
    """Sets one square per image to 0, in place; its place is uniform over those within the image."""
    num_images, _, height, width = images.shape
    top = torch.randint(height - side + 1, (num_images, 1), device=images.device)
    left = torch.randint(width - side + 1, (num_images, 1), device=images.device)
    row, column = torch.arange(height, device=images.device) - top, torch.arange(width, device=images.device) - left
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    return images.masked_fill_(inside[:, None], 0.0)


def draw_boxes(images: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of each image, float32 [B] of whole pixels: top, left, height and width.

    Area uniform in ``scale`` times the image's, logarithm of width / height uniform in that of ``ratio``, place uniform; the
    first of ten draws that fits, and the whole image where none does (as torchvision has it for square images).
    """
    num_images, _, full_height, full_width = images.shape
    area = full_height * full_width * torch.empty(10, num_images, device=images.device).uniform_(*scale)
    aspect = torch.empty(10, num_images, device=images.device).uniform_(math.log(ratio[0]), math.log(ratio[1])).exp()
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (height >= 1) & (height <= full_height) & (width >= 1) & (width <= full_width)
    first = fits.int().argmax(dim=0, keepdim=True)
    found = fits.gather(0, first)[0]
    height = torch.where(found, height.gather(0, first)[0], full_height)
    width = torch.where(found, width.gather(0, first)[0], full_width)
    top = (torch.rand(num_images, device=images.device) * (full_height - height + 1)).floor()
    left = (torch.rand(num_images, device=images.device) * (full_width - width + 1)).floor()
    return top, left, height, width


def resize_boxes(images: Tensor, boxes: tuple[Tensor, Tensor, Tensor, Tensor], size: int) -> Tensor:
    """What :func:`draw_boxes` drew, brought to [B, C, size, size] by bilinear interpolation without antialiasing.

    Without antialiasing it is torchvision's ``resized_crop(antialias=False)``; its default differs in boxes larger than
    ``size``, which are few and hardly larger where images are stored an eighth larger than the network's input.
    """
    top, left, height, width = (value[:, None] for value in boxes)
    step = (torch.arange(size, device=images.device) + 0.5) / size
    # held within the box, not the image: a crop that is resized knows nothing of the pixels around it
    rows = top + (step * height - 0.5).clamp(min=0).minimum(height - 1)
    columns = left + (step * width - 0.5).clamp(min=0).minimum(width - 1)
    down, across = (2 * rows + 1) / images.shape[2] - 1, (2 * columns + 1) / images.shape[3] - 1
    grid = torch.stack([across[:, None, :].expand(-1, size, -1), down[:, :, None].expand(-1, -1, size)], dim=3)
    return functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round_().to(torch.uint8)


def resized_crop(
    images: Tensor, size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """A random part of each image at [B, C, size, size] (Szegedy et al. 2015): see the two functions above."""
    return resize_boxes(images, draw_boxes(images, scale, ratio), size)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Each image seen through its own affine map, nearest neighbour, black outside.

    ``matrices``, float32 [B, 2, 3], lead from a pixel of the output, (x, y, 1) from the image's centre, to one of the input.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    across, down, offset = matrices[:, :, :, None, None].unbind(2)
    # written out, for a matrix product may be rounded to ten bits on a GPU, which moves pixels
    columns, rows = (across * x + down * y + offset).unbind(1)
    columns, rows = (columns + (width - 1) / 2).round_().long(), (rows + (height - 1) / 2).round_().long()
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    return _pick(images, rows.clamp_(0, height - 1), columns.clamp_(0, width - 1)) * inside[:, None]


# --- what becomes of levels; a second argument is float32 [B] on the images' device, and a change of 0 is none ---------------


def _levels(pixels: Tensor) -> Tensor:
    """Float levels as uint8: cut off at both ends, then towards zero."""
    return pixels.clamp_(0, 255).to(torch.uint8)


def _away(images: Tensor, others: Tensor, change: Tensor) -> Tensor:
    """Differences of ``images`` from ``others`` times 1 + ``change``."""
    change = change[:, None, None, None]
    return _levels(torch.addcmul(images * (1 + change), others, -change))


def _luma(images: Tensor) -> Tensor:
    """The grey image, whole levels as float32 [B, 1, H, W]; without colour the image itself, [B, C, H, W]."""
    if images.shape[1] != 3:
        return images.float()
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def brightness(images: Tensor, change: Tensor) -> Tensor:
    """Levels times 1 + ``change``, which is >= -1 here and below."""
    return _levels(images * (1 + change)[:, None, None, None])


def contrast(images: Tensor, change: Tensor) -> Tensor:
    """Differences from the image's mean level times 1 + ``change``."""
    return _away(images, _luma(images).mean(dim=(1, 2, 3), keepdim=True), change)


def saturation(images: Tensor, change: Tensor) -> Tensor:
    """Differences from the grey image times 1 + ``change``."""
    return _away(images, _luma(images), change) if images.shape[1] == 3 else images


def sharpness(images: Tensor, change: Tensor) -> Tensor:
    """Differences from the blurred image times 1 + ``change``; pixels at the border, which have no blurred ones, stay."""
    pixels = images.float()
    inner = pixels[:, :, 1:-1, 1:-1]
    # 3 x 3 neighbours, the middle one five times: sums of whole numbers are exact, a convolution on a GPU need not be
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner).div_(13).round_()
    inner.addcmul_(blurred - inner, -change[:, None, None, None])
    return _levels(pixels)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Colours moved along the circle of hues by ``turn`` of it, -0.5..0.5, at equal saturation and value of HSV."""
    if images.shape[1] != 3:
        return images
    pixels = images.float()
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    spread = value - pixels.amin(1)
    sixths = torch.where(green == value, blue - red + 2 * spread, red - green + 4 * spread)
    sixths = torch.where(red == value, green - blue, sixths) / spread.clamp(min=1) + 6 * turn[:, None, None]
    # red, green and blue are one function of the hue, a third of the circle apart: 5, 3 and 1 sixths
    place = (sixths[:, None] + torch.arange(5, 0, -2, device=images.device)[:, None, None]) % 6
    pixels = value[:, None] - spread[:, None] * torch.minimum(place, 4 - place).clamp_(0, 1)
    return _levels(pixels * (255.999 / 255))  # how torchvision rounds from 0..1


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the ``bits`` highest of each level's eight bits, 1..8."""
    dropped = (8 - bits).to(torch.uint8)[:, None, None, None]
    return (images >> dropped) << dropped


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts levels from ``threshold`` on."""
    return torch.where(images >= threshold[:, None, None, None], ~images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to 0..255; one of a single level stays."""
    pixels = images.float()
    low, high = torch.aminmax(pixels.flatten(2), dim=2, keepdim=True)
    low, high = low[..., None], high[..., None]
    flat = high == low
    stretched = (pixels - low) / torch.where(flat, 1, (high - low) * (1 / 255))
    return torch.where(flat, images, _levels(stretched))


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's levels so that about as many pixels lie in each part of 0..255 (Pillow's rule)."""
    levels = images.flatten(2).long()
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = counts.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    spread = table.clamp_(max=255).gather(2, levels).to(torch.uint8)
    return torch.where(step > 0, spread, images.flatten(2)).view(images.shape)


def grey(images: Tensor, probability: float) -> Tensor:
    """Images without colour, each with that probability."""
    return sometimes(images, _luma(images).to(torch.uint8), probability)


def colour_jitter(images: Tensor, reach: tuple[float, float, float, float], probability: float = 1.0) -> Tensor:
    """:func:`brightness`, :func:`contrast`, :func:`saturation` and :func:`hue`, each by -reach..reach, uniformly.

    A sample is changed at all with ``probability``. The order of the four is drawn per batch; torchvision draws it per image.
    """
    drawn = torch.rand(4, len(images), device=images.device)
    changed = images
    for number in torch.randperm(4).tolist():
        change = (brightness, contrast, saturation, hue)[number]
        changed = change(changed, (2 * drawn[number] - 1) * reach[number])
    return sometimes(images, changed, probability)


# --- policies: which operation with which magnitude -------------------------------------------------------------------------

# Named and ordered as in torchvision. The first six are maps of the plane and are done together.
_MAPS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": brightness,
    "Color": saturation,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": lambda images, magnitude: solarize(images, 255 * magnitude),
    "AutoContrast": lambda images, _: autocontrast(images),
    "Equalize": lambda images, _: equalize(images),
}
OPERATIONS = (*_MAPS, *_CHANGES)
_LAST_SIGNED = OPERATIONS.index("Sharpness")


@lru_cache(maxsize=8)
def magnitudes(bins: int, height: int, width: int) -> Tensor:
    """[operation, bin]: shear as a slope, translation in pixels, angle in degrees, changes, bits, threshold / 255."""
    ends = dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3)) | {"TranslateX": (0.0, 150 / 331 * width), "Rotate": (0.0, 30.0)}
    ends |= {"TranslateY": (0.0, 150 / 331 * height), "Posterize": (8.0, 4.0), "Solarize": (1.0, 0.0)}
    ends |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.9))
    table = torch.stack([torch.linspace(*ends.get(name, (0.0, 0.0)), bins) for name in OPERATIONS])
    for name in ("TranslateX", "TranslateY"):
        table[OPERATIONS.index(name)].trunc_()
    table[OPERATIONS.index("Posterize")].round_()
    return table


def _matrices(operation: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """For :func:`warp`, float32 [b, 2, 3]: shear about the upper left corner, rotation about the centre, anticlockwise."""
    number = torch.arange(1, len(_MAPS))[:, None]
    shear_x, shear_y, right, down, angle = torch.where(operation == number, magnitude, 0).double()
    cosine, sine = angle.deg2rad().cos(), angle.deg2rad().sin()
    first = (cosine, shear_x - sine, shear_x * height / 2 - right)
    second = (shear_y + sine, cosine, shear_y * width / 2 - down)
    return torch.stack([*first, *second], dim=1).view(-1, 2, 3).float()


def operate(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Each sample through its own of ``OPERATIONS``: their numbers, int64 [B], and magnitudes, float32 [B], both on the CPU."""
    operation, order = operation.sort()
    magnitude = magnitude[order]
    kind = (operation - len(_MAPS) + 1).clamp(min=0)
    sizes = torch.bincount(kind, minlength=1 + len(_CHANGES)).tolist()
    matrices = _matrices(operation[: sizes[0]], magnitude[: sizes[0]], *images.shape[2:])
    host = (order, order.argsort(), magnitude, matrices)
    order, back, magnitude, matrices = (moved(tensor, images.device) for tensor in host)
    parts, amounts = torch.split(images.index_select(0, order), sizes), torch.split(magnitude, sizes)
    changed = [warp(parts[0], matrices)]
    for change, part, amount in zip(_CHANGES.values(), parts[1:], amounts[1:], strict=True):
        if len(part):
            changed.append(change(part, amount))
    return torch.cat(changed).index_select(0, back)


def _signed(operation: Tensor, magnitude: Tensor) -> Tensor:
    """Maps and changes go either way, with equal probability."""
    return torch.where((operation <= _LAST_SIGNED) & (torch.rand(len(operation)) < 0.5), -magnitude, magnitude)


def rand_augment(images: Tensor, num_ops: int = 2, magnitude: int = 10, bins: int = 31) -> Tensor:
    """``num_ops`` of torchvision's 14 operations one after the other, uniformly, magnitude 0..bins - 1 (Cubuk et al. 2020)."""
    table = magnitudes(bins, *images.shape[2:])[:, magnitude]
    for _ in range(num_ops):
        operation = torch.randint(len(OPERATIONS), (len(images),))
        images = operate(images, operation, _signed(operation, table[operation]))
    return images
