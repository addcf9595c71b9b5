"""How a driver is asked to stop, and what it does where Ray does not let it."""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tune.search.coordinator import Coordinator
from tune.store.base import Flag, StorageUnavailable

GRACE_SECONDS = 7.5  # that epochs in progress get to end after Ctrl-C; Ray then takes a second or two to end
STUCK_SECONDS = 9.4  # after which Ray is not waited for any more
STOP_SECONDS = 10.0  # from Ctrl-C to the last line
LOOK_SECONDS = 0.5  # between two looks at whether a stop was asked for, or Ray is gone
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, and the epochs in progress did not end in time. Ray's core lets no other kind of exception out of a
    signal handler, and turns this one into a plain KeyboardInterrupt."""


class Interruption:
    """What stops a running sweep: SIGINT, SIGTERM, SIGHUP, ``stop NAME``, and the death of Ray.

    No new trial begins then. Epochs in progress get some seconds to end; after that Ray's loop is broken off. ``why_ray_died``
    says whether Ray has died. A call into Ray may still not come back, and Python's signal handlers do not run meanwhile: then
    another thread calls ``on_stuck``, which must end the process.
    """

    def __init__(self, coordinator: Coordinator, request: Flag, on_stuck: Callable[[], None] = lambda: None) -> None:
        self.coordinator = coordinator
        self.request = request
        self.on_stuck = on_stuck
        self.why_ray_died: Callable[[], str] = lambda: ""  # why Ray is no more; empty while it is there
        self.signal = 0
        self.since = 0.0  # when the signal came
        self.limit = math.inf  # on the monotonic clock, for the main thread to come out of Ray
        self._handled = False
        self._timer_stopped = False
        self._closed = threading.Event()

    def __enter__(self) -> Interruption:
        self.request.unlink(missing_ok=True)
        arrivals, self._arrived = os.pipe()
        os.set_blocking(self._arrived, False)
        self._previous_pipe = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
        self._previous = self.listen()
        threading.Thread(target=self._watch, args=(arrivals,), name="stop", daemon=True).start()
        threading.Thread(target=self._watch_request, name="stop-request", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self.stop_timer()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._arrived)
        with contextlib.suppress(StorageUnavailable):
            self.request.unlink(missing_ok=True)

    def _record(self, number: int) -> None:
        if not self.signal:
            self.since, self.signal = time.monotonic(), number
        self.coordinator.halted.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._handled:
            raise Interrupted
        self._handled = True
        self._record(number)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.since + GRACE_SECONDS - time.monotonic()))

    def listen(self) -> dict[int, Any]:
        """Installs the handlers, and returns the ones before. To be called again after Ray has shut down, which makes SIGTERM
        deadly again without telling Python."""
        handlers: dict[int, Any] = dict.fromkeys(STOPS - {signal.SIGHUP}, self._handle)
        handlers[signal.SIGALRM] = self._give_up
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a terminal that goes away, unless nohup says that it may
            handlers[signal.SIGHUP] = self._handle
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def stop_timer(self) -> None:
        """The trials have stopped: what is left to do is not broken off, but by a second signal."""
        self._timer_stopped = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def seconds_left(self) -> float:
        """How long MLflow may yet take: half a second at least, and without a signal as long as it needs."""
        return max(0.5, STOP_SECONDS - 0.5 - (time.monotonic() - self.since)) if self.signal else math.inf

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def _watch(self, arrivals: int) -> None:
        """Watches the time and Ray. After a signal it asks nobody who may not answer. Python writes the number of each signal
        to the pipe ``arrivals`` when it comes, not when it is handled."""
        while not self._closed.is_set():
            signals = os.read(arrivals, 64) if select.select([arrivals], [], [], LOOK_SECONDS)[0] else b""
            for number in STOPS.intersection(signals):
                self._record(number)
                self.limit = min(self.limit, self.since + STUCK_SECONDS)
            if time.monotonic() > self.limit and not self._timer_stopped:
                self.on_stuck()
                return
            if self.limit < math.inf:
                continue
            why_ray_died = self.why_ray_died
            if (reason := why_ray_died()) and self.why_ray_died is why_ray_died:  # it is replaced before we end Ray ourselves
                self.limit = time.monotonic() + STUCK_SECONDS
                self.coordinator.halt(reason)
        os.close(arrivals)

    def _watch_request(self) -> None:
        """Watches for a stop request, in a thread of its own, because the store that holds it may not answer."""
        while not self._closed.wait(LOOK_SECONDS) and not self._stopping():
            if self._is_requested() and not self._stopping() and not self._closed.is_set():
                _thread.interrupt_main(signal.SIGTERM)  # which arrives as any other
                return

    def _stopping(self) -> bool:
        return bool(self.signal) or self.limit < math.inf

    def _is_requested(self) -> bool:
        try:
            return self.request.exists()
        except StorageUnavailable as error:
            self.coordinator.halt(str(error))
        except OSError:  # a file system that stumbles; the next look may see more
            pass
        return False
