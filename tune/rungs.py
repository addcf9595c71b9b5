"""ASHA's rungs over the ledger's values: a function of the study, so a lost driver loses none of them."""

from __future__ import annotations

import math

import numpy as np

from methods.base import first_epoch
from tune.ledger import SWEEP, Ledger, Record


def below_cut(value: float, others: list[float], reduction_factor: int, min_results: int) -> bool:
    """Whether a result at a rung ends its trial: below the (1 - 1/factor) percentile of those already there.

    Asynchronous successive halving, stopping variant (Li et al., arXiv 1810.05934), with the percentile rule of Ray's
    scheduler. No cut before ``min_results`` others are there; a value that is not finite ends its trial, and no other's.
    """
    if not math.isfinite(value):
        return True
    others = [other for other in others if math.isfinite(other)]
    if len(others) < max(1, min_results):
        return False
    return value < float(np.percentile(others, (1 - 1 / reduction_factor) * 100))


class Rungs:
    """What stands at each rung: trial number -> value, for trials whose method had begun when they got there."""

    def __init__(self, ledger: Ledger) -> None:
        spec = ledger.sweep.spec
        self.ledger = ledger
        self.reduction_factor = spec.reduction_factor
        self.min_results = spec.reduction_factor  # others at a rung before it cuts; Ray's cuts from 1 on
        self.total_epochs = spec.epochs
        self.values: dict[int, dict[int, float]] = {rung: {} for rung in (spec.rungs() if ledger.kind == SWEEP else [])}
        for record in ledger.records.values():
            for epoch in record.objectives:
                self._enter(record, epoch)

    def _enter(self, record: Record, epoch: int) -> None:
        if epoch in self.values and epoch > self.begins(record):
            self.values[epoch][record.number] = record.objectives[epoch]

    def begins(self, record: Record) -> int:
        """How many epochs pass before the trial's method proper starts."""
        return first_epoch(self.ledger.space.begins(record.method, record.values), self.total_epochs)

    def stops(self, record: Record, epoch: int) -> bool:
        """Judges a trial at ``epoch``, which is in the ledger, against those that came before, and enters it. Asked again after
        a restart, when others have come since, it says the same."""
        self._enter(record, epoch)
        standing = self.values.get(epoch, {})
        if record.number not in standing:
            return False
        records, now = self.ledger.records, record.arrived[epoch]
        others = [value for number, value in standing.items() if records[number].arrived.get(epoch, now) < now]
        return below_cut(standing[record.number], others, self.reduction_factor, self.min_results)
