"""Synthetic label noise as a user writes it: its kind, its rate and its map of classes. :mod:`data.noise` draws it.

Two conventions of symmetric noise are in use. Here the true class is excluded unless ``include-true`` is written, so that a
nominal rate of 0.4 is a realised rate of 0.4; with the true class included, as in the code of DivideMix and ELR, the realised
rate is about ``rate * (K - 1) / K``. Asymmetric noise flips one class to a class that is easily confused with it; pair noise is
asymmetric noise that flips every class to the next. Instance-dependent noise depends on the image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data.text import hint
from errors import UserError

KINDS = ("none", "symmetric", "asymmetric", "pair", "instance")
FORMS = (
    "none, symmetric:RATE, symmetric:RATE:include-true, asymmetric:RATE, asymmetric:RATE:MAP, asymmetric:RATE:7>1,2>7 (by "
    "number or by name), pair:RATE or instance:RATE"
)
FLIP = re.compile(r'\s*("(?:[^"]|"")*"|[^",>]+?)\s*>\s*("(?:[^"]|"")*"|[^",>]+?)\s*(,|$)')
PLAIN = re.compile(r'(?!\s)(?![0-9]+\Z)[^",>]+(?<!\s)')  # a class name that needs no quotes in a map


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
            raise UserError(f"noise '{self}': unknown map {name!r}; {known}")
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
            raise UserError(f"noise '{self}': class {one} does not exist{there}")

        mapping: dict[int, int] = {}
        for source, target in ((number(one), number(other)) for one, other in self.mapping):
            if source == target or source in mapping:
                wrong = "mapped to itself" if source == target else "mapped twice"
                raise UserError(f"noise '{self}': class {classes[source] if classes else source} is {wrong}")
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
        raise UserError(f"noise {text!r}: unknown kind {kind!r}; write {FORMS}")
    if kind == "none" and not parts:
        return Noise("none")
    if kind == "none" or len(parts) not in (1, 2):
        raise UserError(f"noise {text!r} is not readable; write {FORMS}")
    try:
        rate = float(parts[0])
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise UserError(f"noise {text!r}: rate {parts[0]!r} is not allowed; it must be a number in [0, 1)")
    if len(parts) == 1:
        return Noise(kind, rate)
    if kind == "asymmetric":
        if re.fullmatch("[a-z][a-z0-9-]*", parts[1]):
            return Noise(kind, rate, map_name=parts[1])
        return Noise(kind, rate, mapping=_parse_mapping(text, parts[1]))
    if kind == "symmetric" and parts[1] == "include-true":
        return Noise(kind, rate, include_true=True)
    allowed = "only include-true is" if kind == "symmetric" else "nothing is"
    raise UserError(f"noise {text!r}: {parts[1]!r} is not allowed after {kind}:RATE; {allowed}")


def _parse_mapping(text: str, words: str) -> tuple[tuple[int | str, int | str], ...]:
    mapping: dict[int | str, int | str] = {}
    place, more = 0, ","
    while more:
        match = FLIP.match(words, place)
        if match is None:
            word = words[place:].partition(",")[0]
            raise UserError(
                f"noise {text!r}: {word!r} is not readable as a flip; write FROM>TO, as in 7>1,2>7 or cat>dog, a name with , >"
                ' or " in it between "'
            )
        source, target = (_class(word) for word in match.group(1, 2))
        if source == target:
            raise UserError(f"noise {text!r}: {match[0].rstrip(', ')!r} flips nothing; a class must map to another class")
        if source in mapping:
            raise UserError(f"noise {text!r}: class {source} is mapped twice; once is allowed")
        mapping[source] = target
        place, more = match.end(), match[3]
    return tuple(mapping.items())


def _class(word: str) -> int | str:
    """A class in a map: a number, or a name, which quotes show it to be."""
    if word.startswith('"'):
        return word[1:-1].replace('""', '"')
    return int(word) if re.fullmatch("[0-9]+", word) else word
