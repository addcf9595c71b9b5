"""A driver at work: ledger, coordinator, trackers and a short-lived Ray Tune run, until the budget is spent or it is ended."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from optuna.trial import TrialState

from tune.cluster import executor
from tune.cluster.interruption import Interruption
from tune.report.closing import closing_words, num_missing
from tune.report.display import Display
from tune.report.tracker import Tracker
from tune.report.tracking import tracking_uri
from tune.search.coordinator import Coordinator
from tune.search.ledger import RETRAIN, SWEEP, Ledger
from tune.search.recipes import best_config_text
from tune.search.space import Space
from tune.store.stored_sweep import Sweep


class Outcome(NamedTuple):
    """How a command ended: its exit code, what is left to say below the table, and what the table shows."""

    code: int
    advice: str = ""
    ledger: Ledger | None = None

    def say(self) -> int:
        """Says the last words; returns the exit code."""
        if self.advice:
            tell(self.advice, sys.stderr if self.code else sys.stdout)
        return self.code


def tell(text: str, file: TextIO) -> None:
    with contextlib.suppress(OSError):  # a terminal or a pipe that is gone takes nothing else with it
        print(text, file=file, flush=True)


def execute(sweep: Sweep, kind: str, command: str, address: str = "", space: Space | None = None) -> Outcome:
    """Runs what is left of a study on the Ray cluster at ``address``, or on this machine alone, under the caller's lock.

    ``command`` goes on with the study. ``space`` is the sweep's, where the caller has resolved it. The exit code is 0; 1 where
    the sweep stopped itself or a retraining is incomplete; 128 and the signal's number where it was interrupted.
    """
    ledger = Ledger(sweep, kind, space=space)
    uri = tracking_uri(sweep.storage, sweep.spec.tracking)
    with Display(ledger, ledger.total) as display:
        coordinator = Coordinator(ledger, total=ledger.total, concurrent=0, on_event=display.event)
        idle = ledger.is_finished
        trackers = [Tracker(ledger, uri, display.line)]
        if kind == SWEEP and RETRAIN in ledger.kinds:  # its runs may be missing, too
            trackers.append(Tracker(Ledger(sweep, RETRAIN, space=ledger.space, read_only=True), uri))

        def on_stuck() -> None:
            code = 1
            sweep.files.stop_waiting()  # the main thread may wait for a database and hold what the tracker needs
            try:
                outcome = outcome_of(ledger, coordinator, interruption.signal, command, idle)
                code = outcome.code
                display.close()
                close_trackers(trackers, coordinator, within=0.5)
                outcome.say()
            except Exception:  # noqa: BLE001  a thread of its own has nobody to raise it to, and the process must end
                traceback.print_exc()
            finally:
                os._exit(code)

        interruption = Interruption(coordinator, sweep.files.stop_request, on_stuck)
        with contextlib.suppress(KeyboardInterrupt), interruption:
            try:
                if not idle:
                    executor.run(coordinator, sweep.spec, interruption, display.line, address)
            finally:
                interruption.stop_timer()
                if interruption.signal or coordinator.problem:  # which may be that they are away, and were waited for
                    sweep.files.stop_waiting()
                close_trackers(trackers, coordinator, within=interruption.seconds_left())
    if kind == SWEEP and (best := ledger.best()):
        try:
            sweep.files.write("best_config.yaml", best_config_text(ledger, best))
        except OSError as error:
            coordinator.problem = coordinator.problem or f"best_config.yaml cannot be written: {error}"
    return outcome_of(ledger, coordinator, interruption.signal, command, idle)


def close_trackers(trackers: Sequence[Tracker], coordinator: Coordinator, *, within: float) -> None:
    """Lets every tracker send what it still has, for at most ``within`` seconds, and warns where one is behind."""
    for tracker in trackers:
        tracker.close(finished=tracker.ledger.is_finished, patience=5 if coordinator.problem else 30, within=within)
        if tracker.problem:
            behind = f"MLflow is behind the ledger ({tracker.problem}); a resume brings it up to date"
            tell(f"warning: {behind}", sys.stderr)


def outcome_of(ledger: Ledger, coordinator: Coordinator, signal_number: int, command: str, idle: bool) -> Outcome:
    """How a driver's work ended; ``signal_number`` is 0 where no signal ended it."""
    if signal_number:
        num_waiting = ledger.count(TrialState.RUNNING)
        return Outcome(
            128 + signal_number, f"interrupted with {num_waiting} trials in progress; go on with:\n{command}", ledger
        )
    if coordinator.problem:
        return Outcome(1, f"error: {coordinator.problem}; go on with: {command}", ledger)
    if ledger.kind == SWEEP:
        return Outcome(0, "\n".join(closing_words(ledger, command, idle)), ledger)
    if num_failed := num_missing(ledger):
        return Outcome(1, f"error: {num_failed} runs failed and are not in the table; try them again with: {command}", ledger)
    return Outcome(0, "", ledger)
