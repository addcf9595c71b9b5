"""Synthetic label noise: drawn once from clean labels, with an exact count, and measured afterwards.

How it is written is :mod:`data.noise_spec`'s; instance-dependent noise is drawn by :func:`instance_labels`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.noise_spec import Noise as Noise
from data.noise_spec import parse_noise as parse_noise
from errors import UserError

SPREAD = 0.1  # standard deviation of the flip probabilities of instance-dependent noise
CHUNK_VALUES = 2**22  # pixels that are looked at in one go: 32 MB
Images = Callable[[Tensor], Tensor]  # rows int64 [b] of those that are corrupted -> their images, uint8 [b, C, H, W]


def corrupt(truth: Tensor, noise: Noise, num_classes: int, generator: torch.Generator, images: Images | None = None) -> Tensor:
    """New labels, int64 [N], drawn from the clean labels ``truth``, int64 [N] in 0..K-1, which stay as they are.

    Symmetric: exactly ``round(rate * N)`` samples are drawn and relabelled uniformly over the other K - 1 classes, or over all
    K where the true class is included. Asymmetric: of each class ``c`` of the map, exactly ``round(rate * n_c)`` flip; who
    flips is read off the clean labels only, so that no label flips twice. Pair: the same with the map ``c -> (c + 1) % K``.
    ``round`` is Python's, halves to even. Instance: see :func:`instance_labels`, for which alone ``images`` are looked at.
    ValueError where the map is missing or names a class outside 0..K-1.
    """
    labels = truth.clone()
    if noise.kind == "symmetric":
        rows = torch.randperm(len(truth), generator=generator)[: round(noise.rate * len(truth))]
        if noise.include_true:
            labels[rows] = torch.randint(num_classes, (len(rows),), generator=generator)
        else:
            offset = torch.randint(1, num_classes, (len(rows),), generator=generator)
            labels[rows] = (truth[rows] + offset) % num_classes
    elif noise.kind == "instance":
        assert images is not None, "instance-dependent noise looks at the images"
        labels = instance_labels(images, truth, noise.rate, num_classes, generator)
    elif noise.kind in ("asymmetric", "pair"):
        for source, target in _flips(noise, num_classes):
            members = (truth == source).nonzero().squeeze(1)
            order = torch.randperm(len(members), generator=generator)
            labels[members[order[: round(noise.rate * len(members))]]] = target
    return labels


def _flips(noise: Noise, num_classes: int) -> tuple[tuple[int, int], ...]:
    """(class, class it flips to) of asymmetric and of pair noise, whose map is :meth:`Noise.numbered`."""
    if noise.kind == "pair":
        return tuple((source, (source + 1) % num_classes) for source in range(num_classes))
    if not noise.mapping:
        raise UserError(f"noise '{noise}' needs a map of classes here; write one, as in {noise}:7>1,2>7 or {noise}:cat>dog")
    flips = tuple((int(source), int(target)) for source, target in noise.mapping)
    for name in (name for flip in flips for name in flip):
        if not 0 <= name < num_classes:
            raise UserError(f"noise '{noise}': class {name} does not exist; classes are 0..{num_classes - 1}")
    return flips


def instance_labels(images: Images, truth: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Instance-dependent label noise as Xia et al. 2020 draw it (arXiv 2006.07836): int64 [N] from ``truth``, int64 [N].

    Sample i flips with probability ``q_i``, from a normal distribution of mean ``rate`` and standard deviation 0.1 that is cut
    to [0, 1]. To what is drawn from ``softmax(x_i W_y)`` over the classes other than its own, y, where ``x_i`` are its pixels
    and ``W_y``, [pixels, K], is standard normal, one for each y. So the mean of ``q`` is a little over small rates (0.206 for
    0.2, 0.129 for 0.1), and the count is not exact. Rate 0 flips nothing.

    The official code takes pixels as they come, 0..255: their mean, which all images share, then decides between the classes,
    and images of one class mostly flip to the same one. Here each image is scaled to mean 0 and standard deviation 1 first, so
    that it is the picture that decides; pixels / 255 or not makes no difference then. In float64, so that another machine's
    rounding draws the same labels; memory is that of a few thousand images and one ``W_y``.
    """
    if rate == 0:
        return truth.clone()
    labels = truth.clone()
    low, high = (0.5 * (1 + math.erf((bound - rate) / SPREAD / math.sqrt(2))) for bound in (0, 1))
    uniform, choice = torch.rand(2, len(truth), generator=generator, dtype=torch.float64)
    flips = (rate + SPREAD * torch.special.ndtri(low + (high - low) * uniform)).clamp(0, 1)
    num_pixels = images(torch.zeros(1, dtype=torch.int64)).numel()
    for label in range(num_classes):
        weights = torch.randn(num_pixels, num_classes, generator=generator, dtype=torch.float64)
        members = (truth == label).nonzero().squeeze(1)
        for rows in members.split(max(1, CHUNK_VALUES // num_pixels)):  # type: ignore[no-untyped-call]
            pixels = images(rows).flatten(1).double()
            centred = pixels - pixels.mean(dim=1, keepdim=True)
            scores = centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12) @ weights
            scores[:, label] = -math.inf
            share = flips[rows, None] * scores.softmax(dim=1)
            share[:, label] = 1 - flips[rows]
            labels[rows] = torch.searchsorted(share.cumsum(dim=1), choice[rows, None]).squeeze(1).clamp(max=num_classes - 1)
    return labels


@dataclass(frozen=True)
class NoiseReport:
    """What noise given labels really hold, as far as their clean labels are known."""

    realised_rate: float  # share of the samples with a known clean label whose given label is another
    matrix: Tensor  # [K, K] float64: row true class, column given; a row sums to 1, that of an absent class to 0
    label_checksum: str  # sha256 of the given labels, see label_bytes
    num_labels: int
    num_known: int  # how many of them have a known clean label
    num_open: int  # how many of these are of no class (open set), so that the given label is wrong and no row has them

    def __str__(self) -> str:
        over = f" over the {self.num_known} of {self.num_labels} labels whose clean one is known"
        over = over if self.num_known < self.num_labels else ""
        of_none = f" (of no class: {self.num_open})" if self.num_open else ""
        return f"realised rate {self.realised_rate:.4f}{over}{of_none}, labels {self.label_checksum[:12]}"


def report(truth: Tensor, labels: Tensor, num_classes: int) -> NoiseReport:
    """Compares clean and given labels, both int64 [N]. A clean label is -1 where it is not known, which one at least is, and
    K where the sample is of no class."""
    known = truth >= 0
    closed = known & (truth < num_classes)
    pairs = truth[closed] * num_classes + labels[closed]
    counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).double()
    matrix = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    realised = (labels != truth)[known].double().mean().item()
    checksum = hashlib.sha256(label_bytes(labels)).hexdigest()
    num_known = int(known.sum())
    return NoiseReport(realised, matrix, checksum, len(labels), num_known, num_known - len(pairs))


def label_bytes(labels: Tensor) -> bytes:
    """Labels or indices, int64 [N], as the little-endian int64 that checksums are taken over."""
    return labels.numpy().astype("<i8").tobytes()
