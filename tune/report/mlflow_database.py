"""MLflow's SQLite file: made whole or not at all, mended where a kill left it half made, and true to where it lies.

MLflow makes its schema in place, in some seventy migrations that SQLite does not take back. A kill within one leaves a file
that every later command refuses, MLflow's own upgrade included. Here a database is made in a temporary folder and put into its
place; one that cannot be opened is replaced, and kept under another name where it holds anything.

The paths of artifacts in it are absolute. After the storage was moved or copied they are set to where it lies now: MLflow has
no call for that, so its tables ``experiments`` and ``runs`` are written here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data.durable import lock_path
from errors import UserError
from tune.report.tracking import ARTIFACTS, DATABASE, quiet, sqlite_path, sqlite_uri

SETTLED = 10.0  # seconds after which a file that is half made is nobody's work in progress
SIDECARS = "-journal", "-wal", "-shm"  # what SQLite keeps beside a file
Say = Callable[[str], None]
_opened_before: set[tuple[int, int]] = set()  # files that this process need not try again


class Unusable(UserError):
    """A database that MLflow cannot open, and that was left as it is."""


# -- making and mending -----------------------------------------------------------------------------------------------


def prepare(path: Path, say: Say) -> None:
    """Makes the database where there is none, and replaces one that MLflow cannot open; a line says so if it held something.

    Unusable where it is of another version of MLflow, or may be in the making; sqlite3.Error or OSError where it is not
    readable.
    """
    if not path.exists():
        _make(path)
        return
    status = path.stat()  # before it is opened, which takes back what a kill left half written
    identity = status.st_dev, status.st_ino
    if identity in _opened_before or not refusal(path):
        _opened_before.add(identity)
        return
    with lock_path(Path(f"{path}.lock"), f"{path} is being mended"):
        if reason := refusal(path):  # nobody has mended it meanwhile
            if time.time() - status.st_mtime < SETTLED:
                raise Unusable(f"{path} cannot be opened ({reason}); it may be in the making")
            _replace(path, reason, say)


def prepare_for_pages(storage: Path, say: Say) -> None:
    """Mends a storage's database where it holds no run, which is quickly seen, and tells it where the storage lies now.
    ValueError where it cannot be read or mended."""
    path = storage / DATABASE
    try:
        if is_blank(path):
            prepare(path, say)
        if os.access(path, os.W_OK):
            follow_storage(storage)
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be opened: {error}") from error


def refusal(path: Path) -> str:
    """Why MLflow does not open the database; empty where it does. What is opened is a copy of its schema."""
    try:
        tables = _tables(path)
    except sqlite3.DatabaseError as error:
        if _is_damage(error):
            return str(error)
        raise
    if not tables:
        return "it is empty"
    with _schema_copy(path) as copy:
        return _why_not_opened(copy)


def is_blank(path: Path) -> bool:
    """Whether the database holds no run, as one that was never made to its end."""
    with contextlib.suppress(sqlite3.DatabaseError), _connected(path) as connection:
        return not connection.execute("select 1 from runs limit 1").fetchone()
    return True


def _make(path: Path) -> None:
    """Puts a new database into its place, unless another process was faster."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / DATABASE
        if reason := _why_not_opened(new):
            raise OSError(f"a database of MLflow's cannot be made in {folder}: {reason}")
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with _connected(new) as source, _connected(beside) as target:
                source.backup(target)
            _put(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _put(new: Path, path: Path) -> None:
    try:
        os.link(new, path)  # which replaces nothing
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if not path.exists():  # a file system without hard links
            new.rename(path)


def _replace(path: Path, reason: str, say: Say) -> None:
    has_content = _holds_something(path)
    if has_content and _is_of_another_version(path):
        raise Unusable(f"{path} is of another version of MLflow ({reason})")
    broken = _free_name(path)
    path.rename(broken)
    for sidecar in SIDECARS:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{sidecar}").rename(f"{broken}{sidecar}")
    _make(path)
    if has_content:
        say(f"MLflow's database {path} could not be opened ({reason}); it is kept as {broken.name}, and was made anew")
    else:
        for name in ("", *SIDECARS):
            Path(f"{broken}{name}").unlink(missing_ok=True)


def _why_not_opened(path: Path) -> str:
    """Lets MLflow open a database, and so complete it. Returns what stood in its way; empty where nothing did."""
    quiet()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        MlflowClient(tracking_uri=sqlite_uri(path)).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ""


def _is_of_another_version(path: Path) -> bool:
    """Whether MLflow's own upgrade can open the database, or its version is none that this MLflow knows."""
    try:
        with _schema_copy(path) as copy:
            command = [sys.executable, "-m", "mlflow", "db", "upgrade", sqlite_uri(copy)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except sqlite3.DatabaseError:
        return False
    return done.returncode == 0 or "Can't locate revision" in done.stderr


def _holds_something(path: Path) -> bool:
    """Whether there is a row that MLflow does not make by itself, or what there is cannot be read."""
    own = {"alembic_version": "0", "workspaces": "name <> 'default'", "experiments": "experiment_id <> 0"}
    try:
        with _connected(path) as connection:
            return any(
                connection.execute(f'select 1 from "{table}" where {own.get(table, "1")} limit 1').fetchone()
                for table in _tables(path)
            )
    except sqlite3.DatabaseError:
        return True


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    return free


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=20)
    try:
        with connection:
            yield connection
    finally:
        connection.close()


def _tables(path: Path) -> list[str]:
    with _connected(path) as connection:
        tables = connection.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")
        return [name for (name,) in tables.fetchall()]


@contextlib.contextmanager
def _schema_copy(path: Path) -> Iterator[Path]:
    """Yields a database with the same tables and the same version, and no other rows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / DATABASE
        with _connected(path) as source, _connected(copy) as target:
            statements = (
                "select sql from sqlite_master where sql is not null and name not like 'sqlite_%' order by type = 'table' desc"
            )
            for (statement,) in source.execute(statements).fetchall():
                target.execute(statement)
            if "alembic_version" in _tables(path):
                versions = source.execute("select version_num from alembic_version").fetchall()
                target.executemany("insert into alembic_version (version_num) values (?)", versions)
        yield copy


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is damaged; a lock, or a disk that does not answer, is another matter."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


# -- where the artifacts lie ------------------------------------------------------------------------------------------


def follow_storage(storage: Path) -> None:
    """Sets the places of artifacts in a storage's own database to where the storage lies now: those of every sweep that is
    here, so that clearing deleted runs of a copy does not reach for the files of the original."""
    here = (storage / ARTIFACTS).as_uri()
    with _connected(storage / DATABASE) as connection:
        experiments = connection.execute("select experiment_id, name, artifact_location from experiments").fetchall()
        for experiment, name, location in experiments:
            is_here = (storage / ARTIFACTS / name).is_dir() or (storage / name).is_dir()
            if is_here and location != f"{here}/{name}" and str(location).endswith(f"/{ARTIFACTS}/{name}"):
                _move(connection, experiment, f"/{ARTIFACTS}/{name}", f"{here}/{name}")


def _move(connection: sqlite3.Connection, experiment: int, old_end: str, location: str) -> None:
    """Sets an experiment's place, and that of its runs, as far as theirs is a folder in one that ends as the old one did."""
    connection.execute("update experiments set artifact_location = ? where experiment_id = ?", (location, experiment))
    connection.execute(
        "update runs set artifact_uri = ? || '/' || run_uuid || '/artifacts'"
        " where experiment_id = ? and artifact_uri like '%' || ? || '/' || run_uuid || '/artifacts'",
        (location, experiment, old_end),
    )


def follow_run(uri: str, run_id: str, location: str) -> None:
    """Sets the place of one run's artifacts to a folder in ``location``, in a database that the storage does not hold."""
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    with engine.begin() as connection:
        place = {"uri": f"{location}/{run_id}/artifacts", "run": run_id}
        connection.execute(text("update runs set artifact_uri = :uri where run_uuid = :run"), place)
    engine.dispose()


def is_own(uri: str, storage: Path) -> bool:
    """Whether a tracking URI is that of the storage's own database."""
    return sqlite_path(uri) == storage / DATABASE
