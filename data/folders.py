"""Where files lie on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$NOISY_LABEL_CACHE``, else ``noisy-label-search`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("NOISY_LABEL_CACHE"):
        return Path(own).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "noisy-label-search"
    except RuntimeError as error:
        raise UserError("there is no home folder to keep data sets in; set NOISY_LABEL_CACHE to a folder") from error


def data_folder() -> Path:
    """Of the data sets of the literature, as published: ``$NOISY_LABEL_DATA``, else ``data-sets`` in the cache folder."""
    own = os.environ.get("NOISY_LABEL_DATA")
    return Path(own).absolute() if own else cache_folder() / "data-sets"


def write_whole(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never half of it, also after a power cut."""
    temporary = path.with_name("." + path.name)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Holds the file ``lock``, waiting for who has it; ``otherwise`` is said then. The kernel's: a dead process leaves none."""
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s; waiting for it", otherwise)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
