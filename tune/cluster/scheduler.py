"""Ray Tune's scheduler door to the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from training.epoch_record import EpochRecord
from tune.search.coordinator import Coordinator


class LedgerScheduler(FIFOScheduler):
    """Hands every result to the coordinator, the last one too; the coordinator writes it into the ledger and decides.

    The study hears of the decision through the searcher, which Tune calls next. The scheduler itself reports a lost process.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coordinator = coordinator

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its scheduler into its folder; nothing of ours belongs there

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """The newest trial that waits. Tune gives it an actor that has just become free, and the older ones keep those that are
        starting for them: given to the oldest instead, each trial that ends would break off the start of an actor, and where
        trials end faster than actors start, a node that is new would never be used."""
        waiting = {trial.trial_id: trial for trial in tune_controller.get_live_trials() if trial.status == TuneTrial.PENDING}
        if self.coordinator.halted.is_set():
            for trial in waiting.values():  # resources for it may never be free, and Tune would wait
                trial.init_local_path()  # Tune's summary at the end asks for it, also where it is new
                tune_controller.stop_trial(trial)
            return None
        return next((waiting[key] for key in reversed(self.coordinator.live) if key in waiting), None)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        keep = self.coordinator.result(
            trial.trial_id,
            [EpochRecord(**epoch) for epoch in result["epochs"]],
            failure=result["failure"],
            diverged=result["diverged"],
        )
        decision: str = TrialScheduler.CONTINUE if keep else TrialScheduler.STOP
        return decision

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Its process is gone. The searcher, whom Tune tells next, is not told why."""
        error = Path(trial.error_file).read_text() if trial.error_file else ""
        self.coordinator.lost(trial.trial_id, loss_reason(error))


def loss_reason(error: str) -> str:
    """Why a process ended: Ray's text without its date, and a line that sums it up. ``error``: the file that Tune wrote."""
    details = error.partition("\n")[2].strip()
    lines = [line for line in details.splitlines() if line and not line.startswith(("\t", "The actor died unexpectedly"))]
    if not lines:
        return ""
    if "ray::" in lines[0]:  # the traceback of an exception that left the actor
        return f"{details}\n{lines[-1].removeprefix('training.locations.Away: ')}"
    return f"{details}\nRay says: {lines[0].rpartition('Worker exit detail: ')[2].partition(' Some common causes')[0]}"
