"""One file per source: decoded once, checked once per machine, mapped by every trial.

Layout: images as uint8, zeros up to a multiple of 8, the int64 columns (truth, given, split), a JSON footer, and a trailer of
fixed length: length of the footer (8 bytes, little-endian), sha256 of the footer, magic. The footer holds shapes, statistics
and the sha256 of the payload, which is everything before it. The mapping is private: the page cache holds the one copy per
machine, and a write through a tensor stays in the process that wrote.

While it is built, the images that are done lie in ``KEY.partial``, and ``KEY.partial.json`` says how many of them are on disk,
where the next process goes on. ``KEY.lock`` is held by the process that builds, and holds which file was checked last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from data.folders import alone, cache_folder, write_whole
from data.noise import label_bytes
from data.sources import TEST, RawTable, Source

T = TypeVar("T")

MAGIC = b"NLSTAB03"
TRAILER = 8 + 32 + len(MAGIC)
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python 3.11 lacks the name
COLUMNS = ("truth", "given", "split")
READ_BYTES = 2**24  # of a build that goes on, at a time
SYNC_SECONDS = 5  # at most so much decoding is repeated after a kill
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """A source, mapped: images uint8 [N, C, H, W], labels int64 [N], statistics per channel of images / 255."""

    images: Tensor
    truth: Tensor | None  # clean labels, -1 where not known
    given: Tensor | None  # labels of the source's own
    split: Tensor | None  # data.sources.TRAIN, VALIDATION or TEST
    num_classes: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of all images but those of the source's own test split
    std: tuple[float, ...]
    checksum: str  # sha256 of images and labels as they are in the file


class UnusableError(Exception):
    """A cache file is not what was written, or not of what the source is now."""


def open_table(source: Source, *, fresh: bool = False) -> Table:
    """Maps the source's cache file, which is built where it is missing and rebuilt, with a warning, where it is damaged.

    ``fresh`` also builds it again where the source has changed since. A process that finds another at it waits. ValueError
    where the cache folder cannot be used.
    """
    path = cache_folder() / f"{source.key}.table"
    stamp = _of(source, source.stamp) if fresh else None
    try:
        with contextlib.suppress(FileNotFoundError, UnusableError):
            return _checked(path, stamp)
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_suffix(".lock"), f"another process builds {path}"):
            return _built(path, source, stamp)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"cache folder {path.parent} cannot be used ({reason}); set NOISY_LABEL_CACHE to one that can"
        ) from error


def same_table(source: Source, checksum: str) -> Table:
    """The source's table as it was elsewhere, or before: this machine's may be from before the source changed, and is built
    again, once. ValueError where the source itself is another."""
    table = open_table(source)
    if checksum and table.checksum != checksum:
        table = open_table(source, fresh=True)
        if table.checksum != checksum:
            now = table.checksum[:12]
            raise ValueError(f"data set {source.name} has changed: its checksum {checksum[:12]} is now {now}")
    return table


def _built(path: Path, source: Source, stamp: str | None) -> Table:
    """The table, built unless another process has done so meanwhile. Under the lock."""
    try:
        return _checked(path, stamp)
    except FileNotFoundError:
        pass
    except UnusableError as reason:
        log.warning("cache file %s %s; it is built again", path, reason)
    _build(path, source)
    _note(path)
    return _map(path)


def _checked(path: Path, stamp: str | None) -> Table:
    """The mapped file, its checksum compared unless this machine has done so. FileNotFoundError, UnusableError."""
    try:
        known = path.with_suffix(".lock").read_text() == _identity(path)
    except FileNotFoundError:
        known = False
    table = _map(path, stamp, verify=not known)
    if not known:
        with contextlib.suppress(OSError):  # a folder that may only be read costs a check in each process
            _note(path)
    return table


def _note(path: Path) -> None:
    """Notes that the file's checksum is right."""
    path.with_suffix(".lock").write_text(_identity(path))


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"


def _build(path: Path, source: Source) -> None:
    """Decodes ``source`` into ``path``, going on where a process before has stopped. A reader sees a whole file or none."""
    stamp, raw = _of(source, source.stamp), _of(source, source.build)
    partial, notes = path.with_suffix(".partial"), path.with_suffix(".partial.json")
    row_bytes = raw.shape[1] * raw.shape[2] * raw.shape[3]
    plan = {"stamp": stamp, "shape": list(raw.shape)}
    done = _done(partial, notes, plan, row_bytes)
    counter = Counter(raw.shape[1])
    counted = torch.ones(raw.shape[0], dtype=torch.bool) if raw.split is None else raw.split != TEST
    with partial.open("r+b" if done else "wb") as file:
        rows = max(1, READ_BYTES // row_bytes)
        for start in range(0, done, rows):
            read = bytearray(file.read(min(rows, done - start) * row_bytes))
            before = torch.frombuffer(read, dtype=torch.uint8).view(-1, *raw.shape[1:])
            counter.add(before, counted[start : start + len(before)])
        file.truncate(done * row_bytes)
        synced = time.monotonic()
        for block in _blocks(source, raw, done):
            file.write(block.contiguous().numpy().data)
            counter.add(block, counted[done : done + len(block)])
            done += len(block)
            if time.monotonic() - synced > SYNC_SECONDS:
                _sync(file)
                write_whole(notes, json.dumps(plan | {"done": done}))
                synced = time.monotonic()
        if done != raw.shape[0]:
            raise RuntimeError(f"{source.name} gave {done} images of {raw.shape[0]}")
        columns = {name: getattr(raw, name) for name in COLUMNS if getattr(raw, name) is not None}
        rest = [bytes(-done * row_bytes % 8), *map(label_bytes, columns.values())]
        for part in rest:
            counter.digest.update(part)
        mean, std = counter.statistics()
        description = {
            "shape": list(raw.shape),
            "tables": list(columns),
            "num_classes": raw.num_classes,
            "classes": list(raw.classes),
            "stamp": stamp,
            "mean": mean,
            "std": std,
            "sha256": counter.digest.hexdigest(),
        }
        footer = json.dumps(description).encode()
        file.writelines([*rest, footer, len(footer).to_bytes(8, "little"), hashlib.sha256(footer).digest(), MAGIC])
        _sync(file)
    partial.replace(path)
    notes.unlink(missing_ok=True)


def _of(source: Source, read: Callable[[], T]) -> T:
    """What the source says of itself. Its own OSErrors are not the cache folder's."""
    try:
        return read()
    except OSError as error:
        raise ValueError(f"data set {source.name}: {error}") from error


def _blocks(source: Source, raw: RawTable, done: int) -> Iterator[Tensor]:
    """The images that are not yet ``done``."""
    if done == raw.shape[0]:
        return
    blocks = raw.blocks(done)
    with progress(f"reading {source.name}", raw.shape[0], done) as advance:
        while True:
            try:
                block = next(blocks)
            except StopIteration:
                return
            except OSError as error:
                raise ValueError(f"data set {source.name}: {error}") from error
            yield block
            advance(len(block))


def _done(partial: Path, notes: Path, plan: dict[str, Any], row_bytes: int) -> int:
    """How many images an interrupted build of the same source has on disk."""
    try:
        noted = json.loads(notes.read_text())
        done = int(noted.pop("done"))
        size = partial.stat().st_size
    except (OSError, ValueError, KeyError):
        return 0
    return done if noted == plan and size >= done * row_bytes else 0


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class Counter:
    """Checksum, and statistics of the images that are not tested on, block by block: exact, by counting the 256 values."""

    def __init__(self, channels: int) -> None:
        self.digest = hashlib.sha256()
        self.counts = torch.zeros(channels, 256, dtype=torch.int64)

    def add(self, images: Tensor, counted: Tensor) -> None:
        """Images uint8 [b, C, H, W]; of the statistics are those that are ``counted``, bool [b]."""
        self.digest.update(images.contiguous().numpy().data)
        if not bool(counted.all()):
            images = images[counted]
        for counts, channel in zip(self.counts, images.unbind(dim=1), strict=True):
            counts += torch.bincount(channel.flatten(), minlength=256)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of images / 255."""
        values = torch.arange(256, dtype=torch.float64) / 255
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True)
        centre = (share * values).sum(dim=1)
        spread = (share * (values - centre[:, None]).square()).sum(dim=1).sqrt()
        return centre.tolist(), spread.tolist()


@contextlib.contextmanager
def progress(title: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar where there is a terminal; else a line now and then, for what takes longer than a few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda more: bar.advance(task, more)
        return
    said, seen = time.monotonic(), done

    def advance(more: int) -> None:
        nonlocal said, seen
        seen += more
        if time.monotonic() - said > 10:
            print(f"{title}: {seen} of {total} images", file=sys.stderr, flush=True)
            said = time.monotonic()

    yield advance


def _map(path: Path, stamp: str | None = None, *, verify: bool = False) -> Table:
    """Maps the file. UnusableError where it is not what was written, or not of this ``stamp``."""
    status = path.stat()
    if status.st_size <= TRAILER:
        raise UnusableError("is damaged (it is too short)")
    footer, payload = _read_footer(mapped(path))
    if verify and hashlib.sha256(payload.numpy().data).hexdigest() != footer["sha256"]:
        raise UnusableError("is damaged (its checksum differs)")
    if stamp is not None and stamp != footer["stamp"]:
        raise UnusableError("is of before the data set changed")
    shape, tables = footer["shape"], footer["tables"]
    split = len(payload) - 8 * shape[0] * len(tables)
    columns = dict(zip(tables, payload[split:].view(torch.int64).view(len(tables), shape[0]), strict=True))
    pixels = shape[0] * shape[1] * shape[2] * shape[3]
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
    )


def mapped(path: Path) -> Tensor:
    """The file's bytes, private to this process where it writes. No memory is reserved: Linux would refuse large tables."""
    with path.open("rb") as file:
        flags, protection = mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, flags=flags, prot=protection), dtype=torch.uint8)


def _read_footer(whole: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The footer and the payload before it."""
    trailer = bytes(whole[-TRAILER:].tolist())
    if trailer[40:] != MAGIC:
        raise UnusableError("is damaged or of another version (its end is missing)")
    start = len(whole) - TRAILER - int.from_bytes(trailer[:8], "little")
    text = bytes(whole[max(start, 0) : -TRAILER].tolist())
    if start < 0 or hashlib.sha256(text).digest() != trailer[8:40]:
        raise UnusableError("is damaged (its footer is not readable)")
    footer: dict[str, Any] = json.loads(text)
    return footer, whole[:start]
