"""A store of sweeps in a PostgreSQL database, for where there is no shared file system (``database.py`` has the connection)."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from training.locations import Location, location, names, remove
from tune.store.base import LOCK, RECORD, STOP_REQUEST, SweepFiles, SweepStore, already_running, driver_note
from tune.store.journal import DamagedFile
from tune.store.postgresql.database import Database, lock_key
from tune.store.postgresql.tables import APPEND_LINES, HOLDERS, READ_LINES, READ_TEXT, WRITE_TEXT

CHUNK = 2_000  # lines that are read at a time: a slow line has to bring them within the limit for an answer


class PostgresLines:
    """An append-only file of records."""

    def __init__(self, files: PostgresFiles, name: str) -> None:
        self.files = files
        self.name = name
        self.offset = 0
        self.line = 0

    @property
    def display_name(self) -> str:
        return self.files.display_name(self.name)

    def append(self, records: list[dict[str, Any]]) -> None:
        values = {
            "sweep": self.files.sweep,
            "file": self.name,
            "append": uuid.uuid4(),
            "lines": [json.dumps(record, separators=(",", ":")) for record in records],
        }
        self.files.database.run(lambda connection, is_retry: connection.execute(APPEND_LINES, values | {"again": is_retry}))

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were added since the last read. DamagedFile for a line that is no record, or is missing."""
        while True:
            rows = self.files.database.select(READ_LINES, self.files.sweep, self.name, self.line, CHUNK)
            for number, line in rows:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if number != self.line or not isinstance(record, dict):
                    raise DamagedFile(f"{self.display_name}: line {self.line + 1} is damaged; it was left as it is")
                self.offset = self.line = self.line + 1
                yield record
            if len(rows) < CHUNK:
                return


class PostgresFlag:
    """A text that is there or not, whatever it says."""

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
        self.stop_request = PostgresFlag(self, STOP_REQUEST)

    def display_name(self, name: str) -> str:
        return f"{name} of sweep {self.sweep!r} in {self.store.display_name}"

    def lines(self, name: str, *, fsync: bool = True) -> PostgresLines:
        return PostgresLines(self, name)

    def read(self, name: str) -> str | None:
        rows = self.database.select(READ_TEXT, self.sweep, name)
        return str(rows[0][0]) if rows else None

    def write(self, name: str, text: str) -> None:
        self.database.execute(WRITE_TEXT, self.sweep, name, text)

    def add_part(self, name: str) -> None:
        """A name may begin with anything."""

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        if not self.database.acquire(self.sweep, f"{driver_note(command)}{uuid.uuid4()}\n"):
            raise already_running(self.sweep, self.read(LOCK) or "")
        try:
            yield
        finally:
            self.database.release(self.sweep)

    def running(self) -> bool:
        return bool(self.database.select(HOLDERS, lock_key(self.sweep)))

    def stop_waiting(self) -> None:
        self.database.stop_waiting()


class PostgresStore(SweepStore):
    """A database that holds the small files of sweeps. Their checkpoints are in a storage, which the record of each names."""

    def __init__(self, url: str, storage: Location | None) -> None:
        self.database = Database(url)
        self.url = self.display_name = url
        self.flags = ["--ledger", url, *(["--storage", str(storage)] if storage else [])]
        self._storage = storage

    @property
    def storage(self) -> Location:
        return self._storage or Path("runs").resolve()

    @property
    def provenance(self) -> dict[str, str]:
        return {"storage": str(self.storage)}

    def folder(self, name: str, provenance: Mapping[str, Any]) -> Location:
        """The folder is where the record says, whatever ``--storage`` does: that may hold another sweep's of the name."""
        return location(provenance["storage"]) / name

    def check_storage(self, name: str, storage: Location) -> None:
        if self._storage not in (None, storage):
            raise UserError(f"--storage: sweep {name!r} keeps its checkpoints in {storage}, not in {self._storage}")

    def names(self) -> list[str]:
        rows = self.database.select("select sweep from noisy_label_texts where name = %s", RECORD)
        return sorted(str(row[0]) for row in rows)

    def files(self, name: str) -> PostgresFiles:
        return PostgresFiles(self, name)

    def exists(self, name: str) -> bool:
        return self.files(name).read(RECORD) is not None

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[tuple[Location, SweepFiles]]:
        """The sweep is there once its record is, which therefore has to be written last."""
        self.database.make_tables()
        files, folder = self.files(name), self.storage / name
        with files.lock(""):
            if self.exists(name):
                raise self.already_exists(name)
            others = [name for name in names(folder) if not name.startswith(".")]  # a launch that was killed may leave those
            if others or (isinstance(folder, Path) and folder.is_file()):
                reason = f"{folder} exists and belongs to no sweep in {self.display_name}"
                raise UserError(f"{reason}; choose another name or storage")
            self.database.execute("delete from noisy_label_lines where sweep = %s", name)  # of a launch that was killed
            try:
                yield folder, files
            except BaseException:
                remove(folder)
                raise
