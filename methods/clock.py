"""Where a trial stands in its budget. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where a trial stands: ``epoch`` whole epochs are done, of a full budget of ``epochs``."""

    epoch: int
    epochs: int

    @property
    def fraction(self) -> float:
        """Share of the full budget that is done, in [0, 1)."""
        return self.epoch / self.epochs

    def has_begun(self, fraction: float) -> bool:
        """True from the first epoch on whose start at least ``fraction`` of the budget is done."""
        return self.epoch >= first_epoch(fraction, self.epochs)

    def since(self, fraction: float) -> float:
        """Share that is done of what follows the first epoch at ``fraction`` of the budget, in [0, 1)."""
        first = first_epoch(fraction, self.epochs)
        return (self.epoch - first) / (self.epochs - first)


def first_epoch(fraction: float, epochs: int) -> int:
    """The first epoch, counted from 0, on whose start at least ``fraction`` of ``epochs`` is done."""
    return math.ceil(round(fraction * epochs, 9))
