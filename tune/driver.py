"""How a driver is asked to stop, and what it does where Ray does not let it."""

from __future__ import annotations

import _thread
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tune.desk import Desk
from tune.files import Flag, Unreachable

GRACE_SECONDS = 8.0  # that epochs in progress get to end after Ctrl-C
STUCK_SECONDS = 9.0  # after which Ray is not waited for any more
STOP_SECONDS = 10.0  # from Ctrl-C to the last line


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, and the epochs in progress did not end in time. Ray's core lets no other kind of exception out of a
    signal handler, and turns this one into a plain KeyboardInterrupt."""


class Interruption:
    """SIGINT, SIGTERM, SIGHUP and ``stop NAME``: no new trial; epochs in progress get some seconds, then it is broken off.

    The same where Ray has died, as ``gone`` says. ``farewell`` is called, from another thread, where the main one stays in a
    call of Ray's all the same: it has nobody to wait for. It ends the process.
    """

    def __init__(self, desk: Desk, request: Flag, farewell: Callable[[], None] = lambda: None) -> None:
        self.desk = desk
        self.request = request
        self.farewell = farewell
        self.gone: Callable[[], str] = lambda: ""  # why Ray is no more; empty while it is there
        self.signal = 0
        self.since = 0.0  # when the signal came
        self._limit = math.inf  # for the main thread to come out of Ray
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
        with contextlib.suppress(Unreachable):
            self.request.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Interrupted
        self.signal, self.since = number, time.monotonic()
        self._limit = self.since + STUCK_SECONDS
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
        self._limit = math.inf
        signal.setitimer(signal.ITIMER_REAL, 0)

    def left(self) -> float:
        """Seconds that MLflow may yet take, half a second at least: without a signal as many as it needs."""
        return max(0.5, STOP_SECONDS - 0.5 - (time.monotonic() - self.since)) if self.signal else math.inf

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            if time.monotonic() > self._limit:
                self.farewell()
                return
            if self._limit < math.inf:
                continue
            gone = self.gone
            if (reason := gone()) and self.gone is gone:  # it is taken away before we end Ray ourselves
                self._limit = time.monotonic() + STUCK_SECONDS
                self.desk.halt(reason)
            elif self._asked():
                self._limit = time.monotonic() + STUCK_SECONDS
                _thread.interrupt_main(signal.SIGTERM)

    def _asked(self) -> bool:
        try:
            return self.request.exists()
        except Unreachable as error:
            self.desk.halt(str(error))
        except OSError:  # a file system that stumbles; the next look may see more
            pass
        return False
