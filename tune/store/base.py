"""The interface of a store of sweeps: a folder (``folder.py``) or a PostgreSQL database (``postgresql/``).

A store holds everything of a sweep but its checkpoints. Its files go by the names that they have in a folder, wherever they are
kept. They are append-only files of records (``metrics.jsonl``), texts that are there whole or not at all (``sweep.yaml``), the
lock of the driver, and the request that it stops.
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
RECORD = "sweep.yaml"  # the spec and its provenance; a sweep exists when this file does
NOISE = "noise.json"  # rate, matrix and checksum of the noise of the labels, where the clean ones are known
DAMAGED = "damaged.txt"  # images that are left out, with the reason
LOCK = "driver.lock"  # names the driver, and the command that goes on with its work
STOP_REQUEST = "stop"  # another process asks the driver to stop by it
PROBE = ".probe"  # lies in the sweep's folder while the nodes of a cluster are asked whether they see it
STALE_SECONDS = 60  # a folder that is being made gets its lock sooner than that


class StorageUnavailable(OSError):
    """The store is out of reach and was waited for in vain, or another process has taken the sweep in the meantime."""


class Flag(Protocol):
    """A file that matters only by being there, with pathlib's methods."""

    def exists(self) -> bool: ...

    def touch(self) -> None: ...

    def unlink(self, missing_ok: bool = False) -> None: ...


class SweepFiles(ABC):
    """The files of one sweep. Writing raises OSError where the store does not take it."""

    store: SweepStore
    stop_request: Flag

    @abstractmethod
    def display_name(self, name: str) -> str:
        """What messages call a file: its path, or its name and the database."""

    @abstractmethod
    def lines(self, name: str, *, fsync: bool = True) -> Lines:
        """An append-only file, to be read from its beginning. Without ``fsync`` a power cut may cost the last records."""

    @abstractmethod
    def read(self, name: str) -> str | None:
        """The text of a file; None where there is no such file."""

    @abstractmethod
    def write(self, name: str, text: str) -> None:
        """Writes a text so that it is there whole or not at all, also after a power cut."""

    @abstractmethod
    def add_part(self, name: str) -> None:
        """Prepares the store for files whose names begin with ``name/``."""

    @abstractmethod
    def lock(self, command: str) -> AbstractContextManager[None]:
        """Makes this process the driver of the sweep, until the block or the process ends. ``command`` is noted as the one that
        goes on with the work. ValueError names the process that is the driver already."""

    @abstractmethod
    def running(self) -> bool:
        """Whether the sweep has a driver."""

    @abstractmethod
    def stop_waiting(self) -> None:
        """Makes what would have to wait for the store raise OSError from now on, since a driver that ends has no time for it.
        Any thread may call this."""

    def command(self) -> str:
        """The command that goes on with the work of the driver, or of the last one; empty where none was noted."""
        return "".join((self.read(LOCK) or "").splitlines()[1:2])


class SweepStore(ABC):
    """A place where sweeps are kept.

    ``display_name`` is what messages call it. ``flags`` are the flags of a command line that finds it.
    """

    display_name: str
    flags: list[str]

    @property
    def provenance(self) -> dict[str, str]:
        """The fields that the record of a new sweep needs for its checkpoints to be found again."""
        return {}

    @property
    @abstractmethod
    def storage(self) -> Location:
        """The place of a new sweep's checkpoints, which get a folder of its name there."""

    @abstractmethod
    def folder(self, name: str, provenance: Mapping[str, Any]) -> Location:
        """The folder of a sweep's checkpoints, by the provenance in its record."""

    @abstractmethod
    def check_storage(self, name: str, storage: Location) -> None:
        """ValueError where the user names another storage than the one that has the sweep's checkpoints."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all sweeps, sorted."""

    @abstractmethod
    def files(self, name: str) -> SweepFiles:
        """The files of a sweep, whether it exists or not."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the name is taken."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[tuple[Location, SweepFiles]]:
        """Makes a sweep, which exists when the block ends well; otherwise nothing is left. Yields its folder for checkpoints
        and its files. ValueError where the sweep exists already."""

    def already_exists(self, name: str) -> UserError:
        return UserError(f"sweep {name!r} exists in {self.display_name}")


def driver_note(command: str) -> str:
    """The text of the lock file of a driver."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{command}\n"


def already_running(name: str, note: str) -> UserError:
    return UserError(f"sweep {name!r} is being run by {note.partition(chr(10))[0].strip() or 'another process'}")
