"""One data set as a trial sees it: split, corrupted, and described, as a pure function of names and seeds.

Three streams are independent of one another: the split (``seed``), the noise (``noise_seed``) and the trial's own seed, which
is not known here. Test labels are clean and are for reports only; validation labels are as noisy as the training labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.cache import Table, same_table
from data.noise import Noise, NoiseReport, corrupt, label_bytes, parse_noise, report
from data.seeds import generator
from data.sources import TEST, TRAIN, VALIDATION, Options, Source, find_source
from data.table import Labelled, TrainData


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
    table: str = ""  # sha256 of the source's images and labels, where they must be the same as before

    def options(self, *, download: bool = False) -> Options:
        """How the source reads its files."""
        return Options(image_size=self.image_size, download=download)

    def source(self, *, download: bool = False) -> Source:
        """Where the images and labels come from. ValueError for a name or an argument that means nothing."""
        return find_source(self.data, self.options(download=download))

    @classmethod
    def of(cls, other: object) -> DataSpec:
        """The same fields of a recipe, or of a sweep's spec; those that it lacks have their defaults."""
        names = (one.name for one in dataclasses.fields(cls))
        return cls(**{name: getattr(other, name) for name in names if hasattr(other, name)})


def newer(default: Any) -> Any:
    """A field that the first sweeps did not have: a recipe's fingerprint leaves it out where it has its default."""
    return field(default=default, metadata={"newer": True})


@dataclass(frozen=True)
class Split:
    """Which rows of the source went where: int64, ascending, disjoint, together every row."""

    train: Tensor
    validation: Tensor
    test: Tensor
    trusted: Tensor


@dataclass(frozen=True)
class Dataset:
    """What a trial is run on. ``train`` and ``trusted`` are for methods; ``train_truth`` and ``test`` are for diagnostics and
    reports."""

    train: TrainData
    trusted: TrainData | None  # with clean labels, classes balanced; None where none were asked for
    train_truth: Tensor | None  # clean labels int64 [N], in the order of ``train``
    validation: Labelled  # with noisy labels
    test: Labelled | None  # with clean labels; None where the source has none or nothing is held out for it
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images / 255
    std: tuple[float, ...]
    classes: tuple[str, ...]  # their names; empty where they have none
    source: Source
    checksum: str  # sha256 of the source's images and labels
    noise: NoiseReport | None  # over training and validation together; None where the truth is not known
    split: Split

    @property
    def input_shape(self) -> tuple[int, int]:
        """Channels and side in pixels of what a network sees."""
        channels, stored = self.train.images.shape[1:3]
        return channels, self.source.input_size or stored

    @property
    def fingerprint(self) -> str:
        """sha256 over source, split and given labels: equal where a sweep may be resumed."""
        digest = hashlib.sha256(self.checksum.encode())
        rows = [self.split.train, self.split.validation, self.split.test]
        if self.trusted is not None:
            rows.append(self.split.trusted)
        for column in (*rows, self.train.labels, self.validation.labels):
            digest.update(len(column).to_bytes(8, "little") + label_bytes(column))
        return digest.hexdigest()


def load(spec: DataSpec, *, test_fraction: float = 0.2) -> Dataset:
    """Splits the source ``spec.data`` and corrupts it with ``spec.noise`` (:func:`data.noise.parse_noise`).

    A source's own test and validation rows stay what they are. Where it has no test rows, ``round(test_fraction * N)`` rows are
    drawn if all clean labels are known; where it has no validation rows, ``round(validation_fraction * rest)`` of the rest are.
    Noise falls on all that is not tested at once, so that its count is exact there; with ``none`` a source keeps its own given
    labels where it has some. The same rows get the same labels at every ``validation_fraction``. ``trusted`` rows leave the
    training set with their clean labels, as many of each class as of any other (one more of some where it does not divide).
    ValueError for an unknown name, another table than ``spec.table``, noise that does not fit the source, or numbers that leave
    too little.
    """
    source = spec.source()
    wanted = parse_noise(spec.noise).completed(source.maps)
    table = same_table(source, spec.table)
    wanted = wanted.numbered(table.classes)
    split = _split(source, table, spec.split_seed, spec.validation_fraction, test_fraction)
    split = _set_trusted_aside(split, table, source, spec.split_seed, spec.trusted)
    rest = torch.cat([split.train, split.trusted, split.validation]).sort().values
    labels = torch.full((len(table.images),), -1)
    labels[rest] = _given_labels(table, wanted, rest, source, spec.noise_seed)
    truth = table.truth if table.truth is not None else torch.full_like(labels, -1)
    known = bool((truth[rest] >= 0).all())
    return Dataset(
        train=TrainData(table.images, labels[split.train], split.train),
        trusted=TrainData(table.images, truth[split.trusted], split.trusted) if spec.trusted else None,
        train_truth=truth[split.train] if known else None,
        validation=Labelled(table.images, labels[split.validation], split.validation),
        test=Labelled(table.images, truth[split.test], split.test) if len(split.test) else None,
        num_classes=table.num_classes,
        mean=table.mean,
        std=table.std,
        classes=table.classes,
        source=source,
        checksum=table.checksum,
        noise=report(truth[rest], labels[rest], table.num_classes) if known else None,
        split=split,
    )


def _given_labels(table: Table, noise: Noise, rows: Tensor, source: Source, noise_seed: int) -> Tensor:
    """The labels of ``rows``: the source's own where it has some and no noise is asked for, else the corrupted truth."""
    if noise.kind == "none" and table.given is not None:
        return table.given[rows]
    if table.truth is None or bool((table.truth[rows] < 0).any()):
        raise ValueError(f"noise '{noise}': data set {source.name!r} has no clean labels to corrupt; only none is allowed")
    random = generator("noise", stream(source), str(noise), noise_seed)
    return corrupt(table.truth[rows], noise, table.num_classes, random, lambda index: table.images[rows[index]])


def stream(source: Source) -> str:
    """What the random numbers of a source are drawn for."""
    return source.stream or source.name


def _split(source: Source, table: Table, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction: {validation_fraction!r} is not allowed; it must be a number in (0, 1)")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction: {test_fraction!r} is not allowed; it must be a number in [0, 1)")
    own = torch.full((len(table.images),), TRAIN) if table.split is None else table.split
    test, validation, free = ((own == part).nonzero().squeeze(1) for part in (TEST, VALIDATION, TRAIN))
    known = table.truth is not None and bool((table.truth[free] >= 0).all())
    num_test = 0 if len(test) or not known else round(test_fraction * len(free))
    num_validation = 0 if len(validation) else round(validation_fraction * (len(free) - num_test))
    num_train = len(free) - num_test - num_validation
    if num_train < 2 or num_validation + len(validation) < 1:
        raise ValueError(
            f"validation_fraction {validation_fraction!r} and test_fraction {test_fraction!r} leave {num_train} training and "
            f"{num_validation} validation samples of {len(free)}; at least 2 and 1 are needed"
        )
    order = free[torch.randperm(len(free), generator=generator("split", stream(source), seed))]
    drawn_test, drawn_validation, train = order.split([num_test, num_validation, num_train])  # type: ignore[no-untyped-call]
    test, validation = torch.cat([test, drawn_test]), torch.cat([validation, drawn_validation])
    return Split(train.sort().values, validation.sort().values, test.sort().values, test[:0])


def _set_trusted_aside(split: Split, table: Table, source: Source, seed: int, num_trusted: int) -> Split:
    """Moves ``num_trusted`` rows from training to trusted, class by class in turn."""
    if not num_trusted:
        return split
    if table.truth is None or bool((table.truth[split.train] < 0).any()):
        raise ValueError(f"--trusted: {num_trusted} is not allowed; data set {source.name!r} has no clean labels")
    order = split.train[torch.randperm(len(split.train), generator=generator("trusted", stream(source), seed))]
    truth = table.truth[order]
    sizes = torch.bincount(truth, minlength=table.num_classes)
    turn = torch.empty_like(truth)  # how many of its class come before
    turn[truth.argsort(stable=True)] = torch.arange(len(truth)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    most = table.num_classes * int(sizes.min())
    if num_trusted > most or len(order) - num_trusted < 2:
        raise ValueError(
            f"--trusted: {num_trusted} is not allowed; data set {source.name!r} has {most} in balanced classes here"
        )
    chosen = (turn * table.num_classes + truth).argsort()[:num_trusted]
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[chosen] = False
    return dataclasses.replace(split, train=order[kept].sort().values, trusted=order[chosen].sort().values)
