"""The small files of a sweep, and where sweeps live: in folders, or in a database (``tune/database.py``).

Everything that a sweep keeps beside its checkpoints goes by the name that it has in a folder (``metrics.jsonl``), wherever it
is kept: append-only files of records, texts that are there whole or not at all, who runs the sweep, and the wish that it stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol

from data.folders import write_whole
from training.locations import Location, Remote, location
from tune.journal import LineFile, Lines

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECORD = "sweep.yaml"  # what was asked for; a sweep is there when this is
NOISE = "noise.json"  # rate, matrix and checksum of the noise that the labels hold, where the clean ones are known
DAMAGED = "damaged.txt"  # images that are left out, with the reason
LOCK = "driver.lock"  # who runs the sweep, and which command goes on with what it does
STOP_REQUEST = "stop"  # by which another process asks the driver to stop
PROBE = ".probe"  # in the sweep's folder, while a cluster's nodes are asked whether they see it
STALE_SECONDS = 60  # longer than a folder that is being made goes without its lock


class Unreachable(OSError):
    """What holds the files is gone, and was waited for in vain; or another process has taken the sweep meanwhile."""


class Flag(Protocol):
    """Something that is there or not, in pathlib's words."""

    def exists(self) -> bool: ...

    def touch(self) -> None: ...

    def unlink(self, missing_ok: bool = False) -> None: ...


class SweepFiles(ABC):
    """The files of one sweep. Writing raises OSError where what holds them does not take it."""

    home: Home
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
    def hurry(self) -> None:
        """From now on what holds the files is not waited for where it is gone."""

    def command(self) -> str:
        """The command that goes on with what the driver does, or did last; empty where none was noted."""
        return "".join((self.read(LOCK) or "").splitlines()[1:2])


class Home(ABC):
    """Where sweeps live. ``place`` is its name for people, ``flags`` are those of a command line that finds it, ``asked`` is
    what ``--storage`` said where a sweep's record says it, too."""

    place: str
    flags: list[str]
    asked: Location | None = None

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
    def making(self, name: str) -> AbstractContextManager[tuple[Location, SweepFiles]]:
        """Makes a sweep: it is there when the block ends well, and otherwise there is nothing. ValueError where it exists."""

    def taken(self, name: str) -> ValueError:
        return ValueError(f"sweep {name!r} exists in {self.place}")


class FolderFiles(SweepFiles):
    """The files of a sweep in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = FolderHome(folder.parent)
        self.stop_request = folder / STOP_REQUEST

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def lines(self, name: str, *, fsync: bool = True) -> LineFile:
        return LineFile(self.folder / name, fsync=fsync)

    def read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, text: str) -> None:
        write_whole(self.folder / name, text)

    def add_part(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """The lock is the kernel's, which lets go of it with the process."""
        with (self.folder / LOCK).open("a+") as file:
            try:
                taken = _locked(file, fcntl.LOCK_EX, patience=0.3)  # as long as a look at the lock may take
            except NoLocks as error:
                how = "give --storage a folder on another one, or --ledger a database"
                raise ValueError(f"the file system of {self.folder.parent} locks no files ({error}); {how}") from error
            if not taken:
                file.seek(0)
                raise held(self.folder.name, file.read())
            file.truncate(0)
            file.write(holder(command))
            file.flush()
            yield

    def running(self) -> bool:
        if not (self.folder / LOCK).exists():
            return False
        with (self.folder / LOCK).open() as file, contextlib.suppress(NoLocks):
            return not _locked(file, fcntl.LOCK_SH)
        return False  # where no file is locked no process could hold the sweep

    def hurry(self) -> None:
        """A disk is not waited for."""


def holder(command: str) -> str:
    """What the driver notes about itself."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{command}\n"


def held(name: str, note: str) -> ValueError:
    return ValueError(f"sweep {name!r} is being run by {note.partition(chr(10))[0].strip() or 'another process'}")


class NoLocks(OSError):
    """A file system does not lock files, as some network file systems do not."""


def _locked(file: IO[Any], how: int, patience: float = 0.0) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError as error:
            raise NoLocks(error.strerror) from error
        else:
            return True


class FolderHome(Home):
    """A folder with a folder for each sweep."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage
        self.place = str(storage)
        self.flags = [] if storage == Path("runs").resolve() else ["--storage", str(storage)]

    @property
    def storage(self) -> Path:
        return self._storage

    def folder(self, name: str, provenance: Mapping[str, Any]) -> Path:
        return self._storage / name

    def names(self) -> list[str]:
        found = (path.parent.name for path in self._storage.glob(f"*/{RECORD}"))
        return sorted(name for name in found if NAME.fullmatch(name))

    def files(self, name: str) -> FolderFiles:
        return FolderFiles(self._storage / name)

    def exists(self, name: str) -> bool:
        return (self._storage / name).exists()

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[tuple[Location, SweepFiles]]:
        """In a temporary folder, which is held like a sweep, and renamed."""
        self._drop_leftovers(name)
        made = self._storage / f".{name}.{secrets.token_hex(4)}"
        made.mkdir()  # with the mode that the user's umask says, which Python's temporary folders do not mind
        try:
            files = FolderFiles(made)
            with files.lock(""):
                yield made, files
                try:
                    made.rename(self._storage / name)
                except OSError as error:
                    if self.exists(name):
                        raise self.taken(name) from error
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _drop_leftovers(self, name: str) -> None:
        """Removes what launches of that name that were killed have left: folders that nobody holds."""
        for left in self._storage.glob(f".{name}.{'?' * 8}"):  # as many letters as the temporary name of a folder has
            with contextlib.suppress(OSError):  # it is gone, or somebody else's
                if time.time() - left.stat().st_mtime > STALE_SECONDS and not FolderFiles(left).running():
                    shutil.rmtree(left)


def open_home(storage: str | None, ledger: str) -> Home:
    """Where sweeps live, by ``--storage`` and ``--ledger``. ValueError where that is nowhere."""
    if storage is not None and not storage.strip():
        raise ValueError(f"--storage: {storage!r} is not allowed; name a folder, or leave it out for ./runs")
    try:
        place = location(storage) if storage else None
    except ValueError as error:
        raise ValueError(f"--storage: {error}") from error
    if ledger:
        from tune.database import DatabaseHome

        return DatabaseHome(ledger, place)
    if isinstance(place, Remote):
        raise ValueError(f"--storage: {storage!r} holds checkpoints only; give a database for the rest with --ledger URL")
    return FolderHome(place or Path("runs").resolve())


def as_home(place: Path | Home) -> Home:
    return place if isinstance(place, Home) else FolderHome(place)
