"""Append-only files of JSON lines that survive a kill, a torn last line and a full disk, and Optuna's journal on top.

In a file, a record is one line, and it exists once its newline is on disk. Whoever writes holds ``flock``, which the kernel
releases with the process, first cuts what a dead writer left after the last newline, and takes back its own bytes if a write
fails. The format is that of Optuna's own journal file, so its reader and its dashboard open it; Optuna's file backend is not
used because a torn line makes its file unreadable and its lock outlives its owner.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from errors import UserError

TAIL = 1 << 16
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)  # what a file system without locks may say


class DamagedFile(UserError):
    """A line that is not the torn last one cannot be read: nothing here is allowed to guess what it said."""


class Lines(Protocol):
    """An append-only file of JSON records, wherever it is kept."""

    offset: int  # where the next read starts
    line: int  # how many lines lie before it

    @property
    def place(self) -> str:
        """Where it is, for messages."""

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records, all of them or none. OSError where they are not taken."""

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were added since the last read, whole appends only."""


class LineFile:
    """A file of JSON lines. Reading never changes it; :meth:`append` is durable when it returns. ``fsync`` can be left out."""

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        self.path = path
        self.fsync = fsync
        self.offset = 0
        self.line = 0

    @property
    def place(self) -> str:
        return str(self.path)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records as one write. OSError where the disk does not take it; the file is then as it was before."""
        data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
        with self._locked() as descriptor:
            end = self._cut_torn_tail(descriptor)
            try:
                self._write(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, end)
                raise

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were added since the last read. DamagedFile for a complete line that is no record."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            end = self._readable(file.fileno())
            file.seek(self.offset)
            while self.offset < end:
                line = file.readline()
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise DamagedFile(f"{self.path}: line {self.line + 1} is damaged; the file was left as it is")
                self.offset += len(line)
                self.line += 1
                yield record

    def _readable(self, descriptor: int) -> int:
        """The length of the records that are there for good. It waits for a write in progress, which may yet be taken back;
        where the file system locks no files there is none, since no driver runs there."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return self._end_of_records(descriptor)
        try:
            return self._end_of_records(descriptor)
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock

    def _cut_torn_tail(self, descriptor: int) -> int:
        """Removes what follows the last newline and returns the length of what is left."""
        end = self._end_of_records(descriptor)
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
        return end

    def _end_of_records(self, descriptor: int) -> int:
        """The length up to and with the last newline; mostly that is the length of the file, and one byte tells."""
        end, look = os.fstat(descriptor).st_size, 1
        while end > 0:
            start = max(0, end - look)
            newline = os.pread(descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end, look = start, TAIL
        return 0

    def _write(self, descriptor: int, data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]
        if self.fsync:
            os.fsync(descriptor)


class Journal(BaseJournalBackend):
    """Optuna's journal in a file of lines."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self._held: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from < self.lines.line:
            self.lines.offset = self.lines.line = 0
        for number, record in enumerate(self.lines.read(), self.lines.line):
            if number >= log_number_from:
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            self.lines.append(logs)
        else:
            self._held += logs

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is appended within becomes one append at the end; Optuna sees it from then on. OSError where it is not taken."""
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
        self.lines.append(held)


def open_storage(journal: Journal) -> JournalStorage:
    """Optuna's storage over a journal. DamagedFile, with its number, for a record that is none of Optuna's."""
    try:
        return JournalStorage(journal)
    except DamagedFile:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        lines = journal.lines
        raise DamagedFile(f"{lines.place}: line {lines.line} is damaged; the file was left as it is") from error
