"""What a reader is: a function of an argument and of :class:`Options` that returns a :class:`Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.folders import data_folder
from errors import UserError
from hparams import Value

if TYPE_CHECKING:
    from torch import Tensor

TRAIN, VALIDATION, TEST = 0, 1, 2
BLOCK_BYTES = 2**22  # of images that are handed on at a time, about


class Block(NamedTuple):
    """Decoded images, in order."""

    images: Tensor  # uint8 [b, C, H, W]; 0 where one is damaged
    facts: Tensor | None = None  # int64 [b, 3]: width, height, what was met (data.readers.pixels.Flag); None: nothing to say
    damage: Mapping[int, str] = {}  # row of the table: why it cannot be read


@dataclass(frozen=True)
class RawTable:
    """A source while it is decoded, block by block. Labels are int64 [N]."""

    shape: tuple[int, int, int, int]  # N, C, H, W
    blocks: Callable[[Sequence[int]], Iterator[Block]]  # the images of these rows, in their order
    num_classes: int
    truth: Tensor | None = None  # clean labels, -1 where not known; None where no clean label is known
    given: Tensor | None = None  # labels of the source's own
    split: Tensor | None = None  # TRAIN, VALIDATION or TEST; None where the source is not split
    classes: tuple[str, ...] = ()  # their names, in order; empty where they have none
    keys: Tensor | None = None  # of each row's file, equal where the file is; None where rows have no files of their own
    rule: str = ""  # how a file becomes pixels; equal where the same file becomes the same pixels
    reading: Mapping[str, Any] = field(default_factory=dict)  # the rule in figures, for what is said at launch
    left_out: Mapping[str, int] = field(default_factory=dict)  # how many files of which kind are not read
    notes: tuple[str, ...] = ()  # what else a user should know of it, each a line of a launch

    @staticmethod
    def of(
        images: Tensor,
        num_classes: int,
        truth: Tensor | None = None,
        given: Tensor | None = None,
        split: Tensor | None = None,
        classes: tuple[str, ...] = (),
    ) -> RawTable:
        """A table whose images, uint8 [N, C, H, W], are in memory."""
        num, channels, height, width = images.shape
        shape = (num, channels, height, width)

        def blocks(rows: Sequence[int]) -> Iterator[Block]:
            length = max(1, BLOCK_BYTES // images[0].numel())
            return (Block(images[list(rows[first : first + length])]) for first in range(0, len(rows), length))

        return RawTable(shape, blocks, num_classes, truth, given, split, classes)


@dataclass(frozen=True)
class Options:
    """What a reader may need to know beside its argument."""

    root: Path = field(default_factory=data_folder)  # of the data sets of the literature, each laid out as it is published
    image_size: int = 0  # side in pixels to which a user's images are brought; 0: by the images, of which many are looked at
    resize: str = ""  # of a user's images, see data.readers.pixels.Decoding; empty: crop
    background: str = ""  # what transparency and padding show; empty: white
    skip_damaged: bool = False  # images that cannot be read are left out
    follow_links: bool = False  # files may be links that lead out of the data set's folder
    download: bool = False  # fetch what is missing, where the source can be fetched


@dataclass(frozen=True)
class Source:
    """A data set; ``build`` decodes it, which happens once per machine (:mod:`data.cache`)."""

    name: str  # as in a sweep: paths are absolute
    key: str  # stem of its cache file
    build: Callable[[], RawTable]  # ValueError where what it reads is missing or damaged
    defaults: Mapping[str, Value]  # hyperparameters by name, and "noise" and "model"
    stream: str = ""  # what its split and noise are drawn for, where that is not the name (a path must not move the split)
    stamp: Callable[[], str] = str  # another text where what ``build`` reads has changed; not asked by trials
    maps: Mapping[str, Mapping[int, int]] = field(default_factory=dict)  # of asymmetric noise; the first is the default
    views: str = "shift"  # its augmentation where a trial's own is "auto", see data.views.VIEWS
    launch_views: str = ""  # what a launch takes where the user says nothing; empty: ``views``
    input_size: int = 0  # side of what a network sees, where images are cropped; 0: the images' own
    image_size: int = 0  # what Options.image_size was taken for; 0 where it does not matter
    skip_damaged: bool = False  # its damaged images are left out; else it cannot be used where there are any


Reader = Callable[[str, Options], Source]


def without_argument(name: str, argument: str) -> None:
    """ValueError where a data set that takes no argument has one."""
    if argument:
        raise UserError(f"data set {name}: {argument!r} is not allowed after it; write {name}")
