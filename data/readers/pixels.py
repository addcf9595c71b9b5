"""One image file to pixels: any format that Pillow reads, the right way up, over a background, at 8 bits and one size.

Pillow is asked for everything; what is decided here is in :class:`Decoding`, one rule for a whole data set.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import io
import os
import random
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from errors import UserError

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

VERSION = 2  # of what pixels a file becomes; 1 knew no orientation, transparency or depth
RESIZES = ("crop", "squash", "pad")
# Pillow runs Ghostscript for EPS, knows the others by their first bytes only, and reads IPTC and PIXAR by their names alone
UNREAD = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "PIXAR", "XVTHUMB", "MCIDAS"}
EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif")  # files that cannot hold more
TURNED = range(2, 9)  # EXIF's orientations other than upright
MOST_MISSING = 0.1  # of a JPEG's pixels, up to which it is read as viewers show it
SURVEYED = 1000  # heads that are read to find a data set's size
DAMAGE = (  # what PIL raises, with what its plug-ins let through (AVIF's decoder, BLP, GIF)
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError),
    *(RuntimeError, LookupError, TypeError, ArithmeticError),
)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as large, it is an error
warnings.filterwarnings(
    "ignore", category=UserWarning, module=r"PIL\."
)  # of what a file notes of itself and no pixel depends on


class Flag(enum.IntFlag):
    """What was met in a file."""

    TURNED = 1  # the orientation that it notes was applied
    TRANSPARENT = 2  # something of the background is seen
    DEEP = 4  # grey of more than 8 bits
    FRAMES = 8  # more than one picture, of which the first is read
    CUT_SHORT = 16  # its last bytes are missing
    DAMAGED = 32  # it cannot be read; its pixels are 0


class DamagedImageError(UserError):
    """The content of a file is no image, or not a whole one."""


@dataclass(frozen=True)
class Decoding:
    """How every file of a data set becomes uint8 pixels [channels, size, size]."""

    channels: int  # 1 or 3
    size: int  # pixels a side
    resize: str = "crop"  # one of RESIZES: the middle square, all of it out of proportion, or all of it over the background
    background: str = "white"  # what transparency and padding show
    bits: int = 16  # that deep greys use: their upper 8 stay

    @property
    def rule(self) -> str:
        """Equal where a file becomes the same pixels."""
        return f"{VERSION} {self}"


class Picture(NamedTuple):
    """A decoded file: pixels uint8 [H, W] or [H, W, 3], the size at which it is seen before it is resized, what was met."""

    pixels: Pixels
    width: int
    height: int
    flags: int  # of Flag


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's formats that are read, with the plug-ins that are installed."""
    Image.init()
    usual = ("JPEG", "PNG", "WEBP", "TIFF")  # Pillow tries them in this order
    return (*usual, *(name for name in Image.OPEN if name not in UNREAD and name not in usual))


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings, in lower case, of files of these formats."""
    known = {*formats(), "MPO"}  # which the plug-in for JPEG opens
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def read_colour(text: str) -> tuple[int, int, int]:
    """``white`` or ``#rrggbb`` as three levels. ValueError for what is no colour."""
    with contextlib.suppress(ValueError):
        colour = ImageColor.getrgb(text)
        if len(colour) == 3:
            return colour
    raise UserError(f"--background: {text!r} is not allowed; it must be a colour such as white or #ff8800")


@contextlib.contextmanager
def opened(path: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image file, or its ``content``. DamagedImageError with its name where it is no image, or damaged where it is used.

    An OSError of the file system is none of the file's, and is passed on.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=formats()) as image:
            yield image
    except DAMAGE as error:
        if isinstance(error, DamagedImageError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        known = "it is no image that Pillow reads"
        reason = known if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise DamagedImageError(f"image {path} cannot be read ({reason})") from error


def decode(path: str, how: Decoding) -> Picture:
    """The pixels of an image file. DamagedImageError with the file's name where it is damaged.

    Resizing is bilinear and antialiased; nothing is changed where the image has that size. A JPEG of four times the size or
    more is decoded at a half, a quarter or an eighth.
    """
    try:
        return _decode(path, how)
    except DamagedImageError as error:
        content = _without_its_last_bytes(path)
        if content is None:
            raise error from error.__cause__
        return _decode(path, how, content)


def _decode(path: str, how: Decoding, content: bytes | None = None) -> Picture:
    with opened(path, content) as image:
        stored = image.size
        image.draft(None, _draft_size(stored, how))
        drafted = image.size != stored
        is_animated = image.format not in ("JPEG", "MPO") and getattr(image, "is_animated", False)
        orientation = _turn(image)
        if drafted:
            width, height = stored[::-1] if orientation >= 5 else stored
        else:
            width, height = image.size
        deep = is_deep(image)
        plain, is_transparent = _flat(image, how)
        met = {
            Flag.TURNED: orientation in TURNED,
            Flag.TRANSPARENT: is_transparent,
            Flag.DEEP: deep,
            Flag.FRAMES: is_animated,
            Flag.CUT_SHORT: content is not None,
        }
        return Picture(np.asarray(_resized(plain, how)), width, height, sum(flag for flag, is_met in met.items() if is_met))


def _draft_size(stored: tuple[int, int], how: Decoding) -> tuple[int, int]:
    """The least size at which a JPEG may be decoded: twice what is kept of it."""
    if how.resize != "pad":
        return 2 * how.size, 2 * how.size
    longer = max(stored)
    width, height = (max(1, 2 * how.size * side // longer) for side in stored)
    return width, height


def _turn(image: Image.Image) -> int:
    """Loads an image and turns it upright, in place; the orientation that it noted, 1 where it noted none."""
    is_late = image.format == "PNG"  # whose notes may follow the pixels
    noted = 1 if is_late else _orientation(image)
    image.load()
    if is_late:
        noted = _orientation(image)
    if noted in TURNED and _orientation(image) in TURNED:  # a TIFF has turned itself
        ImageOps.exif_transpose(image, in_place=True)
    return noted


def _orientation(image: Image.Image) -> int:
    """What EXIF notes; where that cannot be read, 1, as viewers show it."""
    try:
        noted = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error):
        return 1
    return noted if isinstance(noted, int) else 1


def is_deep(image: Image.Image) -> bool:
    """Whether it is in greys of more than 8 bits."""
    return image.mode.startswith("I")


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La") or is_deep(image)


def _flat(image: Image.Image, how: Decoding) -> tuple[Image.Image, bool]:
    """The image at 8 bits, in grey or in colour, over the background; and whether something of that is seen."""
    mode = "L" if how.channels == 1 else "RGB"
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nothing says what is white; store 8 or 16 bits")
    if is_deep(image):
        return _shallow(image, how, mode)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        if np.asarray(seen.getchannel("A")).min() < 255:
            behind = Image.new("RGBA", seen.size, (*read_colour(how.background), 255))
            return Image.alpha_composite(behind, seen).convert(mode), True
    return (image if image.mode == mode else image.convert(mode)), False


def _shallow(image: Image.Image, how: Decoding, mode: str) -> tuple[Image.Image, bool]:
    """A deep grey image at 8 bits: the upper ones of those that the data set uses."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0:
        raise ValueError(f"its darkest level is {levels.min()}; levels must not be negative")
    plain = Image.fromarray(np.minimum(levels >> (how.bits - 8), 255).astype(np.uint8)).convert(mode)
    clear = image.info.get("transparency")
    if not isinstance(clear, int) or not (levels == clear).any():
        return plain, False
    plain.paste(Image.new("RGB", plain.size, read_colour(how.background)).convert(mode), mask=Image.fromarray(levels == clear))
    return plain, True


def _resized(plain: Image.Image, how: Decoding) -> Image.Image:
    size, (width, height) = how.size, plain.size
    if plain.size == (size, size):
        return plain
    if how.resize == "squash":
        return plain.resize((size, size), Image.Resampling.BILINEAR)
    if how.resize == "pad":
        longer = max(width, height)
        inner = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
        canvas = Image.new("RGB", (size, size), read_colour(how.background)).convert(plain.mode)
        canvas.paste(plain.resize(inner, Image.Resampling.BILINEAR), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return canvas
    left, top = max(width - height, 0) / 2, max(height - width, 0) / 2
    return plain.resize((size, size), Image.Resampling.BILINEAR, (left, top, width - left, height - top))


def _without_its_last_bytes(path: str) -> bytes | None:
    """The content of a JPEG of which hardly anything is missing, with an end put to it; None for any other file.

    What the missing bytes would have said shows when they are made up: where two ends give the same pixels, nothing depends on
    them. Viewers show such a file, the missing part in grey.
    """
    with open(path, "rb") as file:
        content = file.read()
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    content = content.rstrip(b"\xff")  # half a marker, or half a byte of pixels, that the next bytes would become part of
    made_up = random.Random(0).randbytes(len(content)).replace(b"\xff", b"\xfe")
    end, shown = b"\xff\xd9", []
    for tail in (end, made_up + end):
        try:
            with opened(path, content + tail) as image:
                shown.append(np.asarray(image.convert("RGB")))
        except DamagedImageError:
            return None
    missing = (shown[0] != shown[1]).any(axis=2).mean()
    return content + end if missing <= MOST_MISSING else None


def shorter_side(paths: Sequence[str]) -> int:
    """The median of the images' shorter sides in pixels, of at most ``SURVEYED`` of them, evenly spread; heads alone are read.

    DamagedImageError where none of these can be read.
    """
    step = max(1, len(paths) // SURVEYED)
    sides, damage = [], None
    for path in paths[::step]:
        try:
            with opened(path) as image:
                sides.append(min(image.size))
        except DamagedImageError as error:
            damage = damage or error
    if not sides:
        assert damage is not None, "there are images"
        raise damage
    return sorted(sides)[(len(sides) - 1) // 2]


def survey(paths: Sequence[str]) -> tuple[int, int]:
    """Channels and bits of a data set: 1 where all images are in grey, else 3; and how many bits its deep greys use, 16 where
    there are none.

    Heads are read up to the first image in colour, and those of all files that can hold more than 8 bits; the pixels only of
    those that do. What cannot be read says nothing.
    """
    in_colour, highest = False, 0
    for path in paths:
        if in_colour and os.path.splitext(path)[1].lower() in EIGHT_BITS:
            continue
        try:
            with opened(path) as image:
                in_colour = in_colour or not is_grey(image)
                if is_deep(image):
                    highest = max(highest, int(np.asarray(image).max()))
        except DamagedImageError:
            continue
    return (3 if in_colour else 1), (max(8, highest.bit_length()) if highest else 16)
