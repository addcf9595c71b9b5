"""Image files: listed, checked, and decoded in threads (PIL lets go of the interpreter while it decodes)."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.processors import num_processors
from data.readers.base import TEST, TRAIN, RawTable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # published .jpg files may be any of these; no format that runs programs
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what PIL raises
BLOCK_BYTES = 2**22
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as large, it is an error


@dataclass(frozen=True)
class Listing:
    """Image files and what is known of each, in order. Labels are int64 [N]."""

    folder: Path
    names: Sequence[str]  # paths within the folder
    classes: tuple[str, ...]
    given: Tensor
    split: Tensor | None = None
    truth: Tensor | None = None  # -1 where not known
    ignored: int = 0  # files in the folder that are no images

    @property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in self.names]

    def table(self, channels: int, size: int) -> RawTable:
        """Decoded to squares of ``size`` pixels a side with 1 or 3 channels. A test row's label is its clean label, where no
        other is known; ValueError where there are no training images."""
        split = torch.zeros_like(self.given) if self.split is None else self.split
        if not bool((split == TRAIN).any()):
            raise ValueError(f"{self.folder} holds no training images")
        truth = torch.full_like(self.given, -1) if self.truth is None else self.truth
        truth = torch.where((split == TEST) & (truth < 0), self.given, truth)
        return RawTable(
            (len(self.names), channels, size, size),
            functools.partial(read_blocks, self.paths, channels, size),
            len(self.classes),
            truth if bool((truth >= 0).any()) else None,
            self.given,
            self.split,
            self.classes,
        )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an OSError into a ValueError that says what was read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error}") from error


def entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in ``folder``, each sorted by name; hidden ones are left out."""
    with os.scandir(folder) as scan:
        found = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    sides: tuple[list[Path], list[Path]] = ([], [])
    for entry in found:
        sides[not entry.is_dir()].append(Path(entry.path))
    return sides


def files_under(folder: Path) -> Iterator[Path]:
    """All files in ``folder`` and in folders within it, sorted; hidden ones are left out. ValueError for a link back up."""
    folders, files = entries(folder)
    yield from files
    for below in folders:
        if below.is_symlink() and folder.resolve().is_relative_to(below.resolve()):
            raise ValueError(f"{below} is a link to a folder that it lies in")
        yield from files_under(below)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it starts from."""
    return not os.path.isabs(name) and "\0" not in name and os.path.normpath(name).split(os.sep)[0] not in (".", "..")


def check_files(folder: Path, names: Sequence[str], listed_in: object) -> None:
    """ValueError where a file is missing: the first, and how many more."""
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{listed_in}: {missing[0]} is missing in {folder}{more}")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image file. ValueError with its name where it cannot be opened, or is damaged where it is used."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except DAMAGE as error:
        unknown = f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        reason = unknown if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(f"image {path} cannot be read ({reason})") from error


def shorter_side(path: str) -> int:
    """Of an image, in pixels; reads no more than its head."""
    with _opened(path) as image:
        return min(image.size)


def count_channels(paths: Sequence[str]) -> int:
    """1 where all images are in greyscale, else 3; heads are read up to the first image in colour."""
    return 1 if all(map(_is_grey, paths)) else 3


def _is_grey(path: str) -> bool:
    with _opened(path) as image:
        return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def decode(path: str, channels: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The middle square of an image, brought to ``size`` pixels a side: uint8 [H, W], or [H, W, 3].

    The same as the shorter side resized (bilinear, antialiased) and then a centre crop, and nothing where the image has that
    size. A JPEG of four times the size or more is decoded at a half, a quarter or an eighth. Transparency is dropped, the upper
    8 of 16 bits of grey stay, and rotation noted in the file is not applied (as in torchvision's ImageFolder). ValueError with
    the file's name where it is damaged.
    """
    mode = "L" if channels == 1 else "RGB"
    with _opened(path) as image:
        image.draft(None, (2 * size, 2 * size))
        plain: Image.Image = image
        if image.mode.startswith("I"):
            plain = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if plain.mode != mode:
            plain = plain.convert(mode)
        if plain.size != (size, size):
            left, top = (max(one - other, 0) / 2 for one, other in (plain.size, plain.size[::-1]))
            box = (left, top, plain.width - left, plain.height - top)
            plain = plain.resize((size, size), Image.Resampling.BILINEAR, box)
        return np.asarray(plain)


def read_blocks(paths: Sequence[str], channels: int, size: int, start: int) -> Iterator[Tensor]:
    """The images from row ``start`` on, uint8 [b, channels, size, size] of about 4 MB. At most two blocks per core wait."""
    rows = max(1, min(512, BLOCK_BYTES // (channels * size * size)))
    workers = num_processors()
    pool, waiting = ThreadPoolExecutor(workers), deque[Future[Tensor]]()
    try:
        for first in range(start, len(paths), rows):
            waiting.append(pool.submit(_read_block, paths[first : first + rows], channels, size))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_block(paths: Sequence[str], channels: int, size: int) -> Tensor:
    images = np.empty((len(paths), channels, size, size), np.uint8)
    for image, path in zip(images, paths, strict=True):
        image[...] = np.moveaxis(decode(path, channels, size).reshape(size, size, channels), 2, 0)
    return torch.from_numpy(images)
