"""One driver at a time, and how it is asked to stop."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tune.desk import Desk

GRACE_SECONDS = 8.0  # that epochs in progress get to end after Ctrl-C
STOP_SECONDS = 10.0  # from Ctrl-C to the last line
STOP_REQUEST = "stop"  # the file by which another process asks


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, and the epochs in progress did not end in time. Ray's core lets no other kind of exception out of a
    signal handler, and turns this one into a plain KeyboardInterrupt."""


LOCK = "driver.lock"  # held by the driver; says who it is, and which command goes on with what it does


@contextlib.contextmanager
def driver_lock(folder: Path, command: str) -> Iterator[None]:
    """Holds the sweep. The kernel lets go of it with the process. ValueError names the process that has it."""
    with (folder / LOCK).open("a+") as file:
        if not _locked(file, fcntl.LOCK_EX, patience=0.3):  # as long as a look at the lock may take
            file.seek(0)
            raise ValueError(f"sweep {folder.name!r} is being run by {file.readline().strip() or 'another process'}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{command}\n")
        file.flush()
        yield


def _locked(file: IO[str], how: int, patience: float = 0.0) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True


def driver_alive(folder: Path) -> bool:
    """Whether a process holds the sweep."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open() as file:
        return not _locked(file, fcntl.LOCK_SH)


def driver_command(folder: Path) -> str:
    """The command that goes on with what the driver does, or did last; empty where none was noted."""
    return "".join((folder / LOCK).read_text().splitlines()[1:2])


class Interruption:
    """SIGINT, SIGTERM, SIGHUP and ``stop NAME``: no new trial; epochs in progress get some seconds, then it is broken off."""

    def __init__(self, desk: Desk, request: Path) -> None:
        self.desk = desk
        self.request = request
        self.signal = 0
        self.since = 0.0  # when the signal came
        self._over = threading.Event()

    def __enter__(self) -> Interruption:
        self.request.unlink(missing_ok=True)
        self._previous = self.listen()
        threading.Thread(target=self._watch, name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.settle()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.request.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Interrupted
        self.signal, self.since = number, time.monotonic()
        self.desk.halted.set()
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def listen(self) -> dict[int, Any]:
        """Installs the handlers, and returns the ones before. To be called again after Ray has shut down, which makes SIGTERM
        deadly again without telling Python."""
        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._handle)
        handlers[signal.SIGALRM] = self._give_up
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that goes away, unless nohup says that it may
            handlers[signal.SIGHUP] = self._handle
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def settle(self) -> None:
        """The trials have stopped: what is left to do is not broken off, but by a second signal."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def left(self) -> float:
        """Seconds that MLflow may yet take, half a second at least: without a signal as many as it needs."""
        return max(0.5, STOP_SECONDS - 0.5 - (time.monotonic() - self.since)) if self.signal else math.inf

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if self.request.exists():
                _thread.interrupt_main(signal.SIGTERM)
                return
