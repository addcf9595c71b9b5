"""ASHA's rungs over the ledger's values: a function of the study, so a lost driver loses none of them."""

from __future__ import annotations

import bisect
import math

from methods.clock import first_epoch
from tune.search.ledger import SWEEP, Ledger, Record


def below_cut(value: float, others: list[float], reduction_factor: int, min_results: int) -> bool:
    """Whether a result at a rung ends its trial: below the (1 - 1/factor) percentile of those already there.

    Asynchronous successive halving, stopping variant (Li et al., arXiv 1810.05934), with the percentile rule of Ray's
    scheduler. No cut before ``min_results`` others are there; a value that is not finite ends its trial, and no other's.
    """
    finite = sorted(other for other in others if math.isfinite(other))
    return _below_cut(value, finite, reduction_factor, min_results)


def _below_cut(value: float, ascending: list[float], reduction_factor: int, min_results: int) -> bool:
    """As :func:`below_cut`, of finite values in ascending order, which it does not walk through."""
    if not math.isfinite(value):
        return True
    if len(ascending) < max(1, min_results):
        return False
    place = (1 - 1 / reduction_factor) * 100 / 100 * (len(ascending) - 1)
    low = math.floor(place)
    share, (left, right) = place - low, (ascending[low], ascending[min(low + 1, len(ascending) - 1)])
    # numpy's own rounding: from the nearer end
    cut = left + (right - left) * share if share < 0.5 else right - (right - left) * (1 - share)
    return value < cut


class Rungs:
    """What stands at each rung: trial number -> value, for trials whose method had begun when they got there."""

    def __init__(self, ledger: Ledger) -> None:
        spec = ledger.sweep.spec
        self.ledger = ledger
        self.reduction_factor = spec.reduction_factor
        self.min_results = spec.reduction_factor  # others at a rung before it cuts; Ray's cuts from 1 on
        self.total_epochs = spec.epochs
        self.values: dict[int, dict[int, float]] = {rung: {} for rung in (spec.rungs() if ledger.kind == SWEEP else [])}
        self._ascending: dict[int, list[float]] = {rung: [] for rung in self.values}  # the finite ones
        for record in ledger.records.values():
            for epoch in record.objectives:
                if self._counts(record, epoch):
                    self._enter(record, epoch)

    def _counts(self, record: Record, epoch: int) -> bool:
        return epoch in self.values and epoch > self.begins(record)

    def _enter(self, record: Record, epoch: int) -> None:
        value = self.values[epoch][record.number] = record.objectives[epoch]
        if math.isfinite(value):
            bisect.insort(self._ascending[epoch], value)

    def begins(self, record: Record) -> int:
        """How many epochs pass before the trial's method proper starts."""
        return first_epoch(self.ledger.space.begins(record.method, record.values), self.total_epochs)

    def stops(self, record: Record, epoch: int) -> bool:
        """Judges a trial at ``epoch``, which is in the ledger, against those that came before, and enters it. Asked again after
        a restart, when others have come since, it says the same."""
        if not self._counts(record, epoch):
            return False
        standing, value = self.values[epoch], record.objectives[epoch]
        if record.number in standing:
            records, now = self.ledger.records, record.arrived[epoch]
            others = [held for number, held in standing.items() if records[number].arrived.get(epoch, now) < now]
            return below_cut(value, others, self.reduction_factor, self.min_results)
        stops = _below_cut(value, self._ascending[epoch], self.reduction_factor, self.min_results)
        self._enter(record, epoch)
        return stops
