"""Sweeps in folders: one for each, in a folder that all its nodes see."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data.folders import write_whole
from errors import UserError
from training.locations import Location
from tune.store.base import LOCK, NAME, RECORD, STALE_SECONDS, STOP_REQUEST, SweepFiles, SweepStore, already_running, holder
from tune.store.journal import LineFile


class FolderFiles(SweepFiles):
    """The files of a sweep in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderStore(folder.parent)
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
                raise UserError(f"the file system of {self.folder.parent} locks no files ({error}); {how}") from error
            if not taken:
                file.seek(0)
                raise already_running(self.folder.name, file.read())
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

    def stop_waiting(self) -> None:
        """A disk is not waited for."""


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


class FolderStore(SweepStore):
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
    def create(self, name: str) -> Iterator[tuple[Location, SweepFiles]]:
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
