"""How a source's cache file is made: decoded once, going on after a kill, with what an earlier file already has.

While it is built, the images that are done lie in ``KEY.partial``, what was met in each in ``KEY.partial.facts``, and
``KEY.partial.json`` says how many of them are on disk, where the next process goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.durable import replace, sync, write_whole
from data.noise import label_bytes
from data.readers.base import TEST, Block, RawTable, Source
from data.readers.pixels import Flag
from data.table_file import COLUMNS, Table, write_end
from errors import UserError

T = TypeVar("T")

READ_BYTES = 2**24  # of a build that goes on, or of an earlier file, at a time
SYNC_SECONDS = 5  # at most so much decoding is repeated after a kill


def build(path: Path, source: Source, earlier: Table | None) -> None:
    """Decodes ``source`` into ``path``, going on where a process before has stopped. A reader sees a whole file or none.

    Rows of the ``earlier`` table whose files are the same are taken from there. An image that is damaged is noted, and is 0.
    """
    stamp, raw = said_by(source, source.stamp), said_by(source, source.build)
    build = _Build(path, raw, {"stamp": stamp, "shape": list(raw.shape), "rule": raw.rule})
    with build:
        for block in _blocks(source, raw, build.done, earlier):
            build.add(block)
        if build.done != raw.shape[0]:
            raise RuntimeError(f"{source.name} gave {build.done} images of {raw.shape[0]}")
        build.finish(stamp)


def said_by(source: Source, read: Callable[[], T]) -> T:
    """What the source says of itself. Its own OSErrors are not the cache folder's."""
    try:
        return read()
    except OSError as error:
        raise UserError(f"data set {source.name}: {error}") from error


class _Build:
    """The files of a build that is under way."""

    def __init__(self, path: Path, raw: RawTable, plan: dict[str, Any]) -> None:
        self.path, self.raw, self.plan = path, raw, plan
        self.partial, self.notes = path.with_suffix(".partial"), path.with_suffix(".partial.json")
        self.fact_file = path.with_suffix(".partial.facts")
        self.row_bytes = raw.shape[1] * raw.shape[2] * raw.shape[3]
        self.counter = Counter(raw)
        self.done, self.damage = self._found()
        self.synced = time.monotonic()

    def _found(self) -> tuple[int, dict[str, str]]:
        """How many images an interrupted build of the same source has on disk, and which of them are damaged."""
        try:
            noted = json.loads(self.notes.read_text())
            done, damage = int(noted.pop("done")), dict(noted.pop("damage"))
            sizes = self.partial.stat().st_size, self.fact_file.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}
        whole = noted == self.plan and sizes[0] >= done * self.row_bytes and sizes[1] >= done * 24
        return (done, damage) if whole else (0, {})

    def __enter__(self) -> None:
        mode = "r+b" if self.done else "w+b"
        self.images, self.facts = self.partial.open(mode), self.fact_file.open(mode)
        rows = max(1, READ_BYTES // self.row_bytes)
        for start in range(0, self.done, rows):
            length = min(rows, self.done - start)
            pixels = torch.frombuffer(bytearray(self.images.read(length * self.row_bytes)), dtype=torch.uint8)
            facts = torch.frombuffer(bytearray(self.facts.read(length * 24)), dtype=torch.int64)
            self.counter.add(start, pixels.view(-1, *self.raw.shape[1:]), facts.view(-1, 3))
        self.images.truncate(self.done * self.row_bytes)
        self.facts.truncate(self.done * 24)

    def __exit__(self, *error: object) -> None:
        self.images.close()
        self.facts.close()

    def add(self, block: Block) -> None:
        """The next images. They are on disk a few seconds later."""
        facts = torch.zeros(len(block.images), 3, dtype=torch.int64) if block.facts is None else block.facts
        self.images.write(block.images.contiguous().numpy().data)
        self.facts.write(facts.contiguous().numpy().data)
        self.counter.add(self.done, block.images, facts)
        self.damage |= {str(row): reason for row, reason in block.damage.items()}
        self.done += len(block.images)
        if time.monotonic() - self.synced > SYNC_SECONDS:
            sync(self.images)
            sync(self.facts)
            write_whole(self.notes, json.dumps(self.plan | {"done": self.done, "damage": self.damage}))
            self.synced = time.monotonic()

    def finish(self, stamp: str) -> None:
        """Makes the cache file of what is there."""
        raw, columns = self.raw, {name: getattr(self.raw, name) for name in COLUMNS if getattr(self.raw, name) is not None}
        rest = [bytes(-self.done * self.row_bytes % 8), *map(label_bytes, columns.values())]
        for part in rest:
            self.counter.digest.update(part)
        self.images.writelines(rest)
        self.facts.seek(0)
        facts = torch.frombuffer(bytearray(self.facts.read()), dtype=torch.int64).view(-1, 3)
        description = {
            "shape": list(raw.shape),
            "tables": list(columns),
            "num_classes": raw.num_classes,
            "classes": list(raw.classes),
            "stamp": stamp,
            "rule": raw.rule,
            "reading": dict(raw.reading),
            "left_out": dict(raw.left_out),
            "notes": list(raw.notes),
            "damage": self.damage,
            "sha256": self.counter.digest.hexdigest(),
            **self.counter.statistics(),
        }
        write_end(self.images, description, facts, raw.keys)
        sync(self.images)
        replace(self.partial, self.path)
        for file in (self.fact_file, self.notes):
            file.unlink(missing_ok=True)


def _blocks(source: Source, raw: RawTable, done: int, earlier: Table | None) -> Iterator[Block]:
    """The images that are not yet ``done``."""
    blocks = _merged(raw, done, earlier)
    if done == raw.shape[0]:
        return
    with progress(f"reading {source.name}", raw.shape[0], done) as advance:
        while True:
            try:
                block = next(blocks)
            except StopIteration:
                return
            except OSError as error:
                raise UserError(f"data set {source.name}: {error}") from error
            yield block
            advance(len(block.images))


def _merged(raw: RawTable, done: int, earlier: Table | None) -> Iterator[Block]:
    """The rows from ``done`` on, in order: those of unchanged files from the ``earlier`` table, the others decoded."""
    places = _places(raw, earlier)
    decoded = _Decoded(raw.blocks((places[done:] < 0).nonzero().squeeze(1).add(done).tolist()))
    if earlier is None or bool((places < 0).all()):
        yield from decoded.blocks
        return
    rows = max(1, READ_BYTES // earlier.images[0].numel())
    for part in torch.arange(done, raw.shape[0]).split(rows):  # type: ignore[no-untyped-call]
        place = places[part]
        is_new = place < 0
        images, facts = earlier.images[place.clamp(min=0)], earlier.facts[place.clamp(min=0)]
        damage = {
            row: earlier.damage[where]
            for row, where in zip(part.tolist(), place.tolist(), strict=True)
            if where >= 0 and where in earlier.damage
        }
        if bool(is_new.any()):
            fresh = decoded.take(int(is_new.sum()))
            assert fresh.facts is not None
            images[is_new], facts[is_new] = fresh.images, fresh.facts
            damage |= fresh.damage
        yield Block(images, facts, damage)


def _places(raw: RawTable, earlier: Table | None) -> Tensor:
    """Where the ``earlier`` table has each row, int64 [N]; -1 where it has not."""
    places = torch.full((raw.shape[0],), -1)
    if earlier is None or raw.keys is None or earlier.keys is None or earlier.rule != raw.rule:
        return places
    where = {key: row for row, key in enumerate(earlier.keys.tolist())}
    return torch.tensor([where.get(key, -1) for key in raw.keys.tolist()])


class _Decoded:
    """Blocks as they come, handed out by the number of rows."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self.blocks = blocks
        self.left: list[Block] = []

    def take(self, num_rows: int) -> Block:
        have = sum(len(block.images) for block in self.left)
        while have < num_rows:
            self.left.append(next(self.blocks))
            have += len(self.left[-1].images)
        images = torch.cat([block.images for block in self.left])
        facts = torch.cat([block.facts for block in self.left if block.facts is not None])
        damage = {row: reason for block in self.left for row, reason in block.damage.items()}
        self.left = [Block(images[num_rows:], facts[num_rows:])]
        return Block(images[:num_rows], facts[:num_rows], damage)


class Counter:
    """Checksum, and statistics of the images that are not tested on, block by block: exact, by counting the 256 values."""

    def __init__(self, raw: RawTable) -> None:
        num_rows, channels = raw.shape[:2]
        self.digest = hashlib.sha256()
        self.counts = torch.zeros(channels, 256, dtype=torch.int64)
        self.counted = torch.ones(num_rows, dtype=torch.bool) if raw.split is None else raw.split != TEST
        labels = raw.given if raw.given is not None else raw.truth
        self.labels = torch.zeros(num_rows, dtype=torch.int64) if labels is None else labels
        self.lowest = torch.full((raw.num_classes, channels), 255, dtype=torch.int64)
        self.highest = torch.zeros(raw.num_classes, channels, dtype=torch.int64)

    def add(self, start: int, images: Tensor, facts: Tensor) -> None:
        """Images uint8 [b, C, H, W] of the rows from ``start`` on, and what was met in them."""
        self.digest.update(images.contiguous().numpy().data)
        rows = slice(start, start + len(images))
        counted = self.counted[rows] & (facts[:, 2] & Flag.DAMAGED == 0)
        labels = self.labels[rows]
        if not bool(counted.all()):
            images, labels = images[counted], labels[counted]
        for counts, channel in zip(self.counts, images.unbind(dim=1), strict=True):
            counts += torch.bincount(channel.flatten(), minlength=256)
        labelled = labels >= 0
        index = labels[labelled, None].expand(-1, images.shape[1])
        low, high = (bound[labelled].long() for bound in (images.flatten(2).amin(dim=2), images.flatten(2).amax(dim=2)))
        self.lowest.scatter_reduce_(0, index, low, "amin")
        self.highest.scatter_reduce_(0, index, high, "amax")

    def statistics(self) -> dict[str, list[Any]]:
        """Mean and standard deviation per channel of images / 255; how many levels a channel has; each class's range."""
        values = torch.arange(256, dtype=torch.float64) / 255
        share = self.counts.double() / self.counts.sum(dim=1, keepdim=True)
        centre = (share * values).sum(dim=1)
        spread = (share * (values - centre[:, None]).square()).sum(dim=1).sqrt()
        return {
            "mean": centre.tolist(),
            "std": spread.tolist(),
            "levels": (self.counts > 0).sum(dim=1).tolist(),
            "class_levels": torch.stack([self.lowest, self.highest], dim=2).tolist(),  # [K, C, 2]
        }


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
