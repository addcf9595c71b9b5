"""What a user should know of the files of a data set before a sweep is launched: one line each, warnings last."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data.readers.images import in_words
from data.readers.pixels import Flag
from data.table_file import Table

FEW_LEVELS = 16  # of 256, from which on a channel says something
NARROW = 16  # levels between the darkest and the brightest of a class, likewise
LONG = 1.5  # times as long as wide, from which on the middle square is far from all
SMALL = 0.5  # of the size that they are brought to, below which images are blurred
NAMED = 5  # classes that a line names


def remarks(table: Table) -> list[str]:
    """Sizes, orientation, transparency, depth, what is left out and what the reader notes, of a table whose images come from
    files; else nothing but warnings about levels."""
    return [*_files(table), *table.notes, *_levels(table)]


def _files(table: Table) -> Iterator[str]:
    if not table.reading:
        return
    width, height, flags = table.facts[table.facts[:, 2] & Flag.DAMAGED == 0].unbind(1)
    size, resize = table.reading["size"], table.reading["resize"]
    shorter, longer = torch.minimum(width, height), torch.maximum(width, height)
    least, most = int((width * height).argmin()), int((width * height).argmax())
    span = f"{width[least]} x {height[least]}" + (f" to {width[most]} x {height[most]}" if least != most else "")
    middle = f"median shorter side {int(shorter.median())}"
    how = {"crop": "the middle square", "squash": "all of each, out of proportion", "pad": "all of each, padded"}[resize]
    yield f"images {len(width)} files of {span} pixels, {middle}, brought to {size} x {size}: {how} (--resize {resize})"

    def count(flag: Flag) -> int:
        return int((flags & flag != 0).sum())

    met = {
        "turned upright as their EXIF says": count(Flag.TURNED),
        f"transparent, over {table.reading['background']} (--background)": count(Flag.TRANSPARENT),
        f"of more than 8 bits of grey, of which the set uses {table.reading['bits']}: the upper 8 stay": count(Flag.DEEP),
        "of several frames, of which the first is read": count(Flag.FRAMES),
        "without their last bytes, shown as far as they go": count(Flag.CUT_SHORT),
        "damaged and left out": len(table.damage),
    }
    if said := {what: number for what, number in met.items() if number}:
        yield f"of these {in_words(said)}"
    if table.left_out:
        yield f"left out {in_words(table.left_out)}"
    blurred = int((shorter < SMALL * size).sum())
    if blurred:
        yield f"warning: {blurred} images are far smaller than {size} x {size}; the smallest side is {int(shorter.min())}"
    cut = int((longer > LONG * shorter).sum())
    if cut and resize == "crop":
        yield f"warning: of {cut} images the middle square is less than two thirds; --resize squash or pad keeps all of them"


def _levels(table: Table) -> Iterator[str]:
    poor = [f"{number}" for number in table.levels if number < FEW_LEVELS]
    binary = _is_binary(table)
    if poor and not binary:
        yield f"warning: channels of the images have only {', '.join(poor)} levels of 256; nearly nothing can be seen in them"
    low, high = table.class_levels.unbind(2)
    narrow = ((high >= low) & (high - low < NARROW)).all(dim=1).nonzero().squeeze(1).tolist()
    if narrow:
        names = [table.classes[label] if table.classes else str(label) for label in narrow]
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        yield f"warning: all images of class {shown} are of nearly one level; nothing can be seen in them"


def _is_binary(table: Table) -> bool:
    """Whether few levels are spread over all of the range, as in drawings: nothing is lost there."""
    low, high = table.class_levels[..., 0].amin(dim=0), table.class_levels[..., 1].amax(dim=0)
    return bool((high - low >= 128).all())
