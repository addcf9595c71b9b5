"""Files that a kill or a power cut leaves whole, and locks that no dead process holds.

Everything that the project writes for good goes through this module: caches of data sets, checkpoints, and the files of sweeps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)  # what a file system without locks may answer
PAUSE = 0.02  # seconds between two attempts to lock a file
log = logging.getLogger(__name__)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_whole(
    path: Path, content: str | bytes | memoryview, *, check: Callable[[Path], object] | None = None, private: bool = False
) -> None:
    """Replaces a file so that its readers find the old content or the new one, also after a power cut.

    The content is first written to a hidden file beside ``path``. ``check`` may look at that file; what it raises is passed on,
    and the old content stays. Processes that may write the same path at the same time need ``private``: the name of the hidden
    file then ends with the process's number, and the caller removes what killed processes leave. Otherwise the next write
    reuses it. OSError where the disk does not take the content.
    """
    temporary = path.with_name(f".{path.name}" + (f".{os.getpid()}" if private else ""))
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            sync(file)
        if check:
            check(temporary)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace(temporary: Path, path: Path) -> None:
    """Gives a file that is on the disk its name, durably; a file that has the name is replaced."""
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems do not sync folders, nor have they to
            raise
    finally:
        os.close(descriptor)


def sync(file: IO[Any]) -> None:
    """Brings all that was written to ``file`` to the disk."""
    file.flush()
    os.fsync(file.fileno())


# -- locks ------------------------------------------------------------------------------------------------------------


class LocksUnsupported(OSError):
    """The file system locks no files, as some network file systems do not."""


def lock(file: IO[Any] | int, *, shared: bool = False, patience: float | None = None) -> bool:
    """Locks an open file until it is unlocked or closed; returns whether that was possible.

    The lock is the kernel's, which releases it when the process dies. Several processes can have a ``shared`` lock, while no
    process has the other kind. ``patience`` is how many seconds other processes are waited for: None means for ever.
    LocksUnsupported where the file system has no locks; OSError where it fails.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, how if deadline is None else how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                return False
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                raise LocksUnsupported(error.errno, error.strerror) from error
            raise


def unlock(file: IO[Any] | int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def lock_path(path: Path, waiting: str) -> Iterator[None]:
    """Holds a lock on the file ``path``, which is made where it is missing and keeps its content. Where another process has
    the lock, the message ``waiting`` is logged and that process is waited for."""
    with path.open("a+") as file:
        if not lock(file, patience=0):
            log.warning("%s; waiting for it", waiting)
            lock(file)
        yield
