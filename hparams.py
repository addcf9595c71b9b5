"""Hyperparameters as documented fields of frozen dataclasses. Standard library only.

A hyperparameter is declared once, as a field of a method's ``Config``: type, default, what it means, which values are
legal, and the range that a search draws from (none: a search leaves it at its default). The suggestions, the checks of
``--set`` and ``--range``, the help and the documentation all read that one declaration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar, cast

from errors import UserError

Value = float | int | str | bool
C = TypeVar("C")
MANY_CLASSES = 32  # nearer to 100 than to 10, in ratio: methods are published for CIFAR-10 and CIFAR-100


@dataclass(frozen=True)
class Interval:
    """A set of numbers written as in mathematics: ``[0, 1)``, ``(0, inf)``."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> Interval:
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text[0] == "[" else value > self.low
        below = value <= self.high if self.text[-1] == "]" else value < self.high
        return above and below


@dataclass(frozen=True)
class Range:
    """What a search draws one hyperparameter from: numbers from ``low`` to ``high``, those in steps of ``step`` from ``low`` on
    where that is given, or one of ``choices``. Where the choices are numbers, ``low`` and ``high`` are the ends of them."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Value, ...] = ()
    step: float = 0.0

    def count(self, kind: type) -> int | None:
        """How many values of the type ``kind`` the range holds; None where there is no end of them."""
        if self.choices:
            return len(self.choices)
        step = self.step or (1 if kind is int else 0)
        return round((self.high - self.low) / step) + 1 if step else None

    def at(self, place: int, kind: type) -> Value:
        """The value at a place in a range that holds a number of them, from 0 on."""
        if self.choices:
            return self.choices[place]
        return cast(Value, kind(Decimal(str(self.low)) + place * Decimal(str(self.step or 1))))

    def place(self, value: Value, kind: type) -> int | None:
        """Where a value stands in such a range; None where it is not in it. A number in steps may differ by its rounding."""
        if self.choices:
            return self.choices.index(value) if value in self.choices else None
        place, count = round((float(value) - self.low) / (self.step or 1)), self.count(kind)
        assert count is not None
        found = 0 <= place < count and math.isclose(float(self.at(place, kind)), float(value), rel_tol=1e-9, abs_tol=1e-12)
        return place if found else None

    def exact(self, value: Value, kind: type) -> Value:
        """The value without the rounding that a number in steps may have got."""
        place = self.place(value, kind) if self.step else None
        return value if place is None else self.at(place, kind)

    def nearest(self, value: Value) -> Value:
        """The value itself where the range holds it, else the nearest one that it holds (of words the first)."""
        if isinstance(value, (str, bool)) or value in self.choices:
            return value if value in self.choices else self.choices[0]
        if self.choices:
            return min(self.choices, key=lambda choice: abs(float(choice) - value))
        kind = type(value)
        if self.step and self.place(value, kind) is not None:
            return value
        inside = kind(min(max(value, self.low), self.high))
        if not self.step:
            return inside
        return self.at(round((inside - self.low) / self.step), kind)

    def __str__(self) -> str:
        if self.choices:
            return ",".join(str(choice) for choice in self.choices)
        return f"{self.low:g}:{self.high:g}" + (":log" if self.log else "") + (f":{self.step:g}" if self.step else "")


@dataclass(frozen=True)
class Hyperparameter:
    """One declared hyperparameter, read back from a Config class by :func:`declared`."""

    name: str
    type: type
    default: Value
    meaning: str
    legal: Interval | None
    choices: tuple[Value, ...]
    search: Range | None
    many_classes: Value | None = None  # the default from MANY_CLASSES classes on, where it is another one

    def default_for(self, num_classes: int) -> Value:
        """The default for that many classes."""
        return self.default if self.many_classes is None or num_classes < MANY_CLASSES else self.many_classes

    @property
    def allowed(self) -> str:
        """The legal values in words, for messages and documentation."""
        if self.type is bool:
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        assert self.legal is not None
        return f"{'an integer' if self.type is int else 'a number'} in {self.legal.text}"

    def check(self, value: Value) -> Value:
        """Returns ``value``; UserError where it is not legal."""
        good = value in self.choices if self.legal is None else is_finite(value) and float(value) in self.legal
        if not good:
            raise UserError(f"{self.name}: {value!r} is not allowed; it must be {self.allowed}")
        return value

    def parse(self, text: object) -> Value:
        """Reads a value as a user writes it (``--set``, YAML). UserError names the value and what is allowed."""
        word = str(text).strip()
        if self.type is bool:
            value: Any = {"true": True, "false": False}.get(word.lower())
        elif self.type is str:
            value = word
        else:
            try:
                value = self.type(word)
            except ValueError:
                value = None
        if value is None:
            raise UserError(f"{self.name}: {word!r} is not allowed; it must be {self.allowed}")
        return self.check(value)

    def parse_range(self, text: str) -> Range:
        """Reads ``a,b,c`` or, for numbers, ``low:high``, ``low:high:log`` or ``low:high:step``. UserError where it is empty or
        illegal."""
        if self.legal is None:
            return Range(choices=self._parse_choices(text))
        if "," in text:
            numbers = self._parse_choices(text)
            return Range(float(min(numbers)), float(max(numbers)), choices=numbers)
        parts = [part.strip() for part in text.split(":")]
        if len(parts) not in (2, 3):
            allowed = "LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP or A,B,..."
            raise UserError(f"{self.name}: range {text!r} is not readable; write {allowed}")
        low, high = (float(self.parse(part)) for part in parts[:2])
        if not low < high:
            raise UserError(f"{self.name}: range {text!r} is empty; LOW must be below HIGH")
        if parts[2:] not in ([], ["log"]):
            step = self._parse_step(text, parts[2], high - low)
            last = Decimal(str(low)) + int((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step))) * Decimal(str(step))
            return Range(low, float(last), step=step)
        if parts[2:] and low <= 0:
            raise UserError(f"{self.name}: range {text!r} cannot be logarithmic; LOW must be above 0")
        return Range(low, high, log=bool(parts[2:]))

    def _parse_choices(self, text: str) -> tuple[Any, ...]:
        """Values with commas between them, each once."""
        return tuple(dict.fromkeys(self.parse(word) for word in text.split(",")))

    def _parse_step(self, text: str, word: str, width: float) -> float:
        """The step of a range that is ``width`` wide."""
        try:
            step = float(self.type(word))
        except ValueError:
            step = math.nan
        if not 0 < step <= width * (1 + 1e-9):
            kind = "an integer" if self.type is int else "a number"
            allowed = f"log, or a step: {kind} above 0 and at most HIGH - LOW"
            raise UserError(f"{self.name}: range {text!r} is not readable; {word!r} must be {allowed}")
        return step


def is_finite(value: Value) -> bool:
    """False for what is not a number, infinite, or too large for a float."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def hyperparameter(
    default: Any,
    meaning: str,
    *,
    legal: str | None = None,
    choices: Iterable[Value] = (),
    search: tuple[float, float] | None = None,
    log: bool = False,
    many_classes: Value | None = None,
) -> Any:
    """Declares a field: ``legal`` is an interval such as ``"[0, 1)"`` (numbers), ``choices`` the legal names (words).

    ``search`` is the range that a search draws from by default; without one the field stays at its default unless the
    user gives a range. ``many_classes`` is the default from ``MANY_CLASSES`` classes on, where that is another one: a search
    and ``train`` start from it. A Config that is made without a value knows no number of classes and has ``default``.
    """
    choices = (True, False) if isinstance(default, bool) else tuple(choices)
    assert bool(legal) != bool(choices), "a number declares the legal interval, a word the legal choices"
    assert search or many_classes is None, "what is not searched is fixed before the number of classes is known"
    drawn = Range(float(search[0]), float(search[1]), log) if search else None
    metadata = {"meaning": meaning, "legal": Interval.parse(legal) if legal else None, "choices": choices, "search": drawn}
    return dataclasses.field(default=default, metadata=metadata | {"many_classes": many_classes})


def declared(config: type) -> dict[str, Hyperparameter]:
    """Every hyperparameter of a Config class by field name, in order of declaration."""
    return {
        field.name: Hyperparameter(field.name, type(field.default), cast(Value, field.default), **field.metadata)
        for field in dataclasses.fields(config)
    }


def inherited(config: type, base: type) -> set[str]:
    """The names of the fields that ``config`` takes over from ``base`` unchanged."""
    own, theirs = config.__dataclass_fields__, base.__dataclass_fields__  # type: ignore[attr-defined]
    return {name for name in own if theirs.get(name) is own[name]}


def build(config: type[C], values: Mapping[str, Value]) -> C:
    """A Config with ``values`` over its defaults, every value checked. UserError for an unknown name or bad value."""
    known = declared(config)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown hyperparameter {name!r}; known are {', '.join(known)}")
        known[name].check(value)
    return config(**values)
