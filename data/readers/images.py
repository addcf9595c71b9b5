"""Image files: listed, checked, and decoded in threads (PIL lets go of the interpreter while it decodes)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.processors import num_processors
from data.readers.base import BLOCK_BYTES, TEST, TRAIN, Block, RawTable
from data.readers.pixels import DamagedImageError, Decoding, Flag, decode, suffixes, survey
from errors import UserError


@dataclass(frozen=True)
class Listing:
    """Image files and what is known of each, in order. Labels are int64 [N]."""

    folder: Path
    names: Sequence[str]  # paths within the folder
    classes: tuple[str, ...]
    given: Tensor
    split: Tensor | None = None
    truth: Tensor | None = None  # -1 where not known
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that are not read, see RawTable
    notes: tuple[str, ...] = ()  # likewise

    @property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in self.names]

    def decoding(self, size: int, resize: str = "", background: str = "") -> Decoding:
        """The one rule by which all files become squares of ``size`` pixels a side."""
        channels, bits = survey(self.paths)
        return Decoding(channels, size, resize or "crop", background or "white", bits)

    def table(self, how: Decoding) -> RawTable:
        """A test row's label is its clean label, where no other is known. ValueError where there are no training images."""
        split = torch.zeros_like(self.given) if self.split is None else self.split
        if not bool((split == TRAIN).any()):
            raise UserError(f"{self.folder} holds no training images")
        truth = torch.full_like(self.given, -1) if self.truth is None else self.truth
        truth = torch.where((split == TEST) & (truth < 0), self.given, truth)
        return RawTable(
            (len(self.names), how.channels, how.size, how.size),
            functools.partial(read_blocks, self.paths, how),
            len(self.classes),
            truth if bool((truth >= 0).any()) else None,
            self.given,
            self.split,
            self.classes,
            keys=self.keys(),
            rule=how.rule,
            reading=vars(how),
            left_out=self.left_out,
            notes=self.notes,
        )

    def keys(self) -> Tensor:
        """One number for each file: of its name, size and time of change."""
        digests = (hashlib.blake2b(line, digest_size=8).digest() for line in self.states())
        return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)

    def states(self) -> Iterator[bytes]:
        """Name, size and time of change of each file. OSError where one is gone."""
        for name, path in zip(self.names, self.paths, strict=True):
            status = os.stat(path)
            yield os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n")


def count_suffixes(files: Sequence[Path]) -> Counter[str]:
    """How many there are of each suffix."""
    return Counter(file.suffix.lower() or "without a suffix" for file in files)


def in_words(counts: Mapping[str, int]) -> str:
    """``3 .txt, 1 .db``, the most first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {what}" for what, number in ordered)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an OSError into a ValueError that says what was read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error}") from error


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
            raise UserError(f"{below} is a link to a folder that it lies in")
        yield from files_under(below)


def is_image(path: Path) -> bool:
    """Whether its name ends as that of an image that Pillow reads."""
    return path.suffix.lower() in suffixes()


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it starts from."""
    return not os.path.isabs(name) and "\0" not in name and os.path.normpath(name).split(os.sep)[0] not in (".", "..")


def check_files(folder: Path, names: Sequence[str], listed_in: object) -> None:
    """ValueError where a file is missing: the first, and how many more."""
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{listed_in}: {missing[0]} is missing in {folder}{more}")


def read_blocks(paths: Sequence[str], how: Decoding, rows: Sequence[int]) -> Iterator[Block]:
    """The images of ``rows``, about 4 MB at a time. At most two blocks per core wait."""
    num_rows = max(1, min(512, BLOCK_BYTES // (how.channels * how.size * how.size)))
    workers = num_processors()
    pool, waiting = ThreadPoolExecutor(workers), deque[Future[Block]]()
    try:
        for first in range(0, len(rows), num_rows):
            waiting.append(pool.submit(_read_block, paths, how, rows[first : first + num_rows]))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_block(paths: Sequence[str], how: Decoding, rows: Sequence[int]) -> Block:
    images = np.zeros((len(rows), how.channels, how.size, how.size), np.uint8)
    facts = np.zeros((len(rows), 3), np.int64)
    damage: dict[int, str] = {}
    for image, fact, row in zip(images, facts, rows, strict=True):
        try:
            picture = decode(paths[row], how)
        except DamagedImageError as error:
            fact[2] = Flag.DAMAGED
            damage[row] = str(error)
            continue
        image[...] = np.moveaxis(picture.pixels.reshape(how.size, how.size, how.channels), 2, 0)
        fact[...] = picture.width, picture.height, picture.flags
    return Block(torch.from_numpy(images), torch.from_numpy(facts), damage)
