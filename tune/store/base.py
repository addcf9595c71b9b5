"""The small files of a sweep, and where sweeps live: in folders, or in a database (``tune/store/postgres.py``).

Everything that a sweep keeps beside its checkpoints goes by the name that it has in a folder (``metrics.jsonl``), wherever it
is kept: append-only files of records, texts that are there whole or not at all, who runs the sweep, and the wish that it stops.
"""

from __future__ import annotations

import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from errors import UserError
from training.locations import Location
from tune.store.journal import Lines

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECORD = "sweep.yaml"  # what was asked for; a sweep is there when this is
NOISE = "noise.json"  # rate, matrix and checksum of the noise that the labels hold, where the clean ones are known
DAMAGED = "damaged.txt"  # images that are left out, with the reason
LOCK = "driver.lock"  # who runs the sweep, and which command goes on with what it does
STOP_REQUEST = "stop"  # by which another process asks the driver to stop
PROBE = ".probe"  # in the sweep's folder, while a cluster's nodes are asked whether they see it
STALE_SECONDS = 60  # longer than a folder that is being made goes without its lock


class StorageUnavailable(OSError):
    """What holds the files is gone, and was waited for in vain; or another process has taken the sweep meanwhile."""


class Flag(Protocol):
    """Something that is there or not, in pathlib's words."""

    def exists(self) -> bool: ...

    def touch(self) -> None: ...

    def unlink(self, missing_ok: bool = False) -> None: ...


class SweepFiles(ABC):
    """The files of one sweep. Writing raises OSError where what holds them does not take it."""

    store: SweepStore
    stop_request: Flag

    @abstractmethod
    def place(self, name: str) -> str:
        """Where a file is, for messages."""

    @abstractmethod
    def lines(self, name: str, *, fsync: bool = True) -> Lines:
        """An append-only file, from its beginning."""

    @abstractmethod
    def read(self, name: str) -> str | None:
        """A text; None where there is none."""

    @abstractmethod
    def write(self, name: str, text: str) -> None:
        """Writes a text so that it is there whole or not at all, also after a power cut."""

    @abstractmethod
    def add_part(self, name: str) -> None:
        """Makes room for files whose names begin with ``name/``."""

    @abstractmethod
    def lock(self, command: str) -> AbstractContextManager[None]:
        """Holds the sweep for this process; a dead one holds nothing. ValueError names the process that has it."""

    @abstractmethod
    def running(self) -> bool:
        """Whether a process holds the sweep."""

    @abstractmethod
    def stop_waiting(self) -> None:
        """From now on what holds the files is not waited for where it is gone."""

    def command(self) -> str:
        """The command that goes on with what the driver does, or did last; empty where none was noted."""
        return "".join((self.read(LOCK) or "").splitlines()[1:2])


class SweepStore(ABC):
    """Where sweeps are kept.

    ``place`` is its name for people. ``flags`` are the flags of a command line that finds it. ``requested`` is what
    ``--storage`` said, where a sweep's own record says it as well.
    """

    place: str
    flags: list[str]
    requested: Location | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """What a sweep's record has to note, so that it is found again."""
        return {}

    @property
    @abstractmethod
    def storage(self) -> Location:
        """Where a new sweep's checkpoints go, in a folder of its name."""

    @abstractmethod
    def folder(self, name: str, provenance: Mapping[str, Any]) -> Location:
        """Where the checkpoints of a sweep are."""

    @abstractmethod
    def names(self) -> list[str]:
        """The sweeps, by name."""

    @abstractmethod
    def files(self, name: str) -> SweepFiles:
        """The files of a sweep, whether it is there or not."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the name is taken."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[tuple[Location, SweepFiles]]:
        """Makes a sweep: it is there when the block ends well, and otherwise there is nothing. ValueError where it exists."""

    def taken(self, name: str) -> UserError:
        return UserError(f"sweep {name!r} exists in {self.place}")


def holder(command: str) -> str:
    """What the driver notes about itself."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{command}\n"


def already_running(name: str, note: str) -> UserError:
    return UserError(f"sweep {name!r} is being run by {note.partition(chr(10))[0].strip() or 'another process'}")
