"""Synthetic label noise: drawn once from clean labels, with an exact count, and measured afterwards.

Two conventions of symmetric noise are in use. Here the true class is excluded unless ``include-true`` is written, so that a
nominal rate of 0.4 is a realised rate of 0.4; with the true class included, as in the code of DivideMix and ELR, the realised
rate is about ``rate * (K - 1) / K``. Asymmetric noise flips one class to a class that is easily confused with it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("none", "symmetric", "asymmetric")
FORMS = "none, symmetric:RATE, symmetric:RATE:include-true, asymmetric:RATE or asymmetric:RATE:7>1,2>7"


@dataclass(frozen=True)
class Noise:
    """What is done to clean labels; ``str`` gives the text that :func:`parse_noise` reads."""

    kind: str  # one of KINDS
    rate: float = 0.0  # share of the samples (symmetric) or of each source class (asymmetric) that is drawn, in [0, 1)
    include_true: bool = False  # symmetric: a drawn sample may get its true class again
    mapping: tuple[tuple[int, int], ...] = ()  # asymmetric: (class, class it flips to); empty: the data set's own map

    def __str__(self) -> str:
        if self.kind == "none":
            return "none"
        short = f"{self.rate:g}"
        text = f"{self.kind}:{short if float(short) == self.rate else repr(self.rate)}"
        if self.include_true:
            return text + ":include-true"
        return text + (":" + ",".join(f"{source}>{target}" for source, target in self.mapping) if self.mapping else "")


def parse_noise(text: str) -> Noise:
    """Reads noise as a user writes it. ValueError names the value and what is allowed."""
    kind, *parts = text.strip().split(":")
    if kind not in KINDS:
        raise ValueError(f"noise {text!r}: unknown kind {kind!r}; write {FORMS}")
    if kind == "none" and not parts:
        return Noise("none")
    if kind == "none" or len(parts) not in (1, 2):
        raise ValueError(f"noise {text!r} is not readable; write {FORMS}")
    try:
        rate = float(parts[0])
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise ValueError(f"noise {text!r}: rate {parts[0]!r} is not allowed; it must be a number in [0, 1)")
    if len(parts) == 1:
        return Noise(kind, rate)
    if kind == "asymmetric":
        return Noise(kind, rate, mapping=_parse_mapping(text, parts[1]))
    if parts[1] != "include-true":
        raise ValueError(f"noise {text!r}: {parts[1]!r} is not allowed after a symmetric rate; only include-true is")
    return Noise(kind, rate, include_true=True)


def _parse_mapping(text: str, words: str) -> tuple[tuple[int, int], ...]:
    mapping: dict[int, int] = {}
    for word in words.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*>\s*([0-9]+)\s*", word)
        if match is None:
            raise ValueError(f"noise {text!r}: {word!r} is not readable as a flip; write FROM>TO, as in 7>1,2>7")
        source, target = int(match[1]), int(match[2])
        if source == target:
            raise ValueError(f"noise {text!r}: {word!r} flips nothing; a class must map to another class")
        if source in mapping:
            raise ValueError(f"noise {text!r}: class {source} is mapped twice; once is allowed")
        mapping[source] = target
    return tuple(mapping.items())


def corrupt(truth: Tensor, noise: Noise, num_classes: int, generator: torch.Generator) -> Tensor:
    """New labels, int64 [N], drawn from the clean labels ``truth``, int64 [N], which stay as they are.

    Symmetric: exactly ``round(rate * N)`` samples are drawn and relabelled uniformly over the other K - 1 classes, or over all
    K where the true class is included. Asymmetric: of each class ``c`` of the map, exactly ``round(rate * n_c)`` flip; who
    flips is read off the clean labels only, so that no label flips twice. ``round`` is Python's, halves to even.
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
    elif noise.kind == "asymmetric":
        if not noise.mapping:
            raise ValueError(f"noise '{noise}' needs a map of classes here; write one, as in {noise}:7>1,2>7")
        for name in (name for flip in noise.mapping for name in flip):
            if not 0 <= name < num_classes:
                raise ValueError(f"noise '{noise}': class {name} does not exist; classes are 0..{num_classes - 1}")
        for source, target in noise.mapping:
            members = (truth == source).nonzero().squeeze(1)
            order = torch.randperm(len(members), generator=generator)
            labels[members[order[: round(noise.rate * len(members))]]] = target
    return labels


@dataclass(frozen=True)
class NoiseReport:
    """What noise given labels really hold."""

    realised_rate: float  # share of the samples whose given label is not the true one
    matrix: Tensor  # [K, K] float64: row true class, column given; a row sums to 1, that of an absent class to 0
    label_checksum: str  # sha256 of the given labels, see label_bytes


def report(truth: Tensor, labels: Tensor, num_classes: int) -> NoiseReport:
    """Compares clean and given labels, both int64 [N] with N >= 1."""
    counts = torch.bincount(truth * num_classes + labels, minlength=num_classes**2).view(num_classes, num_classes).double()
    matrix = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    realised = (labels != truth).double().mean().item()
    return NoiseReport(realised, matrix, hashlib.sha256(label_bytes(labels)).hexdigest())


def label_bytes(labels: Tensor) -> bytes:
    """Labels or indices, int64 [N], as the little-endian int64 that checksums are taken over."""
    return labels.numpy().astype("<i8").tobytes()
