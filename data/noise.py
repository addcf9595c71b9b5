"""Synthetic label noise: drawn once from clean labels, with an exact count, and measured afterwards.

Two conventions of symmetric noise are in use. Here the true class is excluded unless ``include-true`` is written, so that a
nominal rate of 0.4 is a realised rate of 0.4; with the true class included, as in the code of DivideMix and ELR, the realised
rate is about ``rate * (K - 1) / K``. Asymmetric noise flips one class to a class that is easily confused with it; pair noise is
asymmetric noise that flips every class to the next. Instance-dependent noise depends on the image, see :func:`instance_labels`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.text import hint

KINDS = ("none", "symmetric", "asymmetric", "pair", "instance")
FORMS = (
    "none, symmetric:RATE, symmetric:RATE:include-true, asymmetric:RATE, asymmetric:RATE:MAP, asymmetric:RATE:7>1,2>7 (by "
    "number or by name), pair:RATE or instance:RATE"
)
FLIP = re.compile(r'\s*("(?:[^"]|"")*"|[^",>]+?)\s*>\s*("(?:[^"]|"")*"|[^",>]+?)\s*(,|$)')
PLAIN = re.compile(r'(?!\s)(?![0-9]+\Z)[^",>]+(?<!\s)')  # a class name that needs no quotes in a map
SPREAD = 0.1  # standard deviation of the flip probabilities of instance-dependent noise
CHUNK_VALUES = 2**22  # pixels that are looked at in one go: 32 MB
Images = Callable[[Tensor], Tensor]  # rows int64 [b] of those that are corrupted -> their images, uint8 [b, C, H, W]


@dataclass(frozen=True)
class Noise:
    """What is done to clean labels; ``str`` gives the text that :func:`parse_noise` reads."""

    kind: str  # one of KINDS
    rate: float = 0.0  # share of the samples, or of each source class (asymmetric, pair), that is drawn, in [0, 1)
    include_true: bool = False  # symmetric: a drawn sample may get its true class again
    mapping: tuple[tuple[int | str, int | str], ...] = ()  # asymmetric: (class, class it flips to), by number or by name;
    # empty: a map of the data set
    map_name: str = ""  # which of them; empty: the first

    def __str__(self) -> str:
        if self.kind == "none":
            return "none"
        short = f"{self.rate:g}"
        text = f"{self.kind}:{short if float(short) == self.rate else repr(self.rate)}"
        if self.include_true:
            return text + ":include-true"
        if self.map_name:
            return f"{text}:{self.map_name}"
        flips = ",".join(f"{_quoted(source)}>{_quoted(target)}" for source, target in self.mapping)
        return f"{text}:{flips}" if flips else text

    def completed(self, maps: Mapping[str, Mapping[int, int]]) -> Noise:
        """With the map of classes that is named, or else the first, where none is written. ValueError for an unknown name."""
        if self.kind != "asymmetric" or self.mapping or not (maps or self.map_name):
            return self
        name = self.map_name or next(iter(maps))
        if name not in maps:
            known = f"known are {', '.join(maps)}" if maps else "this data set has none; write one, as in 7>1,2>7"
            raise ValueError(f"noise '{self}': unknown map {name!r}; {known}")
        return replace(self, mapping=tuple(maps[name].items()), map_name="")

    def numbered(self, classes: Sequence[str]) -> Noise:
        """With the map's classes counted from 0, for ``classes`` in their order (empty: they have no names). Where all names
        are numbers, as a manifest's labels may be, numbers in the map are those. ValueError for a class that there is not, and
        for one that is mapped twice or to itself."""
        if not self.mapping:
            return self
        all_numbers = bool(classes) and all(re.fullmatch("[0-9]+", name) for name in classes)
        numbers: dict[int | str, int] = {name: number for number, name in enumerate(classes)}
        if all_numbers:
            numbers |= {int(name): number for number, name in enumerate(classes)}

        def number(one: int | str) -> int:
            if isinstance(one, int) and not all_numbers:
                return one
            if one in numbers:
                return numbers[one]
            shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            close = hint(one, classes) if isinstance(one, str) else ""
            there = f"{close}; classes are {shown}" if classes else "; this data set's classes have no names"
            raise ValueError(f"noise '{self}': class {one} does not exist{there}")

        mapping: dict[int, int] = {}
        for source, target in ((number(one), number(other)) for one, other in self.mapping):
            if source == target or source in mapping:
                wrong = "mapped to itself" if source == target else "mapped twice"
                raise ValueError(f"noise '{self}': class {classes[source] if classes else source} is {wrong}")
            mapping[source] = target
        return replace(self, mapping=tuple(mapping.items()))


def _quoted(one: int | str) -> str:
    """A class as it is written in a map: a name in quotes where it could be read as something else."""
    if isinstance(one, int) or PLAIN.fullmatch(one):
        return str(one)
    return '"' + one.replace('"', '""') + '"'


def parse_noise(text: str) -> Noise:
    """Reads noise as a user writes it. ValueError names the value and what is allowed."""
    kind, *parts = text.strip().split(":", 2 if text.strip().startswith("asymmetric:") else -1)
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
        if re.fullmatch("[a-z][a-z0-9-]*", parts[1]):
            return Noise(kind, rate, map_name=parts[1])
        return Noise(kind, rate, mapping=_parse_mapping(text, parts[1]))
    if kind == "symmetric" and parts[1] == "include-true":
        return Noise(kind, rate, include_true=True)
    allowed = "only include-true is" if kind == "symmetric" else "nothing is"
    raise ValueError(f"noise {text!r}: {parts[1]!r} is not allowed after {kind}:RATE; {allowed}")


def _parse_mapping(text: str, words: str) -> tuple[tuple[int | str, int | str], ...]:
    mapping: dict[int | str, int | str] = {}
    place, more = 0, ","
    while more:
        match = FLIP.match(words, place)
        if match is None:
            word = words[place:].partition(",")[0]
            raise ValueError(
                f"noise {text!r}: {word!r} is not readable as a flip; write FROM>TO, as in 7>1,2>7 or cat>dog, a name with , >"
                ' or " in it between "'
            )
        source, target = (_class(word) for word in match.group(1, 2))
        if source == target:
            raise ValueError(f"noise {text!r}: {match[0].rstrip(', ')!r} flips nothing; a class must map to another class")
        if source in mapping:
            raise ValueError(f"noise {text!r}: class {source} is mapped twice; once is allowed")
        mapping[source] = target
        place, more = match.end(), match[3]
    return tuple(mapping.items())


def _class(word: str) -> int | str:
    """A class in a map: a number, or a name, which quotes show it to be."""
    if word.startswith('"'):
        return word[1:-1].replace('""', '"')
    return int(word) if re.fullmatch("[0-9]+", word) else word


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
        raise ValueError(f"noise '{noise}' needs a map of classes here; write one, as in {noise}:7>1,2>7 or {noise}:cat>dog")
    flips = tuple((int(source), int(target)) for source, target in noise.mapping)
    for name in (name for flip in flips for name in flip):
        if not 0 <= name < num_classes:
            raise ValueError(f"noise '{noise}': class {name} does not exist; classes are 0..{num_classes - 1}")
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
