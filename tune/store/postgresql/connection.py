"""Statements on a connection to PostgreSQL, none of which is waited for without a limit.

Where a server is frozen (a paused virtual machine, a disk that stalls) the kernel goes on acknowledging packets. TCP's timeouts
notice nothing then, and libpq has no limit of its own for a statement.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import psycopg

# How long an answer may take. Half of RETRY_SECONDS in database.py, so that a second attempt has its time, too: a busy machine
# with a slow disk takes seconds for a commit, and more for the first lines of a large file.
ANSWER_SECONDS = 30.0
ENDING_SECONDS = 1.0  # the same once the driver has to end
LOOK_SECONDS = 0.1  # between two looks at the clock, and at whether a signal has come
T = TypeVar("T")


def run_within_limit(connection: psycopg.Connection[Any], work: Callable[[], T], ending: threading.Event) -> T:
    """Runs ``work``, which asks the server something over ``connection``, in a thread, and returns its answer.

    ``ending`` can be set from any thread; the shorter limit holds from then on. OperationalError where the server does not
    answer in time. The connection is then broken, as it is where a signal's handler raises while the answer is waited for.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001  it is raised where the answer is waited for
            answer.set_exception(error)

    thread = threading.Thread(target=run, name="statement", daemon=True)
    began = time.monotonic()
    try:
        thread.start()
        while not wait([answer], LOOK_SECONDS).done:
            limit = ENDING_SECONDS if ending.is_set() else ANSWER_SECONDS
            if time.monotonic() - began > limit:
                raise psycopg.OperationalError(f"the server has not answered within {limit:g} s")
    except BaseException:
        _break(connection)
        wait([answer], ENDING_SECONDS)  # the thread notices at once; until then nobody else may touch the connection
        raise
    return answer.result()


def _break(connection: psycopg.Connection[Any]) -> None:
    """Ends the conversation with the server without asking it: who waits for an answer gets an OperationalError."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)
