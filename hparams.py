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
from typing import Any, TypeVar, cast

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
    """What a search draws one hyperparameter from: numbers from ``low`` to ``high``, or one of ``choices``."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Value, ...] = ()

    def nearest(self, value: Value) -> Value:
        """The value itself where the range holds it, else the nearest bound (or the first choice)."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        assert isinstance(value, (int, float))
        return type(value)(min(max(value, self.low), self.high))

    def __str__(self) -> str:
        if self.choices:
            return ",".join(str(choice) for choice in self.choices)
        return f"{self.low:g}:{self.high:g}" + (":log" if self.log else "")


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
    many_classes: Value | None  # the default from MANY_CLASSES classes on, where it is another one

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
        """Returns ``value``; ValueError where it is not legal."""
        good = value in self.choices if self.legal is None else is_finite(value) and float(value) in self.legal
        if not good:
            raise ValueError(f"{self.name}: {value!r} is not allowed; it must be {self.allowed}")
        return value

    def parse(self, text: object) -> Value:
        """Reads a value as a user writes it (``--set``, YAML). ValueError names the value and what is allowed."""
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
            raise ValueError(f"{self.name}: {word!r} is not allowed; it must be {self.allowed}")
        return self.check(value)

    def parse_range(self, text: str) -> Range:
        """Reads ``low:high``, ``low:high:log`` or, for named values, ``a,b,c``. ValueError where it is empty or illegal."""
        if self.legal is None:
            return Range(choices=tuple(self.parse(word) for word in text.split(",")))
        parts = text.split(":")
        if len(parts) not in (2, 3) or parts[2:] not in ([], ["log"]):
            raise ValueError(f"{self.name}: range {text!r} is not readable; write LOW:HIGH or LOW:HIGH:log")
        low, high = (float(self.parse(part)) for part in parts[:2])
        if not low < high:
            raise ValueError(f"{self.name}: range {text!r} is empty; LOW must be below HIGH")
        if parts[2:] and low <= 0:
            raise ValueError(f"{self.name}: range {text!r} cannot be logarithmic; LOW must be above 0")
        return Range(low, high, log=bool(parts[2:]))


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
    """A Config with ``values`` over its defaults, every value checked. ValueError for an unknown name or bad value."""
    known = declared(config)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown hyperparameter {name!r}; known are {', '.join(known)}")
        known[name].check(value)
    return config(**values)
