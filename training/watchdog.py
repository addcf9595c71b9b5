"""Ends a process whose trial hangs, also inside C code, and leaves word of where it stood to the driver."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

from training.locations import Location

SLACK = 10  # what a first epoch gets times ``hang_seconds``, and a later one times the longest before it
NOTE = ".hung"  # beside the trial's checkpoint; holds a text only once its process hung


def allowed_seconds(hang_seconds: float, longest: float, first: bool) -> float:
    """How long an epoch may take (0: any time), given the ``longest`` of the trial so far; the ``first`` of a process builds or
    maps the table, loads weights and compiles as well."""
    return hang_seconds and max(hang_seconds * (SLACK if first else 1), SLACK * longest)


class Watchdog:
    """Between ``with`` and its end the process is to call :meth:`expect` again before the time given last is over; otherwise
    a thread of the interpreter's that needs no lock of Python's writes every thread's stack and exits."""

    def __init__(self, folder: Location) -> None:
        self.path = folder / NOTE if isinstance(folder, Path) else None  # C code writes into files alone
        self.file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        return self

    def expect(self, seconds: float) -> None:
        """Ends the process after so many seconds; 0 is never."""
        if not seconds:
            return
        if self.file is None and self.path:
            with contextlib.suppress(OSError):  # a full disk: then the stacks go to the worker's own output
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("w")
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.file or sys.stderr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.file is not None:
            self.file.close()
            self.file = None
            assert self.path is not None
            with contextlib.suppress(OSError):
                self.path.unlink()


def last_words(folder: Location) -> str:
    """Takes away what a trial's process that hung left in its folder: the stacks, and last a line that says so. Empty where
    it did not hang."""
    if not isinstance(folder, Path):
        return ""
    path = folder / NOTE
    try:
        stacks = path.read_text(errors="replace").strip()
        path.unlink()
    except OSError:
        return ""
    limit, _, stacks = stacks.partition("\n")
    return f"{stacks}\nit hung: no epoch ended for {limit.removeprefix('Timeout (').removesuffix(')!')}" if limit else ""
