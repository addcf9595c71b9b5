"""Which rows are learnt from, selected on and tested on: what a source does not say is drawn here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from data.names import SPLITS
from data.seeds import generator
from data.sources import TEST, TRAIN, VALIDATION, Source
from data.table_file import Table
from errors import UserError

LEFT_OUT = -1  # beside TRAIN, VALIDATION and TEST


@dataclass(frozen=True)
class Split:
    """Which rows of the source went where: int64, ascending, disjoint, together every row that is not damaged."""

    train: Tensor
    validation: Tensor
    test: Tensor
    trusted: Tensor


def stream(source: Source) -> str:
    """What the random numbers of a source are drawn for."""
    return source.stream or source.name


def draw_split(source: Source, table: Table, kind: str, seed: int, validation_fraction: float, test_fraction: float) -> Split:
    """The split of a source, without trusted rows. ``kind`` is one of ``SPLITS``, or empty, which is shuffled.

    Both kinds hold out the same numbers of rows, but that a class keeps a training row where it is stratified. The classes are
    those of the source's own labels, which no synthetic noise has touched, so that another noise moves no row.
    ValueError for fractions outside, and for those that leave too little.
    """
    if kind not in ("", *SPLITS):
        raise UserError(f"unknown split {kind!r}; known are {', '.join(SPLITS)}")
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction: {validation_fraction!r} is not allowed; it must be a number in (0, 1)")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction: {test_fraction!r} is not allowed; it must be a number in [0, 1)")
    own = torch.full((len(table.images),), TRAIN) if table.split is None else table.split.clone()
    own[list(table.damage)] = LEFT_OUT
    test, validation, free = ((own == part).nonzero().squeeze(1) for part in (TEST, VALIDATION, TRAIN))
    testable = table.truth is not None and bool(in_classes(table.truth[free], table.num_classes).all())
    num_test = 0 if len(test) or not testable else round(test_fraction * len(free))
    num_validation = 0 if len(validation) else round(validation_fraction * (len(free) - num_test))
    random = generator("split", stream(source), seed)
    if kind == "stratified":
        labels = table.given if table.given is not None else table.truth
        assert labels is not None, "a source has labels"
        parts = stratified(labels[free], num_test, num_validation, random)
    else:
        parts = shuffled(len(free), num_test, num_validation, random)
    drawn, asked = int((parts == VALIDATION).sum()), len(free) - num_test - num_validation
    num_train = asked if asked < 2 else int((parts == TRAIN).sum())  # rows that classes keep all the same were not asked for
    if num_train < 2 or drawn + len(validation) < 1:
        raise UserError(
            f"validation_fraction {validation_fraction!r} and test_fraction {test_fraction!r} leave {num_train} training and "
            f"{drawn} validation samples of {len(free)}; at least 2 and 1 are needed"
        )
    test, validation = torch.cat([test, free[parts == TEST]]), torch.cat([validation, free[parts == VALIDATION]])
    return Split(free[parts == TRAIN], validation.sort().values, test.sort().values, test[:0])


def shuffled(num_rows: int, num_test: int, num_validation: int, random: torch.Generator) -> Tensor:
    """TRAIN, VALIDATION or TEST of each row, int64 [N], whatever its class."""
    order = torch.randperm(num_rows, generator=random)
    parts = torch.full((num_rows,), TRAIN)
    parts[order[:num_test]] = TEST
    parts[order[num_test : num_test + num_validation]] = VALIDATION
    return parts


def stratified(labels: Tensor, num_test: int, num_validation: int, random: torch.Generator) -> Tensor:
    """The same with about the same share of each class in every part; ``labels`` are int64 [N].

    Numbers of rows are those of :func:`held_out`. Which rows of a class these are, and which of two equal classes gives one row
    more, is drawn from ``random``.
    """
    order = torch.randperm(len(labels), generator=random)
    _, member, sizes = torch.unique(labels[order], return_inverse=True, return_counts=True)
    counts = held_out(sizes.tolist(), num_test, num_validation, torch.randperm(len(sizes), generator=random).tolist())
    tested, validated = torch.tensor(counts, dtype=torch.int64).view(-1, 2).unbind(dim=1)
    place = places(member, sizes)
    parts = torch.full_like(labels, TRAIN)
    parts[order[place < (tested + validated)[member]]] = VALIDATION
    parts[order[place < tested[member]]] = TEST
    return parts


def places(member: Tensor, sizes: Tensor) -> Tensor:
    """How many rows of its class come before each: int64 [N] of ``member``, classes int64 [N], which have ``sizes`` [K]."""
    place = torch.empty_like(member)
    place[member.argsort(stable=True)] = torch.arange(len(member)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return place


def held_out(sizes: Sequence[int], num_test: int, num_validation: int, ties: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers of test and validation rows of each class, by largest remainders.

    The share of a class of ``n`` of N rows is ``n / N`` of both numbers. Where that leaves it less than one training row, as a
    class of one row always, both shares are made smaller for it. Each of its three numbers differs from its share by less than
    one, and the sums are ``num_test`` and ``num_validation`` where no share was made smaller. Of equal remainders the classes
    that come first by ``ties``, an order of the classes, are rounded up.
    """
    shares = []
    for size in sizes:
        wanted = Fraction(size * (num_test + num_validation), sum(sizes))
        fitting = min(Fraction(1), (size - 1) / wanted) if wanted else Fraction(0)
        shares.append([fitting * Fraction(size * number, sum(sizes)) for number in (num_test, num_validation)])
    both = _rounded([test + validation for test, validation in shares], [(0, size) for size in sizes], ties)
    fits = [  # that the test rows, which are the others, are rounded up or down, too
        (held - math.ceil(test), held - math.floor(test)) for held, (test, _) in zip(both, shares, strict=True)
    ]
    validation = _rounded([share for _, share in shares], fits, ties)
    return [(held - number, number) for held, number in zip(both, validation, strict=True)]


def _rounded(shares: Sequence[Fraction], fits: Sequence[tuple[int, int]], ties: Sequence[int]) -> list[int]:
    """Each share rounded up or down, within what fits, so that the sum is as near that of the shares as it can be."""
    low = [max(math.floor(share), fit[0]) for share, fit in zip(shares, fits, strict=True)]
    high = [min(math.ceil(share), fit[1]) for share, fit in zip(shares, fits, strict=True)]
    missing = max(0, round(sum(shares, Fraction(0))) - sum(low))
    rank = {one: place for place, one in enumerate(ties)}
    upward = sorted((one for one in rank if low[one] < high[one]), key=lambda one: (low[one] - shares[one], rank[one]))
    chosen = set(upward[:missing])
    return [number + (one in chosen) for one, number in enumerate(low)]


def in_classes(truth: Tensor, num_classes: int) -> Tensor:
    """Which clean labels, int64 [N], are known and those of a class: bool [N]. -1 is unknown, K is of no class (open set)."""
    return (truth >= 0) & (truth < num_classes)


def set_trusted_aside(split: Split, table: Table, source: Source, seed: int, num_trusted: int) -> Split:
    """Moves ``num_trusted`` rows whose clean label is known from training to trusted, class by class in turn.

    ValueError where there are not as many in balanced classes.
    """
    if not num_trusted:
        return split
    order = split.train[torch.randperm(len(split.train), generator=generator("trusted", stream(source), seed))]
    if table.truth is not None:
        order = order[in_classes(table.truth[order], table.num_classes)]
    if table.truth is None or not len(order):
        raise UserError(f"--trusted: {num_trusted} is not allowed; data set {source.name!r} has no clean labels")
    truth = table.truth[order]
    sizes = torch.bincount(truth, minlength=table.num_classes)
    most = table.num_classes * int(sizes.min())
    if num_trusted > most or len(split.train) - num_trusted < 2:
        rarest = int(sizes.argmin())
        name = repr(table.classes[rarest]) if table.classes else str(rarest)
        raise UserError(
            f"--trusted: {num_trusted} is not allowed; data set {source.name!r} has {most} in balanced classes here (of"
            f" {len(split.train)} training samples {len(order)} have a clean label, {int(sizes.min())} of them of class {name})"
        )
    chosen = order[(places(truth, sizes) * table.num_classes + truth).argsort()[:num_trusted]]
    kept = split.train[~torch.isin(split.train, chosen)]
    return dataclasses.replace(split, train=kept, trusted=chosen.sort().values)
