"""What makes a data set, as a sweep or a trial's recipe says it. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.sources import Options, Source, find_source


def newer(default: Any) -> Any:
    """A field that the first sweeps did not have: a recipe's fingerprint leaves it out where it has its default."""
    return field(default=default, metadata={"newer": True})


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """All that makes a data set: what is read, how its pixels are made, its noise and its split. A trial's recipe is one.

    A field that is newer than the first sweeps is :func:`newer`. A record without it has its default, which is what was done
    when there was no such field.
    """

    data: str
    noise: str
    noise_seed: int = 0
    split_seed: int = 0
    validation_fraction: float = 0.3
    trusted: int = 0  # samples with clean labels, taken from the training set
    image_size: int = 0  # side to which a user's images are brought, see data.sources.Options
    resize: str = newer("")
    background: str = newer("")
    skip_damaged: bool = newer(False)
    follow_links: bool = newer(False)
    table: str = ""  # sha256 of the source's images and labels, where they must be the same as before
    split: str = newer("")  # stratified or shuffled, see data.split; empty: shuffled
    labels_are_clean: bool = newer(False)  # the user knows them to be right

    def options(self, *, download: bool = False) -> Options:
        """How the source reads its files."""
        return Options(
            image_size=self.image_size,
            resize=self.resize,
            background=self.background,
            skip_damaged=self.skip_damaged,
            follow_links=self.follow_links,
            download=download,
        )

    def source(self, *, download: bool = False) -> Source:
        """Where the images and labels come from. ValueError for a name or an argument that means nothing."""
        return find_source(self.data, self.options(download=download))

    @classmethod
    def of(cls, other: object) -> DataSpec:
        """The same fields of a recipe, or of a sweep's spec; those that it lacks have their defaults."""
        names = (one.name for one in dataclasses.fields(cls))
        return cls(**{name: getattr(other, name) for name in names if hasattr(other, name)})
