"""One data set as a trial sees it: split, corrupted, and described, as a pure function of names and seeds.

Three streams are independent of one another: the split (``seed``), the noise (``noise_seed``) and the trial's own seed, which
is not known here. Test labels are clean and are for reports only; validation labels are as noisy as the training labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.cache import same_table
from data.noise import Noise, NoiseReport, corrupt, label_bytes, parse_noise, report
from data.remarks import remarks
from data.seeds import generator
from data.sources import TEST, Source
from data.spec import DataSpec as DataSpec
from data.split import Split, draw_split, in_classes, set_trusted_aside, stream
from data.table import Labelled, TrainData
from data.table_file import Table
from data.text import some
from errors import UserError


@dataclass(frozen=True)
class Dataset:
    """What a trial is run on. ``train`` and ``trusted`` are for methods; ``train_truth`` and ``test`` are for diagnostics and
    reports."""

    train: TrainData
    trusted: TrainData | None  # with clean labels, classes balanced; None where none were asked for
    train_truth: Tensor | None  # clean labels int64 [N], in the order of ``train``: -1 where not known, K where of no class
    validation: Labelled  # with noisy labels
    test: Labelled | None  # with clean labels; None where the source has none or nothing is held out for it
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images / 255
    std: tuple[float, ...]
    classes: tuple[str, ...]  # their names; empty where they have none
    source: Source
    checksum: str  # sha256 of the source's images and labels
    damage: Mapping[int, str]  # rows of the source that are left out, and why
    remarks: tuple[str, ...]  # what a user should know of the source's files
    noise: NoiseReport | None  # over training and validation together; None where no truth is known
    split: Split

    @property
    def input_shape(self) -> tuple[int, int]:
        """Channels and side in pixels of what a network sees."""
        channels, stored = self.train.images.shape[1:3]
        return channels, self.source.input_size or stored

    def label_remarks(self) -> list[str]:
        """What a user should know of its classes and clean labels before a search begins, each a line."""
        train, validation = (torch.bincount(part.labels, minlength=self.num_classes) for part in (self.train, self.validation))
        names = list(self.classes) or [str(label) for label in range(self.num_classes)]
        untrained = [name for name, number in zip(names, train.tolist(), strict=True) if not number]
        lines = []
        if untrained:
            lines.append(f"classes without a training image, which nothing is learnt of: {some(list(map(repr, untrained)))}")
        if unseen := int((validation == 0).sum()):
            single = int((train + validation == 1).sum())
            lines.append(
                f"{unseen} of {self.num_classes} classes have no validation image, so that the search does not see how they do"
                + (f"; {single} have a single image, which is learnt from" if single else "")
            )
        if self.noise and self.noise.num_known < len(self.train) + len(self.validation):
            lines.append(
                "statistics of labels are over the training and validation images whose clean label is known"
                + ("" if self.test else "; no test images are drawn from them (a list can name some: split test)")
            )
        return lines

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
    drawn if all clean labels are known; where it has no validation rows, ``round(validation_fraction * rest)`` of the rest are
    (:mod:`data.split` says which). Where ``labels_are_clean``, given labels are taken for the truth that is not known.
    Noise falls on all that is not tested at once, so that its count is exact there; with ``none`` a source keeps its own given
    labels where it has some. The same rows get the same labels at every ``validation_fraction``. ``trusted`` rows, whose clean
    label is known, leave the training set with it, as many of each class as of any other (one more of some where it does not
    divide).
    ValueError for an unknown name, another table than ``spec.table``, noise that does not fit the source, or numbers that leave
    too little.
    """
    source = spec.source()
    wanted = parse_noise(spec.noise).completed(source.maps)
    table = same_table(source, spec.table)
    wanted = wanted.numbered(table.classes)
    if spec.labels_are_clean:
        table = _taken_for_clean(table, source)
    split = draw_split(source, table, spec.split, spec.split_seed, spec.validation_fraction, test_fraction)
    split = set_trusted_aside(split, table, source, spec.split_seed, spec.trusted)
    rest = torch.cat([split.train, split.trusted, split.validation]).sort().values
    labels = torch.full((len(table.images),), -1)
    labels[rest] = _given_labels(table, wanted, rest, source, spec.noise_seed)
    truth = table.truth if table.truth is not None else torch.full_like(labels, -1)
    known = bool((truth[rest] >= 0).any())
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
        damage=table.damage,
        remarks=tuple(remarks(table)),
        noise=report(truth[rest], labels[rest], table.num_classes) if known else None,
        split=split,
    )


def _taken_for_clean(table: Table, source: Source) -> Table:
    """The table with its given labels as the truth where none is known. ValueError where a truth is another."""
    if table.given is None:
        return table
    truth = table.given if table.truth is None else torch.where(table.truth < 0, table.given, table.truth)
    wrong = truth != table.given
    if table.split is not None:
        wrong &= table.split != TEST
    if bool(wrong.any()):
        raise UserError(f"--labels-are-clean is not allowed; {int(wrong.sum())} labels of {source.name!r} are not their truth")
    return dataclasses.replace(table, truth=truth)


def _given_labels(table: Table, noise: Noise, rows: Tensor, source: Source, noise_seed: int) -> Tensor:
    """The labels of ``rows``: the source's own where it has some and no noise is asked for, else the corrupted truth."""
    if noise.kind == "none" and table.given is not None:
        return table.given[rows]
    known = int(in_classes(table.truth[rows], table.num_classes).sum()) if table.truth is not None else 0
    if table.truth is None or known < len(rows):
        there = f"clean labels for {known} of {len(rows)} samples only" if known else "no clean labels to corrupt"
        raise UserError(
            f"noise '{noise}': data set {source.name!r} has {there}; only none is allowed, or --labels-are-clean where its"
            f" labels are known to be right"
        )
    random = generator("noise", stream(source), str(noise), noise_seed)
    return corrupt(table.truth[rows], noise, table.num_classes, random, lambda index: table.images[rows[index]])
