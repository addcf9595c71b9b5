"""One file per source: decoded once, checked once per machine, mapped by every trial.

``KEY.table`` is the file (:mod:`data.table_file`), which :mod:`data.build` makes. ``KEY.lock`` is held by the process that
builds, and holds which file was checked last.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from data.build import build, said_by
from data.durable import lock_path
from data.folders import cache_folder
from data.readers.base import Source
from data.table_file import Table, UnusableError, read_table
from errors import UserError

NAMED = 5  # damaged images that a message names
log = logging.getLogger(__name__)


def open_table(source: Source, *, fresh: bool = False) -> Table:
    """Maps the source's cache file, which is built where it is missing and rebuilt, with a warning, where it is damaged.

    ``fresh`` also builds it again where the source has changed since; images whose files have not are not decoded again. A
    process that finds another at it waits. ValueError where the cache folder cannot be used, and where images are damaged that
    the source does not skip.
    """
    path = cache_folder() / f"{source.key}.table"
    stamp = said_by(source, source.stamp) if fresh else None
    try:
        table = _opened(path, source, stamp)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cache folder {path.parent} cannot be used ({reason}); set NOISY_LABEL_CACHE to one that can"
        ) from error
    if table.damage and not source.skip_damaged:
        named = "; ".join(list(table.damage.values())[:NAMED])
        more = f"; and {len(table.damage) - NAMED} more" if len(table.damage) > NAMED else ""
        raise UserError(
            f"data set {source.name}: of {len(table.images)} images {len(table.damage)} cannot be read: {named}{more}. "
            "Mend or remove them, or leave them out with --skip-damaged"
        )
    return table


def same_table(source: Source, checksum: str) -> Table:
    """The source's table as it was elsewhere, or before: this machine's may be from before the source changed, and is built
    again, once. ValueError where the source itself is another."""
    table = open_table(source)
    if checksum and table.checksum != checksum:
        table = open_table(source, fresh=True)
        if table.checksum != checksum:
            now = table.checksum[:12]
            raise UserError(
                f"data set {source.name} has changed, or this version reads it differently: its checksum {checksum[:12]} is "
                f"now {now}"
            )
    return table


def _opened(path: Path, source: Source, stamp: str | None) -> Table:
    with contextlib.suppress(FileNotFoundError, UnusableError):
        return _checked(path, source, stamp)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(path.with_suffix(".lock"), f"another process builds {path}"):
        return _built(path, source, stamp)


def _built(path: Path, source: Source, stamp: str | None) -> Table:
    """The table, built unless another process has done so meanwhile. Under the lock."""
    earlier = None
    try:
        return _checked(path, source, stamp)
    except FileNotFoundError:
        pass
    except UnusableError as reason:
        log.warning("cache file %s %s; it is built again", path, reason)
        with contextlib.suppress(UnusableError):
            earlier = _checked(path, source, None)
    build(path, source, earlier)
    _note(path)
    return read_table(path)


def _checked(path: Path, source: Source, stamp: str | None) -> Table:
    """The mapped file, its checksum compared unless this machine has done so. FileNotFoundError, UnusableError."""
    try:
        known = path.with_suffix(".lock").read_text() == _identity(path)
    except FileNotFoundError:
        known = False
    table = read_table(path, stamp, verify=not known)
    if not known:
        with contextlib.suppress(OSError):  # a folder that may only be read costs a check in each process
            _note(path)
    if stamp is not None and table.damage and _is_mended(table, source):
        raise UnusableError("has damaged images that have changed since")
    return table


def _is_mended(table: Table, source: Source) -> bool:
    """Whether the file of a damaged image is another now; a data set's stamp need not say so."""
    now, rows = said_by(source, source.build).keys, list(table.damage)
    return now is not None and table.keys is not None and not torch.equal(now[rows], table.keys[rows])


def _note(path: Path) -> None:
    """Notes that the file's checksum is right."""
    path.with_suffix(".lock").write_text(_identity(path))


def _identity(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"
