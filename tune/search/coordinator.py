"""The driver's decisions, without Ray: who runs next, what a result means, when the sweep is over.

Ray's searcher and scheduler are two doors into this one object; a test walks in by them with no cluster behind.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import TrialState

from training.epoch_record import EpochRecord
from training.locations import names, remove
from training.watchdog import last_words
from tune.search.ledger import Ledger, Record
from tune.search.recipes import of_trial
from tune.search.rungs import Rungs
from tune.spec import KEPT_CHECKPOINTS, MAX_FAILURES

Finished = Literal["finished"]
FINISHED: Finished = "finished"


@dataclass(frozen=True)
class Verdict:
    """How a trial ended: what the study will be told."""

    state: TrialState
    diverged: bool = False
    error: str = ""


class Coordinator:
    """Hands out trials until a budget is spent and ends them. ``concurrent`` trials at a time, ``total`` that count."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        total: int,
        concurrent: int,
        on_event: Callable[[str, Record], None] = lambda event, record: None,
    ) -> None:
        self.ledger = ledger
        self.total = total
        self.concurrent = concurrent
        self.on_event = on_event  # "started", "lost" or "ended", and the trial
        self.rungs = Rungs(ledger)
        self.live: dict[str, Record] = {}  # by the executor's id
        self.verdicts: dict[int, Verdict] = {}
        self.waiting: deque[Record] = deque()
        self.halted = threading.Event()  # no new trial, and none goes on
        self.problem = ""  # why the sweep stopped itself
        self.failures_in_row = 0
        self.last_result = (
            0.0  # the clock at the last result; before any has come, when the first of the live trials was handed out
        )
        self.top = [r for r in ledger.leaderboard() if r.state is TrialState.COMPLETE][:KEPT_CHECKPOINTS]
        self._drop_stray_checkpoints()
        for record in ledger.unfinished():
            self._take_up(record)

    def _take_up(self, record: Record) -> None:
        """A trial that lost its process: finished if its last epoch decides it, else first in line."""
        if record.epochs and (verdict := self._judge(record, record.epochs)):
            self._end(record, verdict)
        else:
            self.waiting.append(record)

    # -- handing out --------------------------------------------------------------------------------------------------

    def next(self, executor_id: str) -> Record | Finished | None:
        """The next trial to run; None: not now; FINISHED: the budget is spent."""
        if self.halted.is_set():
            return FINISHED
        if len(self.live) >= self.concurrent:
            return None
        if self.waiting:
            record = self.waiting.popleft()
        elif not self._is_budget_used():
            try:
                record = self.ledger.ask()
            except OSError as error:
                return self.halt(f"the ledger cannot be written: {error}")
        else:
            return None if self.live else FINISHED
        if not self.live:
            self.last_result = time.monotonic()
        self.live[executor_id] = record
        self.on_event("started", record)
        return record

    def _is_budget_used(self) -> bool:
        """Whether no new trial begins. While trials run, the clock counts since the last result: their epochs in progress are
        not recorded yet. When none does, the ledger alone decides, as it will when a resume asks."""
        clock = self.ledger.account.usage.seconds + time.monotonic() - self.last_result if self.live else 0.0
        return any(budget.over for budget in self.ledger.budgets(self.total, len(self.live), clock))

    def config(self, record: Record) -> dict[str, Any]:
        """What an actor needs to run the trial: plain values only."""
        spec = self.ledger.sweep.spec
        return {
            "number": record.number,
            "recipe": vars(of_trial(self.ledger, record)),
            "folder": str(self.ledger.checkpoints / str(record.number)),
            "rungs": list(self.rungs.values),
            "reported": record.epochs,
            "checkpoint_seconds": spec.checkpoint_seconds,
            "report_seconds": spec.report_seconds,
            "hang_seconds": spec.hang_seconds,
            "cpus": spec.cpus_per_trial,
            "gpus": spec.gpus_per_trial,
        }

    # -- results ------------------------------------------------------------------------------------------------------

    def result(self, executor_id: str, epochs: list[EpochRecord], *, failure: str | None, diverged: bool) -> bool:
        """Records what a trial reports and returns whether it goes on; of one that was given up nothing is taken."""
        record = self.live.get(executor_id)
        if record is None:
            return False
        try:
            new = self.ledger.report(record, epochs)
        except OSError as error:
            self.halt(f"the ledger cannot be written: {error}")
            return False
        self.last_result = time.monotonic()
        for epoch in new:
            verdict = self._judge(record, epoch.epoch)
            if verdict:
                self.verdicts[record.number] = verdict
                return False
        if failure:
            self.verdicts[record.number] = Verdict(TrialState.FAIL, error=failure)
        elif diverged:
            self.verdicts[record.number] = Verdict(TrialState.PRUNED, diverged=True)
        return not (failure or diverged or self.halted.is_set())

    def _judge(self, record: Record, epoch: int) -> Verdict | None:
        if epoch >= self.ledger.sweep.spec.epochs:
            return Verdict(TrialState.COMPLETE)
        return Verdict(TrialState.PRUNED) if self.rungs.stops(record, epoch) else None

    def released(self, executor_id: str) -> None:
        """The executor has let go of a trial. Without a verdict it was interrupted, and stays as it is."""
        record = self.live.pop(executor_id, None)
        verdict = self.verdicts.pop(record.number, None) if record else None
        if record and verdict:
            self._end(record, verdict)

    def lost(self, executor_id: str, reason: str = "") -> None:
        """The executor has lost a trial's process, and why, if it knows: first in line again, or failed when it was lost too
        often."""
        record = self.live.pop(executor_id, None)
        if record is None:
            return
        record.lost_because = last_words(self.ledger.checkpoints / str(record.number)) or reason
        try:
            if self.ledger.lost(record):
                self.waiting.appendleft(record)
                self.on_event("lost", record)
            else:
                self._finish(record)
        except OSError as error:
            self.halt(f"the ledger cannot be written: {error}")

    def _end(self, record: Record, verdict: Verdict) -> None:
        try:
            if verdict.state is TrialState.COMPLETE:
                self.ledger.complete(record)
            elif verdict.state is TrialState.PRUNED:
                self.ledger.prune(record, diverged=verdict.diverged)
            else:
                self.ledger.fail(record, verdict.error)
        except OSError as error:
            self.halt(f"the ledger cannot be written: {error}")
            return
        self._finish(record)

    def _finish(self, record: Record) -> None:
        """After a trial's state is in the ledger: failures in a row, the checkpoint that is no longer needed, the display."""
        self.failures_in_row = self.failures_in_row + 1 if record.state is TrialState.FAIL else 0
        if self.failures_in_row >= MAX_FAILURES:
            reason = record.summary["error"].strip().splitlines()[-1]
            self.halt(f"{MAX_FAILURES} trials in a row failed; the last one: {reason}")
        dropped = [record]
        if record.state is TrialState.COMPLETE:
            self.top = sorted([*self.top, record], key=lambda r: (-(r.value or 0.0), r.number))
            dropped, self.top = self.top[KEPT_CHECKPOINTS:], self.top[:KEPT_CHECKPOINTS]
        for unneeded in dropped:
            remove(self.ledger.checkpoints / str(unneeded.number))
        self._drop_halves(record)
        self.on_event("ended", record)

    def _drop_halves(self, record: Record) -> None:
        """Removes what processes of the trial that were killed while they saved it have left, as far as that can be done."""
        folder = self.ledger.checkpoints / str(record.number)
        if not isinstance(folder, Path):  # an object store has no halves
            return
        with contextlib.suppress(OSError):  # of the folder, which is away
            for half in folder.glob(".*"):
                with contextlib.suppress(OSError):  # NFS keeps a file that another node has open
                    half.unlink()

    def _drop_stray_checkpoints(self) -> None:
        """Removes what a kill left behind: checkpoints of finished trials that are not among the best few, and half of one."""
        needed = {str(record.number): record for record in [*self.ledger.unfinished(), *self.top]}
        for name in names(self.ledger.checkpoints):
            if name not in needed:
                remove(self.ledger.checkpoints / name)
        for record in needed.values():
            self._drop_halves(record)

    def halt(self, problem: str) -> Finished:
        """Stops the sweep, for the reason that was given first."""
        self.problem = self.problem or problem
        self.halted.set()
        return FINISHED
