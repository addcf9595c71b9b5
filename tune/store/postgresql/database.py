"""The one connection to a PostgreSQL database, which also holds the locks of the sweeps that this process runs.

A lock is an advisory lock of the session, so a dead driver has none. Since everything goes over the same connection, nothing
can be written while the lock is gone. A connection that breaks, or whose server does not answer, is made anew for
``RETRY_SECONDS``. The lock is then taken again, which fails where another driver came in between.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo, errors

from errors import UserError
from tune.store.base import LOCK, StorageUnavailable, already_running
from tune.store.postgresql.connection import run_within_limit
from tune.store.postgresql.tables import CREATE_TABLES, READ_TEXT, WRITE_TEXT
from tune.store.urls import AT_SIGN, read_url

RETRY_SECONDS = 60.0  # that a database which is away is waited for
PAUSE = 0.5  # seconds between two attempts
LOCK_PATIENCE = 2.0  # seconds that the server may take to notice that a driver has died
CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 10,  # a server that is cut off is noticed within half a minute
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
SESSION = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"  # the server's own
T = TypeVar("T")


def check_url(url: str) -> str:
    """Returns the URL of a PostgreSQL database. ValueError where it is none, or holds a password."""
    allowed = "write postgresql://USER@HOST:PORT/DATABASE"
    _, has_password, _, shown = read_url(url)
    if not url.startswith(("postgresql://", "postgres://")):
        raise UserError(f"--ledger: {shown!r} is not allowed; {allowed}")
    try:
        parameters = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:  # it may quote the password
        raise UserError(f"--ledger: {shown!r} is not readable; {allowed}") from error
    if has_password or parameters.get("password") or parameters.get("sslpassword"):
        instead = f"leave it out and set PGPASSWORD, or use ~/.pgpass ({AT_SIGN})"
        raise UserError(f"--ledger: the URL of {shown!r} holds a password; {instead}")
    return url


class Database:
    """A connection that is made when it is needed, and again when it breaks. Any thread may use it."""

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._conninfo = conninfo.make_conninfo("", **{**CONNECT, **conninfo.conninfo_to_dict(url)})
        self.locks: dict[int, tuple[str, str]] = {}  # key -> sweep, and what its driver noted
        self._guard = threading.RLock()  # the tracker and the watch for a stop request have threads of their own
        self._connection: psycopg.Connection[Any] | None = None
        self._ending = threading.Event()
        self._process = os.getpid()
        self._has_connected = False
        self._away_since: float | None = None

    def run(self, work: Callable[[psycopg.Connection[Any], bool], T]) -> T:
        """Returns what ``work`` does with the connection; it is told whether this is a further attempt.

        StorageUnavailable where the database is away for too long, or another driver has taken the lock; OSError where the
        database refuses.
        """
        is_retry = False
        self._check_connecting()
        with self._guard:
            while True:
                began = time.monotonic()
                try:
                    answer = self._attempt(work, is_retry)
                    self._away_since = None
                    return answer
                except errors.UniqueViolation:  # another writer came first; nobody may, but tests of our own
                    pass
                except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
                    self._disconnect()
                    self._wait(error, began)
                except psycopg.Error as error:
                    raise OSError(self._message(error)) from error
                except BaseException:  # a signal in the middle of an answer
                    self._disconnect()
                    raise
                is_retry = True

    def _attempt(self, work: Callable[[psycopg.Connection[Any], bool], T], is_retry: bool) -> T:
        connection = self._connect()
        return run_within_limit(connection, lambda: work(connection, is_retry), self._ending)

    def select(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query; none where the tables have yet to be made."""

        def work(connection: psycopg.Connection[Any], is_retry: bool) -> list[Any]:
            try:
                return connection.execute(query, values).fetchall()
            except errors.UndefinedTable:
                return []

        return self.run(work)

    def execute(self, query: str, *values: Any) -> None:
        """Carries out a statement that may be carried out twice."""
        self.run(lambda connection, is_retry: connection.execute(query, values or None))

    def make_tables(self) -> None:
        """Makes the two tables where they are missing; of several launches, one does."""

        def work(connection: psycopg.Connection[Any], is_retry: bool) -> None:
            with connection.transaction():
                connection.execute("select pg_advisory_xact_lock(%s)", [lock_key("")])
                connection.execute(CREATE_TABLES)

        if not self.select("select 1 where to_regclass('noisy_label_texts') is not null"):
            self.run(work)

    # -- connecting ---------------------------------------------------------------------------------------------------

    def _connect(self) -> psycopg.Connection[Any]:
        """The connection. Where it is made anew, the locks are taken again."""
        if self._process != os.getpid():  # a forked process: neither connection nor locks are its own
            self._connection, self._process, self.locks = None, os.getpid(), {}
        if self._connection is None:
            self._check_connecting()
            connection = self._connection = psycopg.connect(self._conninfo, autocommit=True)
            run_within_limit(connection, lambda: self._prepare(connection), self._ending)
        return self._connection

    def _prepare(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute(SESSION)
        self._has_connected = True
        for key, (sweep, note) in self.locks.items():
            has_lock = connection.execute("select 1 where pg_try_advisory_lock(%s)", [key]).fetchall()
            row = connection.execute(READ_TEXT, [sweep, LOCK]).fetchone()
            if row and row[0] != note:
                raise StorageUnavailable(f"the connection was lost, and since then {already_running(sweep, row[0])}")
            if not has_lock:  # the server has yet to notice that our last connection is gone
                raise psycopg.OperationalError("the broken connection still holds the sweep")

    def stop_waiting(self) -> None:
        """Makes no other connection from now on: a driver that ends has no time for it. Any thread may call this."""
        self._ending.set()

    def _check_connecting(self) -> None:
        """StorageUnavailable where a connection would have to be made and must not be. This needs no guard, which a thread may
        have that has just begun to connect."""
        if self._ending.is_set() and self._connection is None:
            raise StorageUnavailable(f"database {self.url}: the connection is lost, and a driver that ends makes no other")

    def _wait(self, error: psycopg.Error, began: float) -> None:
        """Waits until the next attempt, where there is to be one. ``began`` is when the attempt that failed did. A server that
        does not answer has been away since then, but for no more than half of the time that it is waited for."""
        now = time.monotonic()
        self._away_since = self._away_since or max(began, now - RETRY_SECONDS / 2)
        is_over = not self._has_connected or now - self._away_since + PAUSE > RETRY_SECONDS
        if is_over or self._ending.wait(PAUSE):
            raise StorageUnavailable(self._message(error)) from error

    def _message(self, error: psycopg.Error) -> str:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; the password comes from PGPASSWORD or ~/.pgpass" if "password" in reason else ""
        return f"database {self.url}: {reason}{hint}"

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- one driver at a time -----------------------------------------------------------------------------------------

    def acquire(self, sweep: str, note: str) -> bool:
        """Tries to get the lock of a sweep. From then on it is taken again with every new connection."""
        key = lock_key(sweep)

        def work(connection: psycopg.Connection[Any], is_retry: bool) -> bool:
            has_lock = bool(connection.execute("select 1 where pg_try_advisory_lock(%s)", [key]).fetchall())
            if has_lock:
                connection.execute(WRITE_TEXT, [sweep, LOCK, note])
            return has_lock

        with self._guard:
            deadline = time.monotonic() + LOCK_PATIENCE
            while key in self.locks or not self.run(work):
                if key in self.locks or time.monotonic() >= deadline:
                    return False
                time.sleep(0.1)
            self.locks[key] = sweep, note
            return True

    def release(self, sweep: str) -> None:
        """Gives the lock of a sweep back; with a connection that is gone went the lock."""
        if self._ending.is_set() and self._connection is None:
            return
        with self._guard:
            self.locks.pop(lock_key(sweep), None)
            connection = self._connection
            if connection is not None and self._process == os.getpid():
                query = "select pg_advisory_unlock(%s)"
                try:
                    run_within_limit(connection, lambda: connection.execute(query, [lock_key(sweep)]), self._ending)
                except psycopg.Error:
                    self._disconnect()


def lock_key(sweep: str) -> int:
    """The number of the advisory lock of a sweep."""
    return int.from_bytes(hashlib.sha256(f"noisy-label-search {sweep}".encode()).digest()[:8], signed=True)
