"""A store of sweeps in a folder that all nodes see, with a folder for each sweep."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.durable import LocksUnsupported, lock, write_whole
from errors import UserError
from training.locations import Location
from tune.store.base import (
    LOCK,
    NAME,
    RECORD,
    STALE_SECONDS,
    STOP_REQUEST,
    SweepFiles,
    SweepStore,
    already_running,
    driver_note,
)
from tune.store.journal import LineFile


class FolderFiles(SweepFiles):
    """The files of a sweep in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderStore(folder.parent)
        self.stop_request = folder / STOP_REQUEST

    def display_name(self, name: str) -> str:
        return str(self.folder / name)

    def lines(self, name: str, *, fsync: bool = True) -> LineFile:
        return LineFile(self.folder / name, fsync=fsync)

    def read(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, text: str) -> None:
        write_whole(self.folder / name, text)

    def add_part(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        with (self.folder / LOCK).open("a+") as file:
            try:
                is_driver = lock(file, patience=0.3)  # seconds, as long as another process may look at the lock
            except LocksUnsupported as error:
                way_out = "give --storage a folder on another one, or --ledger a database"
                reason = f"the file system of {self.folder.parent} locks no files ({error.strerror})"
                raise UserError(f"{reason}; {way_out}") from error
            if not is_driver:
                file.seek(0)
                raise already_running(self.folder.name, file.read())
            file.truncate(0)
            file.write(driver_note(command))
            file.flush()
            yield

    def running(self) -> bool:
        if not (self.folder / LOCK).exists():
            return False
        with (self.folder / LOCK).open() as file, contextlib.suppress(LocksUnsupported):
            return not lock(file, shared=True, patience=0)
        return False  # no driver runs where no file can be locked

    def stop_waiting(self) -> None:
        """Does nothing: a folder is there or not, and is never waited for."""


class FolderStore(SweepStore):
    """A folder with a folder for each sweep."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage
        self.display_name = str(storage)
        self.flags = [] if storage == Path("runs").resolve() else ["--storage", str(storage)]

    @property
    def storage(self) -> Path:
        return self._storage

    def folder(self, name: str, provenance: Mapping[str, Any]) -> Path:
        return self._storage / name

    def check_storage(self, name: str, storage: Location) -> None:
        """A sweep's checkpoints are in the folder that has its other files."""

    def names(self) -> list[str]:
        names = (path.parent.name for path in self._storage.glob(f"*/{RECORD}"))
        return sorted(name for name in names if NAME.fullmatch(name))

    def files(self, name: str) -> FolderFiles:
        return FolderFiles(self._storage / name)

    def exists(self, name: str) -> bool:
        return (self._storage / name).exists()

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[tuple[Location, SweepFiles]]:
        """The sweep is made in a temporary folder, which is locked like a sweep, and renamed at the end."""
        self._remove_leftovers(name)
        temporary = self._storage / f".{name}.{secrets.token_hex(4)}"
        temporary.mkdir()  # with the mode that the user's umask says, which Python's temporary folders do not mind
        try:
            files = FolderFiles(temporary)
            with files.lock(""):
                yield temporary, files
                try:
                    temporary.rename(self._storage / name)
                except OSError as error:
                    if self.exists(name):
                        raise self.already_exists(name) from error
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove_leftovers(self, name: str) -> None:
        """Removes the temporary folders of launches of that name that were killed: nobody has their locks."""
        for leftover in self._storage.glob(f".{name}.{'?' * 8}"):  # as many letters as the temporary name of a folder has
            with contextlib.suppress(OSError):  # it is gone, or somebody else's
                if time.time() - leftover.stat().st_mtime > STALE_SECONDS and not FolderFiles(leftover).running():
                    shutil.rmtree(leftover)
