"""A connection to PostgreSQL that gives up on a server which says nothing.

Where a server is frozen (a paused virtual machine, a disk that stalls) the kernel goes on acknowledging packets, so none of
TCP's timeouts notices, and libpq has no limit of its own for a statement: it would be waited for, for ever.
"""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

import psycopg
from psycopg import waiting
from psycopg.abc import PQGen

# How long a server may say nothing while it is asked something. It is no limit for a statement: every packet begins it anew, so
# that a journal of any size can be read over any line. But the first packet comes when the server has found the first rows or
# has a commit on its disk, which takes seconds on a busy machine, and more where 100 MB have to be read from a slow disk and
# sorted first. Half of RETRY_SECONDS, so that a second attempt has its time, too.
SILENT_SECONDS = 30.0
HURRIED_SECONDS = 1.0  # the same once a driver has to end
LOOK_SECONDS = 0.1  # between two looks at the clock, and at whether a signal has come
T = TypeVar("T")


class Connection(psycopg.Connection[Any]):
    """``hurried``: set from another thread, also for the statement that is being waited for. OperationalError where the server
    says nothing; the connection is then closed, as it is when a signal's handler raises in the middle of an answer."""

    hurried = threading.Event()

    def wait(self, gen: PQGen[T], interval: float = LOOK_SECONDS, timeout: float | None = None) -> T:
        """Psycopg waits here for every answer. It would ask the server to cancel what a signal broke off, and wait for that."""
        try:
            return waiting.wait(self._heard(gen), self.pgconn.socket, interval=interval)
        except psycopg.Error:
            raise
        except BaseException:
            self.pgconn.finish()
            raise

    def _heard(self, gen: PQGen[T]) -> PQGen[T]:
        """The same as ``gen``, which yields what it waits for and is sent what is ready: nothing after each interval."""
        heard = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                silent = time.monotonic() - heard
                if ready:
                    heard += silent
                elif silent > (limit := HURRIED_SECONDS if self.hurried.is_set() else SILENT_SECONDS):
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server has said nothing for {limit:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
