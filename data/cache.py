"""One file per source: decoded once, checked once per process, mapped by every trial.

Layout: images as uint8, zeros up to a multiple of 8, the int64 tables (truth, given), a JSON footer, and a trailer of fixed
length: length of the footer (8 bytes, little-endian), sha256 of the footer, magic. The footer holds shapes, statistics and
the sha256 of the payload, which is everything before it. The mapping is private: the page cache holds the one copy per
machine, and a write through a tensor stays in the process that wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.noise import label_bytes
from data.sources import RawTable, Source

MAGIC = b"NLSTAB01"
TRAILER = 8 + 32 + len(MAGIC)
log = logging.getLogger(__name__)
_verified: set[tuple[str, int, int, int]] = set()  # path, inode, time and size of the files that this process has checked


@dataclass(frozen=True)
class Table:
    """A source, mapped: images uint8 [N, C, H, W], labels int64 [N], statistics per channel of images / 255."""

    images: Tensor
    truth: Tensor | None  # clean labels
    given: Tensor | None  # labels of the source's own
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    checksum: str  # sha256 of images and labels as they are in the file


class DamagedError(Exception):
    """A cache file is not what was written."""


def cache_folder() -> Path:
    """``$NOISY_LABEL_CACHE``, else ``noisy-label-search`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("NOISY_LABEL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisy-label-search"


def open_table(source: Source) -> Table:
    """Maps the source's cache file, which is built where it is missing and rebuilt, with a warning, where it is damaged.

    ValueError where the cache folder cannot be used.
    """
    path = cache_folder() / f"{source.name}.table"
    try:
        return _map(path)
    except FileNotFoundError:
        pass
    except DamagedError as damage:
        log.warning("cache file %s is damaged (%s); it is built again", path, damage)
    except OSError as error:
        raise ValueError(f"cache file {path} cannot be read ({error.strerror}); set NOISY_LABEL_CACHE") from error
    table = source.build()  # outside the try: its own errors are not the folder's
    try:
        _write(path, table, source.num_classes)
    except OSError as error:
        message = f"cache folder {path.parent} cannot be written ({error.strerror}); set NOISY_LABEL_CACHE to one that can"
        raise ValueError(message) from error
    return _map(path)


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of images / 255, by counting the 256 values: exact, and small in memory."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(dim=1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        centre = (share * values).sum()
        mean.append(centre.item())
        std.append((share * (values - centre).square()).sum().sqrt().item())
    return mean, std


def _write(path: Path, table: RawTable, num_classes: int) -> None:
    """Writes beside ``path``, then renames: a reader sees a whole file or none, and of two writers the last one wins."""
    images = table.images.contiguous().numpy().tobytes()
    parts = [images, bytes(-len(images) % 8)]
    parts += [label_bytes(labels) for labels in (table.truth, table.given) if labels is not None]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    mean, std = _statistics(table.images)
    description = {
        "shape": list(table.images.shape),
        "tables": [name for name in ("truth", "given") if getattr(table, name) is not None],
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "sha256": digest.hexdigest(),
    }
    footer = json.dumps(description).encode()
    parts += [footer, len(footer).to_bytes(8, "little"), hashlib.sha256(footer).digest(), MAGIC]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _map(path: Path) -> Table:
    """Maps the file, and checks it where this process has not yet. DamagedError where it is not what was written."""
    status = path.stat()
    if status.st_size <= TRAILER:
        raise DamagedError("it is too short")
    mapped = torch.from_file(str(path), shared=False, size=status.st_size, dtype=torch.uint8)
    footer, payload = _read_footer(mapped)
    identity = (str(path), status.st_ino, status.st_mtime_ns, status.st_size)
    if identity not in _verified:
        if hashlib.sha256(payload.numpy().data).hexdigest() != footer["sha256"]:
            raise DamagedError("its checksum differs")
        _verified.add(identity)
    shape, tables = footer["shape"], footer["tables"]
    split = len(payload) - 8 * shape[0] * len(tables)
    columns = dict(zip(tables, payload[split:].view(torch.int64).view(len(tables), shape[0]), strict=True))
    pixels = shape[0] * shape[1] * shape[2] * shape[3]
    return Table(
        payload[:pixels].view(shape),
        columns.get("truth"),
        columns.get("given"),
        footer["num_classes"],
        tuple(footer["mean"]),
        tuple(footer["std"]),
        footer["sha256"],
    )


def _read_footer(mapped: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The footer and the payload before it."""
    trailer = bytes(mapped[-TRAILER:].tolist())
    if trailer[40:] != MAGIC:
        raise DamagedError("its end is missing")
    start = len(mapped) - TRAILER - int.from_bytes(trailer[:8], "little")
    text = bytes(mapped[max(start, 0) : -TRAILER].tolist())
    if start < 0 or hashlib.sha256(text).digest() != trailer[8:40]:
        raise DamagedError("its footer is not readable")
    footer: dict[str, Any] = json.loads(text)
    return footer, mapped[:start]
