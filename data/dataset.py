"""One data set as a trial sees it: split, corrupted, and described, as a pure function of names and seeds.

Three streams are independent of one another: the split (``seed``), the noise (``noise_seed``) and the trial's own seed, which
is not known here. Test labels are clean and are for reports only; validation labels are as noisy as the training labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from data.cache import Table, open_table
from data.noise import Noise, NoiseReport, corrupt, label_bytes, parse_noise, report
from data.seeds import generator
from data.sources import Source, find_source
from data.table import Labelled, TrainData


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
    checksum: str  # sha256 of the source's images and labels
    noise: NoiseReport | None  # over training and validation together; None where the truth is not known
    split: Split

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


def load(
    data: str,
    noise: str,
    *,
    seed: int,
    noise_seed: int,
    validation_fraction: float = 0.3,
    test_fraction: float = 0.2,
    num_trusted: int = 0,
) -> Dataset:
    """Splits the source ``data`` and corrupts it with ``noise`` (:func:`data.noise.parse_noise`).

    ``round(test_fraction * N)`` rows with clean labels are the test set; of the rest, ``round(validation_fraction * rest)``
    are the validation set. Noise falls on the whole rest at once, so that its count is exact there; with ``none`` a source
    keeps its own given labels where it has some. The same rows get the same labels at every ``validation_fraction``.
    ``num_trusted`` rows leave the training set with their clean labels, as many of each class as of any other (one more of some
    where it does not divide). ValueError for an unknown name, noise that does not fit the source, or numbers that leave too
    little.
    """
    source = find_source(data)
    wanted = _complete(parse_noise(noise), source)
    table = open_table(source)
    split = _set_trusted_aside(_split(data, table, seed, validation_fraction, test_fraction), table, data, seed, num_trusted)
    rest = torch.cat([split.train, split.trusted, split.validation]).sort().values
    labels = torch.full((len(table.images),), -1)
    labels[rest] = _given_labels(table, wanted, rest, data, noise_seed)
    test = Labelled(table.images[split.test], table.truth[split.test]) if table.truth is not None and len(split.test) else None
    trusted = None
    if table.truth is not None and num_trusted:
        trusted = TrainData(table.images[split.trusted], table.truth[split.trusted])
    return Dataset(
        train=TrainData(table.images[split.train], labels[split.train]),
        trusted=trusted,
        train_truth=None if table.truth is None else table.truth[split.train],
        validation=Labelled(table.images[split.validation], labels[split.validation]),
        test=test,
        num_classes=table.num_classes,
        mean=table.mean,
        std=table.std,
        checksum=table.checksum,
        noise=None if table.truth is None else report(table.truth[rest], labels[rest], table.num_classes),
        split=split,
    )


def _complete(noise: Noise, source: Source) -> Noise:
    """Asymmetric noise without a map takes the source's."""
    if noise.kind == "asymmetric" and not noise.mapping:
        return dataclasses.replace(noise, mapping=tuple(source.confusions.items()))
    return noise


def _given_labels(table: Table, noise: Noise, rows: Tensor, data: str, noise_seed: int) -> Tensor:
    """The labels of ``rows``: the source's own where it has some and no noise is asked for, else the corrupted truth."""
    if noise.kind == "none" and table.given is not None:
        return table.given[rows]
    if table.truth is None:
        raise ValueError(f"noise '{noise}': data set {data!r} has no clean labels to corrupt; only none is allowed")
    return corrupt(table.truth[rows], noise, table.num_classes, generator("noise", data, str(noise), noise_seed))


def _split(data: str, table: Table, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction: {validation_fraction!r} is not allowed; it must be a number in (0, 1)")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction: {test_fraction!r} is not allowed; it must be a number in [0, 1)")
    total = len(table.images)
    num_test = 0 if table.truth is None else round(test_fraction * total)
    num_validation = round(validation_fraction * (total - num_test))
    num_train = total - num_test - num_validation
    if num_train < 2 or num_validation < 1:
        raise ValueError(
            f"validation_fraction {validation_fraction!r} and test_fraction {test_fraction!r} leave {num_train} training and "
            f"{num_validation} validation samples of {total}; at least 2 and 1 are needed"
        )
    order = torch.randperm(total, generator=generator("split", data, seed))
    test, validation, train = order[:num_test], order[num_test : num_test + num_validation], order[num_test + num_validation :]
    return Split(train.sort().values, validation.sort().values, test.sort().values, test[:0])


def _set_trusted_aside(split: Split, table: Table, data: str, seed: int, num_trusted: int) -> Split:
    """Moves ``num_trusted`` rows from training to trusted, class by class in turn."""
    if not num_trusted:
        return split
    if table.truth is None:
        raise ValueError(f"--trusted: {num_trusted} is not allowed; data set {data!r} has no clean labels")
    order = split.train[torch.randperm(len(split.train), generator=generator("trusted", data, seed))]
    truth = table.truth[order]
    sizes = torch.bincount(truth, minlength=table.num_classes)
    turn = torch.empty_like(truth)  # how many of its class come before
    turn[truth.argsort(stable=True)] = torch.arange(len(truth)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    most = table.num_classes * int(sizes.min())
    if num_trusted > most or len(order) - num_trusted < 2:
        raise ValueError(f"--trusted: {num_trusted} is not allowed; data set {data!r} has {most} in balanced classes here")
    chosen = (turn * table.num_classes + truth).argsort()[:num_trusted]
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[chosen] = False
    return dataclasses.replace(split, train=order[kept].sort().values, trusted=order[chosen].sort().values)
