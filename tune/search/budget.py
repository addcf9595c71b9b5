"""What limits a sweep and what of it is spent: functions of the recorded epochs alone, so that no kill changes them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from decimal import Decimal
from typing import NamedTuple

from training.epoch_record import EpochRecord

HOUR = 3600.0
CONFIGURATIONS = "configurations"  # that a space holds, where they are fewer than the trials asked for


class Covered:
    """The length of a union of intervals. They come in any order, mostly at its end, where adding one costs next to nothing."""

    def __init__(self) -> None:
        self.length = 0.0
        self._starts, self._ends = array("d"), array("d")  # of what it consists of, disjoint and ascending

    def add(self, start: float, end: float) -> None:
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        merged = list(zip(self._starts[first:last], self._ends[first:last], strict=True))  # those that it touches
        start, end = min([start, *(s for s, _ in merged)]), max([end, *(e for _, e in merged)])
        self.length += end - start - sum(e - s for s, e in merged)
        self._starts[first:last], self._ends[first:last] = array("d", [start]), array("d", [end])


class Usage(NamedTuple):
    """What the epochs of all trials took that were recorded up to some moment."""

    epochs: int = 0
    seconds: float = 0.0  # during which at least one trial was training
    trial_seconds: float = 0.0  # of training, summed over trials
    gpu_seconds: float = 0.0  # the same, each times the GPUs that its trial held

    def plus(self, other: Usage) -> Usage:
        return Usage(
            self.epochs + other.epochs,
            self.seconds + other.seconds,
            self.trial_seconds + other.trial_seconds,
            self.gpu_seconds + other.gpu_seconds,
        )


class Account:
    """Adds up epochs in the order of their recording."""

    def __init__(self) -> None:
        self.usage = Usage()
        self._covered = Covered()

    def add(self, epoch: EpochRecord) -> Usage:
        """Notes an epoch and returns what was spent up to it."""
        seconds = epoch.metrics["seconds"]
        self._covered.add(epoch.time - seconds, epoch.time)
        self.usage = Usage(
            self.usage.epochs + 1,
            self._covered.length,
            self.usage.trial_seconds + seconds,
            self.usage.gpu_seconds + epoch.metrics.get("gpu_seconds", 0.0),
        )
        return self.usage


class Budget(NamedTuple):
    """One limit, by the name of its field in the spec, or that of the space. The first to be spent ends the sweep."""

    name: str
    used: float
    limit: float  # 0: none

    @property
    def over(self) -> bool:
        return 0 < self.limit <= self.used

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def __str__(self) -> str:
        limit = f" of {self.limit:g}" if self.limit else ""
        return f"{short_number(self.used)}{limit} {self.name.replace('gpu_', 'GPU-')}"


def short_number(value: float) -> str:
    """A count as it is; hours with two decimals, fewer of them with three significant digits and no exponent."""
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value >= 1 else f"{Decimal(f'{value:.3g}'):f}"
