"""What a user sees while a sweep runs: a live table where there is a terminal, else a line per event."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tune.report.leaderboard import leaderboard, rows
from tune.search.ledger import Ledger, Record

REFRESH = 0.5
SHOWN = 12


class Display:
    """Prints a trial's start, end and lost process; on a terminal the leaderboard stands below and moves."""

    def __init__(self, ledger: Ledger, total: int) -> None:
        self.ledger = ledger
        self.total = total
        self.console = Console(soft_wrap=True, highlight=False)
        self.live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="display", daemon=True)
        self.began = time.monotonic()

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The table goes, and the cursor comes back."""
        self._stop.set()
        if self.live:
            self._thread.join(2 * REFRESH)
            self.live.stop()

    def event(self, kind: str, record: Record) -> None:
        """``started``, ``ended`` or ``lost``."""
        if kind == "started":
            if record.epochs:
                self.line(f"trial {record.number} {record.method} goes on from epoch {record.epochs}")
        elif kind == "lost":
            why = f" ({record.lost_because.splitlines()[-1]})" if record.lost_because else ""
            self.line(f"trial {record.number} lost its process after epoch {record.epochs}{why}; it will be run again")
        else:
            self.line(self._ended(record))

    def _ended(self, record: Record) -> str:
        value = f"val {100 * record.value:.2f}" if record.value is not None else "no epoch"
        best = self.ledger.best()
        lead = f"best {100 * best.value:.2f} (trial {best.number})" if best and best.value is not None else "none complete"
        num_done = self.ledger.count(TrialState.COMPLETE, TrialState.PRUNED)
        text = f"trial {record.number} {record.method} {record.status} after {record.epochs} epochs, {value}"
        if record.status == "failed":
            text += f": {record.attrs['summary']['error'].strip().splitlines()[-1]}"
        limits = "".join(f"{budget}, " for budget in self.ledger.budgets()[1:] if budget.limit)
        return f"{text} | {num_done}/{self.total} trials, {limits}{lead}, {time.monotonic() - self.began:.0f} s"

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _refresh(self) -> None:
        live = self.live
        assert live is not None
        while not self._stop.wait(REFRESH):
            live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The running trials, then the best of the finished ones."""
        board = self.ledger.leaderboard()
        shown = rows(self.ledger, {}, sorted(board, key=lambda record: record.finished)[:SHOWN])
        table = Table(title=f"{self.ledger.sweep.name}: {len(board)} of {self.total} trials begun")
        header, lines, _ = leaderboard(shown)
        for column in header:
            table.add_column(column, justify="right" if column in ("trial", "val", "test", "epochs", "seconds") else "left")
        for row, line in zip(shown, lines, strict=False):
            table.add_row(*line, style="dim" if row["state"] in ("stopped", "failed", "diverged") else "")
        return table
