"""What is kept of an epoch. Standard library only: whoever reads a ledger needs it, and no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch as the ledger keeps it: ``objective`` is what the search compares, ``time`` seconds since 1970."""

    epoch: int
    time: float
    objective: float
    metrics: dict[str, float]
