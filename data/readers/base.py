"""What a reader is: a function of an argument and of :class:`Options` that returns a :class:`Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from data.folders import data_folder
from hparams import Value

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class RawTable:
    """A source while it is decoded, block by block. Labels are int64 [N]."""

    shape: tuple[int, int, int, int]  # N, C, H, W
    blocks: Callable[[int], Iterator[Tensor]]  # the images from a row on, uint8 [b, C, H, W] in order, b >= 1
    num_classes: int
    truth: Tensor | None = None  # clean labels, -1 where not known; None where no clean label is known
    given: Tensor | None = None  # labels of the source's own
    split: Tensor | None = None  # TRAIN, VALIDATION or TEST; None where the source is not split
    classes: tuple[str, ...] = ()  # their names, in order; empty where they have none

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
        shape, blocks = (num, channels, height, width), lambda start: iter([images[start:]])
        return RawTable(shape, blocks, num_classes, truth, given, split, classes)


@dataclass(frozen=True)
class Options:
    """What a reader may need to know beside its argument."""

    root: Path = field(default_factory=data_folder)  # of the data sets of the literature, each laid out as it is published
    image_size: int = 0  # side in pixels to which a user's images are brought; 0: by the first image, which is then looked at
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
    views: str = "shift"  # the augmentations that suit it, see data.views.VIEWS
    input_size: int = 0  # side of what a network sees, where images are cropped; 0: the images' own
    image_size: int = 0  # what Options.image_size was taken for; 0 where it does not matter


Reader = Callable[[str, Options], Source]


def without_argument(name: str, argument: str) -> None:
    """ValueError where a data set that takes no argument has one."""
    if argument:
        raise ValueError(f"data set {name}: {argument!r} is not allowed after it; write {name}")
