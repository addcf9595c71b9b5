"""Ray Tune's scheduler door to the desk."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from training.experiment import EpochRecord
from tune.desk import Desk


class LedgerScheduler(FIFOScheduler):
    """Sees every result, the last one too: the desk writes it into the ledger and decides.

    What it decides is told to the study through the searcher, which Tune calls next.
    """

    def __init__(self, desk: Desk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.desk = desk

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its scheduler into its folder; nothing of ours belongs there

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        keep = self.desk.result(
            trial.trial_id,
            [EpochRecord(**epoch) for epoch in result["epochs"]],
            failure=result["failure"],
            diverged=result["diverged"],
        )
        decision: str = TrialScheduler.CONTINUE if keep else TrialScheduler.STOP
        return decision
