"""What can be said and asked of a sweep from outside its driver: the commands about it, and that it stops."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from errors import UserError
from tune.store.base import SweepStore
from tune.store.stored_sweep import Sweep


def command_line(verb: str, store: SweepStore, name: str, *flags: object) -> str:
    """A command about a sweep, for a user to copy."""
    return shlex.join(["python", "search.py", verb, name, *map(str, flags), *store.flags])


def resume_command(sweep: Sweep) -> str:
    """The command line that goes on with a sweep."""
    return command_line("resume", sweep.files.store, sweep.name)


def stop(name: str, store: Path | SweepStore, patience: float = 60.0) -> int:
    """Asks the driver of a running sweep to stop, as Ctrl-C does, and waits for it."""
    sweep = Sweep.find(store, name)
    request = sweep.files.stop_request
    deadline = time.monotonic() + patience
    command = ""
    while time.monotonic() < deadline:
        if not sweep.files.running():
            request.unlink(missing_ok=True)
            print(f"stopped; go on with: {command}" if command else f"sweep {name!r} is not running")
            return 0
        command = sweep.files.command() or resume_command(sweep)
        request.touch()
        time.sleep(0.3)
    raise UserError(f"sweep {name!r} did not stop within {patience:.0f} s")
