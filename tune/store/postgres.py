"""The small files of sweeps in a PostgreSQL database, where there is no shared file system: two tables, one connection.

A line has its number in its file, so that a reader goes on from where it was; an append is one statement, there whole or not
at all, and written once however often it is tried: its lines carry an id by which a second attempt finds the first.

All goes through one connection, which also holds the driver's lock (a session's advisory lock: a dead driver has none). So
nothing can be written while the lock is gone: a connection that breaks, or whose server says nothing, is made anew for
``RETRY_SECONDS``, and with it the lock is taken again, which fails where another driver came in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo, errors

from errors import UserError
from training.locations import AT, Credentials, Location, location, names, remove
from tune.store.base import LOCK, RECORD, STOP_REQUEST, StorageUnavailable, SweepFiles, SweepStore, already_running, holder
from tune.store.connection import Connection
from tune.store.journal import DamagedFile

RETRY_SECONDS = 60.0  # that a database which is away is waited for
PAUSE = 0.5  # between two attempts
LOCK_PATIENCE = 2.0  # as long as the server may take to notice that a driver has died
CHUNK = 10_000  # lines that are read at a time
CONNECT = {
    "connect_timeout": 5,
    "keepalives_idle": 10,  # a server that is cut off is noticed within half a minute
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
SESSION = "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"  # and a driver by it
TABLES = """
create table if not exists noisy_label_lines (
    sweep text, file text, number bigint, append uuid not null, line text not null, primary key (sweep, file, number)
);
create table if not exists noisy_label_texts (
    sweep text, name text, content text not null, primary key (sweep, name)
)"""
APPEND = """
insert into noisy_label_lines (sweep, file, number, append, line)
select %(sweep)s::text, %(file)s::text, held.next + added.place - 1, %(append)s::uuid, added.line
from (select coalesce(max(number) + 1, 0) as next from noisy_label_lines where sweep = %(sweep)s and file = %(file)s) held,
     unnest(%(lines)s::text[]) with ordinality added (line, place)
where not (%(again)s::boolean and exists (
    select from noisy_label_lines where sweep = %(sweep)s and file = %(file)s and append = %(append)s::uuid))"""
READ = "select number, line from noisy_label_lines where sweep = %s and file = %s and number >= %s order by number limit %s"
TEXT = "select content from noisy_label_texts where sweep = %s and name = %s"
WRITE = """
insert into noisy_label_texts values (%s, %s, %s) on conflict (sweep, name) do update set content = excluded.content"""
HELD = """
select 1 from pg_locks join pg_database on pg_database.oid = database
where datname = current_database() and locktype = 'advisory' and objsubid = 1 and granted
and (classid::bigint << 32) | objid::bigint = %s"""
T = TypeVar("T")


def check_url(url: str) -> str:
    """ValueError where ``url`` is none of a PostgreSQL database, or holds a password."""
    allowed = "write postgresql://USER@HOST:PORT/DATABASE"
    userinfo, _, shown = Credentials.of(url)
    if not url.startswith(("postgresql://", "postgres://")):
        raise UserError(f"--ledger: {shown!r} is not allowed; {allowed}")
    try:
        parts = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:  # it may quote the password
        raise UserError(f"--ledger: {shown!r} is not readable; {allowed}") from error
    if ":" in userinfo or parts.get("password") or parts.get("sslpassword"):
        instead = f"leave it out and set PGPASSWORD, or use ~/.pgpass ({AT})"
        raise UserError(f"--ledger: the URL of {shown!r} holds a password; {instead}")
    return url


class Database:
    """The one connection, made when it is needed and again when it breaks."""

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._conninfo = conninfo.make_conninfo("", **{**CONNECT, **conninfo.conninfo_to_dict(url)})
        self.locks: dict[int, tuple[str, str]] = {}  # key -> sweep, and what its holder noted
        self._guard = threading.RLock()  # the tracker and the watch for a stop request have threads of their own
        self._connection: Connection | None = None
        self._hurried = threading.Event()
        self._process = os.getpid()
        self._reached = False  # once
        self._away_since: float | None = None

    def run(self, work: Callable[[psycopg.Connection[Any], bool], T]) -> T:
        """What ``work`` does with the connection; it is told whether this is a further attempt. StorageUnavailable
        where the database is away for too long, or the lock was lost to another driver; OSError where it refuses."""
        again = False
        self._check_stop_waiting()
        with self._guard:
            while True:
                began = time.monotonic()
                try:
                    answer = work(self._connected(), again)
                    self._away_since = None
                    return answer
                except errors.UniqueViolation:  # another writer came first; nobody may, but tests of our own
                    pass
                except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
                    self._drop()
                    self._wait(error, began)
                except psycopg.Error as error:
                    raise OSError(self._reason(error)) from error
                except BaseException:  # a signal in the middle of an answer
                    self._drop()
                    raise
                again = True

    def select(self, query: str, *values: Any) -> list[Any]:
        """The rows that a query finds; none where the tables have yet to be made."""

        def work(connection: psycopg.Connection[Any], again: bool) -> list[Any]:
            try:
                return connection.execute(query, values).fetchall()
            except errors.UndefinedTable:
                return []

        return self.run(work)

    def execute(self, query: str, *values: Any) -> None:
        """A statement that may be carried out twice."""
        self.run(lambda connection, again: connection.execute(query, values or None))

    def make_tables(self) -> None:
        """Makes the two tables where they are missing; of several launches, one does."""

        def work(connection: psycopg.Connection[Any], again: bool) -> None:
            with connection.transaction():
                connection.execute("select pg_advisory_xact_lock(%s)", [lock_key("")])
                connection.execute(TABLES)

        if not self.select("select 1 where to_regclass('noisy_label_texts') is not null"):
            self.run(work)

    def _connected(self) -> psycopg.Connection[Any]:
        if self._process != os.getpid():  # a forked process: neither connection nor locks are its own
            self._connection, self._process, self.locks = None, os.getpid(), {}
        if self._connection is None:
            self._check_stop_waiting()
            self._connection = Connection.connect(self._conninfo, autocommit=True)
            self._connection.hurried = self._hurried
            self._connection.execute(SESSION)
            self._reached = True
            for key, (sweep, note) in self.locks.items():
                self._take_again(self._connection, key, sweep, note)
        return self._connection

    def _take_again(self, connection: psycopg.Connection[Any], key: int, sweep: str, note: str) -> None:
        taken = connection.execute("select 1 where pg_try_advisory_lock(%s)", [key]).fetchall()
        row = connection.execute(TEXT, [sweep, LOCK]).fetchone()
        if row and row[0] != note:
            raise StorageUnavailable(f"the connection was lost, and since then {already_running(sweep, row[0])}")
        if not taken:  # the server has yet to notice that our last connection is gone
            raise psycopg.OperationalError("the broken connection still holds the sweep")

    def stop_waiting(self) -> None:
        """From now on what breaks is not made anew: a driver that ends has no time for it. To be called from any thread."""
        self._hurried.set()

    def _check_stop_waiting(self) -> None:
        """Asked without the guard, too, which a thread may hold that has just begun to connect."""
        if self._hurried.is_set() and self._connection is None:
            raise StorageUnavailable(f"database {self.url}: the connection is lost, and a driver that ends makes no other")

    def _wait(self, error: psycopg.Error, began: float) -> None:
        """Until the next attempt. ``began``: when the one that failed did; a server that says nothing has been away since, but
        one may have said much in that time: no attempt takes more than half of the patience."""
        now = time.monotonic()
        self._away_since = self._away_since or max(began, now - RETRY_SECONDS / 2)
        over = not self._reached or now - self._away_since + PAUSE > RETRY_SECONDS
        if over or self._hurried.wait(PAUSE):
            raise StorageUnavailable(self._reason(error)) from error

    def _reason(self, error: psycopg.Error) -> str:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; the password comes from PGPASSWORD or ~/.pgpass" if "password" in said else ""
        return f"database {self.url}: {said}{hint}"

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- one driver at a time -----------------------------------------------------------------------------------------

    def take(self, sweep: str, note: str) -> bool:
        """Tries to hold a sweep; what breaks the connection from now on makes us take it again."""
        key = lock_key(sweep)

        def work(connection: psycopg.Connection[Any], again: bool) -> bool:
            taken = bool(connection.execute("select 1 where pg_try_advisory_lock(%s)", [key]).fetchall())
            if taken:
                connection.execute(WRITE, [sweep, LOCK, note])
            return taken

        with self._guard:
            deadline = time.monotonic() + LOCK_PATIENCE
            while key in self.locks or not self.run(work):
                if key in self.locks or time.monotonic() >= deadline:
                    return False
                time.sleep(0.1)
            self.locks[key] = sweep, note
            return True

    def release(self, sweep: str) -> None:
        if self._hurried.is_set() and self._connection is None:  # with the connection went the lock
            return
        with self._guard:
            self.locks.pop(lock_key(sweep), None)
            if self._connection is not None and self._process == os.getpid():
                try:
                    self._connection.execute("select pg_advisory_unlock(%s)", [lock_key(sweep)])
                except psycopg.Error:  # with the connection goes the lock
                    self._drop()


def lock_key(sweep: str) -> int:
    """The number of the advisory lock of a sweep."""
    return int.from_bytes(hashlib.sha256(f"noisy-label-search {sweep}".encode()).digest()[:8], signed=True)


class DatabaseLines:
    """An append-only file of records."""

    def __init__(self, files: PostgresFiles, name: str) -> None:
        self.files = files
        self.name = name
        self.offset = 0
        self.line = 0

    @property
    def place(self) -> str:
        return self.files.place(self.name)

    def append(self, records: list[dict[str, Any]]) -> None:
        values = {
            "sweep": self.files.sweep,
            "file": self.name,
            "append": uuid.uuid4(),
            "lines": [json.dumps(record, separators=(",", ":")) for record in records],
        }
        self.files.database.run(lambda connection, again: connection.execute(APPEND, values | {"again": again}))

    def read(self) -> Iterator[dict[str, Any]]:
        """DamagedFile for a line that is no record, or is missing."""
        while True:
            rows = self.files.database.select(READ, self.files.sweep, self.name, self.line, CHUNK)
            for number, line in rows:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if number != self.line or not isinstance(record, dict):
                    raise DamagedFile(f"{self.place}: line {self.line + 1} is damaged; it was left as it is")
                self.offset = self.line = self.line + 1
                yield record
            if len(rows) < CHUNK:
                return


class DatabaseText:
    """A text as a flag that is there or not."""

    def __init__(self, files: PostgresFiles, name: str) -> None:
        self.files = files
        self.name = name

    def exists(self) -> bool:
        return self.files.read(self.name) is not None

    def touch(self) -> None:
        self.files.write(self.name, "")

    def unlink(self, missing_ok: bool = False) -> None:
        self.files.database.execute("delete from noisy_label_texts where sweep = %s and name = %s", self.files.sweep, self.name)


class PostgresFiles(SweepFiles):
    """The files of a sweep in two tables."""

    def __init__(self, store: PostgresStore, sweep: str) -> None:
        self.store = store
        self.sweep = sweep
        self.database = store.database
        self.stop_request = DatabaseText(self, STOP_REQUEST)

    def place(self, name: str) -> str:
        return f"{name} of sweep {self.sweep!r} in {self.store.place}"

    def lines(self, name: str, *, fsync: bool = True) -> DatabaseLines:
        return DatabaseLines(self, name)

    def read(self, name: str) -> str | None:
        rows = self.database.select(TEXT, self.sweep, name)
        return str(rows[0][0]) if rows else None

    def write(self, name: str, text: str) -> None:
        self.database.execute(WRITE, self.sweep, name, text)

    def add_part(self, name: str) -> None:
        """Names are free."""

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        if not self.database.take(self.sweep, f"{holder(command)}{uuid.uuid4()}\n"):
            raise already_running(self.sweep, self.read(LOCK) or "")
        try:
            yield
        finally:
            self.database.release(self.sweep)

    def running(self) -> bool:
        return bool(self.database.select(HELD, lock_key(self.sweep)))

    def stop_waiting(self) -> None:
        self.database.stop_waiting()


class PostgresStore(SweepStore):
    """A database with the sweeps' files; their checkpoints are in a storage beside it, which each sweep notes."""

    def __init__(self, url: str, storage: Location | None) -> None:
        self.database = Database(url)
        self.place = url
        self.flags = ["--ledger", url, *(["--storage", str(storage)] if storage else [])]
        self.requested = storage

    @property
    def storage(self) -> Location:
        return self.requested or Path("runs").resolve()

    @property
    def provenance(self) -> dict[str, str]:
        return {"storage": str(self.storage)}

    def folder(self, name: str, provenance: Mapping[str, Any]) -> Location:
        """Where its record says, whatever ``--storage`` does: there may be another sweep's of that name."""
        return location(provenance["storage"]) / name

    def names(self) -> list[str]:
        rows = self.database.select("select sweep from noisy_label_texts where name = %s", RECORD)
        return sorted(str(row[0]) for row in rows)

    def files(self, name: str) -> PostgresFiles:
        return PostgresFiles(self, name)

    def exists(self, name: str) -> bool:
        return self.files(name).read(RECORD) is not None

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[tuple[Location, SweepFiles]]:
        """The sweep is there once its record is, which must come last."""
        self.database.make_tables()
        files, folder = self.files(name), self.storage / name
        with files.lock(""):
            if self.exists(name):
                raise self.taken(name)
            kept = [name for name in names(folder) if not name.startswith(".")]  # a launch that was killed may leave those
            if kept or (isinstance(folder, Path) and folder.is_file()):
                raise UserError(f"{folder} exists and belongs to no sweep in {self.place}; choose another name or storage")
            self.database.execute("delete from noisy_label_lines where sweep = %s", name)  # of a launch that was killed
            try:
                yield folder, files
            except BaseException:
                remove(folder)
                raise
