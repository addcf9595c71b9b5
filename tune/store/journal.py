"""Append-only files of JSON lines that survive a kill, a torn last line and a full disk, and Optuna's journal on top.

A record is one line of its file, and exists once its newline is on the disk. A writer has the lock of the file, which ends
with its process. It first cuts off what a dead writer has left after the last newline, and takes back its own bytes if a write
fails. The format is that of Optuna's own journal file, so Optuna's reader and its dashboard open it. Optuna's file backend is
not used because a torn line makes its file unreadable and its lock outlives its owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from data.durable import LocksUnsupported, lock, unlock
from errors import UserError

TAIL = 1 << 16  # bytes in which the last newline is looked for at a time


class DamagedFile(UserError):
    """A line that is not the torn last one cannot be read. Nothing here guesses what it said."""


class Lines(Protocol):
    """An append-only file of JSON records in any store."""

    offset: int  # where the next read starts
    line: int  # how many lines lie before it

    @property
    def display_name(self) -> str:
        """What messages call the file."""

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records, all of them or none. OSError where the store does not take them."""

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were added since the last read, whole appends only."""


class LineFile:
    """A file of JSON lines. Reading never changes it. With ``fsync`` an append is durable when it returns."""

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        self.path = path
        self.fsync = fsync
        self.offset = 0
        self.line = 0

    @property
    def display_name(self) -> str:
        return str(self.path)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records as one write. OSError where the disk does not take it; the file is then as it was before."""
        data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
        with self._locked_for_writing() as descriptor:
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
            end = self._end_of_whole_appends(file.fileno())
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

    def _end_of_whole_appends(self, descriptor: int) -> int:
        """The length of the records that are there for good. A write in progress is waited for, since it may be taken back;
        where the file system has no locks there is none, because no driver runs there."""
        try:
            lock(descriptor, shared=True)
        except LocksUnsupported:
            return self._end_of_records(descriptor)
        try:
            return self._end_of_records(descriptor)
        finally:
            unlock(descriptor)

    @contextmanager
    def _locked_for_writing(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            lock(descriptor)
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
        """The length up to and with the last newline. That is mostly the length of the file, which its last byte tells."""
        end, length = os.fstat(descriptor).st_size, 1
        while end > 0:
            start = max(0, end - length)
            newline = os.pread(descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end, length = start, TAIL
        return 0

    def _write(self, descriptor: int, data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]
        if self.fsync:
            os.fsync(descriptor)


class Journal(BaseJournalBackend):
    """A backend for Optuna's journal storage, in a file of lines."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self._pending: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if log_number_from < self.lines.line:
            self.lines.offset = self.lines.line = 0
        for number, record in enumerate(self.lines.read(), self.lines.line):
            if number >= log_number_from:
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._pending is None:
            self.lines.append(logs)
        else:
            self._pending += logs

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Makes one append, at the end of the block, of all that Optuna appends in it. Optuna sees it from then on.
        OSError where the store does not take it."""
        pending = self._pending = []
        try:
            yield
        finally:
            self._pending = None
        self.lines.append(pending)


def open_storage(journal: Journal) -> JournalStorage:
    """Opens Optuna's storage over a journal. DamagedFile names the line of a record that is none of Optuna's."""
    try:
        return JournalStorage(journal)
    except DamagedFile:
        raise
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        lines = journal.lines
        raise DamagedFile(f"{lines.display_name}: line {lines.line} is damaged; the file was left as it is") from error
