"""The layout of a cache file: a table of images and labels that is mapped as it lies.

Images as uint8, zeros up to a multiple of 8, the int64 columns (truth, given, split), what was met in each file (int64 [N, 3])
and the files' keys (int64 [N]), a JSON footer, and a trailer of fixed length: length of the footer (8 bytes, little-endian),
sha256 of the footer, magic. The footer holds shapes, statistics and the sha256 of images and labels, by which a data set is
known, and that of what follows them, which depends on the machine. The mapping is private: the page cache holds the one copy
per machine, and a write through a tensor stays in the process that wrote.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from data.noise import label_bytes

MAGIC = b"NLSTAB05"
FAMILY = MAGIC[:6]
TRAILER = 8 + 32 + len(MAGIC)
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python 3.11 lacks the name
COLUMNS = ("truth", "given", "split")


@dataclass(frozen=True)
class Table:
    """A source, mapped: images uint8 [N, C, H, W], labels int64 [N], statistics per channel of images / 255."""

    images: Tensor
    truth: Tensor | None  # clean labels, -1 where not known
    given: Tensor | None  # labels of the source's own
    split: Tensor | None  # data.sources.TRAIN, VALIDATION or TEST
    num_classes: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of all images but those of the source's own test split, and damaged ones
    std: tuple[float, ...]
    checksum: str  # sha256 of images and labels as they are in the file
    facts: Tensor  # int64 [N, 3]: width, height and data.readers.pixels.Flag of each file; 0 where there is nothing to say
    keys: Tensor | None  # int64 [N], see RawTable
    rule: str
    reading: Mapping[str, Any]
    left_out: Mapping[str, int]
    notes: tuple[str, ...]
    damage: Mapping[int, str]  # row: why its image cannot be read
    levels: tuple[int, ...]  # how many of the 256 levels each channel has
    class_levels: Tensor  # int64 [K, C, 2]: lowest and highest level of each class; 255 and 0 where it has no image


class UnusableError(Exception):
    """A cache file is not what was written, or not of what the source is now."""


def write_end(file: IO[bytes], description: Mapping[str, Any], facts: Tensor, keys: Tensor | None) -> None:
    """What follows images and labels in a file, and with it makes it one."""
    extras = label_bytes(facts) + (b"" if keys is None else label_bytes(keys))
    whole = {**description, "has_keys": keys is not None, "extras_sha256": hashlib.sha256(extras).hexdigest()}
    footer = json.dumps(whole).encode()
    file.writelines([extras, footer, len(footer).to_bytes(8, "little"), hashlib.sha256(footer).digest(), MAGIC])


def read_table(path: Path, stamp: str | None = None, *, verify: bool = False) -> Table:
    """Maps the file. UnusableError where it is not what was written, or not of this ``stamp``."""
    if path.stat().st_size <= TRAILER:
        raise UnusableError("is damaged (it is too short)")
    footer, content = _read_footer(mapped(path))
    shape, names = footer["shape"], footer["tables"]
    num_rows, pixels = shape[0], shape[0] * shape[1] * shape[2] * shape[3]
    num_extras = 8 * num_rows * (3 + footer["has_keys"])
    payload, extras = content[: len(content) - num_extras], content[len(content) - num_extras :]
    for part, name in ((payload, "sha256"), (extras, "extras_sha256")):
        if verify and hashlib.sha256(part.numpy().data).hexdigest() != footer[name]:
            raise UnusableError("is damaged (its checksum differs)")
    if stamp is not None and stamp != footer["stamp"]:
        raise UnusableError("is of before the data set changed")
    labels = payload[len(payload) - 8 * num_rows * len(names) :].view(torch.int64).view(len(names), num_rows)
    columns = dict(zip(names, labels, strict=True))
    numbers = extras.view(torch.int64)
    return Table(
        payload[:pixels].view(shape),
        columns.get("truth"),
        columns.get("given"),
        columns.get("split"),
        footer["num_classes"],
        tuple(footer["classes"]),
        tuple(footer["mean"]),
        tuple(footer["std"]),
        footer["sha256"],
        numbers[: 3 * num_rows].view(num_rows, 3),
        numbers[3 * num_rows :] if footer["has_keys"] else None,
        footer["rule"],
        footer["reading"],
        footer["left_out"],
        tuple(footer["notes"]),
        {int(row): reason for row, reason in footer["damage"].items()},
        tuple(footer["levels"]),
        torch.tensor(footer["class_levels"]),
    )


def mapped(path: Path) -> Tensor:
    """The file's bytes, private to this process where it writes. No memory is reserved: Linux would refuse large tables."""
    with path.open("rb") as file:
        flags, protection = mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags, prot=protection), dtype=torch.uint8)


def _read_footer(whole: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The footer and what is before it."""
    trailer = bytes(whole[-TRAILER:].tolist())
    if trailer[40:] != MAGIC:
        known = trailer[40:].startswith(FAMILY)
        raise UnusableError("is of another version of this program" if known else "is damaged (its end is missing)")
    start = len(whole) - TRAILER - int.from_bytes(trailer[:8], "little")
    text = bytes(whole[max(start, 0) : -TRAILER].tolist())
    if start < 0 or hashlib.sha256(text).digest() != trailer[8:40]:
        raise UnusableError("is damaged (its footer is not readable)")
    footer: dict[str, Any] = json.loads(text)
    return footer, whole[:start]
